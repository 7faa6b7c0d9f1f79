"""Runs whose sites hide their images: from data to report and prediction, killed and resumed, and what is refused."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("dp_accounting")

from typer.testing import CliRunner

from confrere.cli import app
from confrere.config import validate
from confrere.consortium.census import simulated
from confrere.data.synthetic import make_microscopy
from confrere.errors import ConfigError
from confrere.job import run_experiment
from confrere.method import make
from confrere.methods.turns import Turns
from confrere.noisy import NoisyLearner
from confrere.predict import predict_folder
from confrere.privacy import epsilon
from confrere.privacy.mechanism import noisy_mean
from confrere.record.files import read_json
from confrere.record.run import Run
from confrere.report import write_report
from confrere.tensors import digest
from confrere.verify import verify

SEEDED = {"unit": "record", "sigma": 1.0, "delta": 1e-3, "noise_seed": 5}


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("records")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(folder / "cache"))
        make_microscopy(folder / "data", seed=3, sites=2, images=(24, 30), size=32)
        yield folder / "data"


def chosen(path: object, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "path": str(path),
        "backbone": {"name": "test-vit"},
        "adapter": {"blocks": 1, "rank": 4},
        "rounds": 2,
        "threads": 1,
        "train": {"steps": 2, "batch_size": 4, "balance": "none"},
        "controls": [],
        "method": {"name": "fedopal", "training": "in-turn", "warmup": 0},
        "privacy": SEEDED,
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) and key != "method" else value
    return values


def test_from_training_to_report_and_prediction(hospitals: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_experiment(validate(chosen(hospitals, privacy={**SEEDED, "noise_seed": 0})), out)
    results = read_json(out / "results.json")
    said, rates = results["privacy"], {n: s["rate"] for n, s in results["privacy"]["sites"].items()}
    assert results["round"] == 2  # the last one
    assert (said["unit"], said["delta"], said["sigma"], said["clip"]) == ("record", 1e-3, 1.0, 1.0)
    worst = max(epsilon(1.0, rounds=2, delta=1e-3, rate=rate) for rate in rates.values())  # one noisy step a round
    assert said["epsilon"] == pytest.approx(worst)
    assert not said["simulation"]
    assert all(s["steps"] == 2 for s in said["sites"].values())
    assert "privacy" not in results["sites"]["ashford"]
    events = Run(out).events()
    assert not [e for e in events if e["event"] == "debit"]  # those are in each site's own folder
    for event in events:
        if event["event"] == "evaluation":
            assert set(event["sites"].values()) == {None}
        if event["event"] == "round":
            assert all(record["loss"] is None for record in event["sites"].values())
            assert event["diagnostics"]["overlap_before"] is event["diagnostics"]["overlap_after"] is None
    (part,) = verify(out)
    assert (part.rounds, part.recomputed) == (2, 2)
    page = write_report(out).read_text()
    for text in ("one training image of a site", "0.001", "times the clip", "validation and test images"):
        assert text in page
    folder = next(p for p in sorted((hospitals / "ashford").iterdir()) if p.is_dir())
    count, problems = predict_folder(out, "ashford", folder, tmp_path / "p.csv")
    assert count == len(list(folder.glob("*.png")))
    assert problems == []


def numbers_of(file: Path) -> np.ndarray:
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    return np.array([[float(v) for k, v in row.items() if k not in ("file", "predicted")] for row in rows])


@pytest.mark.slow
def test_without_noise_and_clip_predictions_are_those_of_ordinary_training(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G20, from training over saving and loading to predictions: everybody is drawn in every step."""
    monkeypatch.setattr(
        "confrere.noisy.noisy_mean", lambda total, m, source: noisy_mean(total, replace(m, sigma=0), source)
    )
    both = {"method": "fedit", "adapter": {"dropout": 0.0}, "selection": {"every": 2}}
    found, batch = [], 64
    for name, privacy in (
        ("noisy", {**SEEDED, "clip": 1e3, "centred": False}),
        ("ordinary", {"unit": "", "delta": 0.0}),
    ):
        values = {**chosen(hospitals, **both, train={"batch_size": batch}), "privacy": privacy}
        run_experiment(validate(values), tmp_path / name)
        predict_folder(tmp_path / name, "ashford", hospitals / "ashford", tmp_path / f"{name}.csv")
        found.append(numbers_of(tmp_path / f"{name}.csv"))
        with (tmp_path / name / "splits.csv").open() as file:  # in batches of so many each image comes equally often
            batch = math.lcm(*Counter(row["site"] for row in csv.DictReader(file) if row["split"] == "train").values())
    apart = float(np.abs(found[0] - found[1]).max())
    print(f"\nG20: predictions of {len(found[0])} images differ by {apart:.0e} at most")
    assert found[0].std(0).max() > 1e-3
    assert apart < 1e-4  # rounding, which AdamW divides by small gradients; other batches make 6e-4


