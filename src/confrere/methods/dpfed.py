"""DPFed and DPFed-post: hide that a whole hospital took part, by a clip at the site and noise at the server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from confrere.errors import ConfigError, UpdateRefusedError
from confrere.learner import Learner
from confrere.method import Method, Reply, register, sent_by
from confrere.methods.noise import clipped, norm, normal
from confrere.seeds import torch_generator
from confrere.tensors import State, Tensors

ROUNDING = 1e-3
"""A change may be longer than the clip by this share: numbers are rounded on the way."""

PAPER = (
    "Rahimian et al., Practical Challenges in Differentially-Private Federated Survival Analysis, CHIL 2022, PMLR 174"
)


@register("dpfed", title="One shared adapter, client-level differential privacy (DPFed-post)", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class DPFed(Method):
    """``x <- x + server_lr clip_P((sum_k clip_S(d_k) + N(0, (S sigma)^2)) / cohort)``; clips join all tensors.

    The site clips its change itself; all sites count equally; the denominator is fixed; an empty round still releases
    noise. Where noise is far above ``post``, the second clip is nothing but a server learning rate: :meth:`equal_lr`.

    Args:
        clip: S > 0, largest norm of a site's change; fix it beforehand, not by looking at patients' updates.
        sigma: >= 0, noise in units of S; 0 is no privacy.
        cohort: expected sites a round; 0 takes share times number of sites. A step size: privacy does not depend on it.
        post: P in units of S; 0 leaves this clip out (plain DPFed). server_lr: > 0; instead of ``post``.
        noise_seed: 0 takes noise from the operating system; else from this seed, which takes it off again: simulations.

    Differences from the paper: adapters and a head, AdamW, local steps; Poisson sampling and a fixed denominator
    instead of exactly K of N; ``server_lr``. The defaults of ``clip`` and ``post`` are those of its example.
    """

    clip: float = 0.3
    sigma: float = 2.0
    cohort: float = 0.0
    post: float = 3.0
    server_lr: float = 1.0
    noise_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("clip", "cohort", "server_lr", "sigma", "post", "noise_seed"):
            value, zero = getattr(self, name), name in ("sigma", "post", "cohort", "noise_seed")
            if not 0 <= value < math.inf or not (value or zero):
                fix = f"use {name} {'>=' if zero else '>'} 0"
                raise ConfigError(f"{value} is out of range", where=f"method.{name}", fix=fix)
        if self.post and self.server_lr != 1.0:
            raise ConfigError(
                "post and server_lr are two ways to do one thing", where="method.post", fix="set post=0.0"
            )

    def init_server(self, params: Tensors) -> State:
        """Return the shared tensors, the number of releases so far, and the sites that are expected a round."""
        expected = torch.tensor(self.cohort, dtype=torch.float64)
        return {**super().init_server(params), "releases": {"count": torch.tensor(0), "cohort": expected}}

    def expecting(self, server: State, sites: float) -> State:
        """Divide by so many sites, where ``cohort`` does not say another number."""
        expected = torch.tensor(self.cohort or sites, dtype=torch.float64)
        return {**server, "releases": {**server["releases"], "cohort": expected}}

    def release(self) -> dict[str, Any]:
        """Return noise, clip, and whether the noise can be drawn again."""
        return {"sigma": self.sigma, "clip": self.clip, "seeded": bool(self.noise_seed)}

    def admissible(self, payload: State, received: State) -> bool:
        """Return whether a site clipped its change; this looks at nobody else's."""
        return norm(payload["shared"], received["shared"]) <= self.clip * (1 + ROUNDING)

    def may_stop(self, round_: int, rounds: int) -> bool:
        """Return whether it is the last round: epsilon does not cover choosing one by validation images."""
        return round_ >= rounds

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train, then clip the whole change before anything leaves."""
        payload, kept = self.split(learner.fit(self.personal(received, state)))
        return {"shared": clipped(payload["shared"], received["shared"], self.clip)}, kept

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Add clipped changes and new noise, also to nothing; UpdateRefusedError where sites do not count equally."""
        # Under secure aggregation one reply stands for all: their mean, and as its weight their number.
        if any(reply.weight != 1.0 and reply.site != "sum" for reply in replies):
            fix = "set federation.weights = equal"
            raise UpdateRefusedError("dpfed needs sites of equal weight", where="server", fix=fix, code="update-weight")
        x, count = server["shared"], int(server["releases"]["count"]) + 1
        cohort = float(server["releases"]["cohort"])
        if not cohort:
            raise ConfigError("nobody is expected", where="method.cohort", fix="give the sites a round", code="privacy")
        seeded = torch_generator(self.noise_seed, "noise", count) if self.noise_seed else None
        step = {name: self.clip * self.sigma * normal(value.shape, seeded) for name, value in sorted(x.items())}
        for weight, sent in sent_by(replies):
            step = {n: value + weight * (sent[n].double() - x[n].double()) for n, value in step.items()}
        step = {name: value / cohort for name, value in step.items()}
        size, most = norm(step), self.post * self.clip
        lr = most / size if 0 < most < size else self.server_lr
        moved = {name: (value.double() + lr * step[name]).to(value.dtype) for name, value in x.items()}
        return {**server, "shared": moved, "releases": {**server["releases"], "count": torch.tensor(count)}}

    def equal_lr(self, dimensions: int, cohort: float = 0.0) -> float:
        """Return what ``post`` amounts to as a server learning rate where it binds: ``P K / (S sigma sqrt(d))``."""
        loud = self.sigma * math.sqrt(dimensions)
        return min(1.0, self.post * (cohort or self.cohort) / loud) if loud else 1.0
