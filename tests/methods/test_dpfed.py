"""DPFed: the site's clip for any update, the noise's scale, the second clip and what it amounts to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from confrere.errors import ConfigError, TrainingError, UpdateRefusedError
from confrere.method import Reply, make
from confrere.methods.dpfed import clipped, norm, normal
from confrere.tensors import Tensors, sub

QUIET = {"sigma": 0.0, "post": 0.0, "clip": 1.0, "cohort": 2.0}


@dataclass
class Mover:
    """Takes the place of a learner: moves every tensor by a given amount."""

    by: float
    seen: dict[str, Any] = field(default_factory=dict)

    def fit(self, params: Tensors, **options: Any) -> dict[str, torch.Tensor]:
        self.seen = dict(params)
        return {name: value + self.by for name, value in params.items()}


def reply(value: Any, *, site: str = "a", weight: float = 1.0) -> Reply:
    return Reply(site=site, round=1, weight=weight, state={"shared": {"head.w": torch.as_tensor(value).double()}})


def server_of(method: Any, values: Any = (0.0, 0.0)) -> Any:
    return method.init_server({"head.w": torch.tensor(values, dtype=torch.float64)})


floats = st.floats(-(2.0**100), 2.0**100, width=32)


@given(
    start=st.lists(floats, min_size=1, max_size=6),
    change=st.lists(floats, min_size=6, max_size=6),
    most=st.floats(1e-6, 1e6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_what_is_sent_is_never_farther_than_the_clip(start, change, most, dtype):
    """All tensors count as one vector, and rounding to float32 adds nothing."""
    first = torch.tensor(start, dtype=dtype)
    received = {"a": first, "b": torch.ones(2, 2, dtype=dtype)}
    fitted = {
        "a": first + torch.tensor(change[: len(start)], dtype=dtype),
        "b": torch.full((2, 2), change[-1], dtype=dtype),
    }
    sent = clipped(fitted, received, most)
    moved = sub({n: t.double() for n, t in sent.items()}, {n: t.double() for n, t in received.items()})
    assert norm(moved) <= most
    assert {n: (t.shape, t.dtype) for n, t in sent.items()} == {n: (t.shape, t.dtype) for n, t in fitted.items()}
    wanted = sub({n: t.double() for n, t in fitted.items()}, {n: t.double() for n, t in received.items()})
    if norm(wanted) <= most:
        assert all(torch.equal(sent[n], fitted[n]) for n in sent)


def test_a_clip_keeps_the_direction_over_all_tensors_and_uses_all_of_it():
    received = {"a": torch.zeros(2), "b": torch.zeros(1)}
    sent = clipped({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}, received, 0.5)
    assert norm(sent) == pytest.approx(0.5, rel=1e-5)
    assert sent["a"][0] / sent["b"][0] == pytest.approx(0.75)


def test_a_change_that_is_not_finite_is_refused_at_the_site():
    with pytest.raises(TrainingError, match="not finite"):
        clipped({"a": torch.tensor([float("nan")])}, {"a": torch.zeros(1)}, 1.0)


def test_a_site_clips_before_it_sends():
    method = make("dpfed", {"clip": 0.1})
    received = {"shared": {"w": torch.ones(100, dtype=torch.float64)}}
    payload, state = method.update(Mover(5.0), received, {"private": {}})
    assert norm(sub(payload["shared"], received["shared"])) == pytest.approx(0.1)
    assert not state["private"]
    assert method.needs == "sum"


def test_without_noise_clipped_changes_are_added_and_divided_by_the_fixed_cohort():
    method = make("dpfed", QUIET)
    server = server_of(method, [1.0, 1.0])
    moved = method.aggregate(server, [reply([1.5, 1.0]), reply([1.0, 0.0], site="b"), reply([1.0, 1.2], site="c")])
    assert moved["shared"]["head.w"].tolist() == pytest.approx([1.25, 0.6])  # three answered, the cohort is two
    total = method.aggregate(server, [reply([1 + 0.5 / 3, 1 - 0.8 / 3], site="sum", weight=3.0)])  # their mean
    assert total["shared"]["head.w"].tolist() == pytest.approx([1.25, 0.6])


def test_unequal_weights_are_refused():
    method = make("dpfed", QUIET)
    with pytest.raises(UpdateRefusedError) as raised:
        method.aggregate(server_of(method), [reply([1.0, 1.0], weight=120.0)])
    assert raised.value.code == "update-weight"


@pytest.mark.parametrize("seed", [0, 7])
def test_an_empty_round_releases_noise_of_the_right_scale(seed):
    """std = S sigma / cohort = 0.5 * 3 / 4, over 40,000 numbers; from the system and from a seed."""
    method = make("dpfed", {"clip": 0.5, "sigma": 3.0, "cohort": 4.0, "post": 0.0, "noise_seed": seed})
    server = method.init_server({"w": torch.zeros(200, 200)})
    first = method.aggregate(server, [])
    values = first["shared"]["w"]
    assert float(values.std()) == pytest.approx(0.375, rel=0.02)
    assert abs(float(values.mean())) < 0.01
    assert int(first["releases"]["count"]) == 1
    assert set(method.broadcast(first, "a")) == {"shared"}
    again, second = method.aggregate(server, []), method.aggregate(first, [])
    same = torch.equal(again["shared"]["w"], values)
    assert same == (seed != 0)  # the system's noise never comes twice, a seed's is that of its release
    assert not torch.equal(second["shared"]["w"] - values, values)


def test_the_systems_noise_is_standard_normal():
    from scipy import stats

    drawn = normal((50_000,)).numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-6
    assert normal(()).shape == ()
    assert normal((0, 3)).shape == (0, 3)
    far = normal((400_000,)).abs().max()
    assert 4.0 < float(far) < 9.0


def test_the_second_clip_binds_at_post_times_the_clip_and_only_there():
    method = make("dpfed", {**QUIET, "post": 2.0})
    near = method.aggregate(server_of(method), [reply([1.0, 0.0])])
    assert near["shared"]["head.w"].tolist() == [0.5, 0.0]
    far = method.aggregate(server_of(method), [reply([30.0, 40.0])])  # the server trusts, the site has clipped
    assert far["shared"]["head.w"].tolist() == pytest.approx([1.2, 1.6])


def test_where_it_binds_the_second_clip_is_a_fixed_server_learning_rate():
    """Section 4 of its page: E||noise|| = S sigma sqrt(d) / K, so P / that is the learning rate."""
    d, options = 40_000, {"clip": 0.3, "sigma": 3.0, "cohort": 5.0, "noise_seed": 3}
    post = make("dpfed", {**options, "post": 3.0})
    lr = post.equal_lr(d)
    assert lr == pytest.approx(3 * 5 / (3 * d**0.5))
    fixed = make("dpfed", {**options, "post": 0.0, "server_lr": lr})
    change = 0.3 * torch.randn(d, generator=torch.Generator().manual_seed(0)) / d**0.5
    states = []
    for method in (post, fixed):
        server = method.init_server({"w": torch.zeros(d)})
        answers = [Reply(site=s, round=1, state={"shared": {"w": change}}) for s in "abcde"]
        states.append(method.aggregate(server, answers)["shared"]["w"])
    assert norm({"w": states[0]}) == pytest.approx(0.9, rel=1e-5)
    assert float((states[0] - states[1]).norm() / states[0].norm()) < 0.02
    assert make("dpfed", {"sigma": 0.0}).equal_lr(d) == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"clip": 0.0},
        {"clip": float("inf")},
        {"sigma": -1.0},
        {"cohort": -1.0},
        {"post": -1.0},
        {"server_lr": 0.0},
        {"noise_seed": -1},
        {"post": 3.0, "server_lr": 0.5},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError):
        make("dpfed", options)
