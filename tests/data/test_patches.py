"""Patches: where they are cut, what generators decide, and that windows put a whole volume together again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from confrere.data.patches import draw_patches, sliding
from confrere.errors import ConfigError
from confrere.seeds import torch_generator


def numbered(batch: int, size: tuple[int, int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Volumes whose values are their voxels' places, and a few voxels of foreground."""
    count = size[0] * size[1] * size[2]
    volumes = torch.arange(batch * count, dtype=torch.float32).view(batch, 1, *size)
    labels = (torch.rand(batch, *size, generator=torch_generator(seed, "labels")) < 0.02).long()
    return volumes, labels


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.tuples(*[st.integers(2, 9)] * 3), st.data(), st.floats(0, 1))
def test_patches_are_pieces_of_their_volume(seed: int, whole: Any, data: Any, share: float) -> None:
    size = tuple(data.draw(st.integers(1, side)) for side in whole)
    volumes, labels = numbered(3, whole, seed)
    patches, kept = draw_patches(volumes, labels, size, torch_generator(seed, "p"), share)
    assert patches.shape == (3, 1, *size)
    for row in range(3):
        x, y, z = (torch.nonzero(volumes[row, 0] == patches[row, 0, 0, 0, 0])[0]).tolist()
        cut = (slice(x, x + size[0]), slice(y, y + size[1]), slice(z, z + size[2]))
        assert torch.equal(patches[row, 0], volumes[row, 0][cut])
        assert torch.equal(kept[row], labels[row][cut])
        if share == 1 and labels[row].any():
            assert kept[row].any()


def test_the_same_generator_gives_the_same_patches_and_another_one_others() -> None:
    volumes, labels = numbered(4, (9, 9, 9))
    one, two, other = (draw_patches(volumes, labels, (4, 4, 4), torch_generator(seed, "p"))[0] for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_labels_do_not_change_what_is_drawn_next() -> None:
    volumes, labels = numbered(4, (9, 9, 9))
    one, two = torch_generator(0, "p"), torch_generator(0, "p")
    draw_patches(volumes, labels, (4, 4, 4), one, 0.5)
    draw_patches(volumes, labels * 0, (4, 4, 4), two, 1.0)
    assert torch.rand(1, generator=one) == torch.rand(1, generator=two)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.125), (0.5, 0.5625), (1.0, 1.0)])
def test_the_share_of_patches_with_foreground(share: float, expected: float) -> None:
    """One voxel of foreground in a corner: an eighth of random patches of half the edge plus one holds it."""
    labels = torch.zeros(600, 5, 5, 5, dtype=torch.long)
    labels[:, 0, 0, 0] = 2
    _, kept = draw_patches(torch.zeros(600, 1, 5, 5, 5), labels, (4, 4, 4), torch_generator(0, "p"), share)
    assert float((kept == 2).flatten(1).any(1).float().mean()) == pytest.approx(expected, abs=0.06)


def test_a_patch_is_centred_on_the_foreground_where_there_is_room() -> None:
    labels = torch.zeros(8, 20, 20, 20, dtype=torch.long)
    labels[:, 9, 10, 11] = 1
    _, kept = draw_patches(torch.zeros(8, 1, 20, 20, 20), labels, (6, 7, 8), torch_generator(0, "p"), 1.0)
    assert (kept[:, 3, 3, 4] == 1).all()


def test_every_place_is_drawn() -> None:
    volumes, labels = numbered(1, (3, 3, 3))
    many = volumes.expand(400, -1, -1, -1, -1)
    patches, _ = draw_patches(many, labels.expand(400, -1, -1, -1), (2, 2, 2), torch_generator(0, "p"), 0.0)
    assert len(patches[:, 0, 0, 0, 0].unique()) == 8


def test_what_cannot_be_is_refused() -> None:
    volumes, labels = numbered(1, (4, 4, 4))
    for size, share in (((5, 4, 4), 0.5), ((0, 4, 4), 0.5), ((2, 2, 2), 1.5), ((2, 2, 2), float("nan"))):
        with pytest.raises(ConfigError):
            draw_patches(volumes, labels, size, torch_generator(0, "p"), share)
    for overlap in (1.0, -0.1):
        with pytest.raises(ConfigError, match="overlap"):
            sliding(lambda x: x, volumes, (2, 2, 2), overlap)
    with pytest.raises(ConfigError, match="no volume"):
        sliding(lambda x: x, torch.ones(0, 1, 4, 4, 4), (2, 2, 2))


@settings(max_examples=10)
@given(st.tuples(*[st.integers(1, 11)] * 3), st.tuples(*[st.integers(1, 6)] * 3), st.floats(0, 0.9), st.integers(1, 5))
def test_a_function_of_single_voxels_is_put_together_unchanged(
    whole: Any, size: Any, overlap: float, at_once: int
) -> None:
    volumes = torch.randn(2, 1, *whole, generator=torch_generator(0, "v"))
    seen = []

    def net(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return torch.cat((x, 2 * x + 1), 1)

    found = sliding(net, volumes, size, overlap, at_once)
    torch.testing.assert_close(found, net(volumes), rtol=1e-4, atol=1e-4)
    assert all(shape[2:] == size and shape[0] <= at_once for shape in seen[:-1])


def test_no_gradient_is_kept() -> None:
    layer = torch.nn.Conv3d(1, 2, 1)
    assert not sliding(layer, torch.ones(1, 1, 4, 4, 4), (2, 2, 2)).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("whole", [(20, 17, 33), (9, 30, 16)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.7])
def test_windows_are_those_of_monai(whole: Any, overlap: float) -> None:
    inference = pytest.importorskip("monai.inferers").sliding_window_inference
    volumes = torch.randn(2, 1, *whole, generator=torch_generator(0, "v"))
    place = torch.randn(3, 16, 16, 16, generator=torch_generator(0, "place"))  # differs from window to window

    def net(x: torch.Tensor) -> torch.Tensor:
        return x * place

    least = float(volumes.min())
    expected = inference(volumes, (16, 16, 16), 2, net, overlap=overlap, mode="gaussian", cval=least)
    torch.testing.assert_close(sliding(net, volumes, (16, 16, 16), overlap, 3), expected, rtol=1e-4, atol=1e-5)
