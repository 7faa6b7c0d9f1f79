"""The experiment: one meaning in three forms, and mistakes that name the way out."""

from __future__ import annotations

import contextlib
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from method_variants import PRIVATE

from confrere.config import override, read, validate
from confrere.errors import ConfigError
from confrere.initial import slot_ranks
from confrere.method import METHODS

LOCAL_HEAD = {"lam": 0.25, "head": "local"}  # makes no general model, so nothing can be held out
experiments = st.fixed_dictionaries(
    {"path": st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=20)},
    optional={
        "seed": st.integers(0, 2**31 - 1),
        "rounds": st.integers(1, 99),
        "controls": st.lists(st.sampled_from(["local", "pooled", "fedit"]), unique=True),
        "method": st.sampled_from([{"name": "fedit"}, LOCAL_HEAD, {"name": "fedit-ft"}]),
        "train": st.fixed_dictionaries({}, optional={"lr": st.floats(1e-6, 1.0), "steps": st.integers(1, 50)}),
        "adapter": st.fixed_dictionaries({"rank": st.sampled_from([2, 4, 16])}),
        "data": st.fixed_dictionaries({"val": st.floats(0, 0.3), "class_map": st.just({"a b": "c"})}),
    },
)


@given(values=experiments)
def test_an_experiment_survives_toml(values: dict[str, object]) -> None:
    experiment = validate({"hold_out": "a"} | values if values.get("method") != LOCAL_HEAD else values)
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
        ({"path": "x", "adapter": {"rank": 1}}, "use at least 2"),
        ({"path": "x", "seed": -1}, "seed"),
        ({"path": "x", "lr": 1e-3}, r"unknown key \[lr\]\n.*did you mean 'train\.lr'"),
        ({"path": "x", "train": {"lrr": 1e-3}}, r"unknown key \[train\.lrr\]\n.*did you mean 'lr'"),
        ({"path": "x", "rank": 4}, "did you mean 'adapter.rank'"),
        ({"path": "x", "federation": {"every": 2}}, "did you mean 'selection.every'"),
        ({"path": "x", "methd": "fedit"}, "did you mean 'method'"),
        ({"path": "x", "train": {"qqq": 1}}, "valid: balance, batch_size"),
        ({"path": "x", "train": {"lr": 0.0}}, r"train\.lr"),
        ({"path": "x", "train": {"lr": "1e-3"}}, r"got '1e-3' \[train\.lr\]"),
        ({"path": "x", "train": {"steps": 2.0}}, r"train\.steps"),
        ({"path": "x", "train": 5}, r"got 5 \[train\]"),
        ({"path": 3}, r"got 3 \[path\]"),
        ({"path": "x", "adapter": {"dropout": 1.0}}, r"adapter\.dropout"),
        ({"path": "x", "adapter": {"scale": float("nan")}}, r"adapter\.scale"),
        ({"path": "x", "adapter": {"rank": 0}}, r"adapter\.rank"),
        ({"path": "x", "federation": {"fraction": 1.5}}, r"federation\.fraction"),
        ({"path": "x", "federation": {"fraction": 0.0}}, r"federation\.fraction"),
        ({"path": "x", "seed": 2**31}, r"\[seed\]"),
        ({"path": "x", "data": {"val": float("nan")}}, r"data\.val"),
        ({"path": "x", "track": ["wandb"]}, r"got 'wandb' \[track\.0\]"),
        ({"path": "x", "controls": "local"}, r"got 'local' \[controls\]"),
        ({"path": "x", "method": 5}, r"got 5 \[method\]"),
        ({"path": "x", "method": {"name": "fedopl"}}, "did you mean 'fedopal'"),
        ({"path": "x", "method": {"lamm": 1.0}}, r"method\.lamm\]\n.*did you mean 'lam'"),
        ({"path": "x", "method": {"lam": "much"}}, r"expected float, got 'much' \[method\.lam\]"),
        ({"path": "x", "method": {"lam": float("nan")}}, "no finite number"),
        ({"path": "x", "method": {"normalise": 1}}, r"expected bool, got 1"),
        ({"path": "x", "method": {"head": "mine"}}, "use one of: shared, local"),
        ({"path": "x", "method": {"name": "fedit-ft", "finetune": 1}}, r"method\.finetune"),
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


def test_options_follow_a_bare_name() -> None:
    """As the command line of doctor, and a file with ``method = "fedopal"`` and an override, have it."""
    given = override({"task": "classification"}, ["method=fedopal", "method.training=in-turn", "task.name=survival"])
    assert given == {"task": {"name": "survival"}, "method": {"name": "fedopal", "training": "in-turn"}}


def test_an_option_with_its_table_before_it_is_explained() -> None:
    experiment = validate({"path": "x"})
    with pytest.raises(ConfigError, match="stands there without the prefix: training"):
        experiment.for_method("fedopal:method.training=in-turn")


def test_an_override_leaves_its_input_alone() -> None:
    values = {"train": {"lr": 1.0}}
    override(values, ["train.lr=0.5", "seed=1"])
    assert values == {"train": {"lr": 1.0}}


@given(
    value=st.integers(-(2**31), 2**31)
    | st.floats(allow_nan=False)
    | st.booleans()
    | st.text("ab =.'\"\\\n#é", max_size=6)
)
def test_any_value_can_be_given_on_the_command_line(value: object) -> None:
    text = tomli_w.dumps({"v": value}).removeprefix("v = ").strip()
    assert override({}, [f"a.b={text}"]) == {"a": {"b": value}}


