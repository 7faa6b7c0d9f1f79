"""Where the parts of a vision transformer are: embedding, blocks, final norm, tokens.

Shapes: B images, N tokens (class and register tokens first, then the patches row by row), D channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from confrere.errors import BackboneError

# transformers' model types whose blocks map tokens (B, N, D) to tokens, and where those blocks are.
_BLOCKS = {
    "dinov2": "encoder.layer",
    "dinov2_with_registers": "encoder.layer",
    "vit": "layers",
    "vit_msn": "layers",
    "deit": "layers",
    "dinov3_vit": "model.layer",
}


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The parts of one loaded module.

    ``blocks_path`` is None for an architecture that cannot be cut: then ``whole`` maps normalised images
    (B, 3, H, W) to features (B, F) and nothing is cached before it. ``accept`` turns what is no image, e.g. rows of
    numbers, into tensors (None: images are normalised). ``trained`` names the weights of a network that is trained
    whole, which has no adapters; ``draw`` gives a copy of it first values (None: see :meth:`drawn`).
    """

    root: nn.Module
    family: str
    width: int
    patch: tuple[int, ...]
    blocks_path: str | None = None
    embed: Callable[[Tensor], Tensor] | None = None
    norm: nn.Module | None = None
    after_pool: nn.Module | None = None
    prefix_tokens: int = 1
    heads: int = 1
    block_kwargs: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    whole: Callable[[Tensor], Tensor] | None = None
    accept: Callable[[Any], Tensor] | None = None
    qv: str = r"attention\.(q_proj|v_proj)"
    trained: tuple[str, ...] = ()
    draw: Callable[[nn.Module, torch.Generator], None] | None = None

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the transformer blocks in order (empty when the module cannot be cut)."""
        return list(self.root.get_submodule(self.blocks_path).children()) if self.blocks_path else []

    def norms_after(self, cut: int) -> dict[str, Tensor]:
        """Return copies of the layer norms' weights and biases from block ``cut`` on, and of the final norm's.

        Of a module that cannot be cut these are all layer norms.

        Raises:
            BackboneError: there is none.
        """
        kept = tuple(f"{self.blocks_path}.{index}." for index in range(cut, len(self.blocks)))
        norms = {
            path: module
            for path, module in self.root.named_modules()
            if isinstance(module, nn.LayerNorm)
            and (module in (self.norm, self.after_pool) or path.startswith(kept) or not self.blocks_path)
        }
        if not norms:
            raise BackboneError(
                "the backbone has no layer norm to train",
                where=self.family,
                fix="use another method",
                code="backbone-unsupported",
            )
        return {
            f"{path}.{name}": value.detach().float().clone()
            for path, module in norms.items()
            for name, value in module.named_parameters()
        }

    def drawn(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return first values of what is ``trained``: Glorot's for matrices, small normal tokens, no biases."""
        if self.draw is not None:
            root = copy.deepcopy(self.root)
            self.draw(root, generator)
            return {name: value.detach().clone() for name, value in root.named_parameters() if name in self.trained}
        values, parts = {}, dict(self.root.named_parameters())
        for name in self.trained:
            shape = parts[name].shape
            if name.endswith("_token"):
                values[name] = torch.randn(shape, generator=generator) * 0.02
            elif len(shape) > 1:  # the convolution that cuts patches is a matrix, too
                bound = (6 / (shape[0] + shape[1:].numel())) ** 0.5
                values[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
            else:
                values[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        return values

    def drop_blocks_after(self, depth: int) -> None:
        """Remove the blocks from ``depth`` on; the paths of the others stay as they were."""
        if self.blocks_path:
            holder = self.root.get_submodule(self.blocks_path)
            for index in range(depth, len(self.blocks)):
                delattr(holder, str(index))


def unfuse_attention(root: Any) -> None:
    """Let attention be plain matrix products: on CPUs the fused one's backward pass is slow in bfloat16."""
    if hasattr(root, "set_attn_implementation"):
        root.set_attn_implementation("eager")
    for module in root.modules():
        if hasattr(module, "fused_attn"):  # timm
            module.fused_attn = False


def of_transformers(model: Any, image_size: tuple[int, int]) -> Anatomy:
    """Return the anatomy of a transformers vision model for images of ``image_size`` (height, width)."""
    config = model.config
    family = str(config.model_type)
    if family not in _BLOCKS:
        return _whole_transformers(model, family)
    resized = family in ("vit", "vit_msn", "deit")  # these interpolate positions only when asked

    def embed(images: Tensor) -> Tensor:
        tokens: Tensor = model.embeddings(images, **({"interpolate_pos_encoding": True} if resized else {}))
        return tokens

    registers = int(getattr(config, "num_register_tokens", 0) or 0)
    kwargs: dict[str, tuple[Tensor, ...]] = {}
    if family == "dinov3_vit":  # rotary positions depend on the image size only
        with torch.no_grad():
            kwargs["position_embeddings"] = model.rope_embeddings(torch.zeros(1, 3, *image_size))
    return Anatomy(
        root=model,
        family=family,
        width=int(config.hidden_size),
        patch=_pair(config.patch_size),
        blocks_path=_BLOCKS[family],
        embed=embed,
        norm=model.norm if family == "dinov3_vit" else model.layernorm,
        prefix_tokens=1 + registers + (family == "deit"),
        heads=int(config.num_attention_heads),
        block_kwargs=kwargs,
    )


def drop_pooler(model: Any) -> bool:
    """Remove the layer behind the tokens of a model that can be cut (features come from the tokens)."""
    if str(model.config.model_type) not in _BLOCKS:
        return False
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return True


def of_timm(model: Any) -> Anatomy:
    """Return the anatomy of a timm model built with ``num_classes=0``."""
    if type(model).__name__ != "VisionTransformer" or model.attn_pool is not None:
        return Anatomy(
            root=model,
            family=type(model).__name__,
            width=int(model.num_features),
            patch=(1, 1),
            whole=model,
            qv=r".*attn\.qkv",
        )

    def embed(images: Tensor) -> Tensor:
        tokens: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return tokens

    return Anatomy(
        root=model,
        family="timm VisionTransformer",
        width=int(model.embed_dim),
        patch=_pair(model.patch_embed.patch_size),
        blocks_path="blocks",
        embed=embed,
        norm=model.norm,
        after_pool=model.fc_norm,
        prefix_tokens=int(model.num_prefix_tokens),
        heads=int(model.blocks[0].attn.num_heads),
        qv=r"attn\.qkv",  # timm fuses query, key and value in one layer
    )


@dataclass
class _Whole:
    """A model's own pooled output; an object and no closure, so that a copy of it holds a copy of the model."""

    model: Any

    def __call__(self, images: Tensor) -> Tensor:
        output = self.model(pixel_values=images)
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        if pooled is None:
            pooled = (
                output.last_hidden_state.flatten(2).mean(2)
                if output.last_hidden_state.ndim == 4
                else (output.last_hidden_state.mean(1))
            )
        return pooled.flatten(1)


def _whole_transformers(model: Any, family: str) -> Anatomy:
    whole = _Whole(model)
    try:
        with torch.no_grad():
            size = int(getattr(model.config, "image_size", 224) or 224)
            width = whole(torch.zeros(1, 3, size, size)).shape[1]
    except Exception as error:
        raise BackboneError(
            f"models of type {family!r} are not supported",
            where="backbone",
            fix="use a DINOv2, DINOv3, ViT or DeiT model, or a vision model that maps images to features",
            code="backbone-unsupported",
        ) from error
    return Anatomy(
        root=model,
        family=family,
        width=width,
        patch=(1, 1),
        whole=whole,
        qv=r".*\.(q_proj|v_proj|query|value)",
    )


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
