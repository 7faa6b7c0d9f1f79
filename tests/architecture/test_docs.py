"""The documentation says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from confrere.config import Experiment
from confrere.listing import method_rows

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def test_the_readme_lists_every_method_as_the_registry_does() -> None:
    text = (ROOT / "README.md").read_text()
    for row in method_rows():
        sends, keeps = (", ".join(row[k]) or "nothing" for k in ("sends", "keeps"))
        assert f"| [{row['name']}](docs/methods/{row['name']}.md) | {sends} | {keeps} | {row['needs']} |" in text


def test_every_method_has_a_page_with_its_differences() -> None:
    for row in method_rows():
        page = (ROOT / "docs" / "methods" / f"{row['name']}.md").read_text()
        assert f"`{row['name']}`" in page
        assert "**Differences from the paper" in page
        assert "confrere run" in page


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
