"""``confrere doctor`` finds seeded misconfigurations before round 1 (G8), and nothing where nothing is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from confrere import cli
from confrere.adapters.lora import LoraSpec
from confrere.backbones import load
from confrere.config import validate
from confrere.doctor import Finding, examine, verdict
from confrere.doctor import machine as machine_checks
from confrere.job import run_experiment

FAST = ["backbone.name=test-vit", "adapter.blocks=2", "train.batch_size=4"]
SITES, CLASSES = ("a", "b", "c"), ("benign", "malignant")
PERSON = "Zaphod-1952"


def draw(path: Path, label: int, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 120, (34, 36, 3), dtype=np.uint8)
    pixels[..., label] += 90
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good sites: two classes, eight patients a class, an image each."""
    root = tmp_path_factory.mktemp("data") / "hospitals"
    for s, site in enumerate(SITES):
        for label, name in enumerate(CLASSES):
            for k in range(8):
                draw(root / site / name / f"{PERSON}{s}{label}{k}__1.png", label, 100 * s + 10 * label + k)
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    load("test-vit", lora=LoraSpec(slots=(), blocks=1))  # imports transformers, for which no single finding is to blame
    return tmp_path_factory.mktemp("store")


@dataclass
class World:
    """A good experiment, to be spoilt: a copy of the data, overrides, an out and a patch of the machine."""

    data: Path
    tmp: Path
    patch: pytest.MonkeyPatch

    def __post_init__(self) -> None:
        self.overrides, self.out = list(FAST), self.tmp / "run"

    def findings(self) -> list[Finding]:
        return list(examine(self.data, self.overrides, out=self.out))

    def images(self, site: str = "a", label: str = "benign") -> list[Path]:
        return sorted((self.data / site / label).iterdir())

    def table(self, text: str) -> None:
        """Replace the folder by a table of its images, its lines given by ``{path}``-like fields of each."""
        lines = [
            text.format(path=f.relative_to(self.data.parent).as_posix(), site=site, label=label, n=n)
            for site in SITES
            for label in CLASSES
            for n, f in enumerate(self.images(site, label))
        ]
        self.data = self.data.parent / "table.csv"
        self.data.write_text("path,site,label,patient,split\n" + "\n".join(lines))


