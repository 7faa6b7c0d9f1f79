"""Robust rules: against another library, against slow references, and against what may not happen."""

from __future__ import annotations

import json
from itertools import product as cartesian
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_variants import VARIANTS
from tiny_federation import SITES, tiny_sites

from confrere import methods as _methods  # noqa: F401
from confrere.adapters.algebra import product
from confrere.adapters.gauge import LIMIT, canonical
from confrere.choices import Rule as RuleName
from confrere.errors import ConfigError, UpdateRefusedError
from confrere.federation import robust as r
from confrere.federation.defence import Defence
from confrere.federation.gate import Gate
from confrere.method import METHODS, Method, Reply, Request, make
from confrere.seeds import numpy_generator, torch_generator
from confrere.tensors import flatten

ORACLE = json.loads(Path(__file__).with_name("byzfl_values.json").read_text())
ROBUST = [name for name in r.RULES if name != "mean"]
ONE_VALUE = [name for name in ROBUST if name != "clipping"]


SAID = {"examples": 3, "overlap": None, "loss": 1.0}


def site(number: int) -> str:
    return f"site_{number:02d}"


def draw(n: int, d: int, seed: int, spread: float = 1e-3) -> torch.Tensor:
    return torch.from_numpy(numpy_generator(seed, "updates", n, d).normal(0, spread, (n, d)))


def replies_of(updates: torch.Tensor, weight: float = 1.0) -> tuple[dict, list[Reply]]:
    """Return what was received (zeros) and one reply a row, cut into two groups and float32."""
    half = updates.shape[1] // 2
    received = {"shared": {"a": torch.zeros(half), "b": torch.zeros(updates.shape[1] - half)}}
    came = [
        Reply(site=site(k), round=1, weight=weight, state={"shared": {"a": row[:half], "b": row[half:]}}, metrics=SAID)
        for k, row in enumerate(updates.float())
    ]
    return {reply.site: received for reply in came}, came


def vector(reply: Reply) -> torch.Tensor:
    return torch.cat([value.flatten() for _, value in sorted(flatten(reply.state).items())]).double()


def aggregate(rule: str, f: int, updates: torch.Tensor) -> torch.Tensor:
    """Return what FedAvg over the defended replies gives."""
    came = r.robust(rule, f, *replies_of(updates))
    weights = torch.tensor([reply.weight for reply in came], dtype=torch.float64)
    return (weights / weights.sum()) @ torch.stack([vector(reply) for reply in came])


# -- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ORACLE["cases"], ids=lambda c: f"f{c['byzantine']}")
def test_values_are_those_of_byzfl(case: dict) -> None:
    updates = torch.tensor(case["updates"], dtype=torch.float64)
    for name, expected in case["values"].items():
        got = r.RULES[name].combine(updates, case["byzantine"])
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=2e-6, msg=name)
    assert ORACLE["byzfl"] == "0.0.11"


def slow_krum_order(x: np.ndarray, f: int) -> list[int]:
    n, scores = len(x), []
    for i in range(n):
        squares = sorted(float(sum((a - b) ** 2 for a, b in zip(x[i], x[j], strict=True))) for j in range(n) if j != i)
        scores.append(sum(squares[: n - f - 2]))
    return sorted(range(n), key=lambda i: (scores[i], i))


@pytest.mark.parametrize(("n", "f"), [(3, 0), (5, 1), (9, 2), (11, 4)])
def test_krum_and_multi_krum_by_a_slow_reference(n: int, f: int) -> None:
    for seed in range(5):
        x = draw(n, 6, seed, 1.0).numpy()
        order = slow_krum_order(x, f)
        np.testing.assert_array_equal(r.krum(torch.from_numpy(x), f).numpy(), x[order[0]])
        best = x[sorted(order[: n - f - 2])].mean(0)
        np.testing.assert_allclose(r.multi_krum(torch.from_numpy(x), f).numpy(), best, rtol=1e-12, atol=1e-15)


