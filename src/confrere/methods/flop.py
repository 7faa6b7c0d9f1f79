"""FLOP: share a part of the network, keep the classifier; as the paper states it and as its code does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from confrere.learner import Learner
from confrere.method import Method, Reply, register, sent_by
from confrere.tensors import State, Tensors, pick, weighted_mean

PAPER = "Yang et al., FLOP: Federated Learning on Medical Datasets using Partial Networks, KDD 2021, arXiv 2102.05218"


@register("flop", title="Adapter shared, head private (FLOP)", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class FLOP(Method):
    """Average the adapter, each site counting equally, whatever its size; the head never leaves its site.

    Site k trains ``(b, h_k)`` from ``(b, own h_k)`` and sends ``b_k`` only; ``b <- sum_k b_k / K`` over the K sites
    of a round. This is FedPer with an unweighted mean. A site that is not asked keeps its head. There is no general
    model: an unseen site has the shared adapter and its own untrained head, all classes alike, until it trains.

    Differences from the paper: an adapter in a frozen transformer is shared instead of a whole network; local steps
    instead of local epochs; AdamW, fresh in every round. The released code does something else:
    ``flop-released``.
    """

    @property
    def needs(self) -> Literal["sum", "each"]:
        """An unweighted mean is no weighted sum of the payloads."""
        return "each"

    def shared(self, name: str) -> bool:
        """Everything but the head."""
        return not name.startswith("head.")

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Return the unweighted mean of what was sent."""
        sent = [(1.0, tensors) for _, tensors in sent_by(replies)]
        return {**server, "shared": weighted_mean(sent)} if sent else server


@register(
    "flop-released",
    title="FedAvg, judged with the site's last own head (FLOP's released code)",
    paper=PAPER + "; as in the released code, github.com/jianyizhang123/FLOP",
)
@dataclass(frozen=True, kw_only=True)
class FLOPReleased(FLOP):
    """What the code released with FLOP computes: everything is averaged, the head too; only evaluation differs.

    The code puts a site's head into a copy of the model's dictionary and never loads it, so training starts from the
    averaged head, and the head is sent. A site predicts with the averaged adapter and the head that it last sent.
    Nothing here is private. It is here for comparison: the figures that the code gives are of this method.

    Differences from the release: the faults of its data (test images among those for training, partitions
    that ignore their parameter, a training loader without shuffling) are not repeated.
    """

    also_keeps: ClassVar[tuple[str, ...]] = ("copy of the head it last sent, to predict with",)

    def shared(self, name: str) -> bool:
        """Everything, the head included."""
        return True

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train the averaged model, head included; keep a copy of the head."""
        fitted = learner.fit(received["shared"])
        return {"shared": fitted}, {"shared": pick(fitted, lambda name: name.startswith("head."))}

    def personal(self, received: State, state: State) -> Tensors:
        """Return the averaged model with the site's last own head, if it has one."""
        return {**received["shared"], **state.get("shared", {})}
