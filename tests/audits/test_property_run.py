"""Property inference and inversion on a finished run: what the server saw, shadows, rows, refusals."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from confrere.audits import inversion, inversion_bench
from confrere.audits import property_inference as audit
from confrere.audits.audit import Choice, find
from confrere.audits.property import System, posterior
from confrere.audits.property_order import ESTIMATES, order, order_rows
from confrere.audits.property_prolin import prolin
from confrere.audits.property_shadows import Property, class_share, draw_shadows, flat
from confrere.audits.tapped import AuditedRun, open_run
from confrere.config import Experiment, validate
from confrere.data.synthetic import make_microscopy
from confrere.errors import ConfigError
from confrere.federation.participation import identifiability
from confrere.job import run_experiment
from confrere.record.store import round_file

BASE = {
    "method": "fedit",
    "controls": [],
    "threads": 1,
    "workers": 1,
    "rounds": 3,
    "backbone": {"name": "test-vit"},
    "adapter": {"blocks": 1, "rank": 2, "dropout": 0.0},
    "train": {"steps": 1, "batch_size": 4, "balance": "none"},
    "selection": {"every": 3},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_microscopy(tmp_path_factory.mktemp("cells") / "data", seed=0, sites=4, images=(40, 40), size=32)


def opened(data: Path, out: Path, **changes: object) -> AuditedRun:
    run_experiment(validate({"path": str(data), **BASE, **changes}), out)
    return open_run(out)


@pytest.fixture(scope="module")
def plain(cache: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> AuditedRun:
    return opened(data, tmp_path_factory.mktemp("plain") / "run", federation={"fraction": 0.5})


@pytest.fixture(scope="module")
def masked(cache: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> AuditedRun:
    gate = {"norm": 0.0, "factor": 0.0}
    return opened(data, tmp_path_factory.mktemp("masked") / "run", secure={"aggregation": True}, gate=gate)


def test_the_observed_mean_is_that_of_the_replies(plain: AuditedRun) -> None:
    for event in (e for e in plain.run.events() if e["event"] == "round"):
        before, mean = audit.observed(plain, event["round"])
        replies = {s: plain.run.store(s).read(event["round"])[1] for s in event["sites"]}
        total = sum(reply.weight for reply in replies.values())
        updates = [r.weight / total * flat(r.state["shared"], before["shared"]) for r in replies.values()]
        np.testing.assert_allclose(mean, sum(updates), atol=1e-7)
        row = audit.coefficients(plain, tuple(event["sites"]))
        sites = [s for s in plain.sites if s in replies]
        own = [flat(replies[s].state["shared"], before["shared"]) for s in sites]
        np.testing.assert_allclose(row[row > 0] @ np.stack(own), len(sites) * mean, atol=1e-6)
        assert [s for s, value in zip(plain.sites, row, strict=True) if value] == sites


def test_under_masks_the_same_mean_comes_from_the_opened_sum(masked: AuditedRun) -> None:
    before, mean = audit.observed(masked, 1)
    assert masked.reply(masked.sites[0], 1) is None
    np.testing.assert_allclose(mean, flat(masked.server(1)["shared"], before["shared"]), atol=1e-6)
    assert np.abs(mean).max() > 0
    assert audit.observed(masked, 9) is None


def test_the_property_asked_for_is_the_class_in_which_sites_differ_most(plain: AuditedRun) -> None:
    asked = class_share(plain)
    classes = plain.federation.classes
    shares = {}
    for which, name in enumerate(classes):
        rows = {s: plain.data[s].labels[plain.data[s].rows("train")] for s in plain.sites}
        shares[name] = np.ptp([(labels == which).mean() for labels in rows.values()])
    assert asked.name == f"images of class {max(shares, key=shares.get)}"


def test_shadows_hold_no_training_image_and_the_share_they_are_said_to(plain: AuditedRun) -> None:
    asked = class_share(plain)
    made = draw_shadows(plain, asked, 40, 0)
    marks = np.concatenate([asked.marks[s] for s in plain.sites])
    shares = np.array([marks[rows].mean() for rows in made.sets])
    assert all((made.data.split[rows] != 0).all() for rows in made.sets)
    assert (shares[~made.kinds] == 0).all()
    assert shares[made.kinds].mean() == pytest.approx(made.high, abs=0.05)
    assert {len(rows) for rows in made.sets} == {len(plain.data[s].rows("train")) for s in plain.sites}
    again = draw_shadows(plain, asked, 40, 0)
    assert all((a == b).all() for a, b in zip(made.sets, again.sets, strict=True))


@pytest.mark.slow
def test_the_audit_of_a_run_says_what_it_found(plain: AuditedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "SHADOWS", 20)
    found = audit.property_inference(plain, Choice())
    assert find("property").function is audit.property_inference
    written = found.as_json()
    summary, single = found.rows[:2]
    assert (summary.measure, single.measure) == ("skill", "accuracy")
    assert summary.strength.value <= 1
    assert summary.strength.low is None  # four sites say little
    orders, sites = found.rows[2:6], found.rows[6:]
    assert [row.measure for row in orders] == [f"order, {name}" for name in ESTIMATES]
    assert all(0 <= row.strength.value <= 1 and 0 <= row.control.value <= 1 for row in orders)
    assert len(sites) == len(plain.sites)
    assert all(row.strength.low <= row.strength.high for row in sites)
    assert found.costs["models trained"] == 2 * 20 * 3
    cohorts = [tuple(e["sites"]) for e in plain.run.events() if e["event"] == "round"]
    wanted = identifiability(np.array([[float(s in c) for s in plain.sites] for c in cohorts]), plain.sites)
    assert written["settings"]["identifiability"]["rank"] == wanted.rank
    assert "secure aggregation" in found.warnings[0]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"method": "fedadam"}, "method.name"),
        ({"method": "local"}, "method.name"),
        ({"federation": {"rule": "median"}}, "method.name"),
        ({"method": "hetlora", "adapter": {"ranks": {"a": 2}}}, "method.name"),
        ({"method": "fedit", "train": {"balance": "none"},
          "privacy": {"unit": "record", "delta": 1e-5, "epsilon": 8.0}}, "privacy.unit"),
    ],
)  # fmt: skip
def test_what_the_server_has_must_be_a_mean(changes: dict[str, object], key: str) -> None:
    experiment: Experiment = validate({"path": "x", "controls": [], **changes})
    stub = SimpleNamespace(experiment=experiment, method=experiment.build_method(), sites=["a", "b"])
    with pytest.raises(ConfigError) as caught:
        audit.check(stub)  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.where) == ("audit", key)


def test_marks_that_do_not_fit_or_mark_nothing_are_refused(plain: AuditedRun) -> None:
    none = {s: np.zeros(len(plain.data[s].labels), dtype=bool) for s in plain.sites}
    short = {s: marks[:-1] for s, marks in none.items()}
    for marks in (none, short):
        with pytest.raises(ConfigError) as caught:
            draw_shadows(plain, Property(name="nothing", marks=marks), 20, 0)
        assert caught.value.code == "audit"


def test_rounds_whose_states_are_gone_are_left_out(plain: AuditedRun, tmp_path: Path) -> None:
    shutil.copytree(plain.path, tmp_path / "run")
    run = replace(plain, path=tmp_path / "run")
    for round_ in range(3):
        round_file(run.path / "server", round_).unlink()
    with pytest.raises(ConfigError) as caught:
        audit.infer(run, class_share(run), Choice(), shadows=20)
    assert caught.value.where == "record.keep"


def inferred(truth: np.ndarray, estimate: np.ndarray) -> audit.Inferred:
    n = len(truth)
    system = System(
        A=np.eye(n), b=np.zeros(n), mean_with=np.ones(n), var_with=np.ones(n), mean_without=-np.ones(n),
        var_without=np.ones(n),
    )  # fmt: skip
    found = replace(posterior(system, 0.5), mean=estimate, low=estimate - 0.05, high=estimate + 0.05)
    mixed = np.full((3, n), 0.3)
    return audit.Inferred(
        sites=tuple(f"s{i}" for i in range(n)), truth=truth, estimate=found, mixed=mixed,
        guess=0.3, high=0.9, system=system, accuracy=0.9, judged=20,
        seen=identifiability(np.eye(n), [f"s{i}" for i in range(n)]),
    )  # fmt: skip


def test_an_exact_estimate_is_found_and_a_mean_guess_is_not() -> None:
    truth = np.array([0.1, 0.5, 0.2, 0.6, 0.1, 0.4])
    exact, _ = audit.summary_rows(inferred(truth, truth), 0)
    assert (exact.strength.value, exact.finding) == (1.0, "found")
    guess, _ = audit.summary_rows(inferred(truth, np.full(6, 0.3)), 0)
    assert (guess.strength.value, guess.finding) == (0.0, "not found")
    near, *_ = audit.site_rows(inferred(truth, truth + 0.02))
    assert near.strength.value == pytest.approx(0.98)
    assert near.strength.high == 1.0
    assert near.finding == "found"


def test_estimates_order_sites_by_what_sums_say_and_the_control_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ESTIMATES, "PROLIN", (lambda system, _: prolin(system, steps=3000), 2))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    taking, truth = (rng.random((24, 6)) < 0.5).astype(float), np.array([0.1, 0.8, 0.2, 0.9, 0.15, 0.7])
    has, ones = truth > 0.5, np.ones(24)
    system = System(
        A=taking, b=taking @ np.where(has, 1.0, -1.0), mean_with=ones, var_with=0.3 * ones, mean_without=-ones,
        var_without=0.3 * ones,
    )  # fmt: skip
    rows = {row.measure: row for row in order_rows(system, 0.5, has.astype(float), 0)}
    assert set(rows) == {f"order, {name}" for name in ESTIMATES}
    for name, row in rows.items():
        assert row.strength.value == 1.0, name
        assert 0.2 < row.control.value < 0.8, name
    assert order(truth, truth) == 1.0
    assert order(-truth, truth) == 0.0
    assert order(np.ones(6), truth) == order(truth, np.ones(6)) == 0.5


def test_the_inversion_audit_finds_a_plain_gradients_feature_and_not_a_rounds(
    plain: AuditedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FEATURES": 4, "TOKENS": 2}.items():
        monkeypatch.setattr(inversion, name, value)
    monkeypatch.setattr(inversion_bench, "PUBLIC", 16)
    monkeypatch.setattr(inversion.rebuild_tokens, "__kwdefaults__", {"steps": 3})
    found = inversion.inversion(plain, Choice())
    rows = {(row.model, row.measure): row for row in found.rows}
    exact = rows["update: one image, plain gradient", "skill, feature"]
    assert exact.strength.value == pytest.approx(1.0, abs=1e-3)
    assert exact.finding == "found"
    assert exact.control.value < 0.5
    assert rows["update: 4 images, a round of 1 steps", "skill, feature"].strength.value < 0.9
    assert len(rows) == 8
    assert "pinned" in found.warnings[0]
    found.as_json()


def test_updates_that_nobody_sees_are_not_inverted(masked: AuditedRun) -> None:
    with pytest.raises(ConfigError) as caught:
        inversion.inversion(masked, Choice())
    assert caught.value.code == "audit"
