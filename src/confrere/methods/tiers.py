"""The server's side of HiLoRA: means of products over all sites and within groups of alike sites."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from confrere.adapters.algebra import average_products, named, pairs
from confrere.adapters.clusters import spectral_groups, subspace_similarity, update_basis
from confrere.adapters.names import slot_of
from confrere.method import Method, Reply
from confrere.methods.flexlora import revive
from confrere.tensors import State, Tensors, pick, weighted_mean

BASIS, CLUSTER = "basis.", "cluster."
"""Prefixes of the server's groups: bases of each site's root, and adapters (and head) of each group of sites."""


@dataclass(frozen=True, kw_only=True)
class Tiers(Method, ABC):
    """Average the tier that is sent; before the second tier, group the sites. Not registered: a base class.

    Groups of the server's state: ``shared`` (root, mean of the cluster adapters, head: the model of unseen sites),
    ``weights`` (of each site, when it sent last), ``basis.<site>`` until there are groups, then ``members`` (site:
    number) and ``cluster.<number>``, which begins as what was shared and moves when one of its members sends something.
    In the mean over groups, each counts by the weights of all its members, whoever was asked last.
    """

    sends: ClassVar[tuple[str, ...]] = ("tier",)

    clusters: int = 2
    basis: str = "update"

    @property
    def needs(self) -> Literal["sum", "each"]:
        """Means of products need each site's factors."""
        return "each"

    @abstractmethod
    def tier(self, round_: int, rounds: int) -> str:
        """Return which adapter is trained in a round."""

    def payload(self, params: Tensors, received: State, round_: int, rounds: int) -> State:
        """Return the factors of the round's tier and a shared head; nothing of the leaves."""
        tier = self.tier(round_, rounds)
        sent = pick(params, lambda name: self.shared(name) and slot_of(name) in (tier, None))
        return {} if tier == "leaf" else {"tier": sent}

    def broadcast(self, server: State, site: str) -> State:
        """Return the shared model and what replaces its parts within the site's group."""
        member = server.get("members", {}).get(site)
        group = {} if member is None else server[f"{CLUSTER}{int(member)}"]
        return {"shared": server["shared"], **({"group": group} if group else {})}

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Average the tier that was sent: over all sites, and the cluster tier within each group, too."""
        sent = {reply.site: (reply.weight, reply.state["tier"]) for reply in replies if reply.state.get("tier")}
        if not sent:
            return server
        old, some = server["shared"], next(iter(sent.values()))[1]
        came = {site: torch.tensor([weight], dtype=torch.float64) for site, (weight, _) in sent.items()}
        server = {**server, "weights": {**server.get("weights", {}), **came}}
        if pairs(some, "root"):
            last = pairs(old, "root") if self.basis == "update" else {}
            bases = {BASIS + site: update_basis(pairs(new, "root"), last) for site, (_, new) in sent.items()}
            return {**server, "shared": merged(old, sent.values(), "root"), **bases}
        members = server.get("members") or self.members(server)
        begun = {f"{CLUSTER}{int(number)}": {name: old[name] for name in some} for number in members.values()}
        before = {**begun, **server}
        groups: dict[str, list[tuple[float, Tensors]]] = {}
        for site in sorted(sent.keys() & members.keys()):
            groups.setdefault(f"{CLUSTER}{int(members[site])}", []).append(sent[site])
        averaged = {group: merged(before[group], among, "cluster") for group, among in groups.items()}
        rest = {group: tensors for group, tensors in before.items() if not group.startswith(BASIS)}
        new = {**rest, **averaged}
        heavy: dict[str, float] = {}
        for site, number in sorted(members.items()):
            group = f"{CLUSTER}{int(number)}"
            heavy[group] = heavy.get(group, 0.0) + float(server["weights"][site])
        every = [(weight, new[group]) for group, weight in sorted(heavy.items())] or list(sent.values())
        return {**new, "shared": merged(old, every, "cluster"), "members": members}

    def members(self, server: State) -> Tensors:
        """Return the number of each site's group; sites that never trained a root are left out."""
        sites = sorted(group.removeprefix(BASIS) for group in server if group.startswith(BASIS))
        if not sites:
            return {}
        similar = subspace_similarity([server[BASIS + site] for site in sites])
        numbers = spectral_groups(similar, self.clusters)
        return {site: torch.tensor([float(number)]) for site, number in zip(sites, numbers, strict=True)}


def merged(before: Tensors, sent: Iterable[tuple[float, Tensors]], slot: str) -> dict[str, Tensor]:
    """Return ``before`` with the mean of what was sent: of ``slot`` the products' mean, of the head the plain one."""
    each = list(sent)
    last, mean = pairs(before, slot), pairs(average_products(each, slot), slot)
    factors = named({layer: revive(pair, last[layer]) for layer, pair in mean.items()}, slot)
    return {**before, **weighted_mean(each), **factors}
