"""Sites that keep different numbers of blocks, from the command line to what each takes home; and who cannot."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from test_cli import hospitals_of
from test_commands import FAST, Cli

from confrere import cli
from confrere.adapters import colora
from confrere.compare.command import carry_out
from confrere.config import validate
from confrere.console import report_on
from confrere.errors import ConfigError, RunError
from confrere.fingerprint import stored_experiment
from confrere.onboard.candidates import open_run
from confrere.opening import depth_of, open_data
from confrere.predict import Predictor
from confrere.record.run import Run
from confrere.verdicts import predictions

SITES = ("east", "north", "west")
DEPTHS = {"east": 2, "north": 3, "west": 3}  # the tiny backbone has 3 blocks, all of which are kept by default


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hospitals_of(tmp_path_factory.mktemp("data") / "h", {site: {"x": 10, "y": 10} for site in SITES})


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, store: Path) -> Cli:
    monkeypatch.setenv("CONFRERE_CACHE", str(store))
    monkeypatch.setenv("COLUMNS", "160")
    return Cli(capsys, monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path, store: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(store))
        words = ["confrere", "run", str(data), "--out", str(out), "--quiet", "--method", "fedmosaic", *FAST]
        patch.setattr(sys, "argv", [*words, "backbone.depths.east=2", "train.views=2"])
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert not done.value.code
    report_on(out)
    return out


def head(run: Path, site: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "adapters" / site / "head.json").read_text())
    return found


def blocks(run: Path, site: str, slot: str) -> set[int]:
    names = load_file(run / "adapters" / site / slot / "adapter_model.safetensors")
    return {int(found.group(1)) for name in names if (found := re.search(r"\.(\d+)\.", name))}


def test_each_site_trains_and_takes_home_its_own_depth(run: Path) -> None:
    assert {site: head(run, site)["depth"] for site in SITES} == DEPTHS
    assert {site: blocks(run, site, "personal") for site in SITES} == {"east": {0, 1}, "north": {1, 2}, "west": {1, 2}}
    assert Predictor(run, "east").backbone.depth == 2


def test_sites_of_different_depth_share_by_place(run: Path) -> None:
    """P and q have one name and shape at all sites, and what east got is the others' mixture."""
    server = Run(run).server(json.loads((run / "results.json").read_text())["round"])
    sent = {site: {n: tuple(t.shape) for n, t in server[f"own:{site}"].items() if colora.inner(n)} for site in SITES}
    assert sent["east"]
    assert sent["east"] == sent["north"] == sent["west"]
    weights = colora.relevance({s: server[f"probe:{s}"]["gradient"] for s in SITES}, "east", "columns", 0.5)
    got = colora.message(server, "east", "columns", 0.5)
    for name in sent["east"]:
        expected = sum(weights[s] * server[f"own:{s}"][name].double() for s in ("north", "west"))
        assert (got[name].double() - expected).abs().max() < 1e-6


def test_controls_train_alone_at_the_own_depth_and_pooled_at_the_largest(run: Path) -> None:
    assert {site: head(run / "controls" / "local", site)["depth"] for site in SITES} == DEPTHS
    assert {site: head(run / "controls" / "pooled", site)["depth"] for site in SITES} == dict.fromkeys(SITES, 3)


def test_report_and_card_say_which_depth_each_has(run: Path) -> None:
    assert json.loads((run / "backbone.json").read_text())["depths"] == DEPTHS
    assert "depths" not in json.loads((run / "controls" / "pooled" / "backbone.json").read_text())
    assert "east: 2, north: 3, west: 3" in (run / "report.html").read_text()
    assert "Blocks kept: east: 2, north: 3, west: 3." in (run / "card.md").read_text()


