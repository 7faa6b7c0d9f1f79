"""docs/operations.md: its units are taken by systemd, its rules by YAML, its metrics and commands are there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import watch_runs as runs

from confrere.watch.metrics import exposition
from confrere.watch.reader import Watcher

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
BLOCKS = re.findall(r"(?m)^`([^`\n]+)`[^\n]*\n\n```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
"""Files of the page: name, language, content."""
HARDENING = "hardening.conf"
UNITS = {Path(name).name: text for name, kind, text in BLOCKS if kind == "ini"}


def test_the_page_holds_the_files() -> None:
    services = {"confrere-coordinator.service", "confrere-site.service", "confrere-watch.service"}
    assert set(UNITS) == {*services, HARDENING}
    assert {name for name, kind, _ in BLOCKS if kind != "ini"} >= {
        "Containerfile",
        "prometheus.yml",
        "confrere.rules.yml",
    }


def verified(unit: Path) -> list[str]:
    """Return what systemd says of a unit."""
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    return [line for line in said.splitlines() if unit.name in line]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
@pytest.mark.parametrize("name", sorted(set(UNITS) - {HARDENING}))
def test_units_are_whole_and_hardened(name: str, tmp_path: Path) -> None:
    unit = tmp_path / name
    content = f"{UNITS[name]}\n{UNITS[HARDENING]}".replace("/opt/confrere/bin/confrere", sys.executable)
    unit.write_text(content)
    assert verified(unit) == []
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=25", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-300:]
    unit.write_text(f"{content}\nNoNewPrivilege=yes\n")
    assert "NoNewPrivilege" in verified(unit)[0], "a misspelt line is noticed"


def test_rules_and_scrapes_are_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    files = {Path(name).name: yaml.safe_load(text) for name, kind, text in BLOCKS if kind == "yaml"}
    (group,) = files["confrere.rules.yml"]["groups"]
    assert len(group["rules"]) == 3
    assert all({"alert", "expr", "annotations"} <= rule.keys() for rule in group["rules"])
    assert files["prometheus.yml"]["scrape_configs"][0]["authorization"]["type"] == "Bearer"


def test_every_metric_of_the_page_is_there_and_every_one_that_is_there_is_on_the_page(tmp_path: Path) -> None:
    run = runs.begin(tmp_path)
    runs.one_round(run, 1, runs.SITES, runs.failed(1, "west"))
    runs.status(run, updated=time.time())
    names = re.findall(r"(?m)^(confrere_\w+?)(?:\{| )", exposition(Watcher(run).state()).decode())
    made = {name.removesuffix("_sum").removesuffix("_count") for name in names}
    assert made == {n.removesuffix("_sum").removesuffix("_count") for n in re.findall(r"\bconfrere_\w+", PAGE)}
