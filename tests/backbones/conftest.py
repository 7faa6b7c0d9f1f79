from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from confrere.adapters import head, lora
from confrere.backbones import Backbone, load
from confrere.seeds import torch_generator

SLOTS = ("general", "personal")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty hub cache and an address at which nobody listens."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if "CONFRERE_CACHE" not in os.environ:
        monkeypatch.setenv("CONFRERE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return load("test-vit", lora=lora.LoraSpec(slots=SLOTS, blocks=2))


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def make_params() -> Callable[..., dict[str, torch.Tensor]]:
    def make(backbone: Backbone, *, grad: bool = False, **ranks: int) -> dict[str, torch.Tensor]:
        generator = torch_generator(1, "params")
        shapes = backbone.adapter_shapes(ranks or {"general": 3, "personal": 2})
        params = {n: torch.randn(s, generator=generator) * 0.2 for n, s in shapes.items()}
        params |= head.init(3, backbone.feature_dim, generator, std=0.1)
        return {name: value.requires_grad_(grad) for name, value in params.items()}

    return make
