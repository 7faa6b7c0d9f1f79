"""Scores of the private runs on test lesions on which no setting was tried: two thirds of them, by a hash of the name.

    python recipes/ham10000.py DATA --out results/ham10000 --only private
    python recipes/private_outside.py results/ham10000

Prints balanced accuracy and AUROC, means over sites, with a 95 % interval (Student t over seeds).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from sklearn.metrics import recall_score, roc_auc_score

from confrere.data.images import Federation
from confrere.fingerprint import stored_experiment
from confrere.metrics.bootstrap import reach
from confrere.opening import open_data

SHARE, TRIED = 3, 1
"""Settings were tried on the lesions whose hash is ``TRIED`` of ``SHARE``, see ``one_lesion_in``."""


def lesions(table: Path) -> dict[str, str]:
    """Return the lesion of each picture by its SHA-256."""
    with table.open(newline="") as file:
        rows = [(table.parent / row["path"], row["lesion"]) for row in csv.DictReader(file)]
    return {hashlib.sha256(picture.read_bytes()).hexdigest(): lesion for picture, lesion in rows}


def scores(run: Path, federation: Federation, lesion: dict[str, str]) -> tuple[float, float]:
    """Return balanced accuracy and AUROC outside of the lesions that were tried, means over sites."""
    found = []
    for site in federation.sites:
        rows = site.indices("test")
        chances = load_file(run / "sites" / site.name / "test-personalised.safetensors")["test/probabilities"]
        names = [lesion[site.digests[row]] for row in rows]
        outside = np.array([hashlib.sha256(name.encode()).digest()[0] % SHARE != TRIED for name in names])
        truth, chances = site.labels[rows][outside], chances[outside]
        known = [k for k in range(chances.shape[1]) if 0 < (truth == k).sum() < len(truth)]
        areas = [roc_auc_score(truth == k, chances[:, k]) for k in known]
        accuracy = recall_score(truth, chances.argmax(1), labels=np.unique(truth), average="macro")
        found.append((accuracy, np.mean(areas)))
    mean = np.mean(found, 0)
    return float(mean[0]), float(mean[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    lesion, each = lesions(args.out / "data" / "ham10000.csv"), defaultdict(list)
    runs = sorted(path.parent for path in (args.out / "private" / "cells").glob("*/results.json"))
    federation = open_data(stored_experiment(runs[0]), runs[0])
    for run in runs:
        chosen = stored_experiment(run)
        privacy = f"epsilon {chosen.privacy.epsilon:g}" if chosen.privacy.unit else "no noise"
        centred = "" if chosen.privacy.centred else ", not centred"
        name = f"{chosen.method['name']}, {privacy}{centred}, scale {chosen.adapter.scale:g}"
        each[name].append(scores(run, federation, lesion))
    for name, found in each.items():
        values = np.array(found)
        parts = [f"{column.mean():.3f} ± {reach(column.tolist()):.3f}" for column in values.T]
        print(f"{name}: {len(found)} seeds, balanced accuracy {parts[0]}, AUROC {parts[1]}")


if __name__ == "__main__":
    main()
