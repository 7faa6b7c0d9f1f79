"""RoLoRA: B and A take turns, so every round's average is exact and both are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from confrere.adapters.names import side_of
from confrere.learner import Learner
from confrere.method import Method, Reply, register
from confrere.tensors import State, Tensors, pick


@register(
    "rolora",
    title="One shared adapter, A and B in turns (RoLoRA)",
    paper="Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, arXiv 2502.01755",
)
@dataclass(frozen=True, kw_only=True)
class RoLoRA(Method):
    """Train and send B and the head in one round, A and the head in the next; the other factor is common.

    In a round of B, ``mean(B_k A) = mean(B_k) A``; likewise for A. B is first: while it is zero, A has no gradient.
    The server counts the rounds that were averaged and sends the factor whose turn it is as ``shared``, the other
    as ``frozen``. So a round that failed is simply asked again.

    Differences from the paper: a vision transformer; the head is trained in every round and averaged; a fresh
    optimiser in every round, so that no moment of the other factor's turn remains.
    """

    def init_server(self, params: Tensors) -> State:
        """Return all tensors, and the count of averaged rounds."""
        return {**super().init_server(params), "turn": {"rounds": torch.tensor(0)}}

    def broadcast(self, server: State, site: str) -> State:
        """Return what is trained in this turn, and apart from it what is not."""
        waits = "A" if int(server["turn"]["rounds"]) % 2 == 0 else "B"
        return {
            "shared": pick(server["shared"], lambda name: side_of(name) != waits),
            "frozen": pick(server["shared"], lambda name: side_of(name) == waits),
        }

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train and send what came as ``shared``; nothing stays."""
        turn = received["shared"].keys()
        fitted = learner.fit(self.personal(received, state), train=turn.__contains__)
        return {"shared": pick(fitted, turn.__contains__)}, {"private": {}}

    def payload(self, params: Tensors, received: State, round_: int, rounds: int) -> State:
        """Return the factor whose turn it is, and the head."""
        return {"shared": pick(params, received["shared"].__contains__)}

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Average the factor whose turn it is and the head; the other factor stays, and its turn is next."""
        averaged = super().aggregate(server, replies)
        if averaged is server:
            return server
        shared = {**server["shared"], **averaged["shared"]}
        return {**server, "shared": shared, "turn": {"rounds": server["turn"]["rounds"] + 1}}

    def personal(self, received: State, state: State) -> Tensors:
        """Return both factors and the head."""
        return {**received["frozen"], **received["shared"]}
