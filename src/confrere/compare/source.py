"""The source that decides a training's result, as a digest: an edited file has no version that would tell."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from confrere.method import Method

PACKAGE = Path(__file__).parents[1]
OUTSIDE = {
    "__main__", "arguments", "cli", "commands", "compare", "demo", "doctor", "methods", "onboard", "predict",
    "progress", "ranks", "report", "track", "verify",
}  # fmt: skip
"""Parts of the package that no training runs; of ``methods`` each training runs its own."""


def source_of(cls: type[Method]) -> str:
    """Return the digest of all of the package that a training runs, and of the files of its method.

    The latter are the files of the method's class and of those it inherits from, and the files beside them that
    they import, those that these import, and so on. Comments count: to look further than the bytes is not worth it.
    """
    sha = hashlib.sha256(engine().encode())
    for file in sorted(with_imports(_files(cls))):
        sha.update(file.read_bytes())
    return sha.hexdigest()


@cache
def engine(package: Path = PACKAGE) -> str:
    """Return the digest of every module of the package that is not :data:`OUTSIDE` a training, by name."""
    sha = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        place = file.relative_to(package)
        if place.parts[0].removesuffix(".py") not in OUTSIDE:
            sha.update(f"{place.as_posix()}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return sha.hexdigest()


def with_imports(files: Iterable[Path]) -> set[Path]:
    """Return the files and all they import, transitively, from their own folders."""
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _beside(file)
    return found


def _files(cls: type[Method]) -> Iterator[Path]:
    for one in cls.__mro__:
        file = getattr(sys.modules.get(one.__module__), "__file__", None)
        python = one.__module__.partition(".")[0] in sys.stdlib_module_names  # abc.ABC, object
        if file and not python and one.__module__ != "confrere.method":
            yield Path(file)


def _beside(file: Path) -> Iterator[Path]:
    """Return the files in the same folder whose names the imports of ``file`` hold."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        for name in names:
            path = file.with_name(f"{name.rpartition('.')[2]}.py")
            if path.is_file():
                yield path
