"""What users import and type: there, sorted, documented, and quick to start."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import confrere

SOURCE = Path(confrere.__file__).parent
MODULES = sorted(
    ".".join(["confrere", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if path.stem != "__main__"
)
SLOW = ("torch", "transformers", "peft", "timm", "sklearn", "scipy", "matplotlib", "pydantic")
HELP = (
    "import contextlib, sys; sys.argv = ['confrere', '--help']\n"
    "from confrere.cli import main\n"
    "with contextlib.suppress(SystemExit): main()"
)


def test_public_names_are_those_that_are_declared() -> None:
    """``__all__``, the table of homes and the imports for type checkers name the same things."""
    assert set(confrere.__all__) == set(confrere._HOMES)
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {name: f"confrere.{home}" for name, home in confrere._HOMES.items()}
    for name, home in confrere._HOMES.items():
        assert getattr(confrere, name) is getattr(importlib.import_module(f"confrere.{home}"), name)


def test_public_names_are_sorted_and_there() -> None:
    # Constants, then classes, then functions: the order that ruff keeps.
    kinds = sorted(confrere.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert confrere.__all__ == kinds
    assert len(set(confrere.__all__)) == len(confrere.__all__)
    for name in confrere.__all__:
        assert getattr(confrere, name).__doc__
    with pytest.raises(AttributeError, match="no_such_name"):
        confrere.no_such_name  # noqa: B018


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports_and_says_what_it_is(module: str) -> None:
    assert importlib.import_module(module).__doc__


@pytest.mark.parametrize("code", ["import confrere", "import confrere.cli", HELP], ids=["import", "cli", "help"])
def test_start_up_does_not_wait_for_heavy_packages(code: str) -> None:
    check = f"\nimport sys\nprint('LOADED', *(m for m in {SLOW!r} if m in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "LOADED"
    if code is HELP:
        assert "confrere" in done.stdout
        assert "compare" in done.stdout
