"""RMIA, LiRA, the share used and the historical audit on invented models: a planted leak is found, none is not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm, ttest_ind
from seen import seen

from confrere.audits import membership, statistics
from confrere.audits.audit import Choice, Interval, find
from confrere.audits.historical import bits, p_used, signs, threshold
from confrere.audits.membership import averaged, lira_score, on_references, rmia_score, rows, sides
from confrere.audits.references import by_patient, confidence, rows_of
from confrere.audits.tapped import AuditedRun, Guarantee
from confrere.audits.usage import usage
from confrere.errors import ConfigError


def rmia(one):  # type: ignore[no-untyped-def]
    return rmia_score(one, 0.4)


@pytest.mark.parametrize("score", [lira_score, rmia])
def test_a_planted_leak_is_found_and_nothing_is_found_without(score) -> None:  # type: ignore[no-untyped-def]
    leaking = statistics.auc(*sides(score, [seen(2.0)]))
    assert leaking.low is not None
    assert leaking.low > 0.75
    quiet = [statistics.auc(*sides(score, [seen(0.0, seed=seed)])) for seed in range(20)]
    assert sum(not one.low <= 0.5 <= one.high for one in quiet) <= 3  # type: ignore[operator]
    # Difficulty alone would hide it: patients differ by more than training changes.
    plain = statistics.auc(*sides(lambda one: one.right, [seen(2.0)]))
    assert plain.value < leaking.value  # type: ignore[operator]


@pytest.mark.parametrize("score", [lira_score, rmia])
def test_placebo_is_quiet_and_known_references_show_the_power(score) -> None:  # type: ignore[no-untyped-def]
    one = seen(2.0)
    power = averaged([statistics.auc(*pair) for pair in on_references(score, [one], known=True)])
    placebo = averaged([statistics.auc(*pair) for pair in on_references(score, [one], known=False)])
    assert power.low > 0.65  # type: ignore[operator]
    assert placebo.low < 0.5 < placebo.high  # type: ignore[operator]


def test_lira_is_the_formula() -> None:
    one = seen(1.0, members=5, others=5)
    phi, phis = one.right - one.other, one.rights - one.others
    out = [phis[~one.trained[:, k], k] for k in range(10)]
    spread = np.sqrt(sum(((o - o.mean()) ** 2).sum() for o in out) / sum(len(o) - 1 for o in out))
    chances = [norm.cdf(phi[k], out[k].mean(), spread) for k in range(10)]  # 1 - Pr[N > phi]
    assert norm.cdf(lira_score(one)) == pytest.approx(chances)


def test_rmia_is_the_formula() -> None:
    one = seen(1.0, members=5, others=5)
    own = [
        np.exp(one.right[k]) / (0.5 * (1.4 * np.exp(one.rights[~one.trained[:, k], k]).mean() + 0.6)) for k in range(10)
    ]
    beside = np.exp(one.right_beside) / (0.5 * (1.4 * np.exp(one.rights_beside).mean(0) + 0.6))
    counts = [(value / beside > 1).sum() for value in own]
    assert np.floor(rmia_score(one, 0.4)) == pytest.approx(counts)
    assert list(np.argsort(rmia_score(one, 0.4))) == list(np.argsort(own))
    alone = replace(one, right_beside=np.zeros(0), rights_beside=np.zeros((4, 0)))  # no validation images
    assert np.isfinite(rmia_score(alone, 0.4)).all()


def test_a_reference_is_attacked_without_its_own_pair() -> None:
    one = seen(1.0, references=6)
    other = one.against(3)
    assert (other.right == one.rights[3]).all()
    assert (other.rights == one.rights[[0, 1, 4, 5]]).all()
    assert ((~other.trained).sum(0) == 2).all()


def test_images_of_a_patient_count_once_and_a_patient_on_both_sides_is_refused() -> None:
    inside, outside = by_patient(np.array([1.0, 3.0, 5.0]), np.array([7, 7, 8]), np.array([True, True, False]))
    assert (list(inside), list(outside)) == ([2.0], [5.0])
    with pytest.raises(ConfigError, match="among members") as caught:
        by_patient(np.array([1.0, 3.0]), np.array([7, 7]), np.array([True, False]))
    assert caught.value.code == "audit"


def test_confidence_does_not_cancel_where_a_model_is_sure() -> None:
    right, other = confidence(torch.tensor([[60.0, 0.0, 0.0]]), np.array([0]))
    assert other[0] == pytest.approx(-60 + np.log(2))
    assert -1e-20 < right[0] <= 0


def test_a_guarantee_bounds_what_it_covers_and_a_breach_is_called_one() -> None:
    one = seen(2.0)
    record = Guarantee(unit="record", epsilon=0.1, delta=1e-6)
    found = rows("all", lira_score, [one], record, 0, main=True)
    assert found[0].bound == pytest.approx(0.5499, abs=0.001)  # a member in place of another: two steps
    assert found[0].finding == "above bound"
    assert found[1].bound is not None  # 1 % of 150 others can be seen,
    assert found[2].bound is None  # 0.1 % cannot
    assert found[2].finding == "cannot be said"
    own = rows("all", lira_score, [replace(one, model="personalised")], record, 0, main=True)
    assert all(row.bound is None for row in own)
    hospital = replace(record, unit="hospital")
    assert hospital.covers("general")
    assert not hospital.covers("update")
    assert hospital.of_patient(5) == (0.1, 1e-6, 1)
    assert record.of_patient(2) == (pytest.approx(0.2), pytest.approx(2 * np.exp(0.1) * 1e-6), 2)
    assert replace(record, epsilon=400.0).of_patient(2) == (800.0, 1.0, 2)


def test_power_leaves_out_the_reference_on_which_rmia_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only reference 0 knows its members by heart: LiRA has some power on average, RMIA none that it may count."""
    one = seen(0.0, members=300, others=300)
    sure = np.where(one.trained[0], -1e-9, one.rights[0])
    rights = np.concatenate([sure[None], one.rights[1:]])
    leaking = replace(one, rights=rights, others=np.log1p(-np.exp(rights)))
    monkeypatch.setattr(membership, "evidence", lambda run, choice: [leaking])
    run = SimpleNamespace(guarantee=None, federation=SimpleNamespace(classes=()))
    powers = {}
    for name in ("rmia", "lira"):
        found = find(name).function(run, Choice())  # type: ignore[arg-type]
        powers[name] = found.settings["AUC on a reference of known members, general"][0]
        assert bool(found.warnings) == (name == "rmia")
    assert powers["rmia"] == pytest.approx(0.5, abs=0.05)
    assert powers["lira"] > 0.55


