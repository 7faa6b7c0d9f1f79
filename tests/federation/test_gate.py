"""The gate: tables of bad answers, schedules of late and doubled ones, what a hostile site may try (faults C1-C15)."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_federation import tiny_run, tiny_sites

from confrere import methods as _methods  # noqa: F401  fills the registry
from confrere.adapters.algebra import cut
from confrere.federation.checks import LARGEST, LEAVES
from confrere.federation.gate import Gate
from confrere.federation.site import Site
from confrere.federation.transport import Failure, InProcess
from confrere.method import Method, Reply, Request, make
from confrere.record.run import Run
from confrere.seeds import numpy_generator, torch_generator
from confrere.tensors import State, Tensors, digest

SITES = ("a", "b", "c", "d")
A, B = "layers.0.q_proj.lora_A.general.weight", "layers.0.q_proj.lora_B.general.weight"
A2, B2 = "layers.1.q_proj.lora_A.general.weight", "layers.1.q_proj.lora_B.general.weight"
HEAD, BIAS = "head.weight", "head.bias"
SHAPES = {A: (4, 6), B: (5, 4), A2: (4, 6), B2: (5, 4), HEAD: (3, 5), BIAS: (3,)}
METRICS = {"loss": 0.5, "examples": 20, "overlap": {"A": 0.1, "B": None}, "seconds": 0.25}
BAD = (math.nan, math.inf, -math.inf, 3e38)
FEDIT = make("fedit")


def drawn(*address: str | int, scale: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch_generator(0, "gate", *address)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


START = drawn("start")


class Hostile(dict[str, Any]):
    """Looks like a mapping until somebody looks."""

    def __iter__(self) -> Any:
        raise RuntimeError("boo")

    items = keys = values = __iter__


def ask(round_: int = 1, sites: tuple[str, ...] = SITES, state: State | None = None) -> dict[str, Request]:
    state = {"shared": START} if state is None else state
    return {site: Request(kind="train", run="run", round=round_, state=state) for site in sites}


def sent(site: str, round_: int = 1, step: float = 0.01) -> dict[str, torch.Tensor]:
    return {name: START[name] + value for name, value in drawn("step", site, round_, scale=step).items()}


def answer(site: str, round_: int = 1, **changes: Any) -> Reply:
    kept = {"run": "run", "state": {"shared": sent(site, round_)}, "weight": 20.0, "metrics": METRICS, **changes}
    return Reply(site=site, round=round_, **kept)


def gate(method: Method = FEDIT, params: Tensors = START, **changes: Any) -> Gate:
    def form(site: str, request: Request) -> State:
        return method.payload(params, request.state, request.round, 3)

    return Gate(**{"method": method, "run": "run", "expected": form, **changes})


def tensors(site: str = "b", **changes: Any) -> Reply:
    """Return an answer with some tensors replaced, or left out where None is given."""
    changed = {**sent(site), **{{"A": A, "B": B, "bias": BIAS}[key]: value for key, value in changes.items()}}
    return answer(site, state={"shared": {name: value for name, value in changed.items() if value is not None}})


def refused(bad: Reply | Failure, among: Gate | None = None, requests: Mapping[str, Request] | None = None) -> str:
    """Return why ``bad`` is refused; all others must be let in, in order, and nobody else be blamed."""
    requests = requests or ask()
    others = [answer(site) for site in requests if site != bad.site]
    replies, failures = (among or gate()).admit(requests, [*others[1:], bad, *others[:1]])
    assert [reply.site for reply in replies] == [other.site for other in others]
    assert [failed.site for failed in failures] == [bad.site]
    reason = failures[0].reason
    assert reason.isascii()
    assert reason.isprintable()
    assert len(reason) < 600
    return reason


@given(st.permutations([*SITES, *SITES, "b"]))
@settings(max_examples=20, deadline=None)
def test_honest_answers_come_in_by_name_whatever_their_order_and_number(order: list[str]) -> None:
    replies, failures = gate(weights=dict.fromkeys(SITES, 20.0)).admit(ask(), [answer(site) for site in order])
    assert [reply.site for reply in replies] == list(SITES)
    assert failures == []


# ---------------------------------------------------------------------------- C1, C15, G15: values


def test_one_bad_number_keeps_its_site_out_and_the_mean_is_that_of_the_others() -> None:
    """G15: every site, every entry of every tensor, every kind of bad number."""
    tried = poisoned = 0
    for site, value in itertools.product(SITES, BAD):
        others = [answer(other) for other in SITES if other != site]
        mean = digest(FEDIT.aggregate({"shared": START}, others))
        for name, shape in SHAPES.items():
            for entry in range(0, math.prod(shape), 5):
                bad = sent(site)
                bad[name] = bad[name].clone()
                bad[name].view(-1)[entry] = value
                replies, failures = gate().admit(ask(), [answer(site, state={"shared": bad}), *others])
                assert [(f.site, name in f.reason) for f in failures] == [(site, True)]
                poisoned += digest(FEDIT.aggregate({"shared": START}, replies)) != mean
                tried += 1
    print(f"G15: {tried} bad numbers in tensors, {poisoned} poisoned means")
    assert poisoned == 0


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("site", SITES)
def test_a_bad_number_in_any_field_keeps_its_site_out(site: str, value: float) -> None:
    for key in ("loss", "examples", "seconds"):
        assert "metric" in refused(answer(site, metrics={**METRICS, key: value}))
    for nested in ({"A": value}, {"A": {"B": [0.0, value]}}, [value]):
        assert "metric" in refused(answer(site, metrics={**METRICS, "overlap": nested}))
        assert "metric" in refused(answer(site, metrics={**METRICS, "own": nested}))
    assert "weight" in refused(answer(site, weight=value))


def test_denormals_and_negative_zeros_are_numbers_and_what_a_cast_made_infinite_is_not() -> None:
    small = {name: torch.full(shape, 1e-42) for name, shape in SHAPES.items()}
    small[BIAS] = -torch.zeros(3)
    replies, failures = gate(norm=0.0, factor=0.0).admit(ask(), [answer("a", state={"shared": small})])
    assert (len(replies), failures) == (1, [])
    cast = torch.full(SHAPES[B], 1e5).half().float()
    assert "not finite" in refused(tensors(B=cast))
    assert "float16" in refused(tensors(B=torch.zeros(SHAPES[B]).half()))
    edge = torch.full(SHAPES[B], LARGEST)
    assert gate(norm=0.0, factor=0.0).admit(ask(), [tensors(B=edge)])[1] == []
    assert "above 1e+09" in refused(tensors(B=edge * 1.01))


# ---------------------------------------------------------------------------- C2, C3, C4, C14: form


@pytest.mark.parametrize(
    ("extra", "shown"),
    [
        ("head.wieght", "head.wieght"),
        ("../../etc/passwd", "../../etc/passwd"),
        ("a\nb\x1b[31m\u202egnp.exe", "a?b?[31m?gnp.exe"),
        ("\ud800", "?"),
        ("", ""),
        ("x" * 1000, "x" * 80 + ")"),
        (None, "None"),
        (7, "7"),
    ],
)
def test_other_names_are_refused_and_shown_as_they_may_stand_in_a_log(extra: object, shown: str) -> None:
    bad = answer("b", state={"shared": {**sent("b"), extra: torch.zeros(3)}})
    assert f"1 not expected: {shown}" in refused(bad) + ")"
    without = {name: value for name, value in sent("b").items() if name != HEAD}
    reason = refused(answer("b", state={"shared": {**without, extra: START[HEAD]}}))
    assert f"1 missing: {HEAD}; 1 not expected" in reason


def test_at_most_three_names_a_side_are_shown() -> None:
    state = {"shared": {**{f"strange.{i}": torch.zeros(1) for i in range(9)}, BIAS: START[BIAS]}}
    reason = refused(answer("b", state=state))
    assert reason == (
        f"tensors of group shared 5 missing: {HEAD}, {A}, {B}; 9 not expected: strange.0, strange.1, strange.2"
    )


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(4, 5),  # transposed
        torch.zeros(5, 3),  # a lower rank
        torch.zeros(5, 4, 1),
        torch.zeros(20),
        torch.tensor(0.0),
        torch.zeros(5, 0),
        torch.zeros(5, 4, dtype=torch.float64),
        torch.zeros(5, 4, dtype=torch.bfloat16),
        torch.zeros(5, 4, dtype=torch.int32),
        torch.zeros(5, 4, dtype=torch.bool),
        torch.zeros(5, 4, dtype=torch.complex64),
        torch.zeros(5, 4).to_sparse(),
        torch.empty(5, 4, device="meta"),
        torch.zeros(1, 1).expand(10**6, 10**6),  # four bytes that claim four terabytes
        np.zeros((5, 4), dtype=np.float32),
        [[0.0] * 4] * 5,
        0.0,
        "zeros",
    ],
)
def test_another_shape_or_type_is_refused_with_both(value: object) -> None:
    reason = refused(tensors(B=value))
    assert f"group shared, {B}" in reason
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu":
        assert f"{str(value.dtype)[6:]} {tuple(value.shape)} came instead of float32 (5, 4)" in reason


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"shared": {}},
        {"shared": sent("b"), "private": {BIAS: START[BIAS]}},
        {"private": sent("b")},
        {"Shared": sent("b")},
        {"shared": sent("b"), "x\n" * 99: {}},
        {None: {}},
        {"shared": [1, 2]},
        {"shared": None},
        [],
        None,
        "shared",
    ],
)
def test_other_groups_are_refused(state: Any) -> None:
    refused(answer("b", state=state))


def test_what_is_private_is_refused_whatever_a_method_says() -> None:
    class Leaky(type(FEDIT)):  # type: ignore[misc]
        sends = ("shared", "private")

    assert "group private may not leave" in refused(
        answer("b", state={"shared": sent("b"), "private": {BIAS: START[BIAS]}}), gate(Leaky(), expected=None)
    )


def test_a_hundred_thousand_tensors_are_refused_at_once() -> None:
    many = {f"layers.{i}.lora_A.general.weight": torch.zeros(1) for i in range(100_000)}
    started = time.process_time()
    assert "100000 not expected" in refused(answer("b", state={"shared": many}))
    assert time.process_time() - started < 1.5


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", ["fedit", "flexlora", "hetlora", "sdflora", "flora"])
def test_another_rank_is_refused_unless_sites_may_differ_and_it_is_lower(name: str, rank: int) -> None:
    method = make(name)
    wide = {n: torch.cat([t, t], 0 if ".lora_A." in n else 1) if ".lora_" in n else t for n, t in sent("b").items()}
    bad = answer("b", state={"shared": cut(wide, rank)})
    others = [answer(site) for site in ("a", "c")]
    replies, failures = gate(method).admit(ask(), [*others, bad])
    assert (len(failures) == 0) == (rank == 4 or (rank < 4 and method.unequal))
    assert [r.site for r in replies] == (["a", "c"] if failures else ["a", "b", "c"])


def test_a_rank_that_differs_between_layers_or_factors_is_refused() -> None:
    method = make("flexlora")
    low = cut(sent("b"), 2)
    for names in ((A, B), (A,), (B,), (A, A2)):
        mixed = {**sent("b"), **{name: low[name] for name in names}}
        replies, failures = gate(method).admit(ask(), [answer("a"), answer("b", state={"shared": mixed})])
        assert [r.site for r in replies] == ["a"], names
        assert [f.site for f in failures] == ["b"]
    empty = cut(sent("b"), 0)
    assert gate(method).admit(ask(), [answer("b", state={"shared": empty})])[0] == []


def test_without_a_form_what_is_no_number_at_all_is_still_refused() -> None:
    bare = gate(expected=None)
    for value in (torch.zeros(0), torch.zeros(5, 4, dtype=torch.int64), torch.zeros(5, 4, dtype=torch.complex64)):
        refused(tensors(B=value), bare)
    for bad in BAD:
        assert "not finite" in refused(tensors(B=torch.full((5, 4), bad)), bare)
    assert "may not leave" in refused(answer("b", state={"private": {}}), bare)


# ---------------------------------------------------------------------------- C9: weights and counts; metrics


@pytest.mark.parametrize(
    "weight", [0, -1, -0.0, 1e12, 10**400, True, "20", None, b"20", [20], torch.tensor(20.0), 2e9, 1j]
)
def test_a_weight_that_is_no_positive_number_is_refused(weight: object) -> None:
    assert "no positive number" in refused(answer("b", weight=weight))


@pytest.mark.parametrize("weight", [19.999, 21.0, 1, 1000.0])
def test_a_weight_other_than_the_registered_one_is_refused(weight: float) -> None:
    registered = gate(weights=dict.fromkeys(SITES, 20))
    assert "not the registered" in refused(answer("b", weight=weight), registered)
    assert "not the registered" in refused(answer("b"), gate(weights=dict.fromkeys("acd", 20)))


def nested(depth: int) -> Any:
    return {"x": nested(depth - 1)} if depth else 0.0


LOOP: dict[str, Any] = {}
LOOP["loop"] = LOOP


@pytest.mark.parametrize(
    "metrics",
    [
        None,
        [],
        {},
        {"loss": 0.5},
        *({**METRICS, "examples": v} for v in (-1, 1.5, True, "20", None, 10**12, 10**400)),
        *({**METRICS, "loss": v} for v in ("low", True, [0.5], {"a": 0.5}, 10**400)),
        *({**METRICS, "seconds": v} for v in (None, "fast", [1])),
        *({**METRICS, "overlap": v} for v in (0.5, [0.5], "none", {"A": "x"}, {"A": {"B": 0.5}})),
        {**METRICS, "own": nested(4)},
        {**METRICS, "own": LOOP},
        {**METRICS, "own": [0.0] * (LEAVES + 1)},
        {**METRICS, "own": [[[0.0] * 100] * 100] * 100},
        {**METRICS, "own": "x" * 501},
        {**METRICS, "own": "a\nb"},
        {**METRICS, "own": object()},
        {**METRICS, "own": torch.zeros(1)},
        {**METRICS, "own": {1: 0.0}},
        {**METRICS, "k" * 81: 0.0},
        {**METRICS, "a\nb": 0.0},
    ],
    ids=lambda metrics: str(metrics)[:60],
)
def test_metrics_that_are_not_plain_finite_and_whole_are_refused(metrics: Any) -> None:
    assert "metric" in refused(answer("b", metrics=metrics))


def test_metrics_may_hold_more_than_is_needed() -> None:
    metrics = {
        **METRICS,
        "loss": None,
        "overlap": None,
        "own": {"list": [1, 2.5, None, True, "text" * 99], **nested(3)},
    }
    assert gate().admit(ask(), [answer("a", metrics=metrics)])[1] == []


def test_judgements_pass_and_false_ones_do_not() -> None:
    requests = {s: Request(kind="evaluate", run="run", round=1, state={"shared": START}) for s in SITES}
    fine = {"score": 0.5, "confidence": None, "examples": 3, "overlap": None}

    def judged(site: str, state: State | None = None, **changes: Any) -> Reply:
        return Reply(site=site, run="run", round=1, state=state or {}, metrics={**fine, **changes})

    good = [judged(site) for site in "acd"]
    assert gate(weights=dict.fromkeys(SITES, 20.0)).admit(requests, good) == (good, [])
    for bad in (
        *(judged("b", score=v) for v in (*BAD, 1.1, -0.1, "1", True)),
        *(judged("b", confidence=v) for v in BAD),
        judged("b", examples=-1),
        judged("b", overlap=1.0),
        judged("b", state={"shared": START}),
        Reply(site="b", run="run", round=1, metrics={"score": 0.5}),
    ):
        replies, failures = gate().admit(requests, [*good, bad])
        assert replies == good
        assert [f.site for f in failures] == ["b"]


# ---------------------------------------------------------------------------- C10-C13, G5: stamps


@pytest.mark.parametrize("round_", [0, 2, 4, -3, True, 3.0, "3", None])
def test_another_round_is_refused(round_: Any) -> None:
    requests = ask(3)
    others = [answer(site, 3) for site in "acd"]
    replies, failures = gate().admit(requests, [*others, answer("b", round_)])  # type: ignore[arg-type]
    assert [reply.site for reply in replies] == ["a", "c", "d"]
    assert [(f.site, f.reason) for f in failures] == [("b", "an answer belongs to another round")]


@pytest.mark.parametrize("run", ["", "other", "RUN", None, 7])
def test_another_run_is_refused(run: Any) -> None:
    assert refused(answer("b", run=run)) == "an answer belongs to another run"


@pytest.mark.parametrize("late", [answer("b", 2), answer("b", run="old"), answer("b", 2, weight=math.nan)])
def test_a_late_answer_does_not_harm_the_one_in_time(late: Reply) -> None:
    replies, failures = gate().admit(ask(), [late, answer("b"), late])
    assert [reply.site for reply in replies] == ["b"]
    assert len(failures) == 1


@pytest.mark.parametrize(
    "second",
    [
        answer("b", weight=21.0),
        answer("b", metrics={**METRICS, "loss": 0.6}),
        answer("b", weight=math.nan),
        tensors(bias=START[BIAS]),
        tensors(bias=None),
        tensors(bias=torch.full((3,), math.nan)),
        tensors(bias="three"),
        answer("b", state=Hostile()),
        answer("b", metrics=Hostile()),
    ],
)
def test_two_different_answers_are_both_refused(second: Reply) -> None:
    for pair in ([answer("b"), second], [second, answer("b")], [answer("b"), second, answer("b")]):
        replies, failures = gate().admit(ask(), [answer("a"), *pair])
        assert [reply.site for reply in replies] == ["a"]
        assert [failed.site for failed in failures] == ["b"]


def test_a_redelivery_counts_once_though_it_took_another_time() -> None:
    again = answer("b", metrics={k: v for k, v in METRICS.items() if k != "seconds"})
    for pair in ([answer("b"), again], [again, answer("b")]):
        replies, failures = gate().admit(ask(), pair)
        assert (len(replies), failures) == (1, [])


@pytest.mark.parametrize("name", ["e", "pooled", "site_9"])
def test_a_site_that_was_not_asked_is_refused_by_name(name: str) -> None:
    assert refused(answer(name)) == "an answer came from a site that was not asked"


@pytest.mark.parametrize("name", ["", "A", "a ", "a\n", "../a", "x" * 65, "\x1b[2J", "Jane Doe", None, 7, ("a",)])
def test_a_name_that_can_be_no_site_reaches_no_log(name: Any) -> None:
    for bad in (answer(name), Failure(name, "no answer")):
        replies, failures = gate().admit(ask(), [answer("a"), bad])
        assert [reply.site for reply in replies] == ["a"]
        assert [(f.site, f.reason) for f in failures] == [("", "an answer came under no valid name of a site")]


def test_failures_pass_once_and_as_plain_text() -> None:
    said = Failure("b", "it broke\n\x1b[31m" + "x" * 900, "mend\tit")
    replies, failures = gate().admit(ask(), [said, said, answer("a")])
    assert [reply.site for reply in replies] == ["a"]
    (failed,) = failures
    assert failed.site == "b"
    assert failed.reason.startswith("it broke??[31mxx")
    assert len(failed.reason) == 500
    assert failed.fix == "mend?it"


def test_random_schedules_of_messages_are_counted_once_or_not_at_all() -> None:
    """G5: late, doubled, reordered; of another run, round or site; and answers that contradict each other."""
    schedules, wrong, doubled, lost = 2000, 0, 0, 0
    sites, rounds, runs = SITES[:3], (1, 2, 3), ("run", "old")
    bias = {"shared": {BIAS: START[BIAS]}}
    check = gate(params=bias["shared"], norm=0.0, factor=0.0)
    world = {
        (run, round_, site): Reply(
            site=site,
            run=run,
            round=round_,
            state={"shared": {BIAS: START[BIAS] + i}},
            weight=20.0,
            metrics=METRICS,
        )
        for i, (run, round_, site) in enumerate(itertools.product(runs, rounds, (*sites, "e")))
    }
    everything = list(world.values())
    for schedule in range(schedules):
        rng = numpy_generator(0, "schedule", schedule)
        round_ = int(rng.integers(1, 4))
        mail = [everything[i] for i in rng.integers(0, len(everything), size=rng.integers(0, 12))]
        mail += [world["run", round_, site] for site in sites if rng.random() < 0.8]
        twisted = {site for site in sites if rng.random() < 0.1}
        mail += [replace(world["run", round_, site], weight=21.0) for site in twisted]
        mail += [Failure(site, "no answer") for site in sites if rng.random() < 0.1]
        mail = [mail[i] for i in rng.permutation(len(mail))]
        there = {m.site for m in mail if isinstance(m, Reply) and (m.run, m.round) == ("run", round_)} & set(sites)
        torn = {site for site in twisted if any(m is world["run", round_, site] for m in mail)}
        replies, failures = check.admit(ask(round_, sites, bias), mail)
        got = [reply.site for reply in replies]
        wrong += sum(r.state is not world["run", round_, r.site].state for r in replies)
        wrong += sum(r.weight != 20.0 and r.site not in twisted for r in replies)
        wrong += len(set(got) & torn)
        doubled += len(got) - len(set(got))
        lost += len((there - torn) - set(got))
        assert got == sorted(got)
        assert torn <= {failed.site for failed in failures}
    print(f"G5: {schedules} schedules, {wrong} wrong acceptances, {doubled} double counts, {lost} lost")
    assert (wrong, doubled, lost) == (0, 0, 0)


# ---------------------------------------------------------------------------- C7, C8, G16: sizes


def moved(site: str, times: float, names: Mapping[str, Any] = SHAPES) -> dict[str, torch.Tensor]:
    """Return what ``site`` sends, its change of ``names`` scaled."""
    return {n: START[n] + (t - START[n]) * (times if n in names else 1.0) for n, t in sent(site).items()}


@pytest.mark.parametrize("times", [30.0, 1e2, 1e4, 1e6, -1e2])
@pytest.mark.parametrize("names", [SHAPES, (A,), (B2,), (HEAD,), (BIAS,)], ids=["all", "A", "B", "head", "bias"])
def test_a_change_that_is_far_too_large_is_refused(times: float, names: Any) -> None:
    if names != SHAPES and abs(times) < 1e2:  # one tensor of several
        times *= 10
    reason = refused(answer("b", state={"shared": moved("b", times, names)}))
    assert reason.startswith("the change of ")
    assert "[group shared]" in reason


@pytest.mark.parametrize("times", [-5.0, -1.0, 0.0, 0.1, 1.0, 3.0, 5.0])
def test_a_change_of_a_usual_size_passes_with_either_sign(times: float) -> None:
    mail = [answer("a"), answer("b", state={"shared": moved("b", times)}), answer("c")]
    assert gate().admit(ask(), mail)[1] == []


def test_zero_turns_a_check_off_and_two_sites_are_not_compared() -> None:
    big, factors = moved("b", 1e4), moved("b", 1e3, (A, A2))
    assert "all tensors" in refused(answer("b", state={"shared": big}), gate(factor=0.0))
    assert "the factors" in refused(answer("b", state={"shared": factors}), gate(norm=0.0))
    for check, requests in ((gate(norm=0.0, factor=0.0), ask()), (gate(), ask(sites=("a", "b")))):
        mail = [answer("a"), answer("b", state={"shared": big})]
        mail += [answer(site) for site in requests if site in "cd"]
        assert check.admit(requests, mail)[1] == []
    alone = moved("b", 1e12)
    assert "above 1e+09" in gate().admit(ask(), [answer("b", state={"shared": alone})])[1][0].reason


def test_what_all_others_left_as_it_was_may_not_move() -> None:
    """A frozen factor: the median change is zero; rounding is no change."""
    frozen = {name: START[name] for name in (A, A2)}
    mail = [answer(site, state={"shared": {**sent(site), **frozen}}) for site in "acd"]
    for by, let_in in ((1e-3, False), (1e-7, True)):
        bad = answer("b", state={"shared": {**sent("b"), A: START[A] * (1 + by), A2: START[A2]}})
        assert ([r.site for r in gate().admit(ask(), [*mail, bad])[0]] == list(SITES)) == let_in


def test_when_nobody_moves_all_pass() -> None:
    mail = [answer(site, state={"shared": START}) for site in SITES]
    assert gate().admit(ask(), mail)[1] == []


def test_a_site_without_a_start_is_not_compared_with_those_that_have_one() -> None:
    """A newcomer to a method in which every site gets back its own: its first answer is all change."""
    new = {site: Request(kind="train", run="run", round=1, state={}) for site in "de"}
    mail = [answer(site, state={"shared": moved(site, 1e-3)}) for site in "abcd"]
    assert gate().admit({**ask(sites=("a", "b", "c")), **new}, mail)[1] == []
    two = [answer("e", state={"shared": {name: 100 * value for name, value in START.items()}})]
    assert gate(norm=1.5, factor=1.5).admit({**ask(sites=("a", "b", "c")), **new}, [*mail, *two])[1] == []


def test_the_nearest_of_several_models_that_were_received_is_the_start() -> None:
    far = {name: value + 100 for name, value in START.items()}
    requests = ask(state={"shared": far, "cluster.0": START})
    mail = [answer("a"), answer("b"), answer("c", state={"shared": {n: t + 0.01 for n, t in far.items()}})]
    assert gate().admit(requests, mail)[1] == []
    bad = answer("d", state={"shared": {n: t + 50 for n, t in START.items()}})
    assert [failed.site for failed in gate().admit(requests, [*mail, bad])[1]] == ["d"]


def gauged(site: str, c: float) -> dict[str, torch.Tensor]:
    """Return what ``site`` sends with every pair as (c A, B / c): the same product."""
    return {n: t * c if ".lora_A." in n else t / c if ".lora_B." in n else t for n, t in sent(site).items()}


def product_error(replies: list[Reply]) -> float:
    """Return how far the product of the mean factors is from the mean product of honest sites, relatively."""
    honest = torch.stack([sent(r.site)[B].double() @ sent(r.site)[A].double() for r in replies]).mean(0)
    mean = FEDIT.aggregate({"shared": START}, replies)["shared"]
    return float((mean[B].double() @ mean[A].double() - honest).norm() / honest.norm())


def test_a_rescaled_pair_is_refused_where_it_does_much_harm() -> None:
    """C8: (c A, B / c). The gate bounds the harm; a canonical form undoes it."""
    base = product_error([answer(site) for site in SITES])
    errors, out = {}, set()
    for c in (1e-6, 1e-3, 0.01, 0.1, 0.5, 0.9, 1.1, 2.0, 10.0, 100.0, 1e3, 1e6):
        mail = [answer("b", state={"shared": gauged("b", c)}), *(answer(site) for site in "acd")]
        replies, failures = gate().admit(ask(), mail)
        out |= {c} if failures else set()
        errors[c] = product_error(replies), product_error(mail)
    assert {1e-6, 1e-3, 0.01, 10.0, 100.0, 1e3, 1e6} <= out
    assert not {0.9, 1.1} & out
    worst, open_ = (max(pair[i] for pair in errors.values()) for i in (0, 1))
    print(f"G16 (gate): error of the mean product {base:.3f} honest, {worst:.3f} behind the gate, {open_:.3g} without")
    assert worst < 1.0 < 100 < open_


# ---------------------------------------------------------------------------- what only a method knows


def test_a_choice_is_a_number_of_a_cluster() -> None:
    method = make("ifca")
    requests = ask(state={"shared": START, "cluster.0": START, "cluster.1": START})

    def chosen(value: float) -> list[Failure]:
        choice = {"cluster": torch.tensor([value])}
        return gate(method).admit(requests, [answer("a", state={"shared": sent("a"), "choice": choice})])[1]

    assert [len(chosen(v)) for v in (0.0, 1.0, 2.0, -1.0, 0.5, 1e8)] == [0, 0, 1, 1, 1, 1]
    assert len(gate(method).admit(requests, [answer("a")])[1]) == 1  # a choice is due
    assert gate(method).admit(ask(), [answer("a")])[1] == []  # there are no clusters yet


def test_the_mark_of_a_first_answer_is_zero_or_one() -> None:
    method = make("scaffold")
    control = {name: value for name, value in drawn("control").items() if not name.startswith("head.")}
    for mark, passes in ((0.0, True), (1.0, True), (-1.0, False), (1e6, False), (0.5, False)):
        state = {"shared": sent("a"), "control": {**control, "first": torch.tensor(mark, dtype=torch.float64)}}
        assert (gate(method).admit(ask(), [answer("a", state=state)])[1] == []) == passes


def test_moments_are_those_of_weights_of_sum_one() -> None:
    method = make("ridge")
    z = torch.cat([torch.randn(40, 5, generator=torch_generator(0, "z"), dtype=torch.float64), torch.ones(40, 1)], 1)
    y = torch.nn.functional.one_hot(torch.arange(40) % 3, 3).double()
    gram, moment = z.T @ z / 40, z.T @ y / 40
    tilted = gram - 10 * torch.eye(6, dtype=torch.float64)
    tilted[-1] = gram[-1]
    for name, g, m, passes in (
        ("honest", gram, moment, True),
        ("scaled", 1e3 * gram, 1e3 * moment, False),
        ("other labels", gram, 2 * moment, False),
        ("a negative share", gram, moment - torch.tensor([2.0, -1.0, -1.0]), False),
        ("indefinite", tilted, moment, False),
        ("asymmetric", gram + torch.triu(gram, 1), moment, False),
    ):
        sent_ = {"statistics": {"gram": g.double(), "moment": m.double()}}
        assert (gate(method).admit(ask(), [answer("a", state=sent_)])[1] == []) == passes, name


def test_only_optional_groups_may_be_missing() -> None:
    method = make("data-vectors", {"coefficients": "tuned"})
    losses = {"scores": {"loss": torch.ones(6, dtype=torch.float64)}}
    for state, passes in ((losses, True), ({}, True), ({"shared": START}, False), ({"scores": {}}, False)):
        assert (gate(method).admit(ask(3), [answer("a", 3, state=state)])[1] == []) == passes


# ---------------------------------------------------------------------------- anything at all

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3)
TENSORS = st.sampled_from([torch.zeros(3), torch.zeros(0), torch.tensor(1), torch.eye(2).to_sparse(), *START.values()])
ANYTHING = st.recursive(
    PLAIN | TENSORS | st.sampled_from(["shared", A, B]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["shared", "private", A, BIAS, "loss", "examples"]) | PLAIN, inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(site=ANYTHING, round_=ANYTHING, run=ANYTHING, weight=ANYTHING, metrics=ANYTHING, state=ANYTHING, other=ANYTHING)
@settings(max_examples=80, deadline=None)
def test_whatever_comes_nothing_is_raised_and_the_others_pass(site: Any, other: Any, **fields: Any) -> None:
    fields["round"] = fields.pop("round_")
    mail: list[Any] = [other, Reply(site=site, **fields), Failure(site, other, other)]
    mail += [answer("b", **{key: value}) for key, value in fields.items() if key != "round"]
    mail += [Reply(site="b", **fields), answer("c", state={"shared": other}), answer("a")]
    replies, failures = gate().admit(ask(), mail)
    assert [r.site for r in replies if r.site == "a"] == ["a"] or site == "a"
    assert {r.site for r in replies} <= set(SITES)
    assert failures
    assert all(f.reason.isascii() and f.reason.isprintable() for f in failures)


@pytest.mark.parametrize("key", ["state", "metrics"])
def test_an_object_that_breaks_when_looked_at_is_refused(key: str) -> None:
    for bad in (Hostile(), {"shared": Hostile()}):
        refused(answer("b", **{key: bad}))


# ---------------------------------------------------------------------------- codes, and a whole run

CODES = {
    "update-stamp": answer("b", 2),
    "update-weight": answer("b", weight=-1.0),
    "update-metrics": answer("b", metrics={}),
    "group-not-declared": answer("b", state={"private": {}}),
    "update-form": tensors(bias=None),
    "update-values": tensors(bias=torch.full((3,), math.nan)),
    "update-size": answer("b", state={"shared": moved("b", 1e4)}),
    "diverged": Failure("b", "the loss is not finite", "lower train.lr", "diverged"),
}


@pytest.mark.parametrize("code", CODES)
def test_every_refusal_has_a_code_that_stays_when_words_change(code: str) -> None:
    failures = gate().admit(ask(), [CODES[code], *(answer(site) for site in "acd")])[1]
    assert [(failed.site, failed.code) for failed in failures] == [("b", code)]


class Harmed(InProcess):
    """Site b sends what is not finite; or it gives no answer."""

    def __init__(self, sites: Mapping[str, Site], absent: bool) -> None:
        super().__init__(sites)
        self.absent = absent

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        came = super().exchange(requests)
        if next(iter(requests.values())).kind == "evaluate":
            return came
        harmed = [r for r in came if isinstance(r, Reply) and r.site == "b"]
        state = {"shared": {n: torch.full_like(t, math.nan) for n, t in harmed[0].state["shared"].items()}}
        return [r for r in came if r.site != "b"] + [replace(r, state=state) for r in harmed if not self.absent]


def test_a_run_goes_on_without_the_site_as_if_it_had_not_answered(tmp_path: Path) -> None:
    finals = {}
    for absent in (False, True):
        run = tmp_path / str(absent)
        finals[absent] = tiny_run(FEDIT, run, rounds=2, transport=Harmed(tiny_sites(FEDIT, rounds=2), absent))[0]
    failures = [event for event in Run(tmp_path / "False").events() if event["event"] == "failure"]
    assert [(event["round"], event["site"]) for event in failures] == [(1, "b"), (2, "b")]
    assert all("not finite" in event["reason"] for event in failures)
    assert digest(finals[False]) == digest(finals[True])
