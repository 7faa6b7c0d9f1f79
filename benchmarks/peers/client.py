"""What a site does when it is written by hand with PyTorch, transformers and PEFT; no Confrere in it.

Reads the job of ``shared_job.py``. Used by the plain loop and, unchanged, inside the frameworks it is compared with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel

State = dict[str, Tensor]


class Pictures(Dataset):
    """Decodes, resizes and normalises one file at a time, as a torchvision-style data set does."""

    def __init__(self, job: dict[str, Any], site: str) -> None:
        self.files, self.labels = job["sites"][site]["files"], job["sites"][site]["labels"]
        self.size = (job["image_size"][1], job["image_size"][0])
        self.mean, self.std = (torch.tensor(job[k]).view(3, 1, 1) for k in ("mean", "std"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        with Image.open(self.files[row]) as image:
            pixels = np.asarray(ImageOps.fit(image.convert("RGB"), self.size, method=Image.Resampling.BICUBIC))
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div(255)
        return (tensor - self.mean) / self.std, self.labels[row]


class Model(nn.Module):
    """The backbone with PEFT's LoRA and a linear head on the class token."""

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        super().__init__()
        base = AutoModel.from_pretrained(folder / "backbone")
        if getattr(base, "pooler", None) is not None:
            base.pooler = None
        config = LoraConfig(r=job["rank"], lora_alpha=job["scale"] * job["rank"], target_modules=job["layers"])
        self.base = get_peft_model(base, config)
        self.head = nn.Linear(base.config.hidden_size, len(job["classes"]))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return class scores (B, K)."""
        return self.head(self.base(pixel_values=pixels).last_hidden_state[:, 0])


class Client:
    """One site: trains from a given state, evaluates a given state."""

    def __init__(self, folder: Path, site: str, model: Model, job: dict[str, Any], *, autocast: bool = False) -> None:
        self.job, self.site, self.model, self.autocast = job, site, model, autocast
        self.data, self.entry = Pictures(job, site), job["sites"][site]
        self.weight = self.entry["split"].count(0)

    def fit(self, state: State, round_: int) -> State:
        """Return the state after the local steps of one round (counted from 1)."""
        write(self.model, state)
        self.model.train()
        self.model.base.eval()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=self.job["lr"], weight_decay=self.job["weight_decay"])
        rows = self.entry["batches"][round_ - 1]
        for pixels, labels in DataLoader(self.data, batch_sampler=rows):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                scores = self.model(pixels)
            loss = nn.functional.cross_entropy(scores.float(), labels)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, self.job["clip"])
            optimiser.step()
        return read(self.model)

    @torch.no_grad()
    def score(self, state: State, split: int) -> float:
        """Return the balanced accuracy on one split (1 validation, 2 test)."""
        write(self.model, state)
        self.model.eval()
        rows = [row for row, s in enumerate(self.entry["split"]) if s == split]
        hits: dict[int, list[bool]] = {}
        subset = torch.utils.data.Subset(self.data, rows)
        for pixels, labels in DataLoader(subset, batch_size=64):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                scores = self.model(pixels)
            for said, label in zip(scores.argmax(1).tolist(), labels.tolist(), strict=True):
                hits.setdefault(label, []).append(said == label)
        return float(np.mean([np.mean(v) for v in hits.values()]))


def open_job(folder: Path) -> dict[str, Any]:
    """Return the job's settings."""
    return json.loads((folder / "job.json").read_text())


def first_state(folder: Path) -> State:
    """Return the adapters and head before training."""
    return {
        name.replace(".general.", ".default."): tensor
        for name, tensor in load_file(folder / "first.safetensors").items()
    }


def _named(model: Model) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name.removeprefix("base.base_model.model."), parameter


def read(model: Model) -> State:
    """Return a copy of what is trained."""
    return {name: parameter.detach().clone() for name, parameter in _named(model)}


def write(model: Model, state: State) -> None:
    """Put a state into the model."""
    with torch.no_grad():
        for name, parameter in _named(model):
            parameter.copy_(state[name])


def average(states: list[tuple[float, State]]) -> State:
    """Return the weighted mean."""
    total = sum(weight for weight, _ in states)
    return {name: sum(weight / total * state[name] for weight, state in states) for name in states[0][1]}
