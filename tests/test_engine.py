"""bfloat16 and the feed: near float32, equal with and without the cache, float32 wherever a site's tensors are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_prefix import site
from tiny_federation import CLASSES, initial_params, tiny_learner

from confrere.adapters.lora import LoraSpec
from confrere.backbones import Backbone, load
from confrere.errors import BackboneError, ConfigError
from confrere.learner import Learner, TrainSettings, predict
from confrere.method import make
from confrere.prefix import tokens
from confrere.tokenset import Batch, TokenSet, as_numpy, feed


def bf16_backbone() -> Backbone:
    return load("test-vit", lora=LoraSpec(slots=("general",), blocks=1, dropout=0.0), precision="bf16")


def test_bf16_is_near_fp32_and_gives_float32_outside() -> None:
    images = site().images
    half, full = bf16_backbone(), load("test-vit", lora=LoraSpec(slots=("general",), blocks=1, dropout=0.0))
    params = {n: t.clone().requires_grad_() for n, t in initial_params(full, make("fedit"), "a").items()}
    assert half.prefix(images).dtype == torch.bfloat16
    found, exact = (b.logits(params, b.prefix(images)) for b in (half, full))
    assert found.dtype == torch.float32
    features = [b.features(params, b.prefix(images)).detach() for b in (half, full)]
    assert float((features[0] - features[1]).norm() / features[1].norm()) < 0.02
    gradients = [torch.autograd.grad(x.square().sum() + x.sum(), list(params.values())) for x in (found, exact)]
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm()) <= 0.1 * float(theirs.norm()) + 1e-6


def test_training_in_bf16_with_and_without_the_cache_gives_the_same_bytes(tmp_path: Path) -> None:
    backbone, images = bf16_backbone(), site(n=8)
    cached = tokens(backbone, images, CLASSES, tmp_path)
    assert cached.batch(np.arange(3)).tokens.dtype == torch.bfloat16
    (file,) = tmp_path.glob("tokens-*")
    assert np.load(file, allow_pickle=False).itemsize == 2
    direct = TokenSet(
        tokens=as_numpy(backbone.prefix(images.images)),
        labels=images.labels,
        groups=images.groups,
        split=images.split,
        classes=CLASSES,
    )
    found = []
    for data in (cached, direct):
        settings = TrainSettings(steps=2, batch_size=4)
        learner = Learner(backbone=backbone, data=data, settings=settings, seed=0, site="a", round=1, rounds=1)
        found.append(learner.fit(initial_params(backbone, make("fedit"), "a")))
    assert all(t.dtype == torch.float32 for t in found[0].values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert predict(backbone, found[0], cached, np.arange(8)).dtype == torch.float32


def test_precision_is_part_of_the_key_of_cached_tokens() -> None:
    full = load("test-vit", lora=LoraSpec(slots=("general",), blocks=1, dropout=0.0))
    assert full.prefix_digest != bf16_backbone().prefix_digest


def test_a_missing_device_and_a_wrong_precision_are_named() -> None:
    from confrere.config import validate

    if not torch.cuda.is_available():
        with pytest.raises(BackboneError, match="cuda"):
            load("test-vit", lora=LoraSpec(slots=("general",), blocks=1), device="cuda")
    for key, value in (("precision", "fp8"), ("device", "tpu"), ("device", "cuda;x"), ("device", "cpu:1")):
        with pytest.raises(ConfigError, match=key):
            validate({"path": "x", "engine": {key: value}})


def test_the_feed_leaves_batches_on_the_processor_as_they_are() -> None:
    batches = list(tiny_learner(make("fedit"), "a").batches(3, "fit"))
    assert [id(b) for b in feed(iter(batches), torch.device("cpu"))] == [id(b) for b in batches]


def test_a_batch_moves_whole() -> None:
    batch = Batch(torch.ones(2, 3, 4), torch.zeros(2, dtype=torch.int64))
    moved = batch.to(torch.device("meta"))
    assert (moved.tokens.shape, moved.labels.shape) == (batch.tokens.shape, batch.labels.shape)
    assert {moved.tokens.device.type, moved.labels.device.type} == {"meta"}
