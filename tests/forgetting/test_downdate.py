"""The closed-form head after a subtraction is that of a run which never had the forgotten, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forgetting_runs import SITE, never_had, patients_of, trained

from confrere.errors import ConfigError
from confrere.forgetting.forget import forget
from confrere.forgetting.who import Whom
from confrere.record.run import Run

CHOICES: dict[str, Any] = {"method": "ridge", "rounds": 1}
PLAIN = {"steps": 2, "batch_size": 4, "lr": 0.02, "balance": "none"}


def head(run: Path, round_: int) -> dict[str, torch.Tensor]:
    return dict(Run(run).server(round_)["shared"])


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[n] - other[n]).norm() / other[n].norm()) for n in other)


@pytest.mark.parametrize("weights", ["images", pytest.param("equal", marks=pytest.mark.slow)])
def test_a_site_is_subtracted(tmp_path: Path, data: Path, weights: str) -> None:
    run = trained(data, tmp_path / "run", federation={"weights": weights}, **CHOICES)
    found = forget(run, Whom(site=SITE), tmp_path / "new", by="downdate")
    gold = never_had(run, data, tmp_path / "gold", site=SITE)
    assert apart(head(tmp_path / "new", 0), head(gold, 1)) < 1e-5
    assert apart(head(run, 1), head(gold, 1)) > 1e-2
    assert (found["cost"]["steps"], found["cost"]["passes"], found["exact"]) == (0, 0, True)


def test_patients_are_subtracted_by_looking_at_them_alone(tmp_path: Path, data: Path) -> None:
    run = trained(data, tmp_path / "run", train=PLAIN, **CHOICES)
    names = patients_of(data, SITE, run)[:2]
    found = forget(run, Whom(patients=frozenset(names)), tmp_path / "new", by="downdate")
    gold = never_had(run, data, tmp_path / "gold", patients=tuple(names))
    assert apart(head(tmp_path / "new", 0), head(gold, 1)) < 1e-5
    assert apart(head(run, 1), head(gold, 1)) > 1e-3
    assert 0 < found["cost"]["passes"] <= sum(len(list(data.rglob(f"{name}__*"))) for name in names)


@pytest.mark.slow
def test_weights_by_class_cannot_be_subtracted(tmp_path: Path, data: Path, original: Path) -> None:
    run = trained(data, tmp_path / "run", **CHOICES)
    names = patients_of(data, SITE, run)[:2]
    with pytest.raises(ConfigError, match="count by their class") as caught:
        forget(run, Whom(patients=frozenset(names)), tmp_path / "new", by="downdate")
    assert caught.value.code == "forgetting"
    with pytest.raises(ConfigError, match="no closed-form head"):
        forget(original, Whom(site=SITE), tmp_path / "other", by="downdate")


@pytest.mark.slow
def test_a_masked_sum_has_no_single_answers(tmp_path: Path, data: Path) -> None:
    run = trained(data, tmp_path / "run", secure={"aggregation": True}, gate={"norm": 0.0, "factor": 0.0}, **CHOICES)
    with pytest.raises(ConfigError, match="answers are not here"):
        forget(run, Whom(site=SITE), tmp_path / "new", by="downdate")