@pytest.fixture
def world(hospitals: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("CONFRERE_CACHE", str(store))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("CONFRERE_SIGNING_KEY", raising=False)
    shutil.copytree(hospitals, tmp_path / "hospitals")
    return World(tmp_path / "hospitals", tmp_path, monkeypatch)


@dataclass(frozen=True)
class Case:
    spoil: Callable[[World], object]
    check: str
    text: str
    code: int  # 0: a warning


SEEDED: dict[str, Case] = {}
FOUND: dict[str, float] = {}


def seeded(name: str, check: str, text: str, code: int = 0) -> Callable[[Callable[[World], object]], None]:
    def add(spoil: Callable[[World], object]) -> None:
        SEEDED[name] = Case(spoil, check, text, code)

    return add


for _name, _override, _check, _text, _code in (
    ("an unknown key", "train.lrr=1", "experiment", "unknown key", 2),
    ("a value out of range", "train.lr=7", "experiment", "less than or equal to 1", 2),
    ("a value that is no number", "train.lr=nan", "experiment", "finite number", 2),
    ("a wrong type", "train.steps=many", "experiment", "valid integer", 2),
    ("an unknown method", "method=fedopall", "experiment", "unknown method", 2),
    ("an option of another method", "method.lamda=1.0", "experiment", "no option 'lamda'", 2),
    ("an unknown control", "controls=['locla']", "experiment", "unknown method 'locla'", 2),
    ("a rank below the slots", "adapter.rank=1", "experiment", "cannot be divided", 2),
    ("a rank that is not divisible", "adapter.rank=7", "rank", "divided unequally", 0),
    ("ranks that the method cannot carry", "adapter.ranks={a=4}", "experiment", "different ranks", 2),
    ("an unknown site held out", "hold_out=nobody", "data", "no site 'nobody'", 3),
    ("a quorum above the sites", "federation.min_replies=4", "data", "only 3 sites are asked", 2),
    ("an attacker nobody knows", "attack.sites=['d']", "data", "no training site 'd'", 2),
    ("more attackers than a rule withstands", "federation={rule='median', byzantine=2}", "data", "needs 5 sites", 2),
    ("a backbone nobody knows", "backbone.name=test-vitt", "backbone", "no backbone called", 4),
    ("weights with another hash", "backbone.sha256='00'", "backbone", "SHA-256", 4),
    ("more blocks than there are", "adapter.blocks=9", "backbone", "9 blocks cannot be adapted", 4),
    ("a size that patches do not fill", "backbone.image_size=30", "backbone", "not a multiple", 4),
    ("a device that is not there", "engine.device='cuda:7'", "backbone", "no such CUDA device", 4),
    ("no validation images", "data.val=0", "data", "no image for validation", 0),
    ("sites smaller than a batch", "train.batch_size=64", "data", "fewer than a batch of 64", 0),
    ("more threads than cores", "threads=250", "processor", "wait for each other", 0),
    ("a tracker that is not installed", "track=['tensorboard']", "extras", "track = ['tensorboard']", 8),
):

    @seeded(_name, _check, _text, _code)
    def _(w: World, override: str = _override) -> None:
        w.overrides.append(override)
        installed = metadata.version

        def version(name: str) -> str:
            if name == "tensorboard":
                raise metadata.PackageNotFoundError(name)
            return installed(name)

        w.patch.setattr(metadata, "version", version)


@seeded("an unknown site among the ranks", "data", "no site 'd'", 2)
def _(w: World) -> None:
    w.overrides += ["method=hetlora", "controls=[]", "adapter.ranks={d=4}"]


@seeded("a file that is no TOML", "experiment", "not valid TOML", 2)
def _(w: World) -> None:
    w.data = w.tmp / "experiment-of-mine.toml"
    w.data.write_text("path = = 3\n")


@seeded("weights that were never fetched", "backbone", "not on this machine", 4)
def _(w: World) -> None:
    from huggingface_hub import constants

    w.patch.setattr(constants, "HF_HUB_CACHE", str(w.tmp / "hub"))
    w.overrides += ["backbone.name=dinov2-small"]


@seeded("held out from a method without a general model", "hold-out", "makes no general model", 0)
def _(w: World) -> None:
    w.overrides += ["hold_out=c", "method={name='fedopal', head='local'}", "controls=[]"]


@seeded("data that are not there", "places", "no such file or folder", 2)
def _(w: World) -> None:
    w.data = w.tmp / "nowhere"


@seeded("an empty folder of a site", "data", "no usable image at d", 3)
def _(w: World) -> None:
    (w.data / "d" / "benign").mkdir(parents=True)


@seeded("images beside folders", "data", "only folders are expected", 3)
def _(w: World) -> None:
    draw(w.data / "a" / f"{PERSON}.png", 0, 900)


@seeded("a label typed wrong at one site", "classes", "spelt nearly like 'malignant'", 0)
def _(w: World) -> None:
    (w.data / "b" / "malignant").rename(w.data / "b" / "maligant")


HIDDEN = ["method=fedit", "privacy.unit=record", "privacy.epsilon=1", "train.balance=none"]


@seeded("noise that leaves nothing to learn", "noise", "times as long as gradients could go", 0)
def _(w: World) -> None:
    w.overrides += [*HIDDEN, "privacy.delta=1e-3"]


@seeded("a delta that is too large", "noise", "is too large for", 2)
def _(w: World) -> None:
    w.overrides += [*HIDDEN, "privacy.delta=0.5"]


@seeded("one class only at a site", "data", "images of one class only", 0)
def _(w: World) -> None:
    shutil.rmtree(w.data / "b" / "malignant")


@seeded("files that are no images", "data", "1 files are left out", 0)
def _(w: World) -> None:
    w.images()[0].write_bytes(b"\x89PNG\r\n\x1a\n" + PERSON.encode())


@seeded("a pipe among images", "data", "not an ordinary file", 0)
def _(w: World) -> None:
    os.mkfifo(w.data / "a" / "benign" / "pipe.png")


@seeded("a patient in two splits", "data", "more than one of train, val and test", 3)
def _(w: World) -> None:
    w.table("{path},{site},{label}," + PERSON + "{site}{label},train")
    text = w.data.read_text()
    w.data.write_text(text[::-1].replace("niart", "tset", 1)[::-1])


@seeded("the same images at two sites", "data", "occur at more than one site", 0)
def _(w: World) -> None:
    for file in w.images()[:3]:
        shutil.copy(file, w.data / "b" / "benign" / f"copy-{file.name}")


@seeded("an out inside the data", "places", "written into the data", 2)
def _(w: World) -> None:
    w.out = w.data / "run"


@seeded("an out that holds something", "out", "not empty", 5)
def _(w: World) -> None:
    w.out.mkdir()
    (w.out / "thesis.doc").touch()


@seeded("a cache that cannot be written", "cache", "cannot write", 3)
def _(w: World) -> None:
    (w.tmp / "file").touch()
    w.patch.setenv("CONFRERE_CACHE", str(w.tmp / "file" / "cache"))


@seeded("no room on the disk", "run room", "0.0 MB free", 5)
def _(w: World) -> None:
    usage = namedtuple("usage", "total used free")
    w.patch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))


