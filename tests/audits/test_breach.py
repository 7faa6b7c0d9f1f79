"""G26 end to end: audits hold an honest private run to its epsilon, and one whose noise was left out is above it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from noise_images import noise_images
from typer.testing import CliRunner

from confrere.audits.job import audit, hold
from confrere.cli import app
from confrere.config import validate
from confrere.errors import GuaranteeError
from confrere.job import run_experiment
from confrere.privacy.mechanism import noisy_mean
from confrere.record.files import read_json

pytest.importorskip("dp_accounting")


def private(data: Path) -> Any:
    """Return a training that would know its images by heart, but for the noise."""
    values = {
        "path": str(data),
        "backbone": {"name": "test-vit", "image_size": 32},
        "adapter": {"blocks": 1, "rank": 16, "dropout": 0.0},
        "rounds": 1,
        "threads": 1,
        "workers": 1,
        "train": {"steps": 24, "batch_size": 36, "lr": 2e-2, "balance": "none"},
        "data": {"test": 0.45, "val": 0.1},
        "controls": [],
        "method": {"name": "fedit"},
        "privacy": {"unit": "record", "sigma": 46.0, "delta": 1e-3, "centred": False},
    }
    return validate(values)


def areas(found: list[dict[str, Any]], model: str) -> dict[str, dict[str, Any]]:
    rows = [(one["audit"], row) for one in found for row in one["rows"]]
    return {n: r for n, r in rows if (r["subject"], r["model"], r["measure"]) == ("all", model, "AUC")}


@pytest.mark.slow
def test_noise_that_was_left_out_is_above_the_bound_and_noise_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONFRERE_CACHE", str(tmp_path / "cache"))
    experiment = private(noise_images(tmp_path / "data", 80))
    run_experiment(experiment, tmp_path / "honest")
    honest = audit(tmp_path / "honest", only=("rmia", "lira", "canary"))
    hold(honest, tmp_path / "honest")
    assert {row["bound"] is not None for one in honest for row in one["rows"] if row["measure"] == "AUC"} == {True}

    def left_out(total: Any, mechanism: Any, source: Any) -> Any:
        return noisy_mean(total, replace(mechanism, sigma=0), source)

    monkeypatch.setattr("confrere.noisy.noisy_mean", left_out)
    run_experiment(experiment, tmp_path / "planted")
    done = CliRunner().invoke(app, ["audit", str(tmp_path / "planted"), "--only", "lira", "--only", "rmia"])
    assert isinstance(done.exception, GuaranteeError), done.output
    assert "above bound" in done.output
    planted = [read_json(tmp_path / "planted" / "audits" / f"{name}.json") for name in ("rmia", "lira")]
    promised = [read_json(tmp_path / name / "results.json")["privacy"]["epsilon"] for name in ("honest", "planted")]
    assert promised[0] == promised[1] < 1  # the ledger of both says the same
    for name, row in areas(planted, "update").items():
        assert row["finding"] == "above bound", row
        beside = areas(honest, "update")[name]["strength"]
        print(
            f"\nG26: {name}, epsilon {promised[0]:.2f} allows {row['bound']:.2f}; with noise {beside['value']:.2f},",
            end="",
        )
        print(f" without {row['strength']['value']:.2f} ({row['strength']['low']:.2f} or more)")
