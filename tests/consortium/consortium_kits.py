"""Rosters and kits for tests."""

from __future__ import annotations

import shutil
from pathlib import Path

from confrere.consortium.provision import Provisioned, provision

ROSTER = """\
name = "Skin"
address = "localhost"
port = {port}
classes = ["benign", "malignant"]
valid_days = 90

[[sites]]
name = "north"
organisation = "North General"

[[sites]]
name = "south"
"""


def roster(folder: Path, text: str = ROSTER, port: int = 9092) -> Path:
    path = folder / "consortium.toml"
    path.write_text(text.replace("{port}", str(port)))
    return path


def made(folder: Path, port: int = 9092) -> tuple[Path, Provisioned]:
    """Provision :data:`ROSTER` into ``folder/kits``."""
    return folder / "kits", provision(roster(folder, port=port), folder / "kits")


def copied(kits: Path, to: Path) -> Path:
    """Return a copy that a test may spoil."""
    return Path(shutil.copytree(kits, to / "kits"))
