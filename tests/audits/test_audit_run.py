"""``confrere audit`` on small runs: what it writes, signs, shows and refuses; a model that learnt by heart is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from noise_images import noise_images
from typer.testing import CliRunner

from confrere.audits.audit import AUDITS, Audit, Choice, Interval, Known, Row, find, known_audits, register
from confrere.audits.job import audit, check
from confrere.audits.references import halves
from confrere.audits.tapped import AuditedRun, open_run
from confrere.cli import app, main
from confrere.config import validate
from confrere.data.splits import TEST, TRAIN, VAL
from confrere.data.synthetic import make_microscopy
from confrere.errors import ConfigError, GuaranteeError, RunError
from confrere.job import run_experiment
from confrere.record.files import read_json, write_json
from confrere.report import write_report
from confrere.report.audits import audits_of
from confrere.verify import verify

MEMBERSHIP = ("rmia", "lira", "usage", "historical", "canary")
QUICK = Choice(patients=20)


def experiment(path: Path, method: str = "fedopal", **changes: Any) -> Any:
    values = {
        "path": str(path),
        "backbone": {"name": "test-vit", "image_size": 32},
        "adapter": {"blocks": 2, "rank": 4},
        "rounds": 1,
        "threads": 1,
        "workers": 1,
        "train": {"steps": 2, "batch_size": 4},
        "controls": [],
        "method": {"name": method},
    }
    return validate({**values, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("audits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(made / "cache"))
        make_microscopy(made / "data", seed=1, sites=2, images=(60, 60), size=32)
        run_experiment(experiment(made / "data"), made / "run")
        yield made


@pytest.fixture(scope="module")
def audited(folder: Path) -> AuditedRun:
    audit(folder / "run", only=MEMBERSHIP, choice=QUICK)
    return open_run(folder / "run")


def test_every_audit_writes_numbers_beside_their_control(folder: Path, audited: AuditedRun) -> None:
    for name in MEMBERSHIP:
        found = read_json(folder / "run" / "audits" / f"{name}.json")
        assert found["audit"] == name
        assert found["question"].endswith("?")
        assert found["run"]["round"] == 1
        assert {row["model"] for row in found["rows"]} == {"general", "update", "personalised"}
        for row in found["rows"]:
            assert row["finding"] in {"found", "unclear", "not found", "cannot be said"}
            assert row["control"]["value"] is not None or row["strength"]["value"] is None
        for word in ("compliant", "anonymous", "GDPR"):
            assert word not in json.dumps(found)
    assert verify(folder / "run")  # the run is as it was


def test_an_audit_repeats_and_its_references_are_found_again(folder: Path, audited: AuditedRun) -> None:
    trained = folder / "run" / "audits" / "references"
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*.safetensors")}
    first = read_json(folder / "run" / "audits" / "lira.json")
    audit(folder / "run", only=["lira"], choice=QUICK)
    assert {file: file.stat().st_mtime_ns for file in trained.rglob("*.safetensors")} == before
    assert read_json(folder / "run" / "audits" / "lira.json")["rows"] == first["rows"]


def test_no_patient_is_on_both_sides_and_each_is_outside_half_of_the_references(audited: AuditedRun) -> None:
    for pair in np.array_split(np.arange(4), 2):
        splits = [halves(audited, QUICK)[r] for r in pair]
        for site in audited.sites:
            data = audited.data[site]
            sides = [{g for g, s in zip(data.groups.tolist(), one[site], strict=True) if s == TRAIN} for one in splits]
            assert not sides[0] & sides[1]
            assert abs(len(sides[0]) - len(sides[1])) <= 12
            for one in splits:
                assert ((one[site] == VAL) == (data.split == VAL)).all()
            members = [np.mean(one[site][data.split == TRAIN] == TRAIN) for one in splits]
            others = [np.mean(one[site][data.split == TEST] == TRAIN) for one in splits]
            assert members == pytest.approx([0.5, 0.5], abs=0.2)
            assert others == pytest.approx([0.5, 0.5], abs=0.3)


def test_the_run_is_seen_as_the_server_saw_it(audited: AuditedRun) -> None:
    site = audited.sites[0]
    sent = audited.reply(site, 1)
    assert sent is not None
    assert not any(".personal." in name for name in sent["shared"])
    received = audited.broadcast(site, 1)
    assert received is not None
    assert received["shared"].keys() == sent["shared"].keys()
    assert audited.reply(site, 2) is None
    assert audited.broadcast(site, 3) is None
    assert audited.total(1) is None
    assert audited.guarantee is None
    models = {model: audited.params(site, model) for model in ("general", "update", "personalised")}
    assert all(params is not None for params in models.values())


def test_a_method_without_a_general_or_a_personal_model_leaves_less_to_attack(folder: Path) -> None:
    run_experiment(experiment(folder / "data", "local"), folder / "local")
    run = open_run(folder / "local")
    assert run.params(run.sites[0], "general") is None
    assert run.params(run.sites[0], "update") is None
    assert run.params(run.sites[0], "personalised") is not None
    run_experiment(experiment(folder / "data", "fedit"), folder / "fedit")
    run = open_run(folder / "fedit")
    assert run.params(run.sites[0], "personalised") is None  # it is the general one


@pytest.mark.slow
def test_masked_updates_leave_the_sum_to_attack(folder: Path) -> None:
    make_microscopy(folder / "three", seed=1, sites=3, images=(24, 24), size=32)
    masked = experiment(folder / "three", "fedit", secure={"aggregation": True}, gate={"norm": 0, "factor": 0})
    run_experiment(masked, folder / "masked")
    run = open_run(folder / "masked")
    assert run.reply(run.sites[0], 1) is None
    assert run.total(1) is not None
    assert run.params(run.sites[0], "update") is None
    found = audit(folder / "masked", only=["historical"], choice=QUICK)
    assert {row["model"] for row in found[0]["rows"]} == {"general"}


def test_what_a_run_promises_bounds_its_audits(audited: AuditedRun) -> None:
    said = {"unit": "record", "epsilon": 2.0, "delta": 1e-5, "simulation": False}
    guarded = replace(audited, results={"privacy": said})
    assert guarded.guarantee is not None
    found = find("rmia").function(guarded, QUICK)
    bounds = {row.model: row.bound for row in found.rows if row.subject == "all" and row.measure == "AUC"}
    assert bounds["general"] == bounds["update"]
    assert bounds["general"] is not None
    assert bounds["personalised"] is None
    seeded = replace(audited, results={"privacy": {**said, "simulation": True}})
    assert seeded.guarantee is None


def test_audits_are_signed_where_a_key_is_given(
    folder: Path, audited: AuditedRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    kinds = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    secret = tmp_path / "key.pem"
    secret.write_bytes(key.private_bytes(*kinds))
    secret.chmod(0o600)
    public = key.public_key().public_bytes(kinds[0], serialization.PublicFormat.SubjectPublicKeyInfo)
    monkeypatch.setenv("CONFRERE_SIGNING_KEY", str(secret))
    audit(folder / "run", only=["historical"], choice=QUICK)
    file = folder / "run" / "audits" / "historical.json"
    check(file)
    check(file, public)
    found = read_json(file)
    found["rows"][0]["strength"]["value"] = 0.0
    write_json(tmp_path / "forged.json", found)
    for forged in (tmp_path / "forged.json", folder / "run" / "audits" / "lira.json"):  # changed; never signed
        with pytest.raises(RunError, match="not as it was signed") as caught:
            check(forged)
        assert caught.value.code == "signature"


def test_the_page_has_a_section_on_what_attacks_learn(folder: Path, audited: AuditedRun) -> None:
    page = write_report(folder / "run").read_text()
    assert 'id="privacy"' in page
    for name in MEMBERSHIP:
        assert find(name).title in page
    assert "data-protection impact assessment" in page
    assert "A historical baseline" in page
    said = json.loads((folder / "run" / "report.json").read_text())["audits"]
    assert [one["name"] for one in said] == ["canary", "lira", "rmia", "usage", "historical"]  # the baseline last
    file = folder / "run" / "audits" / "lira.json"
    whole = file.read_text()
    try:
        for broken in ("{", json.dumps({"audit": "lira"}), json.dumps({"audit": "lira", "rows": [{}]})):
            file.write_text(broken)
            with pytest.raises(RunError, match=r"lira\.json|audits"):
                audits_of(folder / "run")
    finally:
        file.write_text(whole)


def test_the_command_says_what_it_found(folder: Path, audited: AuditedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("confrere.report.write_report", lambda run: run / "report.html")
    done = CliRunner().invoke(app, ["audit", str(folder / "run"), "--only", "historical", "--patients", "20"])
    assert done.exit_code == 0, done.output
    assert "Calibrated audit" in done.output
    assert "Warning: A historical baseline" in done.output
    assert "Report:" in done.output
    done = CliRunner().invoke(app, ["audit", str(folder / "run"), "--only", "historical", "--json"])
    assert json.loads(done.stdout)[0]["audit"] == "historical"


def test_a_strength_above_its_bound_ends_the_command_once_all_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_audits()
    written: list[Path] = []
    monkeypatch.setattr("confrere.report.write_report", lambda run: written.append(run) or run / "report.html")
    for bound, low in ((0.7, 0.6), (0.6, 0.7)):

        def told(run: AuditedRun, choice: Choice, bound: float = bound, low: float = low) -> Audit:
            found = {"model": "general", "measure": "AUC", "strength": Interval(0.75, low, 0.8), "bound": bound}
            rows = (Row(subject="all", **found), Row(subject="north", **found))
            return Audit(name="invented", rows=rows, means="m", control="c")

        monkeypatch.setitem(AUDITS, "invented", Known("Invented", "Is it?", told))
        for options in ([], ["--json"]):
            done = CliRunner().invoke(app, ["audit", str(folder / "run"), "--only", "invented", *options])
            if low <= bound:
                assert done.exit_code == 0, done.output
                continue
            assert isinstance(done.exception, GuaranteeError)
            assert (done.exception.code, done.exception.exit_code) == ("above-bound", 11)
            assert "2 strengths" in done.exception.what
            assert "invented AUC, general at north" in done.exception.what
            assert json.loads(done.stdout) if options else "above bound" in done.stdout
    assert len(written) == 4
    file = folder / "run" / "audits" / "invented.json"
    assert read_json(file)["rows"][0]["finding"] == "above bound"
    file.unlink()  # the page of this run has no such audit
    monkeypatch.setattr("sys.argv", ["confrere", "audit", str(folder / "run"), "--only", "invented"])
    with pytest.raises(SystemExit) as ended:
        main()
    file.unlink()
    assert ended.value.code == 11


def test_an_audit_that_does_not_apply_is_left_out_unless_it_was_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in set(known_audits()) - {"historical"}:
        monkeypatch.delitem(AUDITS, name)

    @register("elsewhere", title="Elsewhere", question="Does it apply?")
    def elsewhere(run: AuditedRun, choice: Choice) -> Audit:
        raise ConfigError("it does not apply", where="elsewhere", code="audit")

    said: list[str] = []
    monkeypatch.setattr("confrere.audits.job.known_audits", lambda: AUDITS)
    found = audit(folder / "run", choice=Choice(patients=20, notify=said.append))
    assert [one["audit"] for one in found] == ["historical"]
    assert any("elsewhere is left out: it does not apply" in line for line in said)
    with pytest.raises(ConfigError, match="does not apply"):
        audit(folder / "run", only=["elsewhere"])
    monkeypatch.delitem(AUDITS, "elsewhere")


def test_rubbish_is_refused_with_a_reason(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown audit 'lirra'") as caught:
        audit(folder / "run", only=["lirra"])
    assert (caught.value.code, caught.value.fix) == ("unknown-name", "did you mean 'lira'?")
    with pytest.raises(RunError) as stopped:
        audit(tmp_path)
    assert stopped.value.code == "no-run"
    copy = tmp_path / "run"
    shutil.copytree(folder / "run", copy, ignore=shutil.ignore_patterns("audits"))
    (copy / "job.json").write_text("{}")
    with pytest.raises(ConfigError, match="across hospitals") as caught:
        open_run(copy)
    assert caught.value.code == "audit"
    (copy / "job.json").unlink()
    masks = experiment(folder / "data").model_copy(update={"task": {"name": "segmentation"}})
    (copy / "experiment.toml").write_text(masks.toml())
    with pytest.raises(ConfigError):
        open_run(copy)
    shutil.copy(folder / "run" / "experiment.toml", copy)
    (copy / "results.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        open_run(copy)


def test_data_may_have_moved_but_not_changed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    assert open_run(folder / "run", tmp_path / "data").sites
    picture = next((tmp_path / "data").rglob("*.png"))
    picture.unlink()
    with pytest.raises((ConfigError, RunError, Exception), match="changed"):
        open_run(folder / "run", tmp_path / "data")


def test_sites_that_are_too_small_for_halves_or_canaries_are_refused(audited: AuditedRun) -> None:
    site = audited.sites[0]
    data = audited.data[site]
    one = replace(data, split=np.where(np.arange(len(data.split)) == 0, TRAIN, VAL).astype(np.int8))
    small = replace(audited, task=replace(audited.task, data={**audited.data, site: one}), memo={})
    with pytest.raises(ConfigError, match="too few patients"):
        halves(small, QUICK)
    with pytest.raises(ConfigError, match="too few patients, validation or test images"):
        find("historical").function(
            replace(small, task=replace(small.task, data=dict.fromkeys(audited.data, one))), QUICK
        )
    with pytest.raises(ConfigError, match="fewer than 8 canaries"):
        find("canary").function(audited, Choice(patients=2))


def test_rows_keep_their_words() -> None:
    row = Row(subject="all", model="general", measure="AUC", strength=Interval(0.6, 0.5, 0.7), chance=0.5)
    found = Audit(name="lira", rows=(row,), means="m", control="c").as_json()
    assert found["rows"][0]["finding"] == "not found"
    assert found["level"] == 0.95


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run on noise with labels drawn by lot: whatever it gets right it knows by heart."""
    made = tmp_path_factory.mktemp("by_heart")
    noise_images(made / "data", 120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(made / "cache"))
        train = {"steps": 60, "batch_size": 16, "lr": 1e-2}
        settings = {"train": train, "data": {"test": 0.4}, "adapter": {"blocks": 2, "rank": 16, "dropout": 0.0}}
        run_experiment(experiment(made / "data", rounds=3, **settings), made / "run")
        yield made / "run"


@pytest.mark.slow
def test_what_was_learnt_by_heart_is_found_and_the_placebo_stays_quiet(by_heart: Path) -> None:
    found = {one["audit"]: one for one in audit(by_heart, only=("rmia", "lira", "usage", "canary"))}
    for name in ("rmia", "lira"):
        area = {r["model"]: r for r in found[name]["rows"] if r["subject"] == "all" and r["measure"] == "AUC"}
        assert area["personalised"]["finding"] == "found", area["personalised"]
        assert area["personalised"]["strength"]["value"] > 0.8
        for row in area.values():
            assert row["control"]["low"] < 0.5 < row["control"]["high"], row
    used = {r["model"]: r for r in found["usage"]["rows"] if r["subject"] == "all"}["personalised"]
    assert used["strength"]["low"] > max(0.0, used["control"]["value"]), used
    assert used["control"]["low"] < 0.1, used  # few patients are its zero
    bound = {r["model"]: r for r in found["canary"]["rows"]}["personalised"]
    assert bound["strength"]["value"] > 0.1, bound
