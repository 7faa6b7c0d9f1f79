"""SCAFFOLD: one shared adapter; control variates take the sites' drift out of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from confrere.learner import Learner
from confrere.method import Method, Reply, register
from confrere.tensors import State, Tensors, pick, sub, weighted_mean

FIRST = "first"


@register(
    "scaffold",
    title="One shared adapter, control variates (SCAFFOLD)",
    paper="Karimireddy et al., SCAFFOLD, ICML 2020, arXiv 1910.06378",
)
@dataclass(frozen=True, kw_only=True)
class Scaffold(Method):
    """Correct every local gradient by ``c - c_k``: the mean drift of all sites minus the site's own.

    Site k steps along ``g + c - c_k``. Then ``c_k+`` is the mean of the raw gradients g along its path. For SGD of rate
    eta over K steps that is option II of the paper: ``c_k+ = c_k - c + (x - y_k) / (K eta)``.

    The server holds ``c = sum_k W_k c_k / sum_k W_k`` over all sites heard so far, whoever answers. It needs sums only:
    a site sends ``c_k+ - c_k`` and a number that is 1 the first time, else 0. Their weighted sums over a round are
    added to numerator and denominator. A round may be discarded, so c_k is the gradient of the site's last reply that
    counted: the server says which rounds did.

    The head has no variate. It starts at zero, so its bias' first raw gradient would be 1/K minus the class shares.

    Differences from the paper: the optimiser is AdamW, not SGD. The correction enters the gradient before its norm
    is clipped and its moments are taken, so option II's formula would not give the mean gradient; we accumulate it,
    every step alike whatever its rate.
    Means are weighted as the sites are (``federation.weights``), in c as in x; the paper's are uniform. c spans the
    sites heard so far, and one that is new trains its first round without correction; in the paper both start at
    zero. The server's learning rate is 1. The head is averaged without correction.
    """

    sends: ClassVar[tuple[str, ...]] = ("shared", "control")
    whole: ClassVar[bool] = True
    also_sends: ClassVar[tuple[str, ...]] = ("change of the control variate",)

    def init_server(self, params: Tensors) -> State:
        """Return the shared tensors, both sums of c at zero, and round 0 as the only one that counted."""
        state = super().init_server(params)
        total = {name: torch.zeros_like(value) for name, value in state["shared"].items() if _controlled(name)}
        heard = {"weight": torch.zeros((), dtype=torch.float64), "rounds": torch.zeros(1, dtype=torch.int64)}
        return {**state, "total": total, "heard": heard}

    def broadcast(self, server: State, site: str) -> State:
        """Return the shared tensors, c, and the rounds that counted."""
        weight = float(server["heard"]["weight"]) or 1.0
        control = {name: value / weight for name, value in server["total"].items()}
        return {"shared": server["shared"], "control": control, "heard": {"rounds": server["heard"]["rounds"]}}

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train with the correction; send the tensors and the change of c_k, keep c_k and this round's gradient."""
        control, settled = received["control"], _settled(received, state)
        gradient: dict[str, Tensor] = {}
        fitted = learner.fit(
            self.personal(received, state),
            correct=sub(control, settled) if settled else None,
            mean_gradient=gradient,
        )
        payload, kept = self.split(fitted)
        newest = pick(gradient, _controlled)
        change = sub(newest, settled) if settled else newest
        change = {**change, FIRST: torch.tensor(0.0 if settled else 1.0, dtype=torch.float64)}
        kept = {**kept, "control": newest, "settled": settled, "asked": {"round": torch.tensor([learner.round])}}
        return {**payload, "control": change}, kept

    def payload(self, params: Tensors, received: State, round_: int, rounds: int) -> State:
        """Return the shared tensors, the change of c_k, and the mark of a first answer."""
        change = {**pick(params, _controlled), FIRST: torch.zeros((), dtype=torch.float64)}
        return {**super().payload(params, received, round_, rounds), "control": change}

    def plausible(self, payload: State) -> bool:
        """Return whether the mark of a first answer is 0 or 1."""
        return float(payload["control"][FIRST]) in (0.0, 1.0)

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Average the tensors; add the sites' changes and the weight of those that are new to the sums of c."""
        averaged = super().aggregate(server, replies)
        sent = [reply for reply in replies if reply.state.get("control")]
        if not sent:
            return averaged
        weight = sum(reply.weight for reply in sent)
        mean = weighted_mean((reply.weight, reply.state["control"]) for reply in sent)
        total = {name: value + weight * mean[name] for name, value in server["total"].items()}
        heard = {
            "weight": server["heard"]["weight"] + weight * mean[FIRST],
            "rounds": torch.cat([server["heard"]["rounds"], torch.tensor([sent[0].round])]),
        }
        return {**averaged, "total": total, "heard": heard}


def _controlled(name: str) -> bool:
    return not name.startswith("head.")


def _settled(received: State, state: State) -> Tensors:
    """Return c_k as the server has it: that of this site's last reply that counted; empty before the first."""
    if "asked" in state and bool((received["heard"]["rounds"] == state["asked"]["round"]).any()):
        return state["control"]
    return state.get("settled", {})
