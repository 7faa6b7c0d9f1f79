"""G3, B1, B2: every call of the file system in a round fails once; the committed state stands, and the run goes on.

K is counted, not written down. All calls with all errors are a slow test; a part of them runs always.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Faults, Stopped
from tiny_federation import SITES, backbone_of, initial_params, tiny_plan, tiny_run, tiny_sites

from confrere.errors import RunError
from confrere.federation.loop import federate
from confrere.federation.transport import InProcess
from confrere.method import make
from confrere.record.files import write_bytes
from confrere.record.run import Run
from confrere.tensors import digest

DONE, ROUNDS = 1, 2
CALLS = ("open", "write", "fsync", "replace", "mkdir", "unlink")
ERRORS = ("ENOSPC", "EIO", "EACCES", "EDQUOT", "EROFS")


def finish(folder: Path, rounds: int = ROUNDS) -> dict[str, str]:
    """Carry the run in ``folder`` on to the end of ``rounds``; return digests of all that it learned."""
    server, sites = tiny_run(make("fedopal"), folder, rounds=rounds, disk=True)
    personal = {name: digest(site.store.before(rounds + 1) or {}) for name, site in sites.items()}
    return {"server": digest(server), **personal}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with one committed round, whose second is to come."""
    folder = tmp_path_factory.mktemp("begun")
    tiny_run(make("fedopal"), folder, rounds=DONE, disk=True)
    return folder