@given(text=st.text(max_size=12))
def test_whatever_is_typed_is_a_value_or_a_mistake_that_is_explained(text: str) -> None:
    with contextlib.suppress(ConfigError):
        validate(override({"path": "x"}, [text]))
    with contextlib.suppress(ConfigError):
        validate(override({"path": "x"}, [f"train.lr={text}", f"method.{text}"]))


@given(rank=st.integers(1, 64), name=st.sampled_from(sorted(METHODS)))
def test_a_rank_is_divided_among_the_adapters_to_the_last(rank: int, name: str) -> None:
    values = {"path": "x", "method": name, "controls": (), "adapter": {"rank": rank}}
    values |= PRIVATE if METHODS[name]().release() else {}
    slots = len(METHODS[name].slots)
    if rank < slots:
        with pytest.raises(ConfigError, match=f"use at least {slots}"):
            validate(values)
    else:
        ranks = slot_ranks(validate(values).build_method(), rank)
        assert sum(ranks.values()) == rank
        assert max(ranks.values()) - min(ranks.values()) <= 1


def test_unequal_ranks_are_for_methods_that_can_carry_them() -> None:
    values = {"path": "x", "controls": ("local",), "adapter": {"ranks": {"a": 4, "b": 32}}}
    with pytest.raises(ConfigError, match="fedopal cannot carry adapters of different ranks"):
        validate(values)
    experiment = validate({**values, "method": "local"})
    assert [experiment.adapter.rank_of(site) for site in ("a", "b", "c", "")] == [4, 32, 16, 32]
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        validate({"path": "x", "method": "local", "adapter": {"ranks": {"a": 0}}})


def test_an_experiment_does_not_change() -> None:
    experiment = validate({"path": "x"})
    with pytest.raises(ValueError, match="frozen"):
        experiment.rounds = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        experiment.train.lr = 0.5  # type: ignore[misc]


# What follows fails after the main run has been trained, where it could have been refused before.
def test_a_quorum_and_the_default_controls_go_together() -> None:
    experiment = validate({"path": "x", "federation": {"min_replies": 2}})
    for name in experiment.controls:
        experiment.for_method(name)


def test_a_rank_that_a_control_cannot_divide_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="use at least 2"):
        validate({"path": "x", "method": "fedit", "controls": ["fedopal"], "adapter": {"rank": 1}})


def test_a_misspelt_key_of_a_partition_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'column'"):
        validate({"path": "x", "data": {"partition": {"by": "attribute", "colum": "hospital"}}})


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"path": ""}, "path"),
        ({"controls": ["local", "local"]}, "controls"),
        ({"adapter": {"targets": "("}}, "adapter.targets"),
        ({"method": {"name": "fedopal", "lam": float("nan")}}, "method.lam"),
        ({"method": "local", "hold_out": "a"}, "hold_out"),
        ({"method": {"head": "local"}, "hold_out": "a"}, "hold_out"),
        ({"train": {"class_weights": {"a": 1.0}}}, "train.class_weights"),  # and classes are drawn equally often
        ({"train": {"class_weights": {"a": -1.0}, "balance": "none"}}, "train.class_weights.a"),
        ({"task": "multi-label", "data": {"target": "labels"}, "controls": [],
          "train": {"class_weights": {"a": 1.0}, "balance": "none"}}, "train.class_weights"),
    ],
)  # fmt: skip
def test_what_could_only_fail_later_is_refused_at_once(values: dict[str, object], where: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate({"path": "x", **values})
    assert error.value.where == where


def test_a_comparison_may_set_local_training_beside_a_held_out_site() -> None:
    assert validate({"path": "x", "hold_out": "a"}).for_method("local").hold_out == "a"


def test_an_image_size_below_one_pixel_is_refused() -> None:
    with pytest.raises(ConfigError, match="image_size"):
        validate({"path": "x", "data": {"image_size": (0, -3)}})


def test_a_bare_method_name_and_a_label_with_options() -> None:
    experiment = validate({"path": "x", "method": "fedit"})
    assert experiment.build_method().name == "fedit"
    other = experiment.for_method("fedopal:head=local:lam=2.0", seed=3)
    assert (other.method, other.seed, other.controls) == ({"name": "fedopal", "head": "local", "lam": 2.0}, 3, ())
    kept = validate({"path": "x", "method": {"lam": 0.1}}).for_method("fedopal:head=local")
    assert kept.method == {"name": "fedopal", "lam": 0.1, "head": "local"}


def test_options_that_are_not_compared_stay_equal() -> None:
    base = validate({"path": "x", "method": {"head": "local", "lam": 2.0, "regulariser": "R-cos"}})
    assert base.for_method("dual").method == {"name": "dual", "head": "local", "lam": 2.0}
    assert base.for_method("fedit").method == {"name": "fedit"}
    with pytest.raises(ConfigError, match="no orthogonality term"):
        validate({"path": "x", "method": {"name": "dual", "regulariser": "R-cos"}})


def test_a_file_that_is_no_toml_says_where(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("rounds = 3\nrounds = 4\n")
    with pytest.raises(ConfigError, match="line 2"):
        read(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read(tmp_path / "b.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "c.toml").write_text("rounds = 3\n\n[train]\nlr = = 2\n")
    with pytest.raises(ConfigError, match="line 4, column 6") as error:
        read(tmp_path / "c.toml")
    assert error.value.where == str(tmp_path / "c.toml")