def test_the_geometric_median_has_no_downhill() -> None:
    """At the minimum the unit vectors to all points sum to zero."""
    for seed in range(10):
        x = draw(9, 5, seed, 1.0)
        away = x - r.geometric_median(x, 4)
        assert (away / away.norm(dim=1, keepdim=True)).sum(0).norm() < 1e-4


def test_the_geometric_median_of_a_majority_is_its_point() -> None:
    x = torch.tensor([[1.0, 2.0]] * 3 + [[50.0, -7.0], [9.0, 9.0]], dtype=torch.float64)
    torch.testing.assert_close(r.geometric_median(x, 2), x[0])


def test_ties_go_to_the_first_site() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]], dtype=torch.float64)  # 1..4 have equal scores in pairs
    order = slow_krum_order(x.numpy(), 1)
    assert float(r.krum(x, 1)) == float(x[order[0]]) == 1.0 + (order[0] - 1)


# -- properties --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(7, 12), st.integers(0, 2), st.integers(0, 10_000), st.sampled_from(ROBUST), st.randoms())
def test_the_order_of_replies_changes_no_byte(n: int, f: int, seed: int, rule: str, random: object) -> None:
    received, came = replies_of(draw(n, 9, seed))
    mixed = list(came)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    one, two = (r.robust(rule, f, received, order) for order in (came, mixed))
    assert [x.site for x in one] == [x.site for x in two]
    assert all(torch.equal(vector(x), vector(y)) for x, y in zip(one, two, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(7, 12), st.integers(0, 2), st.integers(0, 10_000), st.sampled_from(ONE_VALUE))
def test_a_shift_of_all_updates_shifts_the_value(n: int, f: int, seed: int, rule: str) -> None:
    x, shift = draw(n, 5, seed, 1.0), draw(1, 5, seed + 1, 3.0)
    moved = r.RULES[rule].combine(x + shift, f)
    torch.testing.assert_close(moved, r.RULES[rule].combine(x, f) + shift[0], rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 10_000), st.sampled_from(["median", "trimmed-mean"]), st.floats(-1e30, 1e30))
def test_outliers_do_not_leave_the_honest_range(f: int, seed: int, rule: str, value: float) -> None:
    honest = draw(f + 1 + seed % 4, 6, seed, 1.0)
    bad = torch.full((f, 6), value, dtype=torch.float64) * draw(f, 6, seed + 1, 1.0)
    found = r.RULES[rule].combine(torch.cat([honest, bad]), f)
    slack = 1e-12 * honest.abs().amax()
    assert (found >= honest.amin(0) - slack).all()
    assert (found <= honest.amax(0) + slack).all()


@pytest.mark.parametrize("rule", ROBUST)
def test_two_wild_sites_of_ten_leave_the_value_near_the_honest_mean(rule: str) -> None:
    honest = draw(8, 30, 5) + 0.01
    errors = {}
    for name in (rule, "mean"):
        for value in (1e6, -1e6):
            bad = torch.full((2, 30), value, dtype=torch.float64)
            f = 0 if name == "mean" else 2
            found = aggregate(name, f, torch.cat([honest, bad]))
            errors[name] = float((found - honest.mean(0)).norm() / honest.mean(0).norm())
    assert errors[rule] < 0.5 < 1e5 < errors["mean"]


# -- bad input ---------------------------------------------------------------------------------------------------


def poisoned(rule: str, position: int, value: float, n: int = 8, gate: bool = False) -> bool:
    """Return whether one bad site of eight makes the aggregate not finite, or more than ten times too large."""
    x = draw(n, 1000, 3)
    bad = x.float()
    if value in (float("inf"), float("-inf")) or value != value:
        bad[position, 17] = value
    else:
        bad[position] = value
    received, came = replies_of(x)
    _, hurt = replies_of(bad)
    if gate:
        asked = {s: Request(kind="train", round=1, state=state) for s, state in received.items()}
        hurt, refused = Gate(method=make("fedit")).admit(asked, hurt)
        assert [failure.site for failure in refused] == [site(position)]
    left = r.robust(rule, 0 if rule == "mean" else 1, received, hurt)
    if not left:
        return True
    found = torch.stack([vector(reply) for reply in left]).mean(0)
    largest = float(torch.stack([vector(reply) for reply in came]).norm(dim=1).max())
    return not bool(torch.isfinite(found).all()) or float(found.norm()) > 10 * largest