@pytest.mark.parametrize("site", ["east", "north"])
def test_predict_loads_the_depth_of_the_site(command: Cli, run: Path, data: Path, tmp_path: Path, site: str) -> None:
    command("predict", run, "--site", site, data / site, "--out", tmp_path / "p.csv")
    with (tmp_path / "p.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 20
    one = open_data(stored_experiment(run), run).site(site)
    stored = predictions(run, site)
    assert stored is not None
    found = Predictor(run, site).probabilities(one.images[np.flatnonzero(one.split == 2)])
    np.testing.assert_allclose(found, stored[0], atol=1e-6)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--method", "fedmosaic", "backbone.depths.eats=2"], 2, "there is no site 'eats'"),
        (["--method", "fedmosaic", "backbone.depths.east=4"], 4, "depth 4 is not within 1..3"),
        (["--method", "fedmosaic", "backbone.depths.east=1"], 2, "2 blocks cannot be adapted when 1 are kept"),
        (["--method", "fedmosaic", "backbone.depths.east=0"], 2, "backbone.depths.east"),
        (["--method", "fedopal", "backbone.depths.east=2"], 2, "use one of: fedmosaic, local"),
        (["--method", "local", "--hold-out", "east", "controls=[]", "backbone.depths.east=2"], 2, "held-out site"),
    ],
)
def test_what_cannot_be_is_refused(
    command: Cli, data: Path, tmp_path: Path, words: list[str], code: int, message: str
) -> None:
    assert message in command("run", data, "--out", tmp_path / "r", *FAST, *words, code=code)


def test_a_comparison_refuses_methods_that_cannot_carry_it(command: Cli, data: Path, tmp_path: Path) -> None:
    words = ["backbone.name=test-vit", *FAST[2:], "backbone.depths.east=2"]
    text = command("compare", data, "--methods", "fedmosaic,fedit", "--out", tmp_path / "c", *words, code=2)
    assert "fedit cannot carry different depths" in text
    assert not (tmp_path / "c" / "cells").exists()


def test_a_comparison_of_methods_that_can_is_not_refused_for_the_default_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("confrere.compare.command.compare", lambda experiments, *_, **__: asked.extend(experiments))
    options: dict[str, Any] = {"jobs": 1, "trials": 0, "controls": True, "target": None, "config": None}
    for first, words in (
        ("fedmosaic", ["backbone.depths.east=2", "adapter.blocks=2"]),
        ("flora", ["adapter.ranks.east=2"]),
    ):
        carry_out([data], words, methods=f"{first},local", seeds="0", out=tmp_path, **options)
        found = asked.pop().for_method("local")
        assert (found.backbone.depths or found.adapter.ranks) == {"east": 2}
    with pytest.raises(ConfigError, match="fedopal cannot carry different depths"):
        carry_out([data], ["backbone.depths.east=2"], methods="fedopal,local", seeds="0", out=tmp_path, **options)


def test_nobody_can_be_onboarded_by_models_of_different_depth(run: Path) -> None:
    with pytest.raises(RunError, match="more than one adapter"):
        open_run(run)
    local = run / "controls" / "local"
    with pytest.raises(RunError, match="different numbers of blocks"):
        open_run(local)


def test_pooled_data_and_the_server_have_the_deepest_of_those_that_train(data: Path, tmp_path: Path) -> None:
    values = {"path": str(data), "controls": (), "adapter": {"blocks": 1}, "threads": 1}
    backbone = {"name": "test-vit", "depths": {"east": 1, "north": 2}}
    all_ = validate({**values, "method": "local", "backbone": backbone})
    federation = open_data(all_, tmp_path)
    assert [depth_of(all_, federation, site) for site in (*SITES, "")] == [1, 2, None, None]
    held = validate({**values, "method": "local", "backbone": backbone, "hold_out": "west"})
    assert [depth_of(held, federation, site) for site in (*SITES, "")] == [1, 2, 2, 2]
    assert [depth_of(held.for_method("pooled"), federation, site) for site in (*SITES, "")] == [2, 2, 2, 2]
    with pytest.raises(ConfigError, match="fedit cannot carry different depths"):
        all_.for_method("fedit")


def test_ranks_of_unknown_sites_are_refused_too(command: Cli, data: Path, tmp_path: Path) -> None:
    words = [*FAST, "--method", "local", "controls=[]", "adapter.ranks.eats=4"]
    assert "did you mean 'east'?" in command("run", data, "--out", tmp_path / "r", *words, code=2)
