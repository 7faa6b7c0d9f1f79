"""Who takes part: fixed groups, and what sums over rounds tell of single sites."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_federation import SITES, backbone_of, initial_params, tiny_plan, tiny_sites

from confrere import config
from confrere.choices import FederationChoice
from confrere.errors import ConfigError
from confrere.federation.loop import federate
from confrere.federation.participation import cohorts_of, identifiability, matrix_of
from confrere.federation.sampling import check_groups, groups, sample
from confrere.federation.transport import Failure, InProcess
from confrere.method import make
from confrere.record.run import Run
from confrere.watch.metrics import exposition
from confrere.watch.reader import Watcher

NAMES = [f"s{i:02d}" for i in range(12)]


def seen(sampling: str, fraction: float, rounds: int, seed: int = 0, names: list[str] = NAMES):
    cohorts = [sample(names, fraction, seed, r, sampling, names) for r in range(1, rounds + 1)]  # type: ignore[arg-type]
    return identifiability(matrix_of(cohorts, names), names)


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_a_site_is_identifiable_if_rounds_add_up_to_it_alone(seed: int, rounds: int, sites: int) -> None:
    A = np.random.default_rng(seed).integers(0, 2, (rounds, sites)).astype(float)
    names = [f"s{k}" for k in range(sites)]
    found = identifiability(A, names)
    for k, name in enumerate(names):
        unit = np.eye(sites)[k]
        combination = np.linalg.lstsq(A.T, unit, rcond=None)[0]
        assert (name in found.single) == bool(np.allclose(A.T @ combination, unit, atol=1e-8))
    assert found.rank == np.linalg.matrix_rank(A)


def test_everybody_every_round_shows_a_total_and_one_absence_shows_all() -> None:
    n = len(NAMES)
    whole = identifiability(np.ones((20, n)), NAMES)
    assert (whole.rank, whole.single, whole.groups, whole.condition) == (1, (), (tuple(NAMES),), 1.0)
    left_out = identifiability(np.ones((n, n)) - np.eye(n), NAMES)
    assert (left_out.rank, left_out.single) == (n, tuple(NAMES))
    assert left_out.condition == pytest.approx(n - 1)
    assert identifiability(np.zeros((0, n)), NAMES).condition is None


@pytest.mark.parametrize("seed", range(5))
def test_groups_hide_single_sites_for_ever_and_plain_sampling_does_not(seed: int) -> None:
    plain, grouped = seen("fixed", 0.5, 60, seed), seen("groups", 0.5, 60, seed)
    assert (plain.rank, plain.single) == (12, tuple(NAMES))
    assert (grouped.rank, grouped.single) == (2, ())
    assert sorted(site for group in grouped.groups for site in group) == NAMES
    assert seen("poisson", 0.5, 60, seed).single == tuple(NAMES)


@given(st.integers(0, 2**31 - 1), st.sampled_from([2, 3, 4, 6, 12]), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_groups_are_dealt_once_and_take_turns(seed: int, size: int, cycle: int) -> None:
    fraction, number = size / 12, 12 // size
    dealt = groups(NAMES, fraction, seed)
    assert sorted(site for group in dealt for site in group) == NAMES
    assert {len(group) for group in dealt} == {size}
    turn = [sample(NAMES, fraction, seed, cycle * number + r, "groups") for r in range(1, number + 1)]
    assert sorted(turn) == sorted(dealt)
    assert groups(NAMES[::-1], fraction, seed) == dealt


def test_who_is_away_moves_nobody_to_another_group() -> None:
    for round_ in range(1, 9):
        whole = sample(NAMES, 0.25, 3, round_, "groups", NAMES)
        assert sample(NAMES[1:], 0.25, 3, round_, "groups", NAMES) == [s for s in whole if s != NAMES[0]]
    assert any(groups(NAMES, 0.25, seed) != groups(NAMES, 0.25, 0) for seed in range(1, 5))


@pytest.mark.parametrize(
    ("sites", "choice", "threshold", "key", "fix"),
    [
        (6, {"fraction": 1 / 3, "min_replies": 1}, None, "federation.min_replies", "federation.min_replies=2"),
        (6, {"fraction": 1 / 3, "min_replies": 2}, 0, "secure.threshold", "secure.threshold=2"),
        (6, {"fraction": 0.1, "min_replies": 1}, None, "federation.fraction", "federation.fraction=0.333333"),
        (7, {"fraction": 0.5, "min_replies": 4}, None, "federation.fraction", "federation.fraction=1"),
        (1, {"fraction": 1.0, "min_replies": 1}, None, "federation.fraction", "federation.sampling=fixed"),
    ],
)
def test_groups_that_protect_nobody_are_refused(
    sites: int, choice: dict[str, float], threshold: int | None, key: str, fix: str
) -> None:
    made = FederationChoice(sampling="groups", **choice)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        check_groups(made, sites, threshold=threshold)
    assert (caught.value.code, caught.value.where) == ("groups", key)
    assert fix in caught.value.fix


def test_what_the_fixes_say_is_accepted() -> None:
    check_groups(FederationChoice(sampling="groups", fraction=1 / 3, min_replies=2), 6, threshold=2)
    check_groups(FederationChoice(sampling="groups", fraction=0.333333, min_replies=2), 6, threshold=None)
    check_groups(FederationChoice(fraction=0.5), 7, threshold=0)


def test_a_method_that_averages_whoever_answers_takes_no_groups() -> None:
    from method_variants import PRIVATE

    values = {"path": "x", "method": "dpfed", "controls": [], **PRIVATE}
    values["federation"] = {**values["federation"], "sampling": "groups"}
    with pytest.raises(ConfigError) as caught:
        config.validate(values)
    assert (caught.value.code, caught.value.where) == ("privacy", "federation.sampling")


class Away(InProcess):
    """A transport at which one site fails in some rounds."""

    def exchange(self, requests):
        gone = {s for s, r in requests.items() if s == "a" and r.kind == "train" and r.round == 2}
        came = super().exchange({s: r for s, r in requests.items() if s not in gone})
        return [*came, *(Failure(s, "no answer") for s in gone)]


def test_a_group_with_a_member_missing_is_not_summed(tmp_path: Path) -> None:
    method, sites = make("fedit"), tiny_sites(make("fedit"))
    run = Run(tmp_path)
    plan = tiny_plan(method, rounds=3, sampling="groups", min_replies=3)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    federate(method, server, Away(sites), plan, run)
    assert cohorts_of(run.events()) == [(1, SITES), (3, SITES)]
    assert any(e["event"] == "failure" and e["code"] == "quorum" for e in run.events())
    found = identifiability(matrix_of([c for _, c in cohorts_of(run.events())], SITES), SITES)
    assert (found.rank, found.single) == (1, ())
    state = Watcher(tmp_path).state()
    assert state.participation == found
    text = exposition(state).decode()
    assert "confrere_participation_rank 1.0" in text
    assert "confrere_participation_condition 1.0" in text
    assert "confrere_identifiable_sites 0.0" in text