def test_what_is_learnt_of_one_class_is_found_there_and_not_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    leaking, quiet = (seen(leak, members=600, others=600) for leak in (4.0, 0.0))
    rare, both = leaking.labels == 2, {}
    for key in ("right", "other", "rights", "others"):
        both[key] = np.where(rare, getattr(leaking, key), getattr(quiet, key))
    monkeypatch.setattr(membership, "evidence", lambda run, choice: [replace(quiet, **both)])
    run = SimpleNamespace(guarantee=None, federation=SimpleNamespace(classes=("naevus", "keratosis", "melanoma")))
    for name in ("rmia", "lira"):
        by_class = {r.subject: r for r in find(name).function(run, Choice()).rows if r.measure == "AUC"}  # type: ignore[arg-type]
        assert list(by_class) == ["all", "a", "class naevus", "class keratosis", "class melanoma"]
        assert by_class["class melanoma"].finding == "found"
        assert by_class["class melanoma"].n == "200 members, 200 others"
        assert {by_class[f"class {other}"].finding for other in ("naevus", "keratosis")} == {"not found"}


def test_a_class_keeps_the_epsilon_of_all_images_of_its_patients() -> None:
    record = Guarantee(epsilon=0.1, delta=1e-6, unit="record")
    twice = replace(seen(0.0), most=3).of_class(1)
    found = rows("class x", lira_score, [twice], record, 0, main=False)
    assert found[0].bound == pytest.approx(statistics.auc_bound(*record.of_patient(3)))


def promised(**changes: Any) -> Guarantee | None:
    said = {"unit": "hospital", "neighbours": "add-remove", "sigma": 3.0, "debits": 50, "delta": 1e-3, **changes}
    return AuditedRun.guarantee.fget(SimpleNamespace(results={"privacy": said}))  # type: ignore[attr-defined]


def test_another_patient_replaces_a_hospitals_update_and_moves_the_sum_twice_as_far() -> None:
    found = promised(epsilon=9.43)
    assert found is not None
    # Exact, from the curve of one Gaussian mechanism (Balle and Wang, 2018) of sensitivity 2.
    a, b = 50**0.5 * 2 / 3 / 2, found.epsilon / (50**0.5 * 2 / 3)
    exact = norm.cdf(a - b) - np.exp(found.epsilon) * norm.cdf(-a - b)
    assert exact == pytest.approx(1e-3, rel=1e-3)
    assert found.epsilon == pytest.approx(24.913, abs=0.01)
    already = promised(epsilon=24.9, neighbours="replace-one")
    record = promised(epsilon=9.43, unit="record")
    assert (already and already.epsilon, record and record.epsilon) == (24.9, 9.43)
    assert promised(epsilon=9.43, simulation=True) is None
    assert promised(epsilon=None) is None


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_used_of_a_set_is_estimated(share: float) -> None:
    found = [usage([seen(3.0, members=400, others=400, share=share, seed=seed)], 0, 200) for seed in range(4)]
    assert all(sizes == (400, 400) for _, _, sizes in found)
    assert np.mean([used.value for used, _, _ in found]) == pytest.approx(share, abs=0.07)
    assert np.mean([unused.value for _, unused, _ in found]) == pytest.approx(0, abs=0.07)
    assert all(used.low <= used.value <= used.high for used, _, _ in found)  # type: ignore[operator]