def test_g15_no_bad_site_poisons_a_robust_rule() -> None:
    values = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "3e38": 3e38}
    found = {
        (rule, name): sum(poisoned(rule, position, value) for position in range(8))
        for rule, (name, value) in cartesian(r.RULES, values.items())
    }
    robust = sum(count for (rule, _), count in found.items() if rule != "mean")
    finite = sum(count for (rule, name), count in found.items() if rule == "mean" and name != "3e38")
    gated = sum(poisoned("mean", k, value, gate=True) for k, value in cartesian(range(8), values.values()))
    tried = 8 * len(values) * len(ROBUST)
    print(
        f"G15: {robust} of {tried} poisoned over {len(ROBUST)} robust rules; mean: {finite} of 24 by values that "
        f"are not finite, {found['mean', '3e38']} of 8 by 3e38; behind the gate {gated} of 32"
    )
    assert robust == finite == gated == 0
    assert found["mean", "3e38"] == 8, "the control must be poisoned"


def test_a_site_that_is_left_out_counts_as_one_of_f() -> None:
    """Five sites and f = 1 for Krum: without the bad one, four are left and none of them is bad."""
    x = draw(5, 4, 0)
    x[2, 0] = float("nan")
    left = r.robust("krum", 1, *replies_of(x))
    assert [reply.site for reply in left] == [site(k) for k in (0, 1, 3, 4)]
    assert r.robust("krum", 1, *replies_of(draw(4, 4, 0))) == []  # four came, one of them may still be bad


def test_another_set_of_tensors_is_left_out() -> None:
    received, came = replies_of(draw(5, 4, 0))
    wrong = Reply(site=site(9), round=1, state={"shared": {"a": torch.zeros(2)}})
    left = r.robust("median", 1, received, [*came, wrong])
    assert [reply.site for reply in left] == [reply.site for reply in came]


@pytest.mark.parametrize("rule", r.RULES)
def test_replies_that_hold_nothing_stay(rule: str) -> None:
    came = [Reply(site=site(k), round=1, weight=3.0) for k in range(7)]
    assert [reply.state for reply in r.robust(rule, 0, {}, came)] == [{}] * 7


def test_the_mean_keeps_weights_and_rules_do_not() -> None:
    received, came = replies_of(draw(7, 4, 0), weight=5.0)
    assert {x.weight for x in r.robust("mean", 0, received, came)} == {5.0}
    assert {x.weight for x in r.robust("median", 1, received, came)} == {1.0}


def test_an_update_is_what_was_sent_minus_what_was_received() -> None:
    """Clipping depends on the origin: what a site got is that, and not zero."""
    received = {"shared": {"w": torch.tensor([100.0, 0.0])}}
    sent = [[101.0, 0.0], [100.0, 1.0], [100.0, 50.0]]
    came = [Reply(site=site(k), round=1, state={"shared": {"w": torch.tensor(w)}}) for k, w in enumerate(sent)]
    left = r.robust("clipping", 1, {x.site: received for x in came}, came)
    assert [vector(x).tolist() for x in left] == [[101.0, 0.0], [100.0, 1.0], [100.0, 1.0]]


def test_types_and_groups_are_kept() -> None:
    state = {"shared": {"w": torch.ones(2, 3)}, "control": {"c": torch.ones(2, dtype=torch.float64)}, "empty": {}}
    came = [Reply(site=site(k), round=1, state=state) for k in range(5)]
    for reply in r.robust("median", 1, {}, came):
        assert reply.state.keys() == state.keys()
        assert r.layout(reply.state) == r.layout(state)


