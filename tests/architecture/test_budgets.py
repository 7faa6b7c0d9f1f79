"""Small files, small functions, a small core: what does not fit a page is not read."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

import confrere

SOURCE = Path(confrere.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
FILE, METHOD_FILE, FUNCTION, CORE = 300, 120, 60, 700
CORE_FILES = (
    "tensors.py",
    "seeds.py",
    "method.py",
    "learner.py",
    "federation/site.py",
    "federation/transport.py",
    "federation/loop.py",
)
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(text: str) -> int:
    """Return how many lines hold code: no blank lines, comments or docstrings."""
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and ast.get_docstring(node) is not None:
                prose |= set(range(first.lineno, (first.end_lineno or 0) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - prose)


def test_lines_of_code_are_counted_without_prose() -> None:
    text = '"""Doc\n\nmore."""\n\n# comment\nX = 1\n\n\ndef f():\n    """Doc."""\n    return (\n        X\n    )\n'
    assert code_lines(text) == 5


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    limit = METHOD_FILE if path.parent.name == "methods" else FILE
    assert len(text.splitlines()) <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= FUNCTION, f"{node.name}, line {node.lineno}"


def test_the_core_stays_small() -> None:
    assert sum(code_lines((SOURCE / name).read_text()) for name in CORE_FILES) <= CORE