@pytest.mark.parametrize("name", SEEDED)
def test_a_seeded_misconfiguration_is_found(world: World, name: str) -> None:
    case = SEEDED[name]
    case.spoil(world)
    started = time.monotonic()
    findings = world.findings()
    took = time.monotonic() - started
    level = "error" if case.code else "warning"
    hits = [f for f in findings if (f.check, f.level) == (case.check, level) and case.text in f.what]
    assert hits, "\n".join(f.line() for f in findings)
    assert hits[0].exit_code == case.code
    assert hits[0].fix
    assert took < 10
    if not case.code:
        assert verdict(findings) == 0, "a warning stops nobody"
    assert PERSON not in "".join(f.line() for f in findings), "no finding names a file or a patient"
    assert not (world.out / "events.jsonl").exists()
    FOUND[name] = took


def test_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(SEEDED) == 42
    if len(FOUND) < len(SEEDED):
        pytest.skip("only some were looked for in this process")
    with capsys.disabled():
        print(f"\nG8: {len(FOUND)} of {len(SEEDED)}, the slowest in {max(FOUND.values()):.1f} s")


def test_a_good_experiment_has_nothing_to_mend(world: World) -> None:
    before = sorted(world.tmp.rglob("*"))
    findings = world.findings()
    assert {f.level for f in findings} == {"ok"}, "\n".join(f.line() for f in findings)
    checks = {f.check for f in findings}
    assert checks >= {"experiment", "out", "python", "packages", "extras", "processor", "memory", "cache", "data"}
    assert checks >= {"backbone", "cache room", "run room"}
    assert sorted(world.tmp.rglob("*")) == before, "doctor leaves nothing behind"


def test_a_run_takes_no_more_room_than_was_said(world: World, stopped: Path) -> None:
    world.overrides += ["rounds=2", "controls=['local']"]
    said = float(only(world.findings(), "run room").what.split()[0]) * 1e6
    wrote = sum(f.stat().st_size for f in stopped.rglob("*") if f.is_file())
    assert wrote < said < 10 * wrote + 5e6


