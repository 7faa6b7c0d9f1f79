"""A cell is of the source it runs: what is edited is trained anew, what no training runs is not."""

from __future__ import annotations

import ast
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from confrere.compare.source import OUTSIDE, PACKAGE, engine, source_of, with_imports
from confrere.method import METHODS

METHOD = """from dataclasses import dataclass
from one_helper import X
from confrere.method import Method
@dataclass(frozen=True, kw_only=True)
class Own(Method):
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_method.py").write_text(METHOD)
    (tmp_path / "one_helper.py").write_text("def f():\n    import other_helper\nX = 1\n")
    (tmp_path / "other_helper.py").write_text("Y = 1\n")
    (tmp_path / "no_helper.py").write_text("Z = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("own_method", "one_helper", "other_helper"):
        sys.modules.pop(name, None)


def digest(folder: Path) -> str:
    return source_of(importlib.import_module("own_method").Own)


@pytest.mark.parametrize(
    ("file", "counts"),
    [("own_method.py", True), ("one_helper.py", True), ("other_helper.py", True), ("no_helper.py", False)],
)
def test_a_method_of_ones_own_counts_with_what_it_imports(own: Path, file: str, counts: bool) -> None:
    before = digest(own)
    assert digest(own) == before
    with (own / file).open("a") as added:
        added.write("# edited\n")
    assert (digest(own) != before) == counts


@pytest.mark.parametrize(
    ("file", "counts"),
    [("adapters/residual.py", True), ("learner.py", True), ("new.py", True), ("cli.py", False),
     ("report/page.py", False), ("methods/fedit.py", False)],
)  # fmt: skip
def test_of_the_package_counts_what_a_training_runs(tmp_path: Path, file: str, counts: bool) -> None:
    for name in ("adapters/residual.py", "learner.py", "cli.py", "report/page.py", "methods/fedit.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("X = 1\n")
    before = engine.__wrapped__(tmp_path)
    assert engine.__wrapped__(tmp_path) == before
    (tmp_path / file).write_text("X = 2\n")
    assert (engine.__wrapped__(tmp_path) != before) == counts


def test_one_method_does_not_make_another_ones_cells_old() -> None:
    files = with_imports([PACKAGE / "methods" / "dual.py"])
    names = {file.name for file in files}
    assert "dual.py" in names
    assert "fedamp.py" not in names
    assert source_of(METHODS["fedit"]) != source_of(METHODS["local"])


def imported(file: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            place = PACKAGE.joinpath(*name.split(".")[1:])
            if name.startswith("confrere."):
                yield from (one for one in (place.with_suffix(".py"), place / "__init__.py") if one.is_file())


def test_no_training_runs_what_is_left_out() -> None:
    found, waiting = set(), [PACKAGE / "job.py"]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += imported(file)
    parts = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in found}
    assert {"learner", "adapters", "federation", "metrics"} <= parts
    assert parts & OUTSIDE == {"methods"}


def test_it_costs_little() -> None:
    def once(name: str) -> float:
        start = time.process_time()
        engine.__wrapped__()
        source_of(METHODS[name])
        return time.process_time() - start

    for name in ("fedopal", "fedmosaic", "hilora"):  # hilora inherits from abc.ABC, and the standard library is large
        assert min(once(name) for _ in range(3)) < 0.05, name