@pytest.fixture(scope="module")
def whole(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, int]]:
    """Return what an undisturbed second round ends in, and how many calls of each kind it makes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(begun, folder)
    with Faults(under=folder) as faults:
        found = finish(folder)
    return found, {call: faults.counts[call] for call in CALLS}


def sweep(
    begun: Path, place: Path, counts: dict[str, int], errors: tuple[str, ...], stride: int = 1
) -> Iterator[tuple[str, Path]]:
    """Yield each fault of a round (or every so many of a kind) with a fresh copy of the run it is to hit."""
    for call, count in counts.items():
        for k in range(1, count + 1, stride):
            for error in errors:
                folder = place / f"{call}-{k}-{error}"
                shutil.copytree(begun, folder)
                yield f"{error}:{call}:{k}", folder
                shutil.rmtree(folder)


def hit(fault: str, folder: Path, last: str, expected: dict[str, str]) -> str:
    """Let one call fail, look at what stands, resume; return how the fault ended."""
    ended = "absorbed"
    with Faults(fault, under=folder):
        try:
            finish(folder)
        except RunError as error:
            said = str(error)
            named = str(folder) in said and os.strerror(getattr(errno, fault.partition(":")[0])) in said
            ended = "refused" if named else f"{fault}: not named: {said}"
        except OSError as error:
            ended = f"{fault}: {type(error).__name__}, no message"
    run = Run(folder)
    if run.last_round() < DONE or digest(run.server(DONE)) != last:
        return f"{fault}: the committed state is lost"
    if finish(folder) != expected:
        return f"{fault}: other bytes after resuming"
    return ended


def check(
    begun: Path, place: Path, whole: tuple[dict[str, str], dict[str, int]], errors: tuple[str, ...], stride: int = 1
) -> None:
    expected, counts = whole
    last = digest(Run(begun).server(DONE))
    ends = [hit(fault, folder, last, expected) for fault, folder in sweep(begun, place, counts, errors, stride)]
    wrong = [end for end in ends if end not in ("refused", "absorbed")]
    good = len(ends) - len(wrong)
    print(f"\nG3: {good} of {len(ends)} ({sum(counts.values())} calls a round: {counts}; errors {', '.join(errors)};")
    print(f"refused by name {ends.count('refused')}, absorbed {ends.count('absorbed')})")
    assert not wrong
    assert ends.count("refused") > 0.6 * len(ends)
    assert counts["replace"] == len(SITES) + 1  # each site and the server
    assert counts["fsync"] == 2 * counts["replace"] + 2  # file and directory; the journal grows twice in place


def test_every_fourth_call_of_a_round_may_fail(
    begun: Path, whole: tuple[dict[str, str], dict[str, int]], tmp_path: Path
) -> None:
    check(begun, tmp_path, whole, ("ENOSPC",), 4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_call_of_a_round_may_fail_with_any_error(
    begun: Path, whole: tuple[dict[str, str], dict[str, int]], tmp_path: Path
) -> None:
    check(begun, tmp_path, whole, ERRORS)


@pytest.mark.slow
def test_a_process_may_end_after_every_call_of_a_round(
    begun: Path, whole: tuple[dict[str, str], dict[str, int]], tmp_path: Path
) -> None:
    expected, counts = whole
    for fault, folder in sweep(begun, tmp_path, counts, ("stop", "stop-after")):
        if fault.startswith(("stop-after:open", "stop-after:mkdir")):
            continue  # a descriptor would be lost, which only a real kill may do; a folder that is there is not made
        with Faults(fault, under=folder), pytest.raises(Stopped):
            finish(folder)
        assert finish(folder) == expected, fault


@pytest.mark.parametrize("fault", [pytest.param("ENOSPC", marks=pytest.mark.slow), "stop-after"])
def test_the_first_writes_of_a_run(tmp_path: Path, fault: str) -> None:
    """From nothing to the end of round 1: each name in turn is refused, or the last that is given."""
    with Faults(under=tmp_path / "whole") as faults:
        expected = finish(tmp_path / "whole", 1)
    for k in range(1, faults.counts["replace"] + 1):
        folder = tmp_path / str(k)
        with Faults(f"{fault}:replace:{k}", under=folder), pytest.raises((RunError, Stopped)):
            finish(folder, 1)
        assert finish(folder, 1) == expected, k


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["EACCES", "stop", "stop-after"])
def test_the_deletion_of_old_states_may_fail_or_be_cut_short(tmp_path: Path, fault: str) -> None:
    """With ``record.keep`` 1: a state is only deleted when a newer one is committed, so nothing is lost with it."""
    method = make("fedopal")

    def go(folder: Path) -> dict[str, str]:
        run = Run(folder)
        sites = tiny_sites(method, stores={name: run.store(name) for name in SITES})
        server = method.init_server(initial_params(backbone_of(method), method, ""))
        final = federate(method, server, InProcess(sites), tiny_plan(method, keep=1), run)
        return {"server": digest(final), **{n: digest(s.store.before(4) or {}) for n, s in sites.items()}}

    with Faults(under=tmp_path / "whole") as faults:
        expected = go(tmp_path / "whole")
    assert faults.counts["unlink"] >= len(SITES)
    for k in range(1, faults.counts["unlink"] + 1):
        folder = tmp_path / str(k)
        with Faults(f"{fault}:unlink:{k}", under=folder), pytest.raises((RunError, Stopped)) as error:
            go(folder)
        if fault == "EACCES":
            assert str(folder) in str(error.value)
            assert "Permission denied" in str(error.value)
        assert Run(folder).server(Run(folder).last_round())
        assert go(folder) == expected, k


def test_a_disk_that_stays_full_loses_nothing(
    begun: Path, whole: tuple[dict[str, str], dict[str, int]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    before, journal = {f: f.read_bytes() for f in folder.rglob("*.safetensors")}, Run(folder).events()
    with Faults("ENOSPC:write:1+", under=folder):
        for _ in range(3):
            with pytest.raises(RunError, match=r"cannot write [\d,]+ bytes: No space left"):
                finish(folder)
    assert {f: f.read_bytes() for f in folder.rglob("*.safetensors")} == before
    assert Run(folder).events() == journal
    assert finish(folder) == whole[0]


def test_the_order_of_calls_survives_a_loss_of_power(tmp_path: Path) -> None:
    """Content reaches the disk before the name, the name before the directory; and a state before its journal line."""
    with Faults(under=tmp_path) as faults:
        write_bytes(tmp_path / "x", b"content")
    calls = [call for call, _ in faults.calls]
    assert calls == ["mkdir", "open", "write", "fsync", "replace", "open", "fsync"]
    assert faults.calls[3][1] == faults.calls[2][1]  # the file itself
    assert faults.calls[-1][1] == str(tmp_path)
    with Faults(under=tmp_path) as faults:
        tiny_run(make("fedopal"), tmp_path / "run", rounds=2, disk=True)
    done = [path for call, path in faults.calls if call == "replace" or (call == "fsync" and path.endswith(".jsonl"))]
    order = [Path(path).relative_to(tmp_path / "run").as_posix() for path in done]
    for round_ in (1, 2):
        server = order.index(f"server/{round_:05d}.safetensors")
        sites = [order.index(f"sites/{site}/{round_:05d}.safetensors") for site in SITES]
        assert max(sites) < server
        assert order[server + 1] == "events.jsonl"


def test_a_real_disk_that_is_full(tmp_path: Path, whole: tuple[dict[str, str], dict[str, int]]) -> None:
    """A file system of a few pages, with no injector: what it refuses is refused by name, and space lets it go on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        with pytest.raises(RunError, match="No space left on device") as error:
            finish(disk / "run", 5)
        assert str(disk) in str(error.value)
        run = Run(disk / "run")
        last = run.last_round()
        assert digest(run.server(last))
        subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
        again = finish(disk / "run", 5)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert again == finish(tmp_path / "roomy", 5)
