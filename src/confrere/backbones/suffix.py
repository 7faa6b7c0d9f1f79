"""The adapted part of a backbone: one frozen module, with twins so that threads do not meet in it.

Shapes: B images, N tokens, D channels, F features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from confrere.adapters.dropout import SeededDropout
from confrere.adapters.layer import LoraLinear
from confrere.backbones import block
from confrere.backbones.anatomy import Anatomy
from confrere.backbones.registry import Pool


class Suffix(nn.Module):
    """Blocks from ``cut`` on, final norm and pooling, as a module: one ``functional_call`` reaches every adapter.

    Attributes:
        root: the whole frozen module, whose names adapters go by.
        anatomy: where its parts are.
        dense: every patch is a feature vector, none is pooled.
        shortcut: the last block computes only what the class token needs (same result, less work).
        dropouts: of all adapter branches.
    """

    def __init__(self, anatomy: Anatomy, *, cut: int, pool: Pool, layers: Sequence[str], dense: bool = False) -> None:
        super().__init__()
        self.dense = dense
        self.root, self.cut, self.pool, self.layers = anatomy.root, cut, pool, tuple(layers)
        self.anatomy = anatomy
        self.dropouts = [module for module in self.root.modules() if isinstance(module, SeededDropout)]
        self.lean = anatomy.family in block.LAYOUTS
        self.adapted = [module for module in self.root.modules() if isinstance(module, LoraLinear)]
        plain = not any(layer.lora_gate or layer.lora_shift for layer in self.adapted)
        self.shortcut = pool == "cls" and self.lean and plain and not dense

    def twin(self) -> Suffix:
        """Return a copy of the modules that shares every frozen tensor: a few hundred kB, whatever the model's size."""
        shared: list[Tensor] = [*self.root.parameters(), *self.root.buffers()]
        shared += [t for values in self.anatomy.block_kwargs.values() for t in values]
        other = copy.deepcopy(self, {id(tensor): tensor for tensor in shared})
        for dropout in other.dropouts:
            dropout.generator = None
        return other

    def forward(self, tokens: Tensor) -> Tensor:
        """Return features (B, F), dense ones (B, h w, D), of tokens, or of images where the module cannot be cut."""
        anatomy = self.anatomy
        if anatomy.whole is not None:
            return anatomy.whole(tokens)
        return self._pool(self.through(tokens, self.cut, len(anatomy.blocks)))

    def through(self, tokens: Tensor, first: int, end: int) -> Tensor:
        """Return tokens (B, N, D) after the blocks ``first`` to ``end - 1``."""
        blocks = self.anatomy.blocks
        for index in range(first, end):
            if self.lean:
                last = self.shortcut and index == len(blocks) - 1
                tokens = block.forward(blocks[index], tokens, class_token=last)
            else:
                tokens = blocks[index](tokens, **self.anatomy.block_kwargs)
        return tokens

    def _pool(self, tokens: Tensor) -> Tensor:
        norm, after = self.anatomy.norm, self.anatomy.after_pool
        if self.dense:
            patches = tokens[:, self.anatomy.prefix_tokens :]
            return norm(patches) if norm is not None else patches
        if self.pool == "cls":
            tokens = tokens[:, :1]  # the norm is per token: no need to normalise the others
        tokens = norm(tokens) if norm is not None else tokens
        patches = tokens[:, self.anatomy.prefix_tokens :]
        if self.pool == "cls":
            pooled = tokens[:, 0]
        elif self.pool == "mean":
            pooled = patches.mean(1)
        else:
            return torch.cat([tokens[:, 0], patches.mean(1)], dim=1)
        return after(pooled) if after is not None else pooled

    @contextmanager
    def capturing(self, capture: dict[str, Tensor] | None) -> Iterator[None]:
        """Fill ``capture`` with the input of every adapted layer inside the ``with`` block (None: do nothing)."""
        if capture is None:
            yield
            return
        hooks = []
        for path in self.layers:

            def keep(_: nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> None:
                capture[path] = inputs[0].detach().float()

            hooks.append(self.root.get_submodule(path).register_forward_pre_hook(keep))
        try:
            with self.full_last_block():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def weighing(self, weights: Tensor) -> Iterator[None]:
        """Let the slots of every adapted layer count by ``weights`` (B, slots) inside the ``with`` block."""
        try:
            for layer in self.adapted:
                layer.by_image = weights
            with self.full_last_block():
                yield
        finally:
            for layer in self.adapted:
                layer.by_image = None

    @contextmanager
    def full_last_block(self) -> Iterator[None]:
        """Compute every token of the last block inside the ``with`` block (see ``shortcut``)."""
        before, self.shortcut = self.shortcut, False
        try:
            yield
        finally:
            self.shortcut = before
