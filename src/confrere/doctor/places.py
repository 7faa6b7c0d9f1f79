"""Where a run and the cache go: there, writable, with renames and locks that hold, and with room."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from confrere.doctor.finding import Finding, attempt
from confrere.errors import DataError, RunError
from confrere.prefix import cache_dir
from confrere.record.files import write_bytes
from confrere.record.run import Run


def out_findings(out: Path, *, new: bool) -> list[Finding]:
    """Return whether a run can be written to ``out``; ``new`` expects that none is there."""
    found: list[Finding] = []
    if new:
        attempt("out", Run(out).check_new, found)
    return found or [probe("out", out, RunError.exit_code)]


def cache_findings() -> tuple[list[Finding], bool]:
    """Return what stands about the cache, and whether it can be used."""
    found = probe("cache", cache_dir(), DataError.exit_code)
    return [found], found.level != "error"


@contextmanager
def other_cache(usable: bool) -> Iterator[None]:
    """Use another cache meanwhile where the real one cannot be written: the other checks go on."""
    if usable:
        yield
        return
    before = os.environ.get("CONFRERE_CACHE")
    with tempfile.TemporaryDirectory(prefix="confrere-doctor-") as folder:
        os.environ["CONFRERE_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["CONFRERE_CACHE"]
            else:
                os.environ["CONFRERE_CACHE"] = before


def probe(check: str, path: Path, code: int) -> Finding:
    """Write, rename over, read back, lock and delete a file where ``path`` is or would be made."""
    folder = _existing(path)
    kind = _file_system(folder)
    file = folder / f".tmp-doctor-{os.getpid()}"
    fix = "mend the permissions, or choose another place on a local disk"
    try:
        for content in (b"1", b"2"):
            write_bytes(file, content)
        kept = file.read_bytes()
        with FileLock(file.with_suffix(".lock"), timeout=5):
            pass
    except RunError as error:
        return Finding("error", check, f"{error.what}{kind}", str(path), fix, code)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        what = f"a file cannot be read back or locked: {getattr(error, 'strerror', None) or type(error).__name__}{kind}"
        return Finding("error", check, what, str(path), fix, code)
    finally:
        if folder.is_dir():
            for left in (file, file.with_suffix(".lock")):
                left.unlink(missing_ok=True)
    if kept != b"2":
        what = f"a file that was replaced still shows what it held before{kind}: a run could not be resumed"
        return Finding("error", check, what, str(path), "choose a local disk", code)
    return Finding("ok", check, f"can be written, renames and locks hold{kind}", str(path))


def room(check: str, path: Path, need: int, code: int, *, there: int = 0) -> Finding:
    """Return whether ``need`` more bytes fit where ``path`` is; ``there``: bytes it holds that may be some of them."""
    free = shutil.disk_usage(_existing(path)).free
    what = f"{_bytes(need)} needed at most, {_bytes(free)} free"
    if need <= free:
        return Finding("ok", check, what, str(path))
    if need <= free + there:
        return Finding("warning", check, f"{what}; some may be there already", str(path), "free space to be sure")
    fix = f"free {_bytes(need - free)} there, or choose another place"
    return Finding("error", check, what, str(path), fix, code)


def _existing(path: Path) -> Path:
    """Return ``path``, or what is there of it."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _file_system(folder: Path) -> str:
    """Return the kind of a file system that is not a plain local one, for a message."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError):
        return ""
    real = folder.resolve()
    holding = [(len(point), kind) for point, kind in mounts if real.is_relative_to(point)]
    kind = max(holding)[1] if holding else ""
    plain = kind.startswith(("ext", "xfs", "btrfs", "zfs", "tmpfs")) or not kind
    return "" if plain else f" (file system: {kind})"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
