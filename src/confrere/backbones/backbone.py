"""A frozen vision transformer as a function of named tensors: ``logits(params, tokens)``.

One module serves every site; nobody's tensors live in it. The blocks below ``cut`` never change, so
``prefix`` can be computed once per image and kept.

Shapes: B images, H and W pixels, N tokens, D channels, F features, K classes, h and w patches.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from confrere.adapters import lora
from confrere.adapters.names import gate_name, shift_name
from confrere.backbones.anatomy import Anatomy
from confrere.backbones.registry import HALF, Entry
from confrere.backbones.suffix import Suffix
from confrere.errors import BackboneError
from confrere.tasks import CLASSIFICATION, Task
from confrere.tensors import Tensors

Precision = Literal["fp32", "bf16"]
ARITHMETIC = 2
"""Counts the orders of operations that blocks have had: another order, another last bit."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Backbone:
    """A frozen transformer with LoRA slots in its last blocks; make one with :func:`confrere.backbones.load`.

    Calls write the tensors into modules for their duration; each thread has modules of its own, which share every
    frozen weight, so one backbone serves all threads.

    Attributes:
        name: what it was asked for, e.g. ``dinov2-small-imgfocus``.
        digest: SHA-256 (hex) of the weights.
        entry: licence, provenance, normalisation.
        depth: number of blocks kept; the final norm follows the last one.
        cut: index of the first adapted block (``depth`` without slots); the blocks before it are the
            cacheable prefix.
        image_size: (height, width) in pixels.
        precision, dtype: of frozen weights and activations; adapters and head are float32 outside.
        feature_dim: F, the width of a feature vector.
        task: whose head :meth:`logits` applies.
        layers: module paths of the adapted linear layers.
        scale: factor on every ``B A x``, whatever the rank.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        entry: Entry,
        spec: lora.LoraSpec,
        *,
        digest: str,
        depth: int,
        image_size: tuple[int, ...],
        sizes: Mapping[str, tuple[int, int]],
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        task: Task = CLASSIFICATION,
    ) -> None:
        self.task = task
        self.name, self.digest, self.entry = entry.name, digest, entry
        self.spec, self.scale, self.image_size = spec, spec.scale, image_size
        self.depth = depth
        self.cut = depth - (spec.blocks if spec.slots else 0) if anatomy.blocks_path else 0
        self.pool = entry.pool
        both = self.pool == "cls+mean" and anatomy.blocks_path and not task.dense
        self.feature_dim = anatomy.width * (2 if both else 1)
        self.device, self.precision, self.dtype = torch.device(device), precision, _DTYPES[precision]
        self._sizes = dict(sizes)
        self.layers = tuple(self._sizes)
        self.parameters = sum(p.numel() for p in anatomy.root.parameters())
        lora.inject(anatomy.root, self.layers, spec)
        moved = {
            name: tuple(t.to(self.device, self.dtype) for t in value) for name, value in anatomy.block_kwargs.items()
        }
        anatomy = replace(anatomy, block_kwargs=moved)
        # Never called, only copied: a copy of modules that are at work would hold somebody's tensors.
        self._first = Suffix(anatomy, cut=self.cut, pool=self.pool, layers=self.layers, dense=task.dense).eval()
        self._first.to(self.device, self.dtype)
        self._local, self._lock = threading.local(), threading.Lock()
        self._norms = anatomy.norms_after(self.cut) if spec.norms and not anatomy.trained else {}
        own = (*self._norms, *anatomy.trained)
        names = [*self.adapter_shapes(dict.fromkeys(spec.slots, 1)), *self.extras({}), *own]
        self._required = frozenset(f"root.{name}" for name in names)
        mean, std = entry.mean or HALF, entry.std or HALF
        self._gain = (1 / (255 * torch.tensor(std))).view(3, 1, 1).to(self.device)
        self._shift = (-torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1).to(self.device)

    @property
    def grid(self) -> tuple[int, ...]:
        """Return how many patches an image has, (rows, columns); of a volume its voxels."""
        return tuple(side // part for side, part in zip(self.image_size, self.anatomy.patch, strict=True))

    @property
    def anatomy(self) -> Anatomy:
        """Return the frozen module of the calling thread, and where its parts are."""
        return self._suffix.anatomy

    @property
    def shortcut(self) -> bool:
        """Return whether the last block computes only what the class token needs (same result, less work)."""
        return self._suffix.shortcut

    @property
    def prefix_digest(self) -> str:
        """Return a SHA-256 over all that determines the bits of :meth:`prefix`: a key for caches of tokens."""
        parts = (
            ARITHMETIC,
            torch.__version__,
            self.device.type,
            self.digest,
            self.precision,
            self.cut,
            self.image_size,
            self.entry.mean,
            self.entry.std,
            self.anatomy.family,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def adapter_shapes(self, ranks: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Return the shape of every adapter tensor for one rank per slot.

        Raises:
            ConfigError: a rank below 1.
        """
        return lora.shapes(self._sizes, ranks)

    def extras(self, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of gates (slots, d_in) and shifts (rank,), where the slots have them."""
        spec = self.spec
        found: dict[str, tuple[int, ...]] = {}
        for layer, (d_in, _) in self._sizes.items():
            if spec.gated:
                found[gate_name(layer)] = (len(spec.slots), d_in)
            for slot in spec.slots if spec.shifted else ():
                found[shift_name(layer, slot)] = (ranks.get(slot, 1),)
        return found

    def start(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return first values of the network's own weights that are given by name: norms, or all that are trained."""
        return self._norms | self.anatomy.drawn(generator)

    def normalise(self, images: np.ndarray[Any, Any] | Tensor) -> Tensor:
        """Return images (B, H, W, 3) uint8 as normalised float32 (B, 3, H, W) on the backbone's device.

        Raises:
            BackboneError: another shape or type.
        """
        if self.anatomy.accept is not None:  # no images, but rows of numbers
            return self.anatomy.accept(images).to(self.device)
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(images if images.flags.writeable else images.copy())
        if images.ndim != 4 or tuple(images.shape[1:]) != (*self.image_size, 3) or images.dtype != torch.uint8:
            raise BackboneError(
                f"images must be uint8 of shape (B, {self.image_size[0]}, {self.image_size[1]}, 3), "
                f"got {images.dtype} {tuple(images.shape)}",
                where=self.name,
                fix="decode the images at the backbone's image_size",
                code="backbone-input",
            )
        return images.to(self.device).permute(0, 3, 1, 2).float().mul_(self._gain).add_(self._shift)

    @torch.no_grad()
    def prefix(self, images: np.ndarray[Any, Any] | Tensor) -> Tensor:
        """Return the tokens (B, N, D) that enter the first adapted block, in ``dtype``, without gradient.

        For an architecture that cannot be cut these are the normalised images (B, 3, H, W).

        Raises:
            BackboneError: images of another shape or type than (B, H, W, 3) uint8.
        """
        tokens = self.normalise(images).to(self.dtype)
        if self.anatomy.embed is None:
            return tokens
        tokens = self.anatomy.embed(tokens)
        return self._suffix.through(tokens, 0, self.cut).contiguous()

    def features(self, params: Tensors, tokens: Tensor, *, capture: dict[str, Tensor] | None = None) -> Tensor:
        """Return float32 feature vectors (B, F), dense ones (B, h, w, D), with gradient with respect to ``params``.

        Args:
            params: every slot's adapter tensors by canonical name, gates, shifts and norms where the backbone has
                them; other names (the head) are ignored.
            tokens: what :meth:`prefix` returned, or images as it takes them where nothing is frozen.
            capture: if given, receives the input (B, N, d_in) of every adapted layer under the layer's path,
                without gradient (which takes the time that ``shortcut`` saves).

        Raises:
            BackboneError: an adapter tensor is missing.
        """
        given = {
            f"root.{name}": value.to(self.device, self.dtype)
            for name, value in params.items()
            if lora.slot_of(name) or f"root.{name}" in self._required
        }
        missing = sorted(name.removeprefix("root.") for name in self._required if name not in given)
        if missing or len(given) > len(self._required):
            self._refuse(missing, given)
        suffix, tokens = self._suffix, self.normalise(tokens) if tokens.dtype == torch.uint8 else tokens
        with suffix.capturing(capture):
            out: Tensor = torch.func.functional_call(
                suffix, given, (tokens.to(self.device, self.dtype),), tie_weights=False
            )
        if self.task.dense:
            out = out.view(len(out), *self.grid, -1)
        return out.float()

    def logits(self, params: Tensors, tokens: Tensor, *, capture: dict[str, Tensor] | None = None) -> Tensor:
        """Return what the task's head makes of the features: class scores (B, K), or (B, K, H, W) for every pixel.

        Raises:
            BackboneError: an adapter or head tensor is missing.
        """
        if missing := [name for name in self.task.heads if name not in params]:
            raise BackboneError("the head's tensors are missing", where=", ".join(missing), code="adapter-tensors")
        features = self.features(params, tokens, capture=capture)
        return self.task.apply(params, features, self.image_size)

    @contextmanager
    def dropout(self, generator: torch.Generator | None) -> Iterator[None]:
        """Switch LoRA dropout on inside the ``with`` block, drawing from ``generator`` (None: leave it off).

        The frozen module itself stays in evaluation mode always.
        """
        dropouts = self._suffix.dropouts
        before = [layer.generator for layer in dropouts]
        for layer in dropouts:
            layer.generator = generator
        try:
            yield
        finally:
            for layer, old in zip(dropouts, before, strict=True):
                layer.generator = old

    @contextmanager
    def weighing(self, weights: Tensor) -> Iterator[None]:
        """Let each image's slots count by ``weights`` (B, slots) inside the ``with`` block."""
        with self._suffix.weighing(weights.to(self.device)):
            yield

    @contextmanager
    def full_last_block(self) -> Iterator[None]:
        """Compute every token of the last block inside the ``with`` block (see ``shortcut``)."""
        with self._suffix.full_last_block():
            yield

    @property
    def _suffix(self) -> Suffix:
        """Return the calling thread's modules."""
        mine: Suffix | None = getattr(self._local, "suffix", None)
        if mine is None:
            with self._lock:
                mine = self._local.suffix = self._first.twin()
        return mine

    def describe(self) -> dict[str, Any]:
        """Return what a report says about the backbone (JSON-able)."""
        from confrere.backbones.description import description

        return description(self)

    def attention(self, params: Tensors, tokens: Tensor) -> Tensor:
        """Return where the last kept block looks: (B, h, w), non-negative, each map summing to 1.

        It is the class token's attention to the patches, averaged over heads; for models without a class
        token or of unknown inner layout, the patches' cosine similarity to the mean patch, clipped at 0.

        Raises:
            BackboneError: the architecture has no patch tokens.
        """
        from confrere.backbones.overlay import attention_map

        return attention_map(self, params, tokens)

    def _refuse(self, missing: list[str], given: Mapping[str, Tensor]) -> None:
        if missing:
            slots = sorted({str(lora.slot_of(name)) for name in missing})
            what = f"{len(missing)} adapter tensors are missing, first {missing[0]}"
            fix = "pass every slot the backbone was loaded with; a slot of zeros changes nothing"
            raise BackboneError(what, where=f"slots {', '.join(slots)}", fix=fix, code="adapter-tensors")
        unknown = sorted(set(given) - set(self._required))
        what = f"{len(unknown)} adapter tensors do not belong to this backbone, first {unknown[0][5:]}"
        fix = f"load the backbone with the slots, blocks and targets of the adapter (now {self.spec})"
        raise BackboneError(what, fix=fix, code="adapter-tensors")
