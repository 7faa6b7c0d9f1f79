"""The codes of errors: those in the source, and those on the page that explains them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import confrere
from confrere import errors

SOURCE = Path(confrere.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
CLASSES = {name for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, Exception)}
OWN = {name for name in CLASSES if "code" in vars(getattr(errors, name))} - {"ConfrereError"}
"""Classes with a code of their own; the others give one each time."""


def in_source() -> set[str]:
    found = {getattr(errors, name).code for name in OWN}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                found.add(str(node.value.value))
    return found - {""}


def on_page() -> set[str]:
    first = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return set(re.findall(r"`([a-z-]+)`", "\n".join(first)))
