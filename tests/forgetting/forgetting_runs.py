"""Small runs that forget, and what a run that never had the forgotten would have begun with."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

from confrere.config import validate
from confrere.data.federation import examine
from confrere.data.synthetic import make_microscopy
from confrere.data.table import read_rows
from confrere.fingerprint import stored_experiment
from confrere.job import run_experiment
from confrere.prefix import cache_dir

SITE = "brindley"
STATES = ("server", "sites", "adapters")


def hospitals(folder: Path, sites: int = 3) -> Path:
    return make_microscopy(folder / "h", seed=1, sites=sites, images=(24, 30), size=32)


def trained(data: Path, out: Path, /, **changes: Any) -> Path:
    values: dict[str, Any] = {"path": str(data), "method": "fedit", "controls": (), "rounds": 3, "threads": 1}
    values |= {"backbone": {"name": "test-vit"}, "adapter": {"blocks": 2, "rank": 4}}
    values |= {"train": {"steps": 2, "batch_size": 4, "lr": 0.02}}
    run_experiment(validate({**values, **changes}), out)
    return out


def never_had(
    run: Path, data: Path, out: Path, *, site: str = "", patients: tuple[str, ...] = (), **changes: Any
) -> Path:
    """Train as ``run`` on a copy of the data without a site or patients, with the split that the run had."""
    copy = Path(shutil.copytree(data, out.parent / f"{out.name}-data"))
    if site:
        shutil.rmtree(copy / site)
    for name in patients:
        for picture in copy.rglob(f"{name}__*"):
            picture.unlink()
    experiment = stored_experiment(run)
    values = {**experiment.model_dump(), "path": str(copy), "controls": (), **changes}
    kept = {(s, d) for s, d in digests(copy, validate(values))}
    out.mkdir()
    with (run / "splits.csv").open() as source, (out / "splits.csv").open("w") as target:
        reader = csv.reader(source)
        writer = csv.writer(target)
        writer.writerow(next(reader))
        writer.writerows(row for row in reader if (row[0], row[1]) in kept)
    run_experiment(validate(values), out)
    return out


def digests(data: Path, experiment: Any) -> list[tuple[str, str]]:
    _, found = examine(data, experiment.data, (160, 160), 0, cache_dir())
    return [(files.name, fact.digest) for files in found.sites for fact in files.entry.facts]


def states(run: Path) -> dict[str, bytes]:
    """Return every state and exported file; JSON besides is left out, as it holds times."""
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for part in STATES
        for path in sorted((run / part).rglob("*"))
        if path.is_file()
    }


def patients_of(data: Path, site: str, run: Path, split: str = "train") -> list[str]:
    """Return the names of a site's patients in a split, sorted."""
    rows = {(c["site"], c["sha256"]) for _, c in read_rows(run / "splits.csv", ["split"]) if c["split"] == split}
    _, found = examine(data, stored_experiment(run).data, (160, 160), 0, cache_dir())
    files = next(files for files in found.sites if files.name == site)
    pairs = zip(files.rows, files.entry.facts, strict=True)
    return sorted({str(row.patient) for row, fact in pairs if (site, fact.digest) in rows})
