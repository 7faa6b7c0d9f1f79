"""A label and the file of a data set may set what is asked to differ, and only that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparisons import Log, experiment

from confrere.compare import command as commands
from confrere.compare import compare
from confrere.compare.cells import Cell
from confrere.compare.command import carry_out, named_experiment
from confrere.compare.data import own_choices
from confrere.compare.evidence import overall, site_scores
from confrere.compare.grid import title
from confrere.compare.recommend import recommend
from confrere.config import Experiment, validate
from confrere.errors import ConfigError

MEDIAN = "fedit:federation.rule=median"


def base(**changes: Any) -> Experiment:
    return validate({"path": "x", "controls": (), **changes})


# Keys of the experiment in a label.


def test_a_key_with_a_dot_is_the_experiments_and_one_without_is_the_methods() -> None:
    found = base(attack={"sites": ["b"]}).for_method("fedopal:lam=2.0:federation.rule=median:adapter.rank=8", seed=3)
    assert found.method == {"name": "fedopal", "lam": 2.0}
    assert (found.federation.rule, found.adapter.rank, found.attack.sites) == ("median", 8, ("b",))
    assert base().for_method("flexlora:adapter.ranks.b=4").adapter.ranks == {"b": 4}
    assert (found.seed, found.rounds, found.train) == (3, base().rounds, base().train)
    assert base().for_method('fedit:attack.sites=["a", "b"]').attack.sites == ("a", "b")
    assert base().for_method("fedit").federation.rule == "mean", "nothing is left behind"


@pytest.mark.parametrize(
    "key",
    ["data.val=0.1", "data.partition.by=quantity", "train.steps=3", "federation.fraction=0.5", "selection.every=2",
     "record.keep=1"],
)  # fmt: skip
def test_data_and_steps_are_the_same_for_all(key: str) -> None:
    with pytest.raises(ConfigError, match=r"the same data and steps(?s:.*)beside the data"):
        base().for_method(f"fedit:{key}")


@pytest.mark.parametrize("key", ["seed=1", "path=y", "rounds=3", "split_seed=1"])
def test_a_key_without_a_table_is_no_option_of_a_method(key: str) -> None:
    with pytest.raises(ConfigError, match="has no option"):
        base().for_method(f"fedit:{key}")


@pytest.mark.parametrize(
    ("key", "hint"),
    [("federation.rul=median", "federation.rule"), ("atack.name=x", "attack.name"), ("train.lrr=1", "train.lr"),
     ("seed.a=1", "train"), (".=1", "train.lr")],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest(key: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        base().for_method(f"fedit:{key}")
    assert hint in caught.value.fix
    assert caught.value.where == key.partition("=")[0]


def test_a_wrong_value_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"federation\.rule"):
        base().for_method("fedit:federation.rule=mediam")
    with pytest.raises(ConfigError, match="holds a value, not a table"):
        base().for_method("fedit:train.lr.x=1")


def test_titles_names_and_digests_carry_them() -> None:
    cells = [
        Cell(experiment=base().for_method(label, seed=0), data="x", data_digest="d", label=label)
        for label in ("fedit", MEDIAN, "fedit:federation.rule=mean", "fedit:adapter.rank=8")
    ]
    assert title(MEDIAN).endswith(", federation.rule=median")
    assert cells[1].name == f"x, {MEDIAN}, seed 0"
    plain, median, default, small = (cell.digest for cell in cells)
    assert len({plain, median, small}) == 3
    assert plain == default, "a default that is written out"


def test_the_learning_rate_is_set_or_tuned(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which tuning chooses"):
        compare(base(), ["fedit", "fedit:train.lr=0.01"], [0], tmp_path / "out", trials=2)
    assert not (tmp_path / "out").exists()


def test_a_control_with_another_setting_is_no_method_to_join_with() -> None:
    def row(name: str, mean: float) -> dict[str, Any]:
        score = {"mean": mean, "low": None, "high": None}
        return {"name": name, "balanced_accuracy": score, "worst_site": None, "seeds": [0, 1], "bytes": 1.0}

    rows = [row("fedit", 0.5), row("local:adapter.rank=4", 0.9), row("local", 0.4)]
    assert recommend(rows, [], [])["winner"] == "fedit"


def test_commas_in_brackets_part_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(commands, "compare", lambda *given, **options: asked.append((given, options)) or {})
    (tmp_path / "hospitals").mkdir()
    options: dict[str, Any] = {"jobs": 1, "trials": 0, "controls": False, "target": None, "config": None}
    methods = 'fedit, fedit:attack.sites=["a", "b"]:federation.rule=median,fedopal:lam=1.0'
    carry_out([tmp_path / "hospitals"], [], methods=methods, seeds="0", out=tmp_path / "out", **options)
    labels = asked[0][0][1]
    assert labels == ["fedit", 'fedit:attack.sites=["a", "b"]:federation.rule=median', "fedopal:lam=1.0"]


def test_rules_side_by_side_under_an_attack(sets: tuple[Path, Path], tmp_path: Path) -> None:
    sites = sorted(path.name for path in sets[0].iterdir() if path.is_dir())
    under = experiment(sets[0], rounds=1, attack={"name": "sign-flip", "sites": [sites[0]], "strength": 5.0})
    log = Log()
    found = compare(under, ["fedit", MEDIAN], [0], tmp_path, controls=False, notify=log)
    assert log.trained() == ["north, fedit, seed 0", f"north, {MEDIAN}, seed 0"]
    assert found["methods"][1]["title"].endswith("federation.rule=median")
    a, b = (tmp_path / "cells" / one["cell"] / "results.json" for one in found["cells"])
    read = [json.loads(path.read_text())["sites"] for path in (a, b)]
    assert read[0] != read[1], "the rule was used"
    assert {cell["method"] for cell in json.loads((tmp_path / "index.json").read_text())["cells"].values()} == {
        "fedit", MEDIAN,
    }  # fmt: skip


# Data sets with choices of their own.


def test_a_file_of_an_experiment_is_a_data_set_with_its_own_choices(tmp_path: Path) -> None:
    file = tmp_path / "stained.toml"
    file.write_text('path = "there"\nhold_out = "a"\n[data]\nval = 0.1\n')
    name, found = named_experiment(file, {"rounds": 3, "data": {"test": 0.3}}, ["train.steps=2"])
    assert (name, found.path) == ("stained", str(Path("there").resolve()))
    assert (found.rounds, found.train.steps, found.hold_out, found.data.val) == (3, 2, "a", 0.1)
    assert found.data.test == validate({"path": "x"}).data.test, "its tables stand in for the common ones"
    plain = named_experiment(Path("there"), {"rounds": 3}, [])
    assert plain[0] == ""
    assert plain[1].rounds == 3
    manifest = tmp_path / "federation.toml"
    manifest.write_text("[sites]\n")
    assert named_experiment(manifest, {}, [])[1].path == str(manifest.resolve())


def test_data_sets_differ_in_their_data_alone() -> None:
    shifted = {"shift": [{"kind": "stain", "strength": 0.5}]}
    a, b = base(), base(data=shifted)
    assert [list(one) for one in own_choices([a, b])] == [["data.shift"], ["data.shift"]]
    assert own_choices([a]) == [{}]
    ranks = [base(path=path, method="flexlora", adapter={"ranks": {path: 4}}, hold_out=path) for path in ("y", "z")]
    assert list(own_choices(ranks)[0]) == ["hold_out", "adapter.ranks.y", "adapter.ranks.z"]
    with pytest.raises(ConfigError, match="named twice"):
        own_choices([a, b, base(data=shifted)])
    for changes in ({"rounds": 3}, {"train": {"steps": 3}}, {"adapter": {"rank": 4}}, {"backbone": {"depth": 3}}):
        with pytest.raises(ConfigError, match="cannot differ") as caught:
            own_choices([a, base(path="y", **changes)])
        key, value = next(iter(changes.items()))
        assert caught.value.where == (key if isinstance(value, int) else f"{key}.{next(iter(value))}")


def test_two_shifts_of_the_same_data(sets: tuple[Path, Path], tmp_path: Path) -> None:
    for name, strength in (("faint", 0.1), ("strong", 1.0)):
        shift = f'[[data.shift]]\nkind = "stain"\nstrength = {strength}\n'
        (tmp_path / f"{name}.toml").write_text(f'path = "{sets[0]}"\n{shift}')
    common = {"backbone": {"name": "test-vit"}, "adapter": {"blocks": 2}, "rounds": 1, "threads": 1}
    common |= {"train": {"steps": 2, "batch_size": 4}}
    given = [named_experiment(tmp_path / f"{name}.toml", common, []) for name in ("faint", "strong")]
    log = Log()
    found = compare(
        [one for _, one in given], ["fedit", "local"], [0], tmp_path / "out", names=["faint", "strong"], notify=log,
        controls=False,
    )  # fmt: skip
    assert len(log.trained()) == 4
    assert {one["data"] for one in found["cells"]} == {"faint", "strong"}
    assert len({one["cell"] for one in found["cells"]}) == 4
    assert {site.split("/")[0] for site in found["methods"][0]["sites"]} == {"faint", "strong"}
    assert [one["own"]["data.shift"][0]["strength"] for one in found["data"]] == [0.1, 1.0]


def test_data_sets_of_the_same_patients_do_not_count_as_more_patients() -> None:
    """The same predictions in two sets of one origin: the mean varies as it does in one; of two origins, less."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    runs = {name: (rng.dirichlet([1, 1], 60), labels, np.arange(60) // 2) for name in ("fedit", "fedper")}

    class Fake:
        labels, seeds, headline = ("fedit", "fedper"), (0,), "balanced_accuracy"

        def __init__(self, sets: list[str], origin: dict[str, str]) -> None:
            self.sets, self.origin = sets, origin

        def sites(self) -> list[tuple[str, str]]:
            return [(data, "n") for data in self.sets]

        def predictions(self, label: str, data: str, site: str) -> list[Any]:
            return [runs[label]]

    def width(*given: Any) -> float:
        grid: Any = Fake(*given)
        pair = overall(grid, site_scores(grid))[0]
        return float(pair["high"] - pair["low"])

    one = width(["x"], {})
    assert width(["x", "y"], {"x": "x", "y": "x"}) == pytest.approx(one, rel=0.05)
    assert width(["x", "y"], {}) < 0.85 * one
