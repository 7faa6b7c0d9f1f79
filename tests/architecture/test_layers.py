"""The architecture, enforced: layers, single homes of libraries, forbidden loaders, sizes, public names."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import confrere

SOURCE = Path(confrere.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# A module imports only from lower rows, its own row's equals named here, or its own package.
ROWS = [
    {"tensors", "seeds", "errors"},
    {"adapters", "objectives", "metrics", "data"},
    {"backbones"},  # carries adapters
    {"learner"},
    {"method", "prefix"},
    {"methods"},
    {"record"},
    {"federation"},
    {"report", "verdicts", "export", "listing", "config"},
    {"job", "track", "demo", "progress"},
    {"compare", "predict"},
    {"cli"},
    {"__init__", "__main__"},
]
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
HOMES = {
    "peft": {"adapters/lora.py"},
    "timm": {"backbones/hub.py", "backbones/anatomy.py"},
    "jinja2": {"report/"},
    "matplotlib": {"report/"},
    "mlflow": {"track.py"},
    "flwr": set(),
}
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unit(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "confrere":
                yield from ((f"confrere.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_module_imports_only_from_below(path: Path) -> None:
    here = unit(path)
    for name, line in imports(path):
        if name.startswith("confrere."):
            there = name.split(".")[1]
            assert there == here or ROW[there] < ROW[here], f"{path.name}:{line} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_libraries_have_one_home_and_unsafe_ones_none(path: Path) -> None:
    place = str(path.relative_to(SOURCE))
    for name, line in imports(path):
        top = name.split(".")[0]
        assert top not in FORBIDDEN, f"{place}:{line} imports {name}"
        if top in HOMES:
            assert any(place.startswith(home) for home in HOMES[top]), f"{place}:{line} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_unsafe_call_and_no_assert(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno}: raise an error that teaches"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "torch.load", "yaml.load", "os.system"}, f"{path.name}:{node.lineno}"
            if called in {"np.load", "numpy.load"}:
                assert "allow_pickle=False" in ast.unparse(node), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", sorted((SOURCE / "methods").glob("*.py")), ids=lambda p: p.name)
def test_a_method_knows_no_engine(path: Path) -> None:
    allowed = {"tensors", "adapters", "method", "errors", "learner", "methods"}
    for name, line in imports(path):
        if name.startswith("confrere."):
            assert name.split(".")[1] in allowed, f"{path.name}:{line} imports {name}"
    assert len(path.read_text().splitlines()) <= 120


def test_files_and_functions_stay_small() -> None:
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_public_names_are_sorted_and_there() -> None:
    assert confrere.__all__ == sorted(confrere.__all__, key=lambda n: (n.isupper() is False, n))
    for name in confrere.__all__:
        assert getattr(confrere, name) is not None
    for path in FILES:
        module = ".".join(["confrere", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
        if not module.endswith("__main__"):
            assert importlib.import_module(module).__doc__, module


@pytest.mark.parametrize("module", ["confrere", "confrere.cli"])
def test_start_up_does_not_wait_for_torch(module: str) -> None:
    code = (
        f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'peft', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
