"""What a newcomer runs into: odd places, odd names, odd data, odd terminals, and things that were half done."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from test_commands import FAST, Cli, draw, tensors

ONE = [*FAST, "controls=[]"]
PLAIN = ["backbone.name=test-vit", *FAST[2:]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, store: Path) -> Cli:
    monkeypatch.setenv("CONFRERE_CACHE", str(store))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("CONFRERE_DEBUG", raising=False)
    return Cli(capsys, monkeypatch)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def hospitals_of(root: Path, sites: dict[str, dict[str, int]]) -> Path:
    for s, (site, classes) in enumerate(sites.items()):
        for label, (name, count) in enumerate(classes.items()):
            for k in range(count):
                draw(root / site / name / f"p{s}{label}{k // 2}__{k}.png", label, 1000 * s + 100 * label + k)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"a": {"x": 10, "y": 8}, "b": {"x": 8, "y": 8}}
    return hospitals_of(tmp_path_factory.mktemp("odd") / "data", sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.val=9"], "data.val"),
        (["data=3"], "data"),
        (["val=0.3"], "did you mean 'data.val'"),
        (["data.vall=0.3"], "did you mean 'val'"),
    ],
)
def test_check_reads_the_same_options_as_a_run(command: Cli, data: Path, options: list[str], message: str) -> None:
    assert message in command("data", "check", data, *options, code=2)


def test_check_splits_as_a_run_of_that_seed_would(command: Cli, data: Path) -> None:
    found = [json.loads(command("data", "check", data, "--json", f"split_seed={s}"))["digest"] for s in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("text", ["path = 3", "path = ['x']", "backbone = 3", "train = 'fast'", "method = 3", "x = "])
def test_a_file_of_wrong_types_is_a_wrong_experiment(command: Cli, data: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "e.toml").write_text(text)
    command("run", tmp_path / "e.toml" if "path" in text else data, "--config", tmp_path / "e.toml",
            "--backbone", "test-vit", "--out", tmp_path / "r", code=2)  # fmt: skip


def test_an_out_that_cannot_be_made_is_said(command: Cli, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in command("run", data, "--out", tmp_path / "file" / "run", *ONE, code=5)


def test_a_start_that_failed_can_be_repeated_in_the_same_place(command: Cli, data: Path, tmp_path: Path) -> None:
    command("run", data, "--out", tmp_path / "r", "--backbone", "test-vitt", code=4)
    command("run", data, "--out", tmp_path / "r", "--hold-out", "nobody", *ONE, code=3)
    command("run", data, "--out", tmp_path / "r", *ONE, "data.test=0.5")
    repeated = json.loads((tmp_path / "r" / "federation.json").read_text())
    command("run", data, "--out", tmp_path / "new", *ONE, "data.test=0.5")
    assert json.loads((tmp_path / "new" / "federation.json").read_text()) == repeated
    assert tensors(tmp_path / "new") == tensors(tmp_path / "r")


def test_names_with_brackets_are_printed_as_they_are(command: Cli, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run [/x] [red]"
    assert f"Report: {out}/report.html" in command("run", data, "--out", out, *ONE)
    images = tmp_path / "images"
    draw(images / "[bold]good.png", 0, 1)
    (images / "[red]bad.png").write_bytes(b"x")
    shutil.copy(images / "[bold]good.png", os.fsencode(images) + b"/\xff\xfe.png")
    text = command("predict", out, images, "--site", "a", "--out", tmp_path / "p [x].csv")
    assert "left out [red]bad.png" in text
    with (tmp_path / "p [x].csv").open(errors="surrogateescape") as file:
        assert {r["file"] for r in csv.DictReader(file)} == {"[bold]good.png", "\udcff\udcfe.png"}
    head = out / "adapters" / "a" / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-9])
    text = command("predict", out, images, "--site", "a", "--out", tmp_path / "q.csv", code=5)
    assert "head is missing or damaged" in text
    assert "Is a directory" in command("predict", out, images, "--site", "b", "--out", images, code=5)


@pytest.mark.parametrize(
    ("sites", "options"),
    [
        ({"solo": {"x": 12, "y": 9}}, []),
        ({"a": {"x": 1}, "b": {"x": 1, "y": 1}}, []),
        ({"a": {"x": 8}, "b": {"y": 8}, "c": {"z": 8}}, []),
        ({"a": {"x": 8, "y": 8}, "b": {"x": 8, "y": 8}}, ["data.val=0", "data.test=0"]),
        ({"a": {"x": 8, "y": 8}, "b 日本": {"x": 8, "y": 8}}, ["train.batch_size=999", "federation.fraction=0.1"]),
    ],
    ids=["one site", "two images", "disjoint classes", "nothing held back", "few sites a round"],
)
def test_meagre_data_end_in_a_report(
    command: Cli, tmp_path: Path, sites: dict[str, dict[str, int]], options: list[str]
) -> None:
    command("run", hospitals_of(tmp_path / "h", sites), "--out", tmp_path / "r", *FAST, *options)
    assert (tmp_path / "r" / "report.html").stat().st_size > 1000
    assert "NaN" not in (tmp_path / "r" / "results.json").read_text()


@pytest.mark.parametrize("kind", ["one class", "images under the site", "nothing", "file"])
def test_data_of_no_use_say_why(command: Cli, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "h"
    if kind == "one class":
        hospitals_of(root, {"a": {"x": 3}, "b": {"x": 3}})
    elif kind == "images under the site":
        draw(root / "a" / "1.png", 0, 1)
    elif kind == "nothing":
        root.mkdir()
    else:
        root.write_bytes(b"\x00\x01")
    assert "Fix" in command("run", root, "--out", tmp_path / "r", *ONE, code=3)
    command("data", "check", root, code=3)


def test_resume_refuses_another_split_and_a_broken_journal(command: Cli, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    command("run", data, "--out", out, *ONE)
    lines = (out / "splits.csv").read_text().splitlines()
    moved = [line.replace(",test", ",train", 1) if n == 1 or ",test" in line else line for n, line in enumerate(lines)]
    (out / "splits.csv").write_text("\n".join(moved) + "\n")
    assert "Traceback" not in command("resume", out, code=5)
    (out / "splits.csv").write_text("\n".join(lines) + "\n")
    (out / "results.json").unlink()
    (out / "events.jsonl").write_text("null\n" + (out / "events.jsonl").read_text())
    assert "line 1" in command("resume", out, code=5)


@pytest.mark.slow
def test_a_comparison_keeps_to_its_place_and_goes_on(command: Cli, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    arguments = ["compare", data, "--methods", "fedit,local", "--seeds", "0", "--no-controls", *PLAIN, "--out"]
    assert "outside PATH" in command(*arguments, data / "c", code=2)
    assert not (data / "c").exists()
    assert "no such file" in command("compare", tmp_path / "none", "--methods", "fedit", "--out", out, code=2)
    command(*arguments, out)
    whole = tensors(out)
    assert "Report: " in command(*arguments, out, "rounds=3")
    assert {path: digest for path, digest in tensors(out).items() if path in whole} == whole, "cells of their own"
    whole = tensors(out)
    cells = json.loads((out / "index.json").read_text())["cells"].items()
    part = out / "cells" / next(digest for digest, one in cells if one["method"] == "local")
    (part / "results.json").unlink()
    lines = (part / "events.jsonl").read_text().splitlines(keepends=True)
    second = next(number for number, line in enumerate(lines) if '"round": 2' in line)
    (part / "events.jsonl").write_text("".join(lines[:second]))
    command(*arguments, out, "--jobs", "2")
    assert tensors(out) == whole


def test_nothing_written_in_images_or_tables_gets_into_a_run(command: Cli, tmp_path: Path) -> None:
    rows, canaries = [["path", "label", "site", "patient", "name"]], []

    def plant(word: str) -> str:
        canaries.append(f"Trillian{word}{len(canaries):03d}")
        return canaries[-1]

    for k in range(24):
        patient, folder = plant("Patient"), tmp_path / "images" / plant("Folder")
        folder.mkdir(parents=True)
        image = Image.fromarray(np.random.default_rng(k).integers(0, 255, (36, 36, 3), dtype=np.uint8))
        if k % 2:
            note = PngImagePlugin.PngInfo()
            note.add_text(plant("Key"), plant("Text"))
            file = folder / f"{plant('File')}.png"
            image.save(file, pnginfo=note)
        else:
            exif = Image.Exif()
            exif[0x013B] = plant("Artist")
            file = folder / f"{plant('File')}.jpg"
            image.save(file, exif=exif, comment=plant("Comment").encode())
        rows.append([str(file.relative_to(tmp_path)), "xy"[k % 2], "ab"[k // 12], patient, plant("Column")])
    broken = tmp_path / "images" / f"{plant('Broken')}.png"
    broken.write_bytes(b"\x89PNG" + plant("Bytes").encode())
    rows.append([str(broken.relative_to(tmp_path)), "x", "a", plant("Patient"), plant("Column")])
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    (tmp_path / "table.csv").write_text(text.getvalue())
    printed = command("run", tmp_path / "table.csv", "--out", tmp_path / "r", *FAST)
    for file in (tmp_path / "r").rglob("*"):
        if file.is_file():
            printed += file.read_bytes().decode("latin-1")
    assert len(canaries) > 100
    assert not [c for c in canaries if c in printed]


def real(*arguments: object, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "confrere", *map(str, arguments)],
        capture_output=True,
        env={**os.environ, "COLUMNS": "80", **environment},
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def test_a_terminal_that_knows_ascii_only_and_is_narrow(store: Path, data: Path) -> None:
    code, out, err = real("methods", PYTHONIOENCODING="ascii", COLUMNS="12")
    assert (code, err) == (0, "")
    assert "fed" in out


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "confrere", "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read().decode()
    process.stderr.close()
    process.wait(60)
    assert "Traceback" not in err
    assert "internal error" not in err


def test_a_full_disk_behind_the_output_is_named() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "confrere", "methods"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr


def test_wrong_words_are_a_usage_error() -> None:
    code, _, err = real("runn")
    assert code == 2
    assert "Did you mean 'run'" in err
