"""The experiment: one meaning in three forms, and mistakes that name the way out."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confrere.config import override, read, validate
from confrere.errors import ConfigError

experiments = st.fixed_dictionaries(
    {"path": st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=20)},
    optional={
        "seed": st.integers(0, 2**31 - 1),
        "rounds": st.integers(1, 99),
        "hold_out": st.sampled_from(["a", "b"]),
        "controls": st.lists(st.sampled_from(["local", "pooled", "fedit"]), unique=True),
        "method": st.sampled_from([{"name": "fedit"}, {"lam": 0.25, "head": "local"}, {"name": "fedit-ft"}]),
        "train": st.fixed_dictionaries({}, optional={"lr": st.floats(1e-6, 1.0), "steps": st.integers(1, 50)}),
        "adapter": st.fixed_dictionaries({"rank": st.sampled_from([2, 4, 16])}),
        "data": st.fixed_dictionaries({"val": st.floats(0, 0.3), "class_map": st.just({"a b": "c"})}),
    },
)


@given(values=experiments)
def test_an_experiment_survives_toml(values: dict[str, object]) -> None:
    experiment = validate(values)
    assert validate(tomllib.loads(experiment.toml())) == experiment


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"required key is missing.*path"),
        ({"paht": "x", "path": "x"}, r"paht.*\n.*did you mean 'path'"),
        ({"path": "x", "train": {"batchsize": 4}}, "did you mean 'batch_size'"),
        ({"path": "x", "steps": 4}, "did you mean 'train.steps'"),
        ({"path": "x", "rounds": 0}, "rounds"),
        ({"path": "x", "rounds": "ten"}, "rounds"),
        ({"path": "x", "rounds": True}, "rounds"),
        ({"path": "x", "train": {"lr": float("nan")}}, "train.lr"),
        ({"path": "x", "train": {"lr": float("inf")}}, "train.lr"),
        ({"path": "x", "train": {"balance": "yes"}}, "train.balance"),
        ({"path": "x", "data": {"val": 0.5, "test": 0.6}}, "val"),
        ({"path": "x", "method": {"name": "fedavg"}}, "unknown method 'fedavg'"),
        ({"path": "x", "method": {"name": "fedit", "lam": 1.0}}, "no option 'lam'"),
        ({"path": "x", "method": {"finetune": 0.3}}, "no option 'finetune'"),
        ({"path": "x", "controls": ["lokal"]}, "did you mean 'local'"),
        ({"path": "x", "adapter": {"rank": 5}}, "even rank"),
        ({"path": "x", "seed": -1}, "seed"),
    ],
)
def test_mistakes_name_the_key_and_the_way_out(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(values)


def test_overrides_are_toml_values_or_plain_strings() -> None:
    found = override(
        {"train": {"lr": 1.0}}, ["train.lr=1e-3", "train.steps=5", "method.head=local", "controls=[]", "x=a b"]
    )
    assert found == {"train": {"lr": 0.001, "steps": 5}, "method": {"head": "local"}, "controls": [], "x": "a b"}
    for wrong in ("lr", "=3", "train.lr.x=1"):
        with pytest.raises(ConfigError):
            override({"train": {"lr": 1.0}}, [wrong])


def test_a_bare_method_name_and_a_label_with_options() -> None:
    experiment = validate({"path": "x", "method": "fedit"})
    assert experiment.build_method().name == "fedit"
    other = experiment.for_method("fedopal:head=local:lam=2.0", seed=3)
    assert (other.method, other.seed, other.controls) == ({"name": "fedopal", "head": "local", "lam": 2.0}, 3, ())
    kept = validate({"path": "x", "method": {"lam": 0.1}}).for_method("fedopal:head=local")
    assert kept.method == {"name": "fedopal", "lam": 0.1, "head": "local"}


def test_a_file_that_is_no_toml_says_where(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("rounds = 3\nrounds = 4\n")
    with pytest.raises(ConfigError, match="line 2"):
        read(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read(tmp_path / "b.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.toml")
