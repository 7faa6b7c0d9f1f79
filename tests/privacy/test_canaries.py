"""No patient's name leaves by an artefact or a message (G28), no socket is opened (G38): real commands, looked at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from canaries import CELLS, CONTENT, FILES, FOLDERS, HOME, META, PEOPLE, Place, hits, hospitals, save, table
from nursery import Nursery

FAST = [
    "backbone.name=test-vit", "adapter.blocks=2", "rounds=2", "train.steps=2", "train.batch_size=4", "threads=1",
    "controls=['local']",
]  # fmt: skip
SHOWS_NAMES = {
    ("data check", "stdout"): "names the files that must be mended, for whoever holds them",
    ("predict", "stdout"): "names the files that were left out",
    ("predict", "stderr"): "names the files of which none could be read",
    ("predict", "csv"): "a row for every file that was asked about: its name is the key",
}
"""All that may name a file or patient: it is made for the user who holds the images, and no run needs it."""
SHOWS_PLACES = ("experiment.toml", "mlflow.db")
"""Files of a run that may say where on this machine something lies: resume and MLflow look there. So may terminals."""


def leaks(place: Place) -> list[str]:
    """Return where canaries are that may not be there, by name of the artefact and kind of canary."""
    found = []
    for verb, stream, content in place.said:
        if (verb, stream) not in SHOWS_NAMES:
            found += [f"{verb} {stream}: {c}" for c in hits(content, PEOPLE)]
    for path in place.artefacts():
        if path.suffix == ".csv" and path.parent.name == "predicted":
            continue
        name = str(path.relative_to(place.home))
        found += [f"{name}: {c}" for c in hits(path.read_bytes() + name.encode(errors="replace"), PEOPLE)]
        if path.name not in SHOWS_PLACES:
            found += [f"{name}: the place {c}" for c in hits(path.read_bytes(), [HOME])]
    return found


def sockets(place: Place) -> list[str]:
    return place.sockets.read_text().splitlines() if place.sockets.exists() else []


def tally(place: Place) -> str:
    return "\n".join(f"{v} {s}: {c.decode(errors='replace')[-600:]}" for v, s, c in place.said)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    folder = tmp_path_factory.mktemp("nursery")
    started = Nursery({**Place(folder).environment(), "PYTHONPATH": ""}, folder / "said")
    yield started
    started.close()


def test_there_are_enough_canaries() -> None:
    assert len(set(PEOPLE)) == len(PEOPLE) >= 50
    assert not [c for c in PEOPLE if hits(c.encode(), [o for o in PEOPLE if o != c])], "one is not part of another"


@pytest.mark.parametrize("kind", ["plain", "utf-16-le", "json", "base64", "upper", "sha256", "html-attribute"])
def test_the_search_finds_a_canary_in_any_form(kind: str) -> None:
    import base64
    import hashlib
    import json

    for canary in (FILES[0], next(c for c in PEOPLE if not c.isascii())):
        text = f"<svg>{canary}</svg>"
        content = {
            "plain": text.encode(), "utf-16-le": text.encode("utf-16-le"), "json": json.dumps(text).encode(),
            "base64": base64.b64encode(b"x" + text.encode()), "upper": canary.upper().encode(),
            "sha256": hashlib.sha256(canary.encode()).hexdigest().encode(),
            "html-attribute": canary.replace("-", "_").encode(),
        }[kind]  # fmt: skip
        assert canary in hits(b"\x00\xff" + content + b"\x00", PEOPLE)
    assert not hits(b"nothing of that kind", PEOPLE)


def test_the_canaries_are_in_the_files(tmp_path: Path) -> None:
    """A search that finds nothing in the artefacts means something only if there was something to find."""
    hospitals(tmp_path / "h")
    content = b"".join(f.read_bytes() + str(f).encode() for f in (tmp_path / "h").rglob("*") if f.is_file())
    assert len(hits(content, (*FILES, *META, *CONTENT[:3], FOLDERS[0]))) >= 20


LEAK = "import socket as k; s = k.socket(); s.bind(('127.0.0.1', 0)); s.listen(); k.create_connection(s.getsockname())"
SEEN = {"socket.bind", "socket.listen", "socket.connect"}


def test_the_watch_sees_sockets_and_the_search_sees_leaks(place: Place) -> None:
    subprocess.run([sys.executable, "-c", LEAK], env=place.environment(), check=True)
    assert {line.split()[0] for line in sockets(place)} >= SEEN
    assert leaks(place) == []
    (place.home / "run").mkdir()
    (place.home / "run" / "report.json").write_text(f'"{FILES[3]}", "{place.home}"')
    place.said.append(("run", "stderr", FILES[4].encode()))
    place.said.append(("predict", "stdout", FILES[5].encode()))
    assert [line.split(": ", 1)[1] for line in leaks(place)] == [FILES[4], FILES[3], f"the place {HOME}"]


@pytest.mark.slow
def test_the_watch_sees_sockets_of_forks(place: Place, nursery: Nursery) -> None:
    (place.root / "leak.py").write_text(LEAK)
    forked = nursery.start([], place.environment(), place.root / "leak.py")
    assert forked.communicate(60) == (b"", b"")
    assert {line.split()[0] for line in sockets(place)} >= SEEN


def listed(place: Place) -> Path:
    """Write a list of patients to forget, as the names of files have them."""
    path = place.home / "data" / f"{FOLDERS[0]}.csv"
    path.write_text(f"patient\n{FILES[0]}0\n{FILES[7]}0\n{FILES[4]}0\n")
    return path


def anonymised(place: Place) -> tuple[Path, Path]:
    """Write a plan and a table in which patients, and a column nobody asked for, are canaries; return both."""
    plan, cells = place.home / "data" / "plan.toml", place.home / "data" / "north.csv"
    plan.write_text('k = 4\ntarget = "y"\npatient = "who"\nnumeric.age.cuts = [0, 40, 80]\n')
    lines = [f"who,age,y,{CELLS[0]}", *(f"{CELLS[i % 14]}{i},{5 * i % 80},{i % 2},{CELLS[9]}" for i in range(40))]
    cells.write_text("\n".join(lines) + "\n")
    return plan, cells


def others(place: Place, data: Path, run: Path) -> list[tuple[object, ...]]:
    """Return the commands that ask, audit, forget, generalise and pre-train, as small as they come."""
    home, names, plain = place.home, listed(place), place.home / "fedit"
    audits = [word for name in ("lira", "usage", "historical") for word in ("--only", name)]
    return [
        ("methods",),
        ("backbones",),
        ("status", run),
        ("epsilon", "--unit", "record", "--rounds", "3", "--steps", "4", "--delta", "1e-4", "--batch", "32",
         "--sigma", "2", "--records", "200", "--parameters", "3000"),
        ("audit", run, *audits, "--references", "4", "--patients", "20"),
        ("forget", run, "--site", "south", "--out", home / "without-site"),
        ("forget", run, "--patients", names, "--out", home / "without-patients"),
        ("run", data, "--out", plain, *FAST[:-1], "controls=[]", "--method", "fedit"),
        ("forget", plain, "--patients", names, "--by", "neggrad:rounds=1", "--judge", "2", "--out", home / "nearly"),
        ("anonymise", *anonymised(place), "--out", home / "anonymised"),
        ("pretrain", data, "--out", home / "pretrained", "--backbone", "vit-nano", "--rounds", "1", "train.steps=1",
         "train.batch_size=4", "data.image_size=[16,16]", "threads=1", "controls=[]"),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_good_runs_name_nobody_and_open_no_socket(
    place: Place, nursery: Nursery, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = hospitals(place.home / "data" / "hospitals"), place.home / "run"
    rows, new = table(place.home / "data" / "table"), hospitals(place.home / "data" / "new", ("west",), 5)
    commands: list[tuple[object, ...]] = [
        ("doctor",),
        ("doctor", data, *FAST, "--out", run),
        ("data", "check", data),
        ("data", "check", rows, "--json"),
        ("run", data, "--out", run, *FAST),
        ("resume", run),
        ("verify", run),
        ("doctor", run),
        ("report", run),
        ("predict", run, data / "north", "--site", "north", "--out", place.home / "predicted" / "p.csv",
         "--overlay", "1"),
        ("run", rows, "--out", place.home / "of-table", *FAST[:-1], "controls=[]"),
        ("compare", data, "--methods", "fedit,local", "--seeds", "0", "--no-controls", "--jobs", "2",
         "--out", place.home / "compared", *FAST[:-1]),
        ("ranks", data, "--memory-mb", "64", *FAST[:2]),
        ("onboard", run, new, "--images", "4", "--steps", "2", "--out", place.home / "onboarded"),
    ]  # fmt: skip
    for name in filter(find_spec, ("tensorboard", "mlflow")):
        commands.append(("run", data, "--out", place.home / name, *FAST, f"track=['{name}']"))
    (place.home / "predicted").mkdir()
    first = len(commands)
    for number, command in enumerate([*commands, *others(place, data, run)]):
        place.nursery = None if number < first else nursery
        assert place.run(*command) == 0, f"{command[0]}\n{tally(place)}"
    files = list(place.artefacts())
    assert {f.suffix for f in files} >= {".safetensors", ".html", ".json", ".jsonl", ".md", ".toml", ".npy", ".png"}
    assert leaks(place) == []
    # urllib3, which only MLflow imports, asks once whether there is IPv6, by binding a socket that nobody may reach.
    assert [line for line in sockets(place) if "('::1', 0)" not in line] == []
    assert not [f for f in (place.home / "tmp").rglob("*") if f.is_file()], "temporary files are gone"
    with capsys.disabled():
        verbs = {verb for verb, _, _ in place.said}
        print(f"\nG28: 0 hits of {len(PEOPLE)} canaries in {len(files)} files of {number + 1} good calls,", end=" ")
        print(f"{len(verbs)} of the commands: {', '.join(sorted(verbs))}")
        print(f"G38: 0 sockets bound, listening or connected in {number + 1} calls")


Failure = Callable[[Place, Path], int | None]
FAILURES: dict[str, Failure] = {}


def failure(spoil: Failure) -> Failure:
    FAILURES[spoil.__name__] = spoil
    return spoil


def begin(place: Place, data: Path, *options: str) -> int | None:
    return place.run("run", data, "--out", place.home / "run", *FAST, *options)


def csv(place: Place, text: str, name: str = "t.csv", *options: str) -> int | None:
    """Run on a table of this text, the paths of which lead to nothing."""
    file = place.home / "data" / name
    file.write_text(text)
    place.run("doctor", file, *FAST)
    return begin(place, file, *options)


@failure
def every_image_of_a_site_is_broken(place: Place, data: Path) -> int | None:
    for file in (data / "south").glob("[!.]*/*.*"):
        file.write_bytes(f"{file.name} of {CONTENT[3]}".encode())
    return begin(place, data)


@failure
def broken_images_stop_the_run(place: Place, data: Path) -> int | None:
    return begin(place, data, "data.on_bad=stop")


@failure
def patients_have_folders(place: Place, data: Path) -> int | None:
    save(data / "north" / FOLDERS[2] / "benign" / "1.png", 0, 900)
    return begin(place, data)


@failure
def an_image_lies_beside_the_folders(place: Place, data: Path) -> int | None:
    save(data / "north" / f"{FILES[3]}.png", 0, 900)
    return begin(place, data)


@failure
def a_link_leads_out(place: Place, data: Path) -> int | None:
    (data / "north" / FOLDERS[3]).symlink_to(place.root)
    return begin(place, data)


@failure
def images_are_pipes_and_links(place: Place, data: Path) -> int | None:
    for file in (data / "south").glob("[!.]*/*.*"):
        file.unlink()
    os.mkfifo(data / "south" / "benign" / f"{FILES[4]}.png")
    (data / "south" / "benign" / f"{FILES[5]}.png").symlink_to("/etc/hostname")
    return begin(place, data)


@failure
def a_table_without_header(place: Place, data: Path) -> int | None:
    return csv(place, f"{FILES[0]}.png,{CELLS[1]},{CELLS[1]}\n{FILES[1]}.png,{CELLS[2]},{CELLS[3]}\n")


@failure
def a_table_whose_header_is_a_patient(place: Place, data: Path) -> int | None:
    return csv(place, f"path-{CELLS[1]},label,site\n{FILES[1]}.png,benign,north\n")


@failure
def a_table_with_ragged_lines(place: Place, data: Path) -> int | None:
    return csv(place, f"path,label,site\n{FILES[0]}.png,benign,north,{CELLS[4]}\n")


@failure
def a_table_with_a_broken_quote(place: Place, data: Path) -> int | None:
    return csv(place, f'path,label,site\n"{FILES[0]}.png"{CELLS[5]},benign,north\n')


@failure
def a_table_that_is_not_utf8(place: Place, data: Path) -> int | None:
    file = place.home / "data" / "t.csv"
    file.write_bytes(f"path,label,site\n{FILES[0]}.png,benign,north {CELLS[6]}".encode("ascii", "replace") + b"\xff\n")
    return begin(place, file)


@failure
def a_table_with_paths_that_lead_out(place: Place, data: Path) -> int | None:
    return csv(place, f"path,label,site\n../{FILES[0]}.png,benign,north\n/{FILES[1]}.png,malignant,north\n")


@failure
def a_table_of_files_that_are_gone(place: Place, data: Path) -> int | None:
    return csv(place, f"path,label,site,patient\n{FILES[0]}.png,benign,north,{CELLS[7]}\n{FILES[1]}.png,x,north,\n")


@failure
def a_table_with_wrong_labels_and_splits(place: Place, data: Path) -> int | None:
    return csv(place, f"path,label,site,split\n{FILES[0]}.png,={CELLS[8]},north,train\na.png,x,north,{CELLS[9]}\n")


@failure
def a_table_of_numbers_with_words(place: Place, data: Path) -> int | None:
    return csv(place, f"site,label,patient,age\nnorth,x,{CELLS[10]},3\nnorth,y,{CELLS[11]},{CELLS[12]}\n", "n.csv",
               "backbone.name=mlp")  # fmt: skip


@failure
def a_patient_in_two_splits(place: Place, data: Path) -> int | None:
    rows = table(place.home / "data" / "t")
    head, *lines = (line.split(",") for line in rows.read_text().splitlines())
    moved = [[*cells[:3], CELLS[1], *cells[4:], "test" if n == 0 else "train"] for n, cells in enumerate(lines)]
    rows.write_text("\n".join(",".join(cells) for cells in ([*head, "split"], *moved)))
    return begin(place, rows)


@failure
def a_table_of_patients_that_is_wrong(place: Place, data: Path) -> int | None:
    (data / "patients.csv").write_text(f"file,patient\n../{FILES[0]}.png,{CELLS[2]}\n{FILES[1]}.png,{CELLS[3]},9\n")
    return begin(place, data)


@failure
def a_manifest_with_a_folder_that_is_gone(place: Place, data: Path) -> int | None:
    text = f'[federation]\nname = "x"\n# {CELLS[4]}\n[[site]]\nname = "north"\npath = "{FOLDERS[4]}"\n'
    (data / "federation.toml").write_text(text)
    return begin(place, data)


@failure
def a_manifest_that_is_no_toml(place: Place, data: Path) -> int | None:
    (data / "federation.toml").write_text(f'[federation]\nname = "{CELLS[5]}\npath = {CELLS[6]}\n')
    return begin(place, data)


@failure
def a_manifest_with_unknown_keys(place: Place, data: Path) -> int | None:
    (data / "federation.toml").write_text(f'[federation]\nname = "x"\nowner = "{CELLS[7]}"\n')
    return begin(place, data)


@failure
def a_directory_in_use(place: Place, data: Path) -> int | None:
    from filelock import FileLock

    (place.home / "run").mkdir()
    with FileLock(place.home / "run" / ".lock"):
        return begin(place, data)


@failure
def losses_that_are_not_finite(place: Place, data: Path) -> int | None:
    return begin(place, data, "train.lr=1.0", "train.clip=1e30", "adapter.scale=1e30", "train.steps=8")


@failure
def a_damaged_checkpoint_and_journal(place: Place, data: Path) -> int | None:
    run = place.home / "run"
    assert begin(place, data, "controls=[]") == 0, tally(place)
    (run / "results.json").unlink()
    harmed = [*run.glob("server/*2.safetensors"), *run.glob("sites/*/*2.safetensors")]
    for file in harmed:
        file.write_bytes(file.read_bytes()[:-7] + CONTENT[4].encode())
    place.run("resume", run)
    (run / "events.jsonl").write_bytes(f"of {CONTENT[5]}\n".encode())
    code = place.run("resume", run) and place.run("doctor", run)
    for file in (*harmed, *run.rglob("*.damaged"), run / "events.jsonl"):  # what this wrote there itself is no leak
        file.unlink(missing_ok=True)
    return code


@failure
def data_that_changed_before_resume(place: Place, data: Path) -> int | None:
    assert begin(place, data, "controls=[]") == 0, tally(place)
    (place.home / "run" / "results.json").unlink()
    next((data / "north" / "benign").glob("*.tif")).unlink()
    place.run("doctor", place.home / "run")
    return place.run("resume", place.home / "run")


def _stopped(place: Place, data: Path, number: signal.Signals) -> int | None:
    run = place.home / "run"
    process = place.start("run", data, "--out", run, *FAST, "rounds=5000")
    limit = time.monotonic() + 120
    while not (run / "server" / "00001.safetensors").exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(number)
    return place.finish(process, "run")


@failure
def a_run_that_is_terminated(place: Place, data: Path) -> int | None:
    return _stopped(place, data, signal.SIGTERM)


@failure
def a_run_that_is_killed(place: Place, data: Path) -> int | None:
    return _stopped(place, data, signal.SIGKILL)


@failure
def an_out_inside_the_data(place: Place, data: Path) -> int | None:
    return place.run("run", data, "--out", data / "run", *FAST)


@failure
def predictions_of_what_is_no_image(place: Place, data: Path) -> int | None:
    run, images = place.home / "run", place.home / "data" / "new"
    assert begin(place, data, "controls=[]") == 0, tally(place)
    save(images / FOLDERS[5] / f"{FILES[6]}.png", 0, 1).write_bytes(f"of {CONTENT[6]}".encode())
    head = run / "adapters" / "north" / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-9])
    out = place.home / "predicted.csv"
    broken = place.run("predict", run, images, "--site", "north", "--out", out)
    return broken and place.run("predict", run, images, "--site", "south", "--out", out)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FAILURES)
def test_a_run_that_fails_names_nobody(tmp_path: Path, nursery: Nursery, name: str) -> None:
    place = Place(tmp_path, nursery)
    code = FAILURES[name](place, hospitals(place.home / "data" / "hospitals"))
    assert code != 0, tally(place)
    text = tally(place)
    assert "Traceback" not in text
    assert "internal error" not in text, text
    assert leaks(place) == [], text
    assert sockets(place) == []


@pytest.mark.slow
def test_the_goals(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(FAILURES) >= 20
    with capsys.disabled():
        print(f"\nG28: {len(FAILURES)} induced failures, {len(PEOPLE)} canaries each")


def test_the_list_of_what_shows_names_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "what-leaves-a-hospital.md").read_text()
    for verb, stream in SHOWS_NAMES:
        assert f"`confrere {verb}`" in page, (verb, stream)
    for name in SHOWS_PLACES:
        assert f"`{name}`" in page, name
