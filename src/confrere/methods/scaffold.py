"""SCAFFOLD: one shared adapter; control variates take the sites' drift out of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import Method, Reply, register
from confrere.tensors import State, Tensors, sub, weighted_mean


@register(
    "scaffold",
    title="One shared adapter, control variates (SCAFFOLD)",
    paper="Karimireddy et al., SCAFFOLD, ICML 2020, arXiv 1910.06378",
)
@dataclass(frozen=True, kw_only=True)
class Scaffold(Method):
    """Correct every local gradient by ``c - c_k``: the mean drift of all sites minus the site's own.

    Site k steps along ``g + c - c_k``. Then ``c_k+`` is the mean of the raw gradients g along its path. For SGD of rate
    eta over K steps that is option II of the paper: ``c_k+ = c_k - c + (x - y_k) / (K eta)``. The site sends its new
    tensors and ``c_k+ - c_k``; the server adds ``participation`` times the weighted mean of the latter to c.

    Args:
        participation: sites in a round over all sites, in (0, 1]: the paper's ``|S|/N``. The server hears only of
            the sites that answer, so it must be told: use the value of ``federation.fraction``.

    Differences from the paper: the optimiser is AdamW, not SGD. The correction enters the gradient before its norm
    is clipped and its moments are taken, so option II's formula would not give the mean gradient; we accumulate it.
    Means are weighted as the sites are (``federation.weights``), in c as in x; the paper's are uniform. The server's
    learning rate is 1. A site that did not answer keeps its c_k; one that is new starts at zero.
    """

    sends: ClassVar[tuple[str, ...]] = ("shared", "control")
    also_sends: ClassVar[tuple[str, ...]] = ("change of the control variate",)

    participation: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.participation <= 1.0:
            raise ConfigError(
                f"{self.participation} is out of range",
                where="method.participation",
                fix="use the value of federation.fraction, in (0, 1]",
            )

    def init_server(self, params: Tensors) -> State:
        """Return the shared tensors and c = 0."""
        state = super().init_server(params)
        return {**state, "control": _zeros(state["shared"])}

    def broadcast(self, server: State, site: str) -> State:
        """Return the shared tensors and c."""
        return {"shared": server["shared"], "control": server["control"]}

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train with the correction; send the tensors and the change of c_k, keep c_k."""
        mine = state.get("control") or _zeros(received["control"])
        gradient: dict[str, Tensor] = {}
        fitted = learner.fit(
            self.personal(received, state), correct=sub(received["control"], mine), mean_gradient=gradient
        )
        payload, kept = self.split(fitted)
        return {**payload, "control": sub(gradient, mine)}, {**kept, "control": gradient}

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Average the tensors; move c by the sites' mean change, as far as they stand for all sites."""
        averaged = super().aggregate(server, replies)
        sent = [(reply.weight, reply.state["control"]) for reply in replies if reply.state.get("control")]
        if not sent:
            return averaged
        change = weighted_mean(sent)
        moved = {name: c + self.participation * change[name] for name, c in server["control"].items()}
        return {**averaged, "control": moved}


def _zeros(tensors: Tensors) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in tensors.items()}
