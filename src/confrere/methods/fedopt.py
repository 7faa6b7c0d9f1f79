"""FedOpt: the server steps, with momentum or adaptively, along Delta: the sites' mean minus its own tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, full_like, zeros_like

from confrere.errors import ConfigError
from confrere.method import Method, Reply, register
from confrere.tensors import State, Tensors, sub

HSU = "Hsu et al., Measuring the Effects of Non-Identical Data Distribution, 2019, arXiv 1909.06335"
REDDI = "Reddi et al., Adaptive Federated Optimization, ICLR 2021, arXiv 2003.00295"


@register("fedavgm", title="One shared adapter, server momentum (FedAvgM)", paper=HSU)
@dataclass(frozen=True, kw_only=True)
class FedAvgM(Method):
    """Average with momentum on the server: ``m <- beta1 m + Delta``, ``x <- x + server_lr m``.

    Args:
        server_lr: > 0; a lasting Delta moves x by ``server_lr / (1 - beta1)`` Delta a round.
        beta1: momentum in [0, 1); 0 with ``server_lr`` 1 is FedIT.

    Differences from the paper: adapters and a head; AdamW at the sites; the default ``server_lr`` is ours (1 there).
    """

    whole: ClassVar[bool] = True
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"server_lr": ("log", 0.03, 1.0)}

    server_lr: float = 0.3
    beta1: float = 0.9

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value, decay = getattr(self, name), name.startswith("beta")
            if not (0.0 <= value < 1.0 if decay else 0.0 < value < float("inf")):
                fix = f"use 0 <= {name} < 1" if decay else f"use {name} > 0"
                raise ConfigError(f"{value} is out of range", where=f"method.{name}", fix=fix)

    def init_server(self, params: Tensors) -> State:
        """Return the shared tensors and a momentum of zero."""
        state = super().init_server(params)
        return {**state, "momentum": {name: zeros_like(value) for name, value in state["shared"].items()}}

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Take one step of the server's optimiser along Delta; none when nothing was sent."""
        averaged = super().aggregate(server, replies)
        return averaged if averaged is server else self.step(server, sub(averaged["shared"], server["shared"]))

    def step(self, server: State, delta: Tensors) -> State:
        """Return the server's state after one step along ``delta``."""
        momentum = {name: self.beta1 * m + delta[name] for name, m in server["momentum"].items()}
        moved = {name: x + self.server_lr * momentum[name] for name, x in server["shared"].items()}
        return {**server, "shared": moved, "momentum": momentum}


@register("fedadagrad", title="One shared adapter, server AdaGrad (FedAdagrad)", paper=REDDI)
@dataclass(frozen=True, kw_only=True)
class FedAdagrad(FedAvgM):
    """Step by ``m <- beta1 m + (1 - beta1) Delta``, ``v <- v + Delta^2``, ``x <- x + server_lr m / (sqrt(v) + tau)``.

    Args:
        server_lr: > 0; about how far an entry moves a round, once Delta^2 exceeds ``tau^2``.
        beta1: decay of m in [0, 1). Neither moment is corrected for its start (algorithm 2).
        tau: > 0; the smaller, the more all entries move alike. v starts at ``tau^2``.

    Differences from the paper: adapters and a head instead of whole models; AdamW at the sites, not SGD; means are
    weighed as the sites are. The defaults of ``server_lr`` and ``tau`` are ours: about a round of AdamW at 1e-3.
    """

    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"server_lr": ("log", 1e-3, 0.1), "tau": ("log", 1e-4, 1e-2)}

    server_lr: float = 0.01
    beta1: float = 0.0
    tau: float = 1e-3

    def init_server(self, params: Tensors) -> State:
        """Return the shared tensors, a momentum of zero and a variance of ``tau^2``."""
        state = super().init_server(params)
        return {**state, "variance": {n: full_like(x, self.tau**2) for n, x in state["shared"].items()}}

    def step(self, server: State, delta: Tensors) -> State:
        """Return the server's state after one adaptive step along ``delta``."""
        m = {n: self.beta1 * old + (1 - self.beta1) * delta[n] for n, old in server["momentum"].items()}
        v = {n: self.second(old, delta[n].square()) for n, old in server["variance"].items()}
        moved = {n: x + self.server_lr * m[n] / (v[n].sqrt() + self.tau) for n, x in server["shared"].items()}
        return {**server, "shared": moved, "momentum": m, "variance": v}

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Return v after one more ``square`` of Delta."""
        return v + square


@register("fedadam", title="One shared adapter, server Adam (FedAdam)", paper=REDDI)
@dataclass(frozen=True, kw_only=True)
class FedAdam(FedAdagrad):
    """FedAdagrad that forgets: ``v <- beta2 v + (1 - beta2) Delta^2``; otherwise as :class:`FedAdagrad`."""

    beta1: float = 0.9
    beta2: float = 0.99

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Return v after one more ``square`` of Delta."""
        return self.beta2 * v + (1 - self.beta2) * square


@register("fedyogi", title="One shared adapter, server Yogi (FedYogi)", paper=REDDI)
@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdam):
    """FedAdam with ``v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)``: v falls slowly; otherwise as FedAdam."""

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Return v after one more ``square`` of Delta."""
        return v - (1 - self.beta2) * square * (v - square).sign()
