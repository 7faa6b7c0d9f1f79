"""Every hostile case, generated: ``python tests/hostile/corpus.py FOLDER`` writes all of them."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import hostile_images
import hostile_runs
import hostile_tables
import hostile_tensors
import hostile_toml
from hostile_case import Base, Case

CASES: tuple[Case, ...] = tuple(
    case
    for family in (hostile_images, hostile_tables, hostile_toml, hostile_tensors, hostile_runs)
    for case in family.cases()
)


def generate(out: Path) -> Path:
    """Write each case into a folder of its name, and ``cases.json`` with what must be said of it."""
    base = Base(out / "base")
    kept = []
    for case in CASES:
        opened = case.make(out / case.name, base)
        row = {key: value for key, value in vars(case).items() if key != "make"}
        kept.append({**row, "opened_at": str(opened.relative_to(out))})
    (out / "cases.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    place = parser.parse_args().out
    place.mkdir(parents=True)
    os.environ["CONFRERE_CACHE"] = str(place / "cache")
    print(f"{len(CASES)} cases in {generate(place)}")