@pytest.mark.slow
def test_with_a_seed_a_run_is_a_simulation_with_the_same_bytes(hospitals: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run_experiment(validate(chosen(hospitals)), tmp_path / name)
    said = read_json(tmp_path / "one" / "results.json")["privacy"]
    assert said["simulation"]
    assert said["statement"].startswith("Simulation, no privacy")
    states = [digest(Run(tmp_path / name).server(2)) for name in ("one", "two")]
    assert states[0] == states[1]


def test_a_run_that_was_killed_goes_on_and_counts_what_it_made_twice(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, calls = NoisyLearner.fit, []

    def killed(self: NoisyLearner, *args: Any, **options: Any) -> Any:
        calls.append(self.site)
        if len(calls) == 6:  # in the second site's first noisy steps of round 2
            raise KeyboardInterrupt
        return fit(self, *args, **options)

    experiment = validate(chosen(hospitals, workers=1))
    with monkeypatch.context() as patch:
        patch.setattr(NoisyLearner, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(experiment, tmp_path / "cut")
    run_experiment(experiment, tmp_path / "cut")
    run_experiment(experiment, tmp_path / "whole")
    cut, whole = (read_json(tmp_path / name / "results.json")["privacy"]["sites"] for name in ("cut", "whole"))
    again = [name for name in cut if cut[name]["debits"] > whole[name]["debits"]]
    assert len(again) == 1
    assert {cut[name]["debits"] for name in again} == {3}
    assert cut[again[0]]["epsilon"] > whole[again[0]]["epsilon"]
    # A seed gives the same noise again: the same bytes, as of any run.
    assert digest(Run(tmp_path / "cut").server(2)) == digest(Run(tmp_path / "whole").server(2))


@pytest.mark.slow
def test_patients_and_secure_aggregation_and_a_control(hospitals: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    privacy = {**SEEDED, "unit": "patient", "images": 2}
    plain = validate(chosen(hospitals, method="fedit", privacy=privacy, controls=["local"]))
    run_experiment(plain, tmp_path / "plain")
    said = read_json(tmp_path / "plain" / "results.json")["privacy"]
    assert "all training images of one patient" in said["statement"]
    assert "privacy" not in read_json(tmp_path / "plain" / "controls" / "local" / "results.json")
    gate = {"norm": 0.0, "factor": 0.0}
    masked = validate(chosen(hospitals, method="fedit", privacy=privacy, secure={"aggregation": True}, gate=gate))
    run_experiment(masked, tmp_path / "masked")
    one, other = (Run(tmp_path / name).server(2)["shared"] for name in ("plain", "masked"))
    assert max(float((one[n] - other[n]).abs().max()) for n in one) < 1e-3


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("train.balance", {"train": {"balance": "sampling"}}),
        ("train.balance", {"train": {"balance": "weights"}}),
        ("selection.patience", {"selection": {"patience": 2}}),
        ("privacy.delta", {"privacy": {**SEEDED, "delta": 0.0}}),
        ("privacy.epsilon", {"privacy": {**SEEDED, "sigma": 0.0}}),
        ("privacy.unit", {"method": "dpfed"}),
        ("privacy.unit", {"privacy": {**SEEDED, "unit": ""}}),
        ("backbone.name", {"backbone": {"name": "mlp"}}),
        ("task", {"task": {"name": "survival", "horizon": 5.0, "curve": "cox"}, "method": "fedit"}),
    ],
)
def test_what_epsilon_would_not_cover_is_refused(where: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as raised:
        validate(chosen("x", **changes))
    assert (raised.value.code, raised.value.where) == ("privacy", where)


@pytest.mark.parametrize("name", ["fedopal", "dual", "scaffold", "ditto", "fedmosaic", "ridge", "ifca", "apfl"])
def test_methods_whose_images_get_around_the_noise_are_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(ConfigError, match="more than a clip bounds") as raised:
        validate(chosen("x", method=name))
    assert raised.value.code == "privacy"
    assert "training=in-turn" in raised.value.fix
    assert "fedit" in raised.value.fix


def test_controls_that_send_nothing_need_no_noise_but_nothing_else_is_budgeted() -> None:
    validate(chosen("x", controls=["local", "pooled"]))
    validate(chosen("x", method="local"))  # as one of a comparison
    with pytest.raises(ConfigError, match="bound nothing"):
        validate(chosen("x", method="local", controls=["pooled"]))
    validate(chosen("x", privacy={**SEEDED, "unit": "patient"}))


def test_turns_need_a_shared_head_and_two_steps() -> None:
    for options, where in (({"head": "local"}, "method.head"), ({"training": "both"}, "method.training")):
        with pytest.raises(ConfigError) as raised:
            make("fedopal", {"training": "in-turn", **options})
        assert raised.value.where == where
    with pytest.raises(ConfigError, match="one step"):
        validate(chosen("x", train={"steps": 1}))
    assert isinstance(make("fedopal"), Turns)


def test_between_hospitals_nobody_may_seed_the_noise() -> None:
    assert simulated(validate(chosen("x"))) == ["privacy.noise_seed"]
    assert simulated(validate(chosen("x", privacy={**SEEDED, "noise_seed": 0}))) == []


def test_the_command_says_what_a_level_costs_and_when_it_is_out_of_reach() -> None:
    given = ["epsilon", "--unit", "record", "--rounds", "3", "--steps", "4", "--delta", "1e-5", "--batch", "32"]
    few = CliRunner().invoke(
        app, [*given, "--sigma", "2", "--records", "200", "--parameters", "300000", "--json"], catch_exceptions=False
    )
    found = json.loads(few.stdout)
    assert found["epsilon"] == pytest.approx(epsilon(2.0, rounds=12, delta=1e-5, rate=0.16))
    assert "out of reach" in found["verdict"]
    many = CliRunner().invoke(app, [*given, "--sigma", "1", "--records", "9000", "--parameters", "500"])
    assert "That can work" in many.stdout
    assert "12 steps" in many.stdout
    for wrong in (["--records", "0"], ["--records", "20000"], ["--unit", "ward", "--records", "20"]):
        refused = CliRunner().invoke(app, [*given, "--sigma", "1", "--parameters", "5", *wrong])
        assert isinstance(refused.exception, ConfigError)


@pytest.mark.slow
def test_the_command_finds_the_noise_for_a_level() -> None:
    given = ["epsilon", "--unit", "record", "--rounds", "3", "--steps", "4", "--delta", "1e-5", "--batch", "32"]
    aimed = [*given, "--sigma", "0", "--target", "3", "--records", "900", "--parameters", "9000"]
    assert "For epsilon 3: sigma" in CliRunner().invoke(app, aimed).stdout
