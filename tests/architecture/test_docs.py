"""The documentation says what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from confrere import cli, errors
from confrere.backbones import REGISTRY
from confrere.config import Experiment
from confrere.listing import method_page, method_rows

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def test_the_list_of_methods_is_that_of_the_registry() -> None:
    page = (ROOT / "docs" / "methods" / "index.md").read_text()
    assert page == method_page(), "run: python -m confrere.listing docs/methods/index.md"
    rows = {row["name"]: row for row in method_rows()}
    for name, sends, keeps, needs in re.findall(
        r"\| \[[^]]+\]\(docs/methods/([^)]+)\.md\) \| ([^|]*) \| ([^|]*) \| (\w+) \|", (ROOT / "README.md").read_text()
    ):
        row = rows[name]
        assert (sends, keeps, needs) == (*(", ".join(row[k]) or "nothing" for k in ("sends", "keeps")), row["needs"])


def test_every_method_has_a_page_with_its_differences() -> None:
    for row in method_rows():
        page = (ROOT / "docs" / "methods" / f"{row['name']}.md").read_text()
        assert f"`{row['name']}`" in page
        for heading in ("What.", "Maths.", "Sent:", "Stays:", "Options.", "Differences from the paper", "Result:"):
            assert f"**{heading}" in page, heading
        assert "confrere run" in page
        assert f"recipes/ham10000.py /path/to/fed_ham10000 --out results/{row['name']} " in page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), target


def test_every_key_of_an_experiment_is_documented() -> None:
    text = (ROOT / "docs" / "experiment.md").read_text()
    for name, info in Experiment.model_fields.items():
        inner = getattr(info.annotation, "model_fields", None)
        for key in [f"{name}.{k}" for k in inner] if inner else [name]:
            assert f"`{key}" in text, key


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_anchors_are_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text()):
        text = (page.parent / target if target else page).read_text()
        headings = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"(?m)^#+ (.+)$", text)}
        assert anchor in headings, anchor


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for prefix, app in (("", cli.app), ("data ", cli.data_app)):
        for command in app.registered_commands:
            name = command.name or getattr(command.callback, "__name__", "")
            assert f"`confrere {prefix}{name}" in text, name


def test_every_exit_code_is_documented() -> None:
    text = (ROOT / "docs" / "exit-codes.md").read_text()
    for kind in errors.ConfrereError.__subclasses__():
        assert f"| {kind.exit_code} | `{kind.__name__}` |" in text


def test_every_backbone_is_documented() -> None:
    text = (ROOT / "docs" / "backbones.md").read_text()
    for name in REGISTRY:
        assert f"`{name}`" in text, name


@pytest.mark.slow
def test_the_python_page_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for site in ("st_mary", "riverside"):
        for channel, label in enumerate(("melanoma", "naevus")):
            folder = tmp_path / "hospitals" / site / label
            folder.mkdir(parents=True)
            for number in range(12):
                pixels = rng.integers(0, 100, (32, 32, 3))
                pixels[..., channel] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{site}{channel}{number}__1.png")
    page = (ROOT / "docs" / "python-api.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    env = {**os.environ, "CONFRERE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "12 images predicted, 0 left out" in done.stdout
    assert (tmp_path / "run" / "report.html").exists()
