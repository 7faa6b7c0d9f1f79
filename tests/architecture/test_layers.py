"""The architecture, enforced: layers, single homes of libraries, forbidden loaders."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import confrere

SOURCE = Path(confrere.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# A module imports only from lower rows, its own row's equals named here, or its own package.
ROWS = [
    {"tensors", "seeds", "errors", "choices", "intake"},
    {"adapters", "objectives", "optimiser", "metrics", "data", "fusion", "pictures", "survival", "privacy"},
    {"networks"},  # what networks that are trained whole have in common
    {"pretext"},
    {"tasks"},  # heads, losses and metrics of each kind of answer
    {"backbones"},  # carries adapters
    {"tokenset"},
    {"learner", "centre"},
    {"noisy"},
    {"method", "prefix"},
    {"methods", "initial"},
    {"record"},
    {"federation"},
    {"consistency"},
    {"report", "verdicts", "export", "listing", "config"},
    {"pretrain", "examination", "fingerprint", "opening", "arguments", "picture_folders"},
    {"predict_volumes", "predict_boxes"},
    {"job", "track", "demo", "progress"},
    {"compare", "predict", "verify", "doctor"},
    {"onboard", "ranks", "consortium", "watch", "anonymise", "audits"},
    {"flower", "forgetting"},  # which audits judge
    {"console"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
]
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
HOMES = {
    "peft": set(),  # its names and format, not its import: two seconds of every start
    "monai": {"metrics/masks.py", "backbones/volumetric.py"},
    "nibabel": {"data/grid.py"},
    "dp_accounting": {"privacy/"},
    "pydicom": {"data/dicom.py", "data/dicom_checks.py", "data/series.py"},
    "timm": {"backbones/"},
    "transformers": {"backbones/"},
    "onnx": {"backbones/"},
    "jinja2": {"report/"},
    "matplotlib": {"report/"},
    "mlflow": {"track.py"},
    "tensorboard": {"track.py"},
    "optuna": {"compare/tuning.py"},
    "cryptography": {"record/signing.py", "consortium/", "federation/secure/"},
    "prometheus_client": {"watch/"},
    "starlette": {"watch/", "flower/front.py"},
    "uvicorn": {"watch/", "flower/front.py"},
    "typer": {
        "cli.py",
        "console.py",
        "commands.py",
        "anonymise/commands.py",
        "audits/commands.py",
        "consortium/commands.py",
        "watch/commands.py",
        "flower/commands.py",
        "forgetting/commands.py",
    },
    "flwr": {"flower/"},
}
FORBIDDEN = {"yaml", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "__import__", "torch.load", "yaml.load", "os.system"}
# What a method may know: its own tensors, and what `update` is given.
OF_METHODS = {"tensors", "adapters", "backbones", "method", "errors", "learner", "methods", "tokenset", "seeds"}
OF_METHODS |= {"privacy"}  # where noise comes from


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
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path.name}:{node.lineno}: write imports from confrere in full"
            assert not node.level, f"{path.name}:{node.lineno}: write imports from confrere in full"
            if node.module == "confrere":
                yield from ((f"confrere.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


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
        assert name != "torch.load", f"{place}:{line} imports {name}"
        if top in HOMES:
            assert any(place.startswith(home) for home in HOMES[top]), f"{place}:{line} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_unsafe_call_and_no_assert(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno}: raise an error that teaches"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in UNSAFE_CALLS, f"{path.name}:{node.lineno} calls {called}"
            if called in {"np.load", "numpy.load"}:
                assert "allow_pickle=False" in ast.unparse(node), f"{path.name}:{node.lineno}"
            assert "allow_pickle=True" not in ast.unparse(node), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", sorted((SOURCE / "methods").glob("*.py")), ids=lambda p: p.name)
def test_a_method_knows_no_engine(path: Path) -> None:
    for name, line in imports(path):
        top = name.split(".")[0]
        assert top in {"confrere", "torch"} | sys.stdlib_module_names, f"{path.name}:{line} imports {name}"
        if top == "confrere":
            assert name.split(".")[1] in OF_METHODS, f"{path.name}:{line} imports {name}"


def test_every_module_has_a_row() -> None:
    assert {unit(path) for path in FILES} == set(ROW)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_dangerous_libraries_go_by_the_name_that_is_searched_for(path: Path) -> None:
    """``import torch as t; t.load(f)`` and ``from numpy import load`` would pass the test above."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in {"torch", "numpy", "os"}:
                    assert alias.asname == {"numpy": "np"}.get(alias.name), f"{path.name}:{node.lineno}"
        elif isinstance(node, ast.ImportFrom) and node.module in {"torch", "numpy", "os", "builtins"}:
            taken = {alias.name for alias in node.names}
            assert not taken & {"load", "system", "eval", "exec"}, f"{path.name}:{node.lineno}"
        elif isinstance(node, ast.keyword):
            assert not (node.arg == "shell" and ast.unparse(node.value) != "False"), f"{path.name}: shell"
            assert not (node.arg == "weights_only" and ast.unparse(node.value) == "False"), f"{path.name}: unpickles"


def test_the_rules_notice_what_breaks_them(tmp_path: Path) -> None:
    """A test of the tests: what they must find, they find."""
    bad = tmp_path / "bad.py"
    bad.write_text("import pickle\nfrom torch import load\nfrom confrere.cli import main\nimport peft.utils as p\n")
    found = {name for name, _ in imports(bad)}
    assert {"pickle", "torch.load", "confrere.cli", "confrere.cli.main", "peft.utils"} <= found
    bad.write_text("from . import x\n")
    with pytest.raises(AssertionError, match="in full"):
        list(imports(bad))
    bad.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pickle\n")
    assert "pickle" not in {name for name, _ in imports(bad)}
    bad.write_text("def f(x):\n    assert x\n")
    with pytest.raises(AssertionError, match="teaches"):
        test_no_unsafe_call_and_no_assert(bad)
    for line in ("eval('1')", "torch.load(f)", "np.load(f)", "np.load(f, allow_pickle=True)", "yaml.load(f)"):
        bad.write_text(line + "\n")
        with pytest.raises(AssertionError):
            test_no_unsafe_call_and_no_assert(bad)
    for line in ("import torch as t", "from numpy import load", "run(x, shell=True)"):
        bad.write_text(line + "\n")
        with pytest.raises(AssertionError):
            test_dangerous_libraries_go_by_the_name_that_is_searched_for(bad)
