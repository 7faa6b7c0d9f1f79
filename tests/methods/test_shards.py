"""Adapter shards: each model sees its own part of the patients, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_federation import backbone_of, initial_params, tiny_data

from confrere.adapters.vectors import side_by_side, split_models
from confrere.config import validate
from confrere.errors import ConfigError
from confrere.learner import Learner, TrainSettings
from confrere.method import Reply, make
from confrere.methods.shards import steps_of
from confrere.tensors import Tensors, weighted_mean
from confrere.tokenset import TokenSet, shard_of

SHARDS = make("shards", {"shards": 3})
BACKBONE = backbone_of(SHARDS)


def learner(data: TokenSet, **changes: object) -> Learner:
    settings = TrainSettings(**{"steps": 7, "batch_size": 4, "lr": 0.02, **changes})  # type: ignore[arg-type]
    return Learner(backbone=BACKBONE, data=data, settings=settings, seed=0, site="a", round=1, rounds=2)


def start() -> dict[str, Tensors]:
    return dict(SHARDS.init_server(initial_params(BACKBONE, SHARDS, "a")))


def same(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_an_image_less_moves_the_model_of_its_shard_alone() -> None:
    data, begun = tiny_data(BACKBONE, "a"), start()
    whole, _ = SHARDS.update(learner(data), begun, {})
    gone = int(data.rows("train")[0])
    less, _ = SHARDS.update(learner(data.trained_on(data.rows("train")[1:])), begun, {})
    shard = int(shard_of(data.groups[[gone]].astype(np.uint64), 3)[0])
    for index, (before, after) in enumerate(
        zip(split_models(whole["shared"], 3), split_models(less["shared"], 3), strict=True)
    ):
        assert same(before, after) == (index != shard)
    images = whole["parts"]["images"] - less["parts"]["images"]
    assert images.tolist() == [float(index == shard) for index in range(3)]


def test_models_are_averaged_by_their_own_images() -> None:
    rng, params = torch.Generator().manual_seed(0), initial_params(BACKBONE, SHARDS, "a")
    counts = {"a": [4.0, 0.0, 0.0], "b": [1.0, 3.0, 0.0]}
    models = {s: [{n: torch.randn(t.shape, generator=rng) for n, t in params.items()} for _ in range(3)] for s in "ab"}
    replies = [
        Reply(
            site=site,
            round=1,
            weight=100.0,
            state={
                "shared": side_by_side(models[site]),
                "parts": {"images": torch.tensor(counts[site]).double(), "losses": torch.zeros(3).double()},
            },
        )
        for site in "ab"
    ]
    got = split_models(SHARDS.aggregate(start(), replies)["shared"], 3)
    assert same(got[0], weighted_mean([(4.0, models["a"][0]), (1.0, models["b"][0])]))
    assert same(got[1], weighted_mean([(3.0, models["b"][1])]))
    assert same(got[2], split_models(start()["shared"], 3)[2])  # trained by nobody


def test_prediction_is_the_mean_of_probabilities() -> None:
    trained, _ = SHARDS.update(learner(tiny_data(BACKBONE, "a")), start(), {})
    tokens = tiny_data(BACKBONE, "a").batch(np.arange(5)).tokens
    with torch.no_grad():
        got = SHARDS.scores(BACKBONE, trained["shared"], tokens).exp()
        each = [BACKBONE.logits(model, tokens).softmax(1) for model in split_models(trained["shared"], 3)]
    assert len({tuple(one.flatten().tolist()) for one in each}) == 3
    torch.testing.assert_close(got, sum(each) / 3)


def test_training_images_of_a_part_keep_their_views() -> None:
    data = tiny_data(BACKBONE, "a")
    rows = data.rows("train")
    turned = replace(data, views=(np.asarray(data.tokens)[rows] + 100.0,))
    chosen = rows[[1, 3, 4]]
    part = turned.trained_on(chosen[::-1])
    assert part.rows("train").tolist() == chosen.tolist()
    assert part.rows("val").tolist() == data.rows("val").tolist()
    got = part.batch(chosen[[2, 0]], np.array([1, 0])).tokens.numpy()
    np.testing.assert_array_equal(got[0], np.asarray(data.tokens)[chosen[2]] + 100.0)
    np.testing.assert_array_equal(got[1], np.asarray(data.tokens)[chosen[0]])


def test_one_gauge_for_all_models_is_refused() -> None:
    values = {"path": "x", "controls": [], "method": "shards", "federation": {"canonical": True}}
    with pytest.raises(ConfigError, match="several models side by side"):
        validate(values)


def test_steps_are_divided_and_none_is_lost() -> None:
    assert [steps_of(7, 3, shard) for shard in range(3)] == [3, 2, 2]
    with pytest.raises(ConfigError, match="2 steps are too few for 3 shards"):
        SHARDS.check(2, 5)
    with pytest.raises(ConfigError, match="use shards >= 2"):
        make("shards", {"shards": 1})
