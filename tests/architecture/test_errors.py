"""Every error has a code, every code a line in docs/errors.md; tests/conftest.py checks that a test raises each."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from error_codes import CLASSES, OWN, SOURCE, in_source, on_page


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_error_has_a_code(path: Path) -> None:
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in CLASSES - OWN:
            assert "code" in {keyword.arg for keyword in call.keywords}, f"{path.name}:{call.lineno}"


def test_every_code_has_a_line_and_every_line_a_code() -> None:
    """G40, the half that is documentation."""
    assert on_page() == in_source()
    print(f"G40: {len(on_page())} of {len(in_source())} error codes have a line in docs/errors.md")
