"""The one guard that every path and name from a file passes before it is used."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from confrere.errors import DataError, RunError

SLUG = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
# A drive letter, a scheme such as file: or https:, or a home directory.
_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|~")
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


class Root:
    """A folder that no path may leave; links are followed, so a link that leads out is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._real = os.path.realpath(path)

    def join(self, name: str) -> Path:
        """Return the file called ``name``, a relative path with ``/``; whether it exists is not checked.

        Raises:
            ValueError: the reason, without the name (which may hold a patient's).
        """
        if not name or any(unicodedata.category(char) == "Cc" for char in name):
            raise ValueError("path is empty or holds control characters")
        if "\\" in name:
            raise ValueError("path holds a backslash; write / between folders")
        if name.startswith("/") or _ELSEWHERE.match(name):
            raise ValueError("path is absolute, a URL or a home directory; write it relative to the table")
        parts = name.split("/")
        if ".." in parts or any(_DEVICES.fullmatch(part.strip()) for part in parts):
            raise ValueError("path leaves its folder or names a device")
        if len(name) > 1024 or any(len(part.encode(errors="replace")) > 255 for part in parts):
            raise ValueError("path is too long")
        path = self.path / name
        if not self.holds(path):
            raise ValueError("link leads out of the folder")
        return path

    def holds(self, path: Path) -> bool:
        """Return whether ``path``, its links followed, lies in this folder."""
        real = os.path.realpath(path)
        return real == self._real or real.startswith(self._real.rstrip("/") + os.sep)


@contextmanager
def new_folder(out: Path, *, replaces: Callable[[Path], bool] = lambda path: False) -> Iterator[Path]:
    """Yield a draft that becomes ``out`` when all went well, so that ``out`` is whole, or as it was.

    Args:
        out: a folder that is not there, or holds nothing but what may go.
        replaces: whether what lies in ``out`` may go.

    Raises:
        DataError: ``out`` is a file or holds something else. RunError: it cannot be written.
    """
    _to_go(out, replaces)
    draft = out.with_name(f".{out.name}.part")
    try:
        with _writing(out):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        yield draft
        old = _to_go(out, replaces)  # again: that took its time
        with _writing(out):
            for path in old:
                path.unlink()
            if out.exists():
                out.rmdir()
            draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _to_go(out: Path, replaces: Callable[[Path], bool]) -> list[Path]:
    """Return what lies in ``out``, all of which may go."""
    with _writing(out):
        found = list(out.iterdir()) if out.is_dir() else []
    if (out.exists() and not out.is_dir()) or not all(map(replaces, found)):
        raise DataError(
            "the folder is not empty", where=str(out), fix="remove it, or choose another one", code="not-empty"
        )
    return found


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what, fix = f"cannot write the folder: {error.strerror}", "free space, mend the permissions or choose another"
        raise RunError(what, where=str(out), fix=fix, code="cannot-write") from error


def is_ignored(name: str) -> bool:
    """Return whether a file or folder is what operating systems leave behind."""
    return name.startswith(".") or name.lower() in {"thumbs.db", "desktop.ini", "__macosx"}


def slug(text: str) -> str:
    """Return the nearest valid site name, e.g. ``"St. Mary (old)"`` gives ``"st_mary_old"``."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9-]+", "_", plain).strip("_-")[:64] or "site"


RESERVED = "pooled"
"""The site that the pooled control trains; no hospital may be called so."""


def check_site_name(name: str, where: str = "") -> str:
    """Return ``name`` if it can name a site on every file system.

    Raises:
        DataError: anything but 1 to 64 of ``a-z 0-9 _ -``, or ``pooled``.
    """
    if name == RESERVED:
        raise DataError(
            f"{name!r} is the name of the pooled control", where=where, fix="rename the site", code="site-name"
        )
    if not SLUG.fullmatch(name) or _DEVICES.fullmatch(name):
        raise DataError(
            f"{name[:80]!r} cannot name a site: use 1 to 64 of a-z, 0-9, _ and -",
            where=where,
            fix=f"rename it, e.g. to {slug(name)!r}",
            code="site-name",
        )
    return name


def site_id(name: str, seen: dict[str, str], where: str = "") -> str:
    """Return the site name made of a folder's or cell's ``name``, e.g. ``st_mary`` of ``St. Mary``.

    ``seen`` maps the site names made so far to what they were made of.

    Raises:
        DataError: nothing is left of the name, or two names would become one site.
    """
    made = check_site_name(slug(name), where)
    first = seen.setdefault(made, name)
    if first != name:
        raise DataError(
            f"{first!r} and {name!r} would both be site {made!r}",
            where=where,
            fix="rename one of them",
            code="site-name",
        )
    return made


def check_class_name(name: str, where: str = "") -> str:
    """Return ``name`` if it can stand in tables and file names.

    Raises:
        DataError: empty, dots alone, longer than 64, control characters, slashes, or a spreadsheet formula.
    """
    bad = [char for char in name if unicodedata.category(char)[0] == "C" or char in "/\\"]
    if not name.strip(" .") or len(name) > 64 or bad or name[0] in "=+@":
        raise DataError(
            "a class name is empty, too long, or holds slashes, control characters or a formula",
            where=where,
            fix="use 1 to 64 printable characters",
            code="class-name",
        )
    return name


def fit_for_csv(name: str) -> str:
    """Return a path to the same file that is no formula to a spreadsheet."""
    return f"./{name}" if name[0] in "=+-@" else name
