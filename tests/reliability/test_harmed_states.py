"""B4, B5: a checkpoint that is cut, changed, or in another's place is refused by name, or read as what was written."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faults import Faults
from tiny_federation import SITES, tiny_run

from confrere.errors import RunError
from confrere.method import make
from confrere.record.run import Run
from confrere.seeds import numpy_generator
from confrere.tensors import digest

ROUNDS = 3
MUTATIONS = 1000
Draw = np.random.Generator


def _cut(content: bytes, draw: Draw, others: list[bytes]) -> bytes:
    return content[: int(draw.integers(len(content)))]


def _flip(content: bytes, draw: Draw, others: list[bytes]) -> bytes:
    changed = bytearray(content)
    for _ in range(int(draw.integers(1, 9))):
        changed[int(draw.integers(len(content)))] ^= 1 << int(draw.integers(8))
    return bytes(changed)


def _flip_in_header(content: bytes, draw: Draw, others: list[bytes]) -> bytes:
    length = 8 + int.from_bytes(content[:8], "little")
    changed = bytearray(content)
    changed[int(draw.integers(length))] ^= 1 << int(draw.integers(8))
    return bytes(changed)


def _zero(content: bytes, draw: Draw, others: list[bytes]) -> bytes:
    at, length = int(draw.integers(len(content))), int(draw.integers(1, 4096))
    return content[:at] + b"\0" * min(length, len(content) - at) + content[at + length :]


def _splice(content: bytes, draw: Draw, others: list[bytes]) -> bytes:
    other = others[int(draw.integers(len(others)))]
    at = int(draw.integers(min(len(content), len(other))))
    return content[:at] + other[at:]


def _grow(content: bytes, draw: Draw, others: list[bytes]) -> bytes:
    return content + draw.bytes(int(draw.integers(1, 64)))


def _swap(content: bytes, draw: Draw, others: list[bytes]) -> bytes:
    """Another round of the same owner, or another site; a site's file in the server's place: see HARMS."""
    return others[int(draw.integers(len(others)))]


def _number(content: bytes, draw: Draw, others: list[bytes]) -> bytes:
    """Change a digit of the header: a round, a weight, a metric, a shape or an offset."""
    length = 8 + int.from_bytes(content[:8], "little")
    digits = [i for i in range(8, length) if chr(content[i]).isdigit()]
    at = digits[int(draw.integers(len(digits)))]
    return content[:at] + str((int(chr(content[at])) + 1) % 10).encode() + content[at + 1 :]


KINDS: tuple[Callable[[bytes, Draw, list[bytes]], bytes], ...] = (
    _cut, _flip, _flip_in_header, _zero, _splice, _grow, _swap, _number,
)  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    tiny_run(make("fedopal"), folder, rounds=ROUNDS, disk=True)
    return folder


def of_server(file: Path) -> bool:
    return file.parent.name == "server"


def read(run: Run, file: Path) -> str:
    """Return a digest of all that the product reads of a checkpoint, through the functions it uses itself."""
    round_ = int(file.stem)
    if of_server(file):
        return digest(run.server(round_))
    store = run.store(file.parent.name)
    reply = store.reply(round_)
    if reply is None:
        return "absent"
    said = (reply.site, reply.round, reply.weight, sorted(reply.metrics.items(), key=str))
    return digest(store.before(round_ + 1) or {}) + digest(reply.state) + repr(said)


def test_a_thousand_mutations_are_refused_or_harmless(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(written, folder)
    run = Run(folder)
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == ROUNDS * len(SITES) + ROUNDS + 1
    contents = {file: file.read_bytes() for file in files}
    truth = {file: read(run, file) for file in files}
    ends: Counter[str] = Counter()
    for number in range(MUTATIONS):
        draw = numpy_generator(5, "mutation", number)
        kind, file = KINDS[number % len(KINDS)], files[int(draw.integers(len(files)))]
        others = [c for f, c in contents.items() if f != file and (not of_server(file) or of_server(f))]
        changed = kind(contents[file], draw, others)
        file.write_bytes(changed)
        try:
            found = read(run, file)
        except RunError as error:
            ends["refused" if str(file) in str(error) else f"{kind.__name__}: not named"] += 1
        else:
            ends["harmless" if found == truth[file] else f"{kind.__name__}: silently different"] += 1
        file.write_bytes(contents[file])
    good = ends["refused"] + ends["harmless"]
    print(f"\nB5: {good} of {MUTATIONS} (refused {ends['refused']}, read as written {ends['harmless']})")
    assert good == MUTATIONS, ends
    assert ends["refused"] > 0.9 * MUTATIONS


def finish(folder: Path, rounds: int = ROUNDS + 1) -> str:
    server, sites = tiny_run(make("fedopal"), folder, rounds=rounds, disk=True)
    return digest(server) + "".join(digest(s.store.before(rounds + 1) or {}) for _, s in sorted(sites.items()))


def outcome(folder: Path, expected: str, rounds: int = ROUNDS + 1) -> str:
    """Resume a harmed run; return how it ended."""
    try:
        found = finish(folder, rounds)
    except RunError as error:
        return "refused" if str(folder) in str(error) else f"not named: {error}"
    return "same" if found == expected else "silently different"


HARMS = [
    (harm, whose)
    for harm in ("cut", "flip", "swap round", "swap site", "swap run", "gone")
    for whose in ("server", "sites/a")
]


def harmed(newest: Path, harm: str, other_run: Path) -> bytes | None:
    """Return what is found in the place of a state."""
    content = bytearray(newest.read_bytes())
    if harm == "cut":
        return bytes(content[:-9])
    if harm == "flip":
        content[len(content) // 2] ^= 1
        return bytes(content)
    run = newest.parents[1] if newest.parent.name == "server" else newest.parents[2]
    others = {
        "swap site": run / "sites" / "b" / newest.name,
        "swap round": newest.with_name("00001.safetensors"),
        "swap run": other_run / newest.relative_to(run),
    }
    return others[harm].read_bytes() if harm in others else None


@pytest.fixture(scope="module")
def expected(written: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("expected") / "run"
    shutil.copytree(written, folder)
    return finish(folder)


@pytest.mark.parametrize(("harm", "whose"), HARMS)
def test_a_resume_from_a_harmed_newest_state(
    written: Path, expected: str, tmp_path: Path, harm: str, whose: str
) -> None:
    """B4: it falls back to the state before and ends in the same bytes, or refuses by name; it says which."""
    folder = tmp_path / "run"
    shutil.copytree(written, folder)
    if harm == "swap run":
        tiny_run(make("fedopal"), tmp_path / "other", rounds=ROUNDS, disk=True, seed=1)
    newest = folder / whose / f"{ROUNDS:05d}.safetensors"
    content = harmed(newest, harm, tmp_path / "other")
    if content is None:
        newest.unlink()
    else:
        newest.write_bytes(content)
    ended = outcome(folder, expected)
    assert ended in ("refused", "same")
    if ended == "same":
        said = [e for e in Run(folder).events() if e["event"] == "fallback"]
        assert said, "what was done again is in the journal"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_resumes_of_harmed_runs(written: Path, expected: str, tmp_path: Path) -> None:
    """The same through the whole loop: 100 runs with one harmed file each."""
    ends: Counter[str] = Counter()
    names = sorted(f.relative_to(written) for f in written.rglob("*.safetensors"))
    contents = {name: (written / name).read_bytes() for name in names}
    for number in range(100):
        draw = numpy_generator(6, "mutation", number)
        kind, name = KINDS[number % len(KINDS)], names[int(draw.integers(len(names)))]
        folder = tmp_path / "run"
        shutil.copytree(written, folder)
        others = [c for n, c in contents.items() if n != name and (not of_server(name) or of_server(n))]
        (folder / name).write_bytes(kind(contents[name], draw, others))
        ends[outcome(folder, expected)] += 1
        shutil.rmtree(folder)
    print(
        f"\nB5, resumed: {ends['refused'] + ends['same']} of 100 (refused {ends['refused']}, same bytes {ends['same']})"
    )
    assert set(ends) <= {"refused", "same"}, ends


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["states", "journal"])
def test_a_file_that_cannot_be_read_is_no_traceback(written: Path, expected: str, tmp_path: Path, whose: str) -> None:
    """B4: every opening of a file of the run fails once."""
    shutil.copytree(written, tmp_path / "count")
    with Faults(under=tmp_path / "count") as faults:
        finish(tmp_path / "count")
    files = [path for call, path in faults.calls if call == "read"]
    wrong = []
    for k, path in enumerate(files, 1):
        if path.endswith("events.jsonl") != (whose == "journal"):
            continue
        folder = tmp_path / str(k)
        shutil.copytree(written, folder)
        with Faults(f"EIO:read:{k}", under=folder):
            try:
                ended = outcome(folder, expected)
            except OSError as error:
                ended = type(error).__name__
        if ended not in ("refused", "same") or finish(folder) != expected:
            wrong.append(f"{k}: {ended} of {path}")
    assert len(files) > 4
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("lie", ["cut=40", "flip=3001"])
def test_a_disk_that_lied_is_found_out_when_the_state_is_read(tmp_path: Path, lie: str) -> None:
    """B4: the write succeeded, the bytes are wrong; every write of the first round in turn."""
    expected = finish(tmp_path / "whole", 2)
    with Faults(under=tmp_path / "count") as faults:
        finish(tmp_path / "count", 1)
    for k in range(1, faults.counts["write"] + 1):
        folder = tmp_path / str(k)
        with Faults(f"{lie}:write:{k}", under=folder):
            try:
                tiny_run(make("fedopal"), folder, rounds=1, disk=True)
            except RunError:
                continue  # found at once
        assert outcome(folder, expected, 2) in ("refused", "same"), k