@pytest.mark.parametrize("name", [name for name, case in SEEDED.items() if case.code])
@pytest.mark.slow
def test_a_run_refuses_what_doctor_calls_an_error(world: World, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same rules, not a second set: a run ends with the status that doctor gave, before round 1."""
    if name == "no room on the disk":
        pytest.skip("a run finds out when it writes")
    SEEDED[name].spoil(world)
    code = verdict(world.findings())
    world.patch.setattr(sys, "argv", ["confrere", "run", str(world.data), "--out", str(world.out), *world.overrides])
    if name == "weights that were never fetched":
        from huggingface_hub import constants

        world.patch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == code, capsys.readouterr().err
    assert not (world.out / "events.jsonl").exists()


def only(findings: list[Finding], check: str) -> Finding:
    return next(f for f in findings if f.check == check)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_file_system_that_cannot_rename_or_sync_is_noticed(world: World, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    world.patch.setattr(os, call, fail)
    found = only(list(examine(None)), "cache")
    assert (found.level, found.exit_code) == ("error", 3)
    assert "Invalid argument" in found.what


def test_a_replaced_file_that_still_shows_the_old_content_is_noticed(world: World) -> None:
    world.patch.setattr(Path, "read_bytes", lambda self: b"1")
    found = only(list(examine(None)), "cache")
    assert "still shows what it held before" in found.what


def test_locks_that_do_not_work_are_noticed(world: World) -> None:
    from confrere.doctor import places

    def fail(*_: object, **__: object) -> None:
        raise NotImplementedError

    world.patch.setattr(places, "FileLock", fail)
    assert "NotImplementedError" in only(list(examine(None)), "cache").what


@pytest.mark.parametrize(("name", "have"), [("pillow", "9.0"), ("jinja2", None), ("torch", "2.9.1+cpu")])
def test_packages_that_are_missing_or_too_old_are_named(world: World, name: str, have: str | None) -> None:
    installed = metadata.version

    def version(asked: str) -> str:
        if asked != name:
            return installed(asked)
        if have is None:
            raise metadata.PackageNotFoundError(asked)
        return have

    world.patch.setattr(metadata, "version", version)
    found = next(f for f in examine(None) if f.level == "error")
    assert name in found.what
    assert "pip install" in found.fix
    assert found.exit_code == 8


def test_an_old_python_is_refused_and_little_memory_warned_of(world: World) -> None:
    world.patch.setattr(machine_checks.platform, "python_version", lambda: "3.9.2")
    world.patch.setattr(machine_checks, "free_memory", lambda: 10**8)
    found = list(examine(None))
    assert only(found, "python").level == "error"
    assert only(found, "memory").level == "warning"
    world.patch.setattr(machine_checks, "free_memory", lambda: None)
    assert only(list(examine(None)), "memory").level == "ok"


def test_a_slow_processor_is_warned_of(world: World) -> None:
    world.patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert only(list(examine(None)), "processor").level == "warning"


def test_a_signing_key_that_others_may_read_is_an_error(world: World) -> None:
    (world.tmp / "key.pem").touch(mode=0o644)
    world.patch.setenv("CONFRERE_SIGNING_KEY", str(world.tmp / "key.pem"))
    assert only(list(examine(None)), "signing").level == "error"


def test_the_cache_of_another_run_may_be_the_room_that_lacks(world: World, store: Path) -> None:
    usage = namedtuple("usage", "total used free")
    world.patch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))
    world.patch.setenv("CONFRERE_CACHE", str(world.tmp / "cache"))
    assert only(world.findings(), "cache room").level == "error"
    (world.tmp / "cache" / "tokens-1.npy").write_bytes(bytes(3_000_000))
    assert only(world.findings(), "cache room").level == "warning"


@pytest.fixture(scope="module")
def stopped(hospitals: Path, tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A finished run; what doctor says of one that was stopped is the same."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(store))
        run_experiment(
            validate({"path": str(hospitals), "controls": ["local"], "backbone": {"name": "test-vit"}, "rounds": 2,
                      "threads": 1, "adapter": {"blocks": 2}, "train": {"steps": 1, "batch_size": 4}}), out,
        )  # fmt: skip
    return out


@pytest.fixture
def run(stopped: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONFRERE_CACHE", str(store))
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def test_a_run_that_can_go_on(run: Path) -> None:
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    findings = list(examine(run))
    assert {f.level for f in findings} == {"ok"}, "\n".join(f.line() for f in findings)
    assert [f.what.split(":")[0] for f in findings if f.check == "journal"] == [".", "controls/local"]
    assert "those the run began with" in only(findings, "resume").what
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before
    (run / "results.json").unlink()
    assert "round 2 of 2 is the last one" in only(list(examine(run)), "journal").what


def test_a_damaged_journal_is_an_error_with_its_line(run: Path) -> None:
    lines = (run / "events.jsonl").read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b'"round"', b'"rouns"', 1)
    (run / "events.jsonl").write_bytes(b"\n".join(lines))
    found = only(list(examine(run)), "journal")
    assert found.exit_code == 5
    assert "line 2" in found.where


@pytest.mark.parametrize("file", ["server/00002.safetensors", "sites/b/00002.safetensors"])
def test_a_damaged_state_costs_rounds_and_is_left_where_it_is(run: Path, file: str) -> None:
    (run / file).write_bytes((run / file).read_bytes()[:-3])
    found = only(list(examine(run)), "states")
    assert found.level == "warning"
    assert "earlier round" in found.what
    assert file in found.where
    assert (run / file).exists()
    (run / file).unlink()
    if file.startswith("server"):
        assert "missing" in only(list(examine(run)), "states").what


def test_what_makes_resume_refuse_is_listed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = json.loads((run / "machine.json").read_text())
    (run / "machine.json").write_text(json.dumps({**machine, "torch": "1.0"}))
    kept = json.loads((run / "federation.json").read_text())
    (run / "federation.json").write_text(json.dumps({**kept, "digest": "00"}))
    found = [f for f in examine(run) if f.check == "resume"]
    assert [f.exit_code for f in found] == [5, 5]
    assert "torch: 1.0 then" in found[0].what
    assert "the data changed" in found[1].what
    monkeypatch.setattr(sys, "argv", ["confrere", "resume", str(run)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 5


def test_a_run_without_its_data_still_has_its_journal_read(run: Path) -> None:
    text = (run / "experiment.toml").read_text()
    (run / "experiment.toml").write_text(text.replace("/hospitals", "/nowhere"))
    findings = list(examine(run))
    assert only(findings, "data").level == "error"
    assert only(findings, "journal").level == "ok"


def test_a_run_in_use_is_said(run: Path) -> None:
    from filelock import FileLock

    with FileLock(run / ".lock"):
        assert only(list(examine(run)), "lock").exit_code == 5


def test_the_command(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    def confrere(*arguments: object) -> tuple[int, str]:
        world.patch.setattr(sys, "argv", ["confrere", "doctor", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return int(done.value.code or 0), "".join(capsys.readouterr())

    code, text = confrere(world.data, *FAST, "--out", world.out)
    assert code == 0
    assert "0 errors, 0 warnings: a run can begin" in text
    code, text = confrere(world.data, *FAST, "--json", "hold_out=nobody")
    told = json.loads(text)
    assert code == told["exit_code"] == 3
    assert {"level", "check", "what", "where", "fix", "exit_code", "code"} == told["findings"][0].keys()
    assert confrere()[0] == 0
    assert confrere("train.lr=1")[0] == 2
    assert confrere(world.data, world.tmp)[0] == 2
