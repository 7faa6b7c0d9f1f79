"""Simulated attackers, for research: what some sites send instead of what they learned.

The attacker is omniscient: it reads the honest replies of the round before it sends its own, as no real one can. So
what withstands it withstands more than it will meet. Data attacks change what a site trains on, and send honestly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from confrere.adapters.names import pair_names
from confrere.errors import ConfigError, nearest
from confrere.federation.robust import layout, restored, update
from confrere.federation.transport import Failure, Transport
from confrere.method import Reply, Request
from confrere.seeds import numpy_generator, torch_generator
from confrere.tensors import Tensors
from confrere.tokenset import TokenSet


class Scene(NamedTuple):
    """What an attacker knows: ``own`` (d,), the update it would send, and ``honest`` (n, d), those of all others."""

    own: Tensor
    honest: Tensor
    strength: float
    generator: torch.Generator


def sign_flip(scene: Scene) -> Tensor:
    """Return ``-s own``: a step the wrong way."""
    return -scene.strength * scene.own


def scaling(scene: Scene) -> Tensor:
    """Return ``s own``: the right way, but much too far."""
    return scene.strength * scene.own


def little(scene: Scene) -> Tensor:
    """Return ``mean - s std`` of the honest updates, a coordinate at a time: within their spread, hard to tell.

    A Little Is Enough: Baruch et al., NeurIPS 2019. The paper's s follows from the numbers of sites (for 2 of 10 it is
    0); here it is given.
    """
    return scene.honest.mean(0) - scene.strength * scene.honest.std(0, correction=0)


def inner_product(scene: Scene) -> Tensor:
    """Return ``-s mean`` of the honest updates. Fall of Empires: Xie et al., UAI 2019."""
    return -scene.strength * scene.honest.mean(0)


def noise(scene: Scene) -> Tensor:
    """Return ``own`` plus a random direction, s times as long as ``own``."""
    drawn = torch.randn(scene.own.shape, generator=scene.generator, dtype=torch.float64)
    length: Tensor = scene.strength * scene.own.norm() / drawn.norm().clamp_min(1e-300)
    return scene.own + length * drawn


def not_finite(scene: Scene) -> Tensor:
    """Return ``own`` with one NaN at a random place."""
    sent = scene.own.clone()
    if len(sent):
        sent[int(torch.randint(len(sent), (), generator=scene.generator))] = float("nan")
    return sent


class Attack(NamedTuple):
    """One line that says what ``strength`` means, and the update that is sent; None where it is no update."""

    line: str
    send: Callable[[Scene], Tensor] | None = None


ATTACKS: dict[str, Attack] = {
    "sign-flip": Attack("the own update times -strength", sign_flip),
    "scaling": Attack("the own update times strength", scaling),
    "alie": Attack("A Little Is Enough: mean minus strength standard deviations of the honest updates", little),
    "inner-product": Attack("Fall of Empires: the mean of the honest updates times -strength", inner_product),
    "noise": Attack("the own update plus noise strength times as long", noise),
    "not-finite": Attack("one NaN in the own update; strength is not used", not_finite),
    "gauge": Attack("every pair (A, B) becomes (strength A, B / strength): the same adapter, other factors"),
    "label-flip": Attack("training labels y become K - 1 - y; strength is the share of them, 0 to 1"),
}
DATA = ("label-flip",)
"""Attacks on what a site trains on, see :func:`flip_labels`; its replies stay as they are."""


def check_attack(name: str, sites: Collection[str], strength: float, known: Collection[str]) -> None:
    """Refuse an attack that is not there or cannot be; without ``sites`` nobody attacks and nothing is checked.

    Args:
        name: in :data:`ATTACKS`.
        sites: who attacks.
        strength: see :data:`ATTACKS`.
        known: the sites that train; at least one of them has to stay honest.

    Raises:
        ConfigError: naming ``attack.name``, ``attack.sites`` or ``attack.strength``, with the fix.
    """
    if not sites:
        return
    if name not in ATTACKS:
        raise ConfigError(
            f"unknown attack {name!r}", where="attack.name", fix=nearest(name, ATTACKS), code="unknown-name"
        )
    for site in sites:
        if site not in known:
            raise ConfigError(
                f"there is no training site {site!r}",
                where="attack.sites",
                fix=nearest(site, known),
                code="unknown-site",
            )
    if set(sites) >= set(known):
        raise ConfigError("every site attacks", where="attack.sites", fix="leave at least one honest", code="attack")
    if name == "gauge" and strength == 0:
        raise ConfigError("a factor cannot be divided by 0", where="attack.strength", fix="use 10", code="attack")
    if name in DATA and strength > 1:
        raise ConfigError(
            f"{strength:g} is no share of labels", where="attack.strength", fix="use 0 to 1", code="attack"
        )


class Attacked:
    """A transport on which the replies of some sites to ``train`` are what an attack makes of them.

    Args:
        transport: the one that is wrapped. attack: a name in :data:`ATTACKS`. sites: who attacks.
        strength: see :data:`ATTACKS`. seed: of the run; draws have the address (attack, round, site).
    """

    def __init__(self, transport: Transport, attack: str, sites: Collection[str], strength: float, seed: int) -> None:
        self._transport, self._attack, self._attackers = transport, attack, frozenset(sites)
        self._strength, self._seed = strength, seed

    def sites(self) -> tuple[str, ...]:
        """Return the sites of the wrapped transport."""
        return self._transport.sites()

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        """Return what came, with the attackers' replies to ``train`` replaced; judging stays honest."""
        came = self._transport.exchange(requests)
        if self._attack in DATA:
            return came
        replies = sorted((a for a in came if isinstance(a, Reply)), key=lambda r: r.site)
        honest = [r for r in replies if r.site not in self._attackers] or replies
        return [
            self._attacked(answer, requests, honest)
            if isinstance(answer, Reply) and answer.site in self._attackers and requests[answer.site].kind == "train"
            else answer
            for answer in came
        ]

    def _attacked(self, reply: Reply, requests: Mapping[str, Request], honest: Sequence[Reply]) -> Reply:
        if self._attack == "gauge":
            return replace(reply, state={g: regauged(t, self._strength) for g, t in reply.state.items()})
        like = layout(reply.state)
        seen = [r for r in honest if layout(r.state) == like] or [reply]
        scene = Scene(
            own=update(reply.state, requests[reply.site].state),
            honest=torch.stack([update(r.state, requests[r.site].state) for r in seen]),
            strength=self._strength,
            generator=torch_generator(self._seed, "attack", self._attack, reply.round, reply.site),
        )
        send = ATTACKS[self._attack].send
        if send is None:
            return reply
        return replace(reply, state=restored(send(scene), reply.state, requests[reply.site].state))


def regauged(tensors: Tensors, c: float) -> dict[str, Tensor]:
    """Return the tensors with every pair ``(A, B)``, and what stands between, as ``(c A, B / c)``: the same adapter."""
    result = dict(tensors)
    for a, b, shift in pair_names(tensors):
        result[a], result[b] = tensors[a] * c, tensors[b] / c
        if shift in tensors:
            result[shift] = tensors[shift] * c
    return result


def flip_labels(data: TokenSet, share: float, seed: int, site: str) -> TokenSet:
    """Return the data of an attacking site: a share of the training labels y become K - 1 - y.

    A larger share flips the same labels and more. Of an odd number of classes the middle one stays as it is.
    """
    rows = numpy_generator(seed, "attack", "label-flip", site).permutation(data.rows("train"))
    labels: np.ndarray = data.labels.copy()
    chosen = rows[: round(share * len(rows))]
    labels[chosen] = len(data.classes) - 1 - labels[chosen]
    return replace(data, labels=labels)