def test_a_model_that_is_surer_of_everybody_does_not_look_as_if_it_had_used_them() -> None:
    one = seen(3.0, members=400, others=400, share=0.0)
    surer = replace(
        one, right=-np.logaddexp(0, -(one.right - one.other + 2)), other=-np.logaddexp(0, one.right - one.other + 2)
    )
    used, unused, _ = usage([surer], 0, 200)
    assert abs(used.value) < 0.2  # type: ignore[operator]
    assert abs(unused.value) < 0.2  # type: ignore[operator]


def test_without_power_no_share_is_said() -> None:
    for seed in range(10):
        used, unused, _ = usage([seen(0.0, seed=seed)], 0, resamples=50)
        assert used == unused == Interval()


def test_the_historical_p_depends_on_the_number_of_misses_alone() -> None:
    """Four of any number are p < 0.05: the whole test."""
    for n in (50, 500, 5000):
        found = [p_used(np.r_[np.zeros(m), np.ones(n - m)]) for m in range(5)]
        assert found[0] == 1.0
        assert found[1:] == pytest.approx([0.32, 0.157, 0.083, 0.045], abs=0.004)
    count = np.r_[np.zeros(7), np.ones(60)]
    assert p_used(count) == pytest.approx(ttest_ind(count, np.ones(67) + 1e-9 * np.arange(67)).pvalue, rel=1e-3)
    assert p_used(np.zeros(5)) == 0.0


def test_historical_signs_and_thresholds_are_as_described() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    found, predicted = signs(logits, np.array([0, 0, 1]))
    assert list(predicted) == [0, 1, 1]
    assert list(found[:, 0]) == [1.0, 0.0, 1.0]
    p = 1 / (1 + np.exp(-2))
    assert found[0, 1] == pytest.approx(p)
    assert found[0, 2] == pytest.approx(p * np.log(p) + (1 - p) * np.log(1 - p))
    inside, outside = np.array([0.9, 0.8, 0.3]), np.array([0.2, 0.4, 0.1])
    slow = max(np.r_[inside, outside], key=lambda v: (inside >= v).mean() + (outside < v).mean())
    assert threshold(inside, outside) == slow
    assert threshold(np.zeros(0), np.zeros(0)) == float("inf")
    nobody = (np.zeros((0, 3)), np.zeros(0, int))
    assert list(bits((found, predicted), nobody, nobody)) == [1.0, 0.0, 1.0]  # only whether it is right


@pytest.mark.parametrize("options", [{"references": 3}, {"references": 2}, {"patients": 0}, {"seed": -1}])
def test_a_choice_that_cannot_be_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as caught:
        Choice(**options)  # type: ignore[arg-type]
    assert caught.value.code == "audit"


def test_members_and_others_are_thinned_alike_at_every_site() -> None:
    """Else a score that knows nothing but the site finds members, once sites are put together."""
    splits = {"small": np.repeat([0, 1, 2], [60, 10, 30]), "large": np.repeat([0, 1, 2], [600, 100, 300])}
    data = {site: SimpleNamespace(split=split, groups=np.arange(len(split)) // 2) for site, split in splits.items()}
    run: Any = SimpleNamespace(data=data)
    kept = {s: [len(rows_of(run, s, split, Choice(patients=100))) // 2 for split in (0, 2)] for s in splits}
    assert kept == {"small": [30, 15], "large": [100, 50]}
    of_site = {"small": 0.0, "large": 1.0}
    members, others = (np.concatenate([np.full(kept[s][side], of_site[s]) for s in splits]) for side in (0, 1))
    assert statistics.auc(members, others).value == pytest.approx(0.5)
    assert len(rows_of(run, "large", 1, Choice(patients=10))) == 20  # nobody is compared with validation images
    drawn = [rows_of(run, "large", 0, Choice(patients=7, seed=seed)) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize("offset", [0.0, 0.4, 1.0])
def test_models_that_are_sure_of_what_is_wrong_have_finite_scores(offset: float) -> None:
    """Noise makes such models: the chance of the right class is zero in double precision, for all of them."""
    one = seen(1.0, members=5, others=5)
    sure = replace(one, right=one.right - 1500, rights=one.rights - 1500, rights_beside=one.rights_beside - 1500)
    assert np.isfinite(rmia_score(sure, offset)).all()
