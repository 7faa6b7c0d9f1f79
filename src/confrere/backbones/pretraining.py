"""Vision transformers without weights, trained whole on images without labels; then a backbone like any other.

A network is transformers' own (``ViTMAEForPreTraining``, ``ViTModel``). What it learns is a task
(:mod:`confrere.tasks.pretext`). :func:`encoder_files` writes the encoder as a folder which
:func:`confrere.backbones.load` and transformers' ``AutoModel`` take.

Shapes: B images (B, 3, H, W), N patches, D channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812  as in PyTorch's own documentation

from confrere.adapters.dropout import Chance
from confrere.backbones.anatomy import Anatomy
from confrere.backbones.augmentation import two_views
from confrere.backbones.loading import Loaded
from confrere.backbones.quiet import quiet
from confrere.backbones.registry import Entry
from confrere.errors import BackboneError
from confrere.tasks.pretext import Contrast, Reconstruction
from confrere.tasks.task import Task
from confrere.tensors import Tensors

ENCODER = "encoder."
_FIXED = ("position_embeddings", "decoder_pos_embed")
"""Sines and cosines, which are not trained: an average would let them drift."""


class MaskedAutoencoder(nn.Module):
    """transformers' MAE, with the loss of each image.

    Where no step is trained, the same patches of all images are hidden.
    """

    def __init__(self, config: Mapping[str, Any], task: Reconstruction) -> None:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        super().__init__()
        width = task.decoder_width or max(32, config["hidden_size"] // 64 * 32)
        made = ViTMAEConfig(
            **config,
            mask_ratio=task.masked,
            norm_pix_loss=task.normalised,
            decoder_hidden_size=width,
            decoder_num_hidden_layers=task.decoder_depth,
            decoder_num_attention_heads=width // 32,
            decoder_intermediate_size=4 * width,
        )
        net = ViTMAEForPreTraining(made)
        self.encoder, self.decoder, self.chance = net.vit, net.decoder, Chance()
        self.patch, self.normalised = int(config["patch_size"]), task.normalised

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, 2): mean squared error over hidden patches, and that of each patch's own mean."""
        drawn, hidden = self.drawn(images)
        parts = patches(images, self.patch)
        mean = parts.mean(-1, keepdim=True)
        spread = (parts.var(-1, keepdim=True) + 1e-6).sqrt() if self.normalised else torch.ones_like(mean)
        true = (parts - mean) / spread if self.normalised else parts
        flat = torch.zeros_like(mean) if self.normalised else mean
        share = hidden / hidden.sum(1, keepdim=True)
        errors = [((guess - true).square().mean(-1) * share).sum(1) for guess in (drawn, flat)]
        return torch.stack(errors, 1)

    def drawn(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what was drawn of every patch (B, N, 3 patch^2), and which were hidden (B, N), 1 or 0."""
        count = (images.shape[2] // self.patch) * (images.shape[3] // self.patch)
        noise = self.chance(images.new_empty(len(images), count, dtype=torch.float32))
        seen = self.encoder(images, noise=noise)
        return self.decoder(seen.last_hidden_state, seen.ids_restore).logits, seen.mask


class ContrastiveEncoder(nn.Module):
    """MoCo v3 on a vision transformer: no queue, a momentum encoder that never leaves a training call.

    Differences from the paper: layer norms in place of batch norms, whose statistics would be somebody's images; the
    momentum encoder starts each round as what the site received; one hidden layer in the projector.
    """

    def __init__(self, config: Mapping[str, Any], task: Contrast) -> None:
        from transformers import ViTConfig, ViTModel

        super().__init__()
        self.encoder = ViTModel(ViTConfig(**config), add_pooling_layer=False)
        width, out = int(config["hidden_size"]), task.projection
        self.projector = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, out)
        )
        self.predictor = nn.Sequential(
            nn.Linear(out, 2 * out), nn.LayerNorm(2 * out), nn.GELU(), nn.Linear(2 * out, out)
        )
        self.chance, self.task = Chance(), task
        self._of: torch.Generator | None = None
        self._slow: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, 2): mean cross-entropy of both directions, and the share of directions that hit."""
        views = two_views(images, self.chance)
        now = {n: p for part in ("encoder", "projector") for n, p in self.named_parameters() if n.startswith(part)}
        self._follow(now)
        asked = [self.predictor(self.projected(view)) for view in views]
        with torch.no_grad():
            keys = [self._key(view) for view in views]
        own = torch.arange(len(images), device=images.device)
        losses, hits = [], []
        for query, key in zip(asked, reversed(keys), strict=True):
            alike = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / self.task.temperature
            losses.append(F.cross_entropy(alike, own, reduction="none"))
            hits.append((alike.argmax(1) == own).to(images.dtype))
        return torch.stack([torch.stack(losses).mean(0), torch.stack(hits).mean(0)], 1)

    def projected(self, view: Tensor) -> Tensor:
        """Return the projection (B, P) of the class token."""
        out: Tensor = self.projector(self.encoder(view).last_hidden_state[:, 0])
        return out

    def _follow(self, now: Mapping[str, Tensor]) -> None:
        """Let the momentum encoder follow: it starts where a training call starts, and is nobody's afterwards."""
        generator, share = self.chance.generator, self.task.momentum
        values = {name: value.detach() for name, value in now.items()}
        if generator is None or generator is not self._of:
            self._slow = {name: value.clone() for name, value in values.items()}
        else:
            self._slow = {n: share * old + (1 - share) * values[n] for n, old in self._slow.items()}
        self._of = generator

    def _key(self, view: Tensor) -> Tensor:
        pooled = self._slowly("encoder", view).last_hidden_state[:, 0]
        return cast(Tensor, self._slowly("projector", pooled))

    def _slowly(self, part: str, given: Tensor) -> Any:
        weights = {n.removeprefix(f"{part}."): v for n, v in self._slow.items() if n.startswith(f"{part}.")}
        return functional_call(getattr(self, part), weights, (given,))


def patches(images: Tensor, patch: int) -> Tensor:
    """Return images (B, 3, H, W) as patches (B, N, patch^2 3), row by row, the colours of a pixel side by side."""
    batch, colours, height, width = images.shape
    cut = images.reshape(batch, colours, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * colours)


def untrained(entry: Entry, size: tuple[int, int] | None, task: Task) -> Loaded:
    """Return a network for a pretext task; its weights are nobody's until :meth:`Backbone.start` draws them.

    Raises:
        BackboneError: another kind of task, or images that are not square.
    """
    if task.target == "image" and not isinstance(task, Reconstruction | Contrast):
        fix = "use backbone.name=unetr, unet or swinunetr, with data.volume.size"
        raise BackboneError(f"{task.name} is learnt of volumes", where=entry.name, fix=fix, code="backbone-unsupported")
    if not isinstance(task, Reconstruction | Contrast):
        fix = "pretrain it with `confrere pretrain`, and use what that writes: backbone.name=RUN/backbone"
        raise BackboneError("it has no weights yet", where=entry.name, fix=fix, code="weights-missing")
    height, width = size or entry.input_size or (224, 224)
    if height != width:
        fix = f"use data.image_size=[{height}, {height}]"
        raise BackboneError("pretraining takes square images", where=entry.name, fix=fix, code="backbone-image-size")
    channels, patch = int(entry.width or 0), int(entry.patch or 0)
    config = {
        "hidden_size": channels,
        "num_hidden_layers": entry.depth,
        "num_attention_heads": channels // 64,
        "intermediate_size": 4 * channels,
        "image_size": height,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
    }
    with quiet(), torch.random.fork_rng(devices=[]):
        root = MaskedAutoencoder(config, task) if isinstance(task, Reconstruction) else ContrastiveEncoder(config, task)
    _place(root)
    names = tuple(name for name, _ in root.named_parameters() if not name.endswith(_FIXED))
    anatomy = Anatomy(
        root=root,
        family="vit_mae" if isinstance(task, Reconstruction) else "moco_v3",
        width=channels,
        patch=(patch, patch),
        whole=root,
        trained=names,
    )
    said = json.dumps([entry.name, config, task.choice()], sort_keys=True)
    return Loaded(anatomy, entry, hashlib.sha256(said.encode()).hexdigest())


def encoder_files(anatomy: Anatomy, entry: Entry, params: Tensors) -> dict[str, bytes]:
    """Return the encoder as the files of a folder in transformers' layout: config, weights, preprocessing."""
    from transformers import ViTConfig

    encoder = cast(Any, anatomy.root).encoder
    kept = {key: getattr(encoder.config, key) for key in _CONFIG}
    config = ViTConfig(**kept, architectures=["ViTModel"]).to_dict()
    weights = dict(encoder.state_dict())
    weights |= {n.removeprefix(ENCODER): value for n, value in params.items() if n.startswith(ENCODER)}
    side = kept["image_size"]
    prepared = {"image_mean": entry.mean, "image_std": entry.std, "size": {"height": side, "width": side}}
    return {
        "config.json": _text(config),
        "model.safetensors": save({name: value.float().contiguous() for name, value in sorted(weights.items())}),
        "preprocessor_config.json": _text(prepared),
    }


_CONFIG = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
    "layer_norm_eps",
)


def _text(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _place(root: nn.Module) -> None:
    """Fill all tables of positions: transformers leaves the decoder's empty, and draws those of a plain transformer."""
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    for name, table in root.named_parameters():
        if name.endswith(_FIXED):
            side = int((table.shape[1] - 1) ** 0.5)
            place = build_2d_sinusoidal_position_embedding(
                height=side, width=side, embed_dim=table.shape[-1], cls_token=True
            )
            with torch.no_grad():
                table.copy_(place.view_as(table))
