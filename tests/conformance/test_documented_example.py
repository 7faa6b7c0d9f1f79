"""The method written out in docs/adding-a-method.md is a method."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_federation import tiny_run

from confrere.method import METHODS, Method, make
from confrere.tensors import digest

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


@pytest.fixture
def example() -> Iterator[type[Method]]:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code
    module = types.ModuleType("documented_example")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(code[1], module.__dict__)
    yield METHODS["pulled"]
    del METHODS["pulled"], sys.modules[module.__name__]


def test_without_a_pull_it_is_fedit_and_with_one_it_moves_less(example: type[Method], tmp_path: Path) -> None:
    fedit, _ = tiny_run(make("fedit"), tmp_path / "fedit")
    none, _ = tiny_run(example(mu=0.0), tmp_path / "none")  # type: ignore[call-arg]
    strong, _ = tiny_run(example(mu=1000.0), tmp_path / "strong")  # type: ignore[call-arg]
    assert digest(none) == digest(fedit)
    size = [sum(float(t.abs().sum()) for n, t in s["shared"].items() if "lora_B" in n) for s in (none, strong)]
    assert size[1] < size[0]
