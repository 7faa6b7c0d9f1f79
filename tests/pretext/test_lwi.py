"""The pretext task of LWI: what is shuffled, masked and grouped, and that a network can learn it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from confrere.backbones.volumetric import Size, build
from confrere.errors import BackboneError, ConfigError
from confrere.pretext.lwi import (
    Losses,
    Lwi,
    OrderHeads,
    Puzzle,
    divides,
    groups,
    judge,
    loss,
    order_heads,
    puzzle,
    restore,
    swap_output,
    weights,
)
from confrere.seeds import torch_generator

SIZE: Size = (16, 16, 32)
TASK = Lwi(slabs=4, cube=4)


def volumes(batch: int = 2, size: Size = SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 1, *size, generator=torch_generator(seed, "volumes"))


def make(classes: int = 1, name: str = "unetr", size: Size = SIZE, seed: int = 0, **options: Any) -> Any:
    options = {**({"hidden": 16, "depth": 3} if name == "unetr" else {}), "width": 2, **options}
    return build(name, classes=classes, size=size, generator=torch_generator(seed, "net"), **options)


def draw(task: Lwi = TASK, batch: int = 2, seed: int = 0) -> Puzzle:
    return puzzle(volumes(batch), task, torch_generator(seed, "puzzle"))


# Permutation and mask


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("per_sample", [False, True])
def test_slabs_stand_where_the_order_says(axis: int, per_sample: bool) -> None:
    given = draw(Lwi(slabs=4, cube=4, axis=axis, per_sample=per_sample), batch=3)
    thick = SIZE[axis] // 4
    for row in range(3):
        for place in range(4):
            origin = int(given.order[row, place])
            now = given.target[row, 0].narrow(axis, place * thick, thick)
            assert torch.equal(now, volumes(3)[row, 0].narrow(axis, origin * thick, thick))


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0, 0.99), st.booleans())
def test_whole_cubes_are_masked_and_as_many_as_asked(seed: int, masked: float, per_sample: bool) -> None:
    task = Lwi(slabs=4, cube=4, masked=masked, per_sample=per_sample)
    given = draw(task, seed=seed)
    zero = (given.masked == 0)[:, 0]
    assert torch.equal(given.masked[:, 0][~zero], given.target[:, 0][~zero])
    cubes = zero.unfold(1, 4, 4).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).float().mean(4)
    assert set(cubes.unique().tolist()) <= {0.0, 1.0}
    assert cubes.flatten(1).sum(1).tolist() == [round(masked * 4 * 4 * 8)] * 2


def test_one_draw_for_a_batch_or_one_for_each_volume() -> None:
    assert Lwi().per_sample is False  # as released
    batch, each = draw(batch=8), draw(Lwi(slabs=4, cube=4, per_sample=True), batch=8)
    assert (batch.order == batch.order[0]).all()
    assert not (each.order == each.order[0]).all()
    hidden = [(one.masked == 0).flatten(1) for one in (batch, each)]
    assert (hidden[0] == hidden[0][0]).all()
    assert not (hidden[1] == hidden[1][0]).all()


def test_the_same_generator_gives_the_same_puzzle() -> None:
    one, two, other = draw(), draw(), draw(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.masked, other.masked)
    before = torch.random.get_rng_state()
    draw()
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_order_is_drawn_and_none_is_preferred() -> None:
    task = Lwi(slabs=3, cube=1, per_sample=True)
    found = puzzle(torch.ones(3000, 1, 1, 1, 3), task, torch_generator(0, "orders")).order
    counts = torch.unique(found, dim=0, return_counts=True)[1]
    assert len(counts) == 6
    assert counts.min() > 400


# Grouping, with index tensors


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("grid", [(4, 4, 4), (8, 4, 12), (12, 8, 4)])
def test_an_intended_group_holds_exactly_one_slab(axis: int, grid: Size) -> None:
    """Volumes whose voxels say which slab they belong to, seen by an encoder that only averages patches."""
    patch = 2
    size = [side * patch for side in grid]
    shape = [1, 1, 1]
    shape[axis] = -1
    index = (torch.arange(size[axis]) // (size[axis] // 4)).view(shape).expand(*size)[None, None].float()
    given = puzzle(index, Lwi(slabs=4, cube=1, axis=axis, masked=0), torch_generator(axis, "order"))
    tokens = torch.nn.functional.avg_pool3d(given.target, patch).flatten()
    place = groups(grid, Lwi(slabs=4, axis=axis))
    assert sorted(place.unique().tolist()) == [0, 1, 2, 3]
    for group in range(4):
        assert tokens[place == group].unique().tolist() == [float(given.order[0, group])]


@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("grid", [(4, 4, 4), (8, 4, 12), (6, 6, 4)])
def test_a_released_group_holds_all_slabs_alike(axis: int, grid: Size) -> None:
    if axis == 0:
        grid = grid[::-1]
    shape = [1, 1, 1]
    shape[axis] = -1
    slab = (torch.arange(grid[axis]) // (grid[axis] // 4)).view(shape).expand(*grid).flatten()
    place = groups(grid, Lwi(slabs=4, axis=axis, grouping="released"))
    for group in range(4):
        assert slab[place == group].unique(return_counts=True)[1].unique().numel() == 1
        assert len(slab[place == group].unique()) == 4


def test_grids_that_cannot_hold_the_slabs_have_no_groups() -> None:
    assert not divides((4, 4, 6), Lwi(slabs=4))
    assert divides((4, 4, 6), Lwi(slabs=4, grouping="released"))
    assert not divides((1, 1, 2), Lwi(slabs=4, grouping="released"))
    with pytest.raises(ConfigError, match="divide"):
        groups((4, 4, 6), Lwi(slabs=4))


# Heads and loss


def test_heads_by_hand() -> None:
    stage = torch.randn(2, 5, 2, 3, 8, generator=torch_generator(0, "stage"))
    heads = OrderHeads([stage.shape], TASK, torch_generator(0, "heads"))
    (scores,) = heads([stage])
    assert scores.shape == (2, 4, 4)
    layer = heads.heads[0]
    for row in range(2):
        for group in range(4):
            mean = stage[row, :, :, :, 2 * group : 2 * group + 2].mean((1, 2, 3))
            torch.testing.assert_close(scores[row, group], layer.weight @ mean + layer.bias)


def test_stages_too_coarse_for_the_slabs_have_no_head() -> None:
    shapes = [(1, 8, 4, 4, 8), (1, 16, 2, 2, 4), (1, 32, 1, 1, 2)]
    assert OrderHeads(shapes, TASK, torch_generator(0, "h")).used == (0, 1)
    with pytest.raises(ConfigError, match="no stage"):
        OrderHeads(shapes[2:], TASK, torch_generator(0, "h"))


@pytest.mark.parametrize(("name", "count"), [("unetr", 3), ("unet", 3)])
def test_the_loss_is_mse_over_all_voxels_and_the_sum_of_cross_entropies(name: str, count: int) -> None:
    net = make(name=name)
    task = Lwi(slabs=4, cube=4, reconstruction=2.0, order=3.0)
    heads = order_heads(net, volumes(), task, torch_generator(0, "heads"))
    found = loss(net, heads, volumes(), torch_generator(0, "puzzle"))
    given = puzzle(volumes(), task, torch_generator(0, "puzzle"))
    rebuilt = net(given.masked)
    assert len(heads.used) == count
    torch.testing.assert_close(found.reconstruction, ((rebuilt - given.target) ** 2).mean())
    torch.testing.assert_close(found.total.detach(), 2 * found.reconstruction + 3 * found.order)
    found.total.backward()
    assert all(value.grad is not None for value in [*net.parameters(), *heads.parameters()])
    assert 0 <= float(found.accuracy) <= 1


def test_cross_entropy_and_accuracy_against_a_slow_truth() -> None:
    generator = torch_generator(0, "scores")
    scores = [torch.randn(3, 4, 4, generator=generator) for _ in range(2)]
    order = torch.stack([torch.randperm(4, generator=generator) for _ in range(3)])
    blank = torch.zeros(3, 1, 2, 2, 4)
    found = judge(blank, scores, Puzzle(blank, blank, order), TASK)
    expected, right = 0.0, 0
    for one in scores:
        for row in range(3):
            for place in range(4):
                values = [math.exp(value) for value in one[row, place].tolist()]
                expected -= math.log(values[int(order[row, place])] / sum(values)) / 12
                right += int(values.index(max(values)) == int(order[row, place]))
    assert float(found.order) == pytest.approx(expected, rel=1e-5)
    assert float(found.accuracy) == pytest.approx(right / 24)
    assert float(found.reconstruction) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"slabs": 1},
        {"cube": 0},
        {"masked": 1.0},
        {"masked": float("nan")},
        {"axis": 3},
        {"grouping": "other"},
        {"reconstruction": -1.0},
        {"order": float("inf")},
        {"grouping": "released", "axis": 1},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Lwi(**options)


def test_volumes_that_cannot_be_cut_are_refused() -> None:
    for options in ({"slabs": 5, "cube": 4}, {"slabs": 4, "cube": 3}, {"slabs": 4, "cube": 32}):
        with pytest.raises(ConfigError, match="cannot be cut"):
            draw(Lwi(**options))


# Step 2


def test_all_weights_but_the_output_go_into_step_2() -> None:
    net = make()
    heads = order_heads(net, volumes(), TASK, torch_generator(0, "heads"))
    stored = weights(net, heads)
    assert sum(name.startswith("order_heads.") for name in stored) == 2 * len(heads.used)
    fresh = make(seed=1)
    restore(fresh, stored)
    swap_output(fresh, 3, torch_generator(0, "output"))
    assert fresh(volumes()).shape == (2, 3, *SIZE)
    expected = make(classes=3).state_dict()
    assert {key: value.shape for key, value in fresh.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, stored[key]) == (not key.startswith("out."))
    again = make(seed=2)
    swap_output(again, 3, torch_generator(0, "output"))
    assert torch.equal(again.out.conv.conv.weight, fresh.out.conv.conv.weight)


@pytest.mark.parametrize("harm", ["missing", "one too many", "shape", "swapped before"])
def test_loading_is_strict(harm: str) -> None:
    net = make()
    stored = weights(net, order_heads(net, volumes(), TASK, torch_generator(0, "heads")))
    if harm == "missing":
        del stored["vit.norm.weight"]
    elif harm == "one too many":
        stored["more"] = torch.ones(1)
    elif harm == "shape":
        stored["vit.norm.weight"] = torch.ones(3)
    else:
        swap_output(net, 3, torch_generator(0, "output"))
    with pytest.raises(BackboneError, match="not those") as caught:
        restore(net, stored)
    assert caught.value.code == "weights-damaged"


# Learning (the specification's minimal experiment: what is asserted there, not the Dice)


def organs(count: int, seed: int) -> torch.Tensor:
    """16^3 volumes: two ellipsoids, one near the bottom, one near the top, of jittered places and sizes, and noise."""
    generator = torch_generator(seed, "organs")
    grid = torch.stack(torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij"))
    made = []
    for _ in range(count):
        volume = 0.1 * torch.randn(16, 16, 16, generator=generator)
        for centre, radius, value in (((5, 6, 4), (3.5, 3, 3), 1.0), ((10, 9, 11), (3, 4, 2.5), 2.0)):
            jitter = torch.rand(2, 3, generator=generator) - 0.5
            middle, spread = torch.tensor(centre) + 2 * jitter[0], torch.tensor(radius) + jitter[1]
            volume[(((grid - middle[:, None, None, None]) / spread[:, None, None, None]) ** 2).sum(0) < 1] += value
        made.append(volume)
    return torch.stack(made)[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("per_sample", [False, True])
def test_order_and_reconstruction_are_learnt_and_hold_on_unseen_volumes(per_sample: bool) -> None:
    known, unseen, size = organs(8, 0), organs(16, 1), (16, 16, 16)
    task = Lwi(slabs=4, cube=4, per_sample=per_sample)
    net = make(size=size, patch=4, hidden=32, width=4, depth=4)
    heads = order_heads(net, known, task, torch_generator(0, "heads"))
    optimiser = torch.optim.AdamW([*net.parameters(), *heads.parameters()], lr=2e-3)
    for step in range(100):
        generator = torch_generator(0, "step", step)
        found = loss(net, heads, known[torch.randperm(8, generator=generator)[:4]], generator)
        optimiser.zero_grad()
        found.total.backward()
        optimiser.step()
    with torch.no_grad():
        tried = [loss(net, heads, unseen, torch_generator(1, "test", draw)) for draw in range(8)]
    mean = {name: sum(float(getattr(one, name)) for one in tried) / len(tried) for name in Losses._fields}
    assert mean["accuracy"] > 0.5  # 0.25 by chance
    assert mean["reconstruction"] < 0.7 * float(unseen.var())  # of the best constant


@pytest.mark.slow
def test_swin_unetr_takes_the_task_too() -> None:
    pytest.importorskip("monai")
    net, batch = make(name="swinunetr", size=(32, 32, 64), width=12), volumes(1, (32, 32, 64))
    heads = order_heads(net, batch, Lwi(slabs=4, cube=8), torch_generator(0, "heads"))
    assert heads.used == (0, 1, 2)  # 16, 8, 4 and 2 tokens along the depth
    loss(net, heads, batch, torch_generator(0, "puzzle")).total.backward()
    swap_output(net, 3, torch_generator(0, "output"))
    assert net(batch).shape == (1, 3, 32, 32, 64)