# -- contradictions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rule", "f", "asked", "where"),
    [
        ("fedit", "mean", 1, 10, "federation.byzantine"),
        ("fedit", "median", 2, 4, "federation.byzantine"),
        ("fedit", "krum", 1, 4, "federation.byzantine"),
        ("fedit", "krum", 0, 2, "federation.rule"),
        ("fedit", "medain", 1, 10, "federation.rule"),
        ("flexlora", "median", 1, 10, "federation.rule"),
        ("ifca", "clipping", 1, 10, "federation.rule"),
        ("scaffold", "clipping", 1, 10, "federation.rule"),
    ],
)
def test_contradictions_are_refused(method: str, rule: str, f: int, asked: int, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        r.check_rule(make(method), rule, f, asked)
    assert caught.value.where == where
    assert caught.value.fix


@pytest.mark.parametrize(
    ("method", "rule", "f", "asked"),
    [("fedit", "median", 2, 5), ("fedit", "krum", 1, 5), ("flexlora", "clipping", 1, 3), ("local", "median", 1, 3)],
)
def test_what_can_be_is_accepted(method: str, rule: str, f: int, asked: int) -> None:
    r.check_rule(make(method), rule, f, asked)


def test_unequal_updates_are_only_clipped() -> None:
    r.check_rule(make("flexlora"), "clipping", 1, 5, unequal=True)
    with pytest.raises(ConfigError, match="one shape"):
        r.check_rule(make("fedit"), "median", 1, 5, unequal=True)


def test_every_rule_that_may_be_chosen_is_there() -> None:
    assert set(get_args(RuleName)) == set(r.RULES)
    assert all(rule.line and rule.combine.__doc__ for rule in r.RULES.values())


def accepted(method: Method, rule: str) -> bool:
    try:
        r.check_rule(method, rule, 1, 3)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_under_a_rule_gives_finite_tensors_or_is_refused(name: str) -> None:
    method = VARIANTS[name]
    allowed = [rule for rule in ("median", "clipping") if accepted(method, rule)]
    if not allowed or not method.sends or method.pools:
        return
    sites = tiny_sites(method, steps=2)
    server = method.init_server(sites[SITES[0]].initial())
    asked = {s: Request(kind="train", round=1, state=method.broadcast(server, s)) for s in SITES}
    came = [sites[s].handle(asked[s]) for s in SITES]
    for rule in allowed:
        left = r.robust(rule, 1, {s: q.state for s, q in asked.items()}, came)
        after = method.aggregate(server, left)
        assert all(torch.isfinite(value).all() for value in flatten(after).values()), rule


# -- gauge -------------------------------------------------------------------------------------------------------

A, B = "layer.lora_A.general.weight", "layer.lora_B.general.weight"


def factors(seed: int, n: int = 8, rank: int = 8, d: int = 192) -> tuple[dict, list[dict]]:
    """Return the broadcast pair and what n honest sites make of it."""
    g = torch_generator(seed, "factors")
    base = {A: torch.randn(rank, d, generator=g) / d**0.5, B: 0.1 * torch.randn(d, rank, generator=g)}
    return base, [{k: v + 0.2 * v.std() * torch.randn(v.shape, generator=g) for k, v in base.items()} for _ in range(n)]


def averaged(sites: list[dict]) -> torch.Tensor:
    """Return mean(B) mean(A), as FedAvg over factors has it."""
    mean = {k: torch.stack([s[k].double() for s in sites]).mean(0) for k in (A, B)}
    return product((mean[A], mean[B]))


def rescaled(pair: dict, g: torch.Tensor) -> dict:
    """Return (G A, B G^-1) in float32, as it travels."""
    return {A: (g @ pair[A].double()).float(), B: torch.linalg.solve(g, pair[B].double(), left=False).float()}


def apart(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


def test_g16_no_gauge_moves_the_aggregate() -> None:
    rng = numpy_generator(0, "gauge")
    base, sites = factors(0)
    clean = averaged([canonical(s, base) for s in sites])
    others = [canonical(s, base) for s in sites[1:]]
    worst, refused, largest = 0.0, 0, 0.0
    for _ in range(1000):
        c, condition = 10 ** rng.uniform(-6, 6), 10 ** rng.uniform(0, 5)
        u, v = (np.linalg.qr(rng.normal(size=(8, 8)))[0] for _ in range(2))
        g = torch.from_numpy(c * u @ np.diag(np.geomspace(1, condition, 8)) @ v)
        try:
            sent = canonical(rescaled(sites[0], g), base)
        except UpdateRefusedError:
            refused += 1
            continue
        largest = max(largest, condition)
        worst = max(worst, apart(averaged([sent, *others]), clean))
    print(f"G16: 1,000 gauges: largest change {worst:.1e}, {refused} refused, largest condition taken {largest:.0f}")
    assert worst <= 1e-4
    assert 100 < refused < 700, "both ways out must have been tried"
    assert largest > LIMIT / 3, "what is taken must not be trivial"


def test_g16_control_plain_averaging_is_wrong_by_nine_tenths() -> None:
    _, sites = factors(0)
    mean = torch.stack([product((s[A].double(), s[B].double())) for s in sites]).mean(0)
    wrong = {}
    for c in (1.0, 10.0, 1000.0):
        sent = rescaled(sites[0], c * torch.eye(8, dtype=torch.float64))
        assert apart(product((sent[A].double(), sent[B].double())), product((sites[0][A], sites[0][B])).double()) < 1e-5
        wrong[c] = apart(averaged([sent, *sites[1:]]), mean)
    print(f"G16 control: plain averaging of factors is wrong by {wrong}")
    assert wrong[1.0] < 0.1
    assert 0.8 < wrong[10.0] < 1.0
    assert wrong[1000.0] > 90


def test_the_canonical_form_is_the_same_adapter() -> None:
    base, sites = factors(1)
    for one in sites:
        form = canonical(one, base)
        assert apart(product((form[A].double(), form[B].double())), product((one[A], one[B])).double()) < 1e-5
        along = form[A].double() @ torch.linalg.pinv(base[A].double())
        assert apart(along, torch.eye(8, dtype=torch.float64)) < 1e-5, "what is new is orthogonal to what was broadcast"
    same = canonical(base, base)
    assert apart(same[A], base[A]) < 1e-6
    assert apart(same[B], base[B]) < 1e-6


def test_the_common_form_does_not_wear_out() -> None:
    """Factors that move by half their size in each of 20 rounds: nobody is refused and A does not fade."""
    g = torch_generator(5, "rounds")
    base, _ = factors(5)
    first = base[A].norm()
    for _ in range(20):
        step = 0.5 * base[A].std()
        sent = [{A: base[A] + step * torch.randn(8, 192, generator=g), B: base[B]} for _ in range(8)]
        forms = [canonical(one, base) for one in sent]
        base = {k: torch.stack([form[k] for form in forms]).mean(0) for k in (A, B)}
        sizes = torch.linalg.svdvals(base[A])
        assert sizes[0] < 50 * sizes[-1]
        assert base[A].norm() > 0.9 * first


def test_a_shift_between_the_factors_goes_along() -> None:
    """B (A x + s) is the same before and after."""
    base, sites = factors(2)
    one = {**sites[0], "layer.lora_shift.general.weight": torch.arange(8.0)}
    form, x = canonical(one, base), torch.linspace(-1, 1, 192)
    said = [t[B] @ (t[A] @ x + t["layer.lora_shift.general.weight"]) for t in (one, form)]
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)


def test_what_is_no_pair_stays() -> None:
    base, sites = factors(3)
    alone = {A: sites[0][A], "head.weight": torch.ones(3)}
    assert canonical(alone, base) == alone
    other = {A: sites[0][A][:4], B: sites[0][B][:, :4]}
    assert canonical(other, base) == other


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_factor_without_a_form_is_refused(value: float) -> None:
    base, sites = factors(4)
    bad = {**sites[0], A: sites[0][A].clone()}
    bad[A][3] = value
    with pytest.raises(UpdateRefusedError, match=r"lora_A"):
        canonical(bad, base)
    came = [Reply(site="a", round=1, state={"shared": bad}), Reply(site="b", round=1, state={"shared": sites[1]})]
    left, refused = Defence(canonical=True)({s: {"shared": base} for s in "ab"}, came)
    assert [x.site for x in left] == ["b"]
    assert [x.site for x in refused] == ["a"]
    assert refused[0].fix
