"""What cannot be forgotten so is refused, with what can be done instead; nothing is half written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from forgetting_runs import SITE, trained

from confrere.data.paths import slug
from confrere.errors import ConfigError, ConfrereError, DataError, RunError
from confrere.fingerprint import stored_experiment
from confrere.forgetting.forget import forget
from confrere.forgetting.frame import refuse
from confrere.forgetting.way import parse
from confrere.forgetting.who import Whom, read_list, whom
from confrere.method import make

NOBODY = frozenset(["Erika Mustermann"])


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.mark.parametrize(
    ("who", "kind", "code", "fix"),
    [
        (Whom(site="brindly"), ConfigError, "unknown-site", "brindley"),
        (Whom(patients=NOBODY), DataError, "unknown-patient", "column"),
    ],
)
def test_whom_the_run_does_not_know(
    tmp_path: Path, run: Path, who: Whom, kind: type[ConfrereError], code: str, fix: str
) -> None:
    with pytest.raises(kind) as caught:
        forget(run, who, tmp_path / "new")
    assert caught.value.code == code
    assert fix in caught.value.fix
    assert "Mustermann" not in str(caught.value)
    assert not (tmp_path / "new" / "server").exists()
    assert not (tmp_path / "new" / "certificate.json").exists()


def test_one_site_or_one_list(tmp_path: Path) -> None:
    for arguments in ((None, None), ("a", tmp_path)):
        with pytest.raises(ConfigError, match="one site or one list") as caught:
            whom(*arguments)
        assert caught.value.code == "forgetting"
    assert whom("St Mary", None).site == slug("St Mary")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("name\np1\n", "table-header"),
        ("patient\n", "table-rows"),
        ("", "table-rows"),
        ('patient,a\n"",1\n', "table-rows"),
    ],
)
def test_a_list_that_names_nobody(tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        read_list(tmp_path / "list.csv")
    assert caught.value.code == code


def test_a_list_is_read_as_the_table_is(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("Lesion;note\n p1 ;x\np2;y\np1;z\n", encoding="utf-8-sig")
    assert read_list(tmp_path / "list.csv") == {"p1", "p2"}


@pytest.mark.parametrize(
    ("label", "code"),
    [
        ("rebild", "unknown-name"),
        ("neggrad:bta=1", "unknown-key"),
        ("neggrad:beta=nan", "value"),
        ("neggrad:beta=x", "value"),
        ("scrub:rounds=0", "value"),
        ("scrub:rounds=1.5", "value"),
        ("rebuild:rounds=1", "unknown-key"),
    ],
)
def test_ways_and_their_options(label: str, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(label)
    assert caught.value.code == code
    assert caught.value.fix


@pytest.mark.parametrize("by", ["neggrad:beta=1.5", "federaser:ratio=2", "purification:counted=7", "ssd:alpha=0"])
def test_options_out_of_range(tmp_path: Path, run: Path, by: str) -> None:
    with pytest.raises(ConfigError) as caught:
        forget(run, Whom(site=SITE), tmp_path / "new", by=by)
    assert caught.value.code == "value"


@pytest.mark.parametrize(
    ("method", "given", "why"),
    [
        ("fedit", {"masked": True}, "secure"),
        ("dpfed", {"noisy": True}, "epsilon"),
        ("fedit", {"noisy": True}, "epsilon"),
        ("fedit", {"target": "mask"}, "classes"),
        ("local", {}, "no one shared"),
        ("ditto", {}, "no one shared"),
        ("ridge", {}, "no one shared"),
        ("pooled", {}, "no one shared"),
        ("fedper", {}, "no general model"),
        ("fedper", {"patients": True}, "personal part"),
        ("fedopal", {"patients": True}, "personal part"),
    ],
)
def test_approximate_ways_are_for_one_shared_adapter(method: str, given: dict[str, Any], why: str) -> None:
    choices = {"masked": False, "noisy": False, "patients": False, "target": "label", **given}
    with pytest.raises(ConfigError, match=why) as caught:
        refuse(make(method), **choices)
    assert caught.value.code == "forgetting"
    assert "rebuild" in caught.value.fix


@pytest.mark.parametrize("method", ["fedit", "fedprox", "ffa-lora"])
def test_and_those_have_one(method: str) -> None:
    for patients in (False, True):
        refuse(make(method), masked=False, noisy=False, patients=patients, target="label")


def test_places_that_are_taken(tmp_path: Path, run: Path, data: Path) -> None:
    for out, code in ((run / "new", "forgetting"), (run.parent / "x", "not-empty"), (data / "x", "out-inside-data")):
        (run.parent / "x").mkdir(exist_ok=True)
        (run.parent / "x" / "file").touch()
        with pytest.raises(ConfrereError) as caught:
            forget(run, Whom(site=SITE), out)
        assert caught.value.code == code
    assert not (data / "x").exists()


def test_runs_that_are_not_here(tmp_path: Path, run: Path) -> None:
    with pytest.raises(RunError) as caught:
        forget(tmp_path / "none", Whom(site=SITE), tmp_path / "new")
    assert caught.value.code == "no-run"
    assert not (tmp_path / "none").exists()
    (run / "job.json").write_text("{}")
    with pytest.raises(RunError) as caught:
        forget(run, Whom(site=SITE), tmp_path / "new")
    assert caught.value.code == "across-hospitals"
    (run / "job.json").unlink()
    (run / "results.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        forget(run, Whom(site=SITE), tmp_path / "new")


def test_data_that_changed(tmp_path: Path, data: Path) -> None:
    place = Path(shutil.copytree(data, tmp_path / "data"))
    run = trained(place, tmp_path / "run", rounds=1)
    next((place / "ashford").rglob("*.png")).unlink()
    for who in (Whom(site=SITE), Whom(site="corvale")):
        with pytest.raises(ConfrereError) as caught:
            forget(run, who, tmp_path / "new")
        assert caught.value.code == "data-changed"
        shutil.rmtree(place / SITE, ignore_errors=True)


@pytest.mark.slow
def test_what_needs_the_forgotten_images_says_so(tmp_path: Path, data: Path) -> None:
    place = Path(shutil.copytree(data, tmp_path / "data"))
    run = trained(place, tmp_path / "run", rounds=1)
    shutil.rmtree(place / SITE)
    for options in ({"by": "scrub"}, {"retrain": 2}):
        with pytest.raises(ConfigError, match="not in the data") as caught:
            forget(run, Whom(site=SITE), tmp_path / "new", **options)
        assert caught.value.code == "forgetting"


def test_all_patients_of_a_site(tmp_path: Path, run: Path, data: Path) -> None:
    names = {picture.name.partition("__")[0] for picture in (data / SITE).rglob("*.png")}
    with pytest.raises(ConfigError, match="no image of the site would be left") as caught:
        forget(run, Whom(patients=frozenset(names)), tmp_path / "new")
    assert f"--site {SITE}" in caught.value.fix


def test_one_retrained_model_is_no_judge(tmp_path: Path, run: Path) -> None:
    with pytest.raises(ConfigError, match="no spread"):
        forget(run, Whom(site=SITE), tmp_path / "new", retrain=1)


@pytest.mark.slow
def test_a_method_without_one_model_of_classes_is_not_judged(tmp_path: Path, data: Path) -> None:
    run = trained(data, tmp_path / "run", rounds=1, method="ditto")
    with pytest.raises(ConfigError, match="could be measured") as caught:
        forget(run, Whom(site=SITE), tmp_path / "new", retrain=2)
    assert caught.value.code == "forgetting"


@pytest.mark.slow
def test_answers_that_are_not_kept(tmp_path: Path, data: Path) -> None:
    run = trained(data, tmp_path / "run", record={"keep": 1})
    with pytest.raises(ConfigError, match="not kept") as caught:
        forget(run, Whom(site=SITE), tmp_path / "new", by="federaser")
    assert (caught.value.code, "record.keep" in caught.value.fix) == ("forgetting", True)


@pytest.mark.slow
def test_a_site_that_was_held_out_taught_nothing(tmp_path: Path, data: Path) -> None:
    run = trained(data, tmp_path / "run", hold_out=SITE, rounds=1)
    assert stored_experiment(run).hold_out == SITE
    with pytest.raises(ConfigError, match="held out") as caught:
        forget(run, Whom(site=SITE), tmp_path / "new")
    assert caught.value.code == "forgetting"
