"""FedMosaic: sites share small matrices between fixed factors, the more the more alike their tasks are."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from confrere.adapters import colora
from confrere.adapters.names import slot_of
from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import register
from confrere.methods.relevance import Relevance
from confrere.seeds import torch_generator
from confrere.tensors import State, Tensors, pick
from confrere.tokenset import Batch


@register(
    "fedmosaic",
    title="Shared inner matrices, by relevance (FedMosaic, Co-LoRA)",
    paper="Seo et al., Not All Clients Are Equal, ICLR 2026, arXiv 2506.11024",
)
@dataclass(frozen=True, kw_only=True)
class FedMosaic(Relevance):
    """Train P_i, q_i of ``B (P_i A x + q_i)`` beside a frozen mixture P', q' of the other sites'.

    ``y = W0 x + s [beta B (P' A x + q') + (1 - beta) B (P_i A x + q_i)]`` with A and B orthonormal, common and frozen
    and beta a gate of the layer. ``P' = sum over j != i of w_ij P_j``, ``w_ij = softmax(S_ij / temperature)``, S being
    the similarity of moving averages ``G <- (G + g) / 2`` of a frozen probe's gradient. The last block of each of four
    parts carries P and q; other blocks have plain adapters, shared among sites of equal shapes. Only P_i costs rank.

    Args:
        similarity: ``columns`` (mean of the columns' cosines, the released code) or ``flattened`` (the paper).
        temperature: of the softmax, > 0.
        every: steps between two gradients of the probe, >= 1.
        noise: standard deviation added to a gradient before it is sent, >= 0. This is not differential privacy.

    Differences from the paper: the gate is a softmax over both copies, token by token; the probe is a random layer on
    the site's own frozen features; the head stays; the server holds each site's last P and G; one learning rate.
    """

    slots: ClassVar[tuple[str, ...]] = ("personal",)
    own: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[tuple[str, ...]] = ("general",)
    gated: ClassVar[bool] = True
    shifted: ClassVar[bool] = True
    depths: ClassVar[bool] = True
    also_sends: ClassVar[tuple[str, ...]] = ("P and q", "own adapters of other blocks", "gradient of a frozen probe")
    keeps: ClassVar[tuple[str, ...]] = ("gates", "head", "copy of what it last sent, to predict with")
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"temperature": ("log", 0.05, 2.0)}

    every: int = 10
    noise: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.noise < float("inf") and self.every >= 1):
            raise ConfigError("a value is out of range", where="method", fix="every=10 noise=0.0001")

    def shared(self, name: str) -> bool:
        """Say no of all, for lists: ``also_sends`` and ``keeps`` say in words what leaves and stays."""
        return False

    def init_site(self, params: Tensors) -> State:
        """Return fixed factors, gates, head, and plain factors before training (both copies start from these)."""
        return {"private": colora.fix(params)}

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train P, q, plain factors, gates and head; meanwhile average the probe's gradient."""
        fixed, others = state["private"], received.get("others", {})
        own = state.get("shared") or received.get("own", {})
        off = {n: torch.zeros_like(t) if ".lora_B." in n else t for n, t in self.personal(received, state).items()}
        step, seen, classes = itertools.count(), list[Tensor](), len(learner.data.classes)

        def loss(params: Tensors, batch: Batch) -> Tensor:
            if next(step) % self.every == 0:
                seen.append(colora.probe_gradient(learner.features(off, batch).cpu(), batch.labels.cpu(), classes))
            return learner.loss(colora.assemble(others, params, fixed), batch)

        fitted = learner.fit({**colora.first(fixed), **own}, loss=loss)
        gradient = colora.blurred(seen, self.noise, torch_generator(learner.seed, "probe", learner.round, learner.site))
        sent = pick(fitted, leaves)
        kept = {n: fitted[n] if n in fitted and n not in sent else t for n, t in fixed.items()}
        return {"shared": sent, "probe": {"gradient": gradient}}, {"private": kept, "shared": sent}

    def payload(self, params: Tensors, received: State, round_: int, rounds: int) -> State:
        """Return P, q and plain factors, and the rows of the probe's gradient that are sent."""
        gradient = torch.empty(math.ceil(colora.KEEP * colora.HIDDEN), params["head.weight"].shape[1])
        return {"shared": pick(colora.first(params), leaves), "probe": {"gradient": gradient}}

    def personal(self, received: State, state: State) -> Tensors:
        """Return both copies as adapters ``(P A, B)`` with shifts, beside gates and head."""
        own = state.get("shared") or received.get("own", {})
        return colora.assemble(received.get("others", {}), own, state["private"])


def leaves(name: str) -> bool:
    """Return whether a tensor that is trained leaves the site: P, q, and factors of blocks that carry neither."""
    return colora.inner(name) or slot_of(name) == "personal"
