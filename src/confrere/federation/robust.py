"""Robust rules: what replaces the mean where some sites may send anything.

A rule works on the updates of a round: what each site sends minus what it received, all groups as one float64 vector.
It stands in front of a method's own ``aggregate``: the payload of every reply is replaced by the rule's one value (for
``clipping`` by its own, shortened), with equal weights, as a weight is a claim like any other. A method that needs
only a weighted sum then averages equal things. The order of replies changes no byte; ties go to the site whose name
comes first. No rule has memory: a resumed run computes what an undisturbed one does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from confrere.errors import ConfigError, nearest
from confrere.method import Method, Reply
from confrere.tensors import State, flatten, unflatten

Layout = tuple[tuple[str, torch.Size, torch.dtype], ...]

TOLERANCE = 1e-8
"""The geometric median is found when a step moves it by less than this share of the median distance to it."""
SMOOTHING = 1e-6
"""No distance counts as shorter than this share of the median distance: Weiszfeld's weights stay finite."""
STEPS = 200
"""Most steps of Weiszfeld's algorithm."""


def mean(updates: Tensor, byzantine: int) -> Tensor:
    """Return the unweighted mean (d,) of the updates (n, d); one site alone moves it anywhere."""
    return updates.mean(0)


def median(updates: Tensor, byzantine: int) -> Tensor:
    """Return the median (d,) of each coordinate, of an even number the mean of the middle two.

    Yin et al., Byzantine-robust distributed learning: towards optimal statistical rates, ICML 2018.
    """
    n, ordered = len(updates), updates.sort(0).values
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def trimmed_mean(updates: Tensor, byzantine: int) -> Tensor:
    """Return the mean (d,) of each coordinate without its f largest and f smallest values. Yin et al. 2018."""
    return updates.sort(0).values[byzantine : len(updates) - byzantine].mean(0)


def geometric_median(updates: Tensor, byzantine: int) -> Tensor:
    """Return the point (d,) with the least sum of Euclidean distances to the updates.

    Smoothed Weiszfeld from the coordinate median, to :data:`TOLERANCE`. Pillutla et al., Robust aggregation for
    federated learning, IEEE Trans. Signal Process. 70, 2022.
    """
    centre = median(updates, byzantine)
    for _ in range(STEPS):
        distances = (updates - centre).norm(dim=1)
        scale = float(median(distances[:, None], 0))
        if scale == 0:  # at least half of the sites sent just this
            return centre
        weights = 1 / distances.clamp_min(SMOOTHING * scale)
        moved = (weights / weights.sum()) @ updates
        step, centre = float((moved - centre).norm()), moved
        if step <= TOLERANCE * scale:
            break
    return centre


def krum(updates: Tensor, byzantine: int) -> Tensor:
    """Return the one update (d,) whose n - f - 2 nearest others are nearest to it, by squared distances.

    Blanchard et al., Machine learning with adversaries: Byzantine tolerant gradient descent, NeurIPS 2017.
    """
    return updates[_by_krum(updates, byzantine)[0]]


def multi_krum(updates: Tensor, byzantine: int) -> Tensor:
    """Return the mean (d,) of the n - f - 2 updates that Krum ranks best.

    The largest number for which Damaskinos et al. (AggregaThor, MLSys 2019) prove resilience.
    """
    return updates[_by_krum(updates, byzantine)[: len(updates) - byzantine - 2]].mean(0)


def clipping(updates: Tensor, byzantine: int) -> Tensor:
    """Return every update (n, d), those longer than the median length scaled down to it.

    One step of centred clipping (Karimireddy et al., Learning from history for Byzantine robust optimization, ICML
    2021) around what was broadcast. Differences from the paper: the centre is no momentum of earlier rounds, which a
    server without memory does not have; the radius is the median length of the round, not a constant to be
    tuned. So an attacker counts no more than an honest site, but is not found out over time.
    """
    lengths = updates.norm(dim=1)
    radius = median(lengths[:, None], byzantine)
    shares: Tensor = (radius / lengths.clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=1)
    return updates * shares[:, None]


def nearest_neighbours(updates: Tensor, byzantine: int) -> Tensor:
    """Replace each update by the mean of the n - f nearest to it, itself included; return their trimmed mean (d,).

    Allouah et al., Fixing by mixing, AISTATS 2023 (NNM): honest sites that differ become alike before the rule that
    follows compares them. A mean may not follow: the attacker's own mixture still holds 1 / (n - f) of what it sent.
    """
    nearby = _distances(updates).sort(dim=1, stable=True).indices[:, : len(updates) - byzantine]
    return trimmed_mean(torch.stack([updates[rows.sort().values].mean(0) for rows in nearby]), byzantine)


def _by_krum(updates: Tensor, byzantine: int) -> Tensor:
    """Return (n,): the numbers of the updates, the best by Krum's score first."""
    n = len(updates)
    others = _distances(updates).square().sort(dim=1).values[:, 1 : n - byzantine - 1]  # the first is itself
    return others.sum(1).sort(stable=True).indices


def _distances(updates: Tensor) -> Tensor:
    """Return (n, n): Euclidean distances, by differences, as a far outlier would drown the short ones otherwise."""
    return torch.stack([(updates - one).norm(dim=1) for one in updates])


class Rule(NamedTuple):
    """A rule: the function of updates (n, d) and f, one line about it, and which n it needs beyond 2 f."""

    combine: Callable[[Tensor, int], Tensor]
    line: str
    beyond: int = 1


RULES: dict[str, Rule] = {
    "mean": Rule(mean, "the method's own weighted mean: no defence", 0),
    "median": Rule(median, "the median of each coordinate"),
    "trimmed-mean": Rule(trimmed_mean, "the mean of each coordinate without its f largest and f smallest values"),
    "geometric-median": Rule(geometric_median, "the point with the least sum of distances to all updates"),
    "krum": Rule(krum, "the one update that is nearest to its n - f - 2 nearest", 3),
    "multi-krum": Rule(multi_krum, "the mean of the n - f - 2 updates that Krum ranks best", 3),
    "clipping": Rule(clipping, "no update longer than the median length; the method averages as it does"),
    "nearest-neighbours": Rule(nearest_neighbours, "each update becomes the mean of its n - f nearest; trimmed mean"),
}


def check_rule(method: Method, rule: str, byzantine: int, asked: int, *, unequal: bool = False) -> None:
    """Refuse a rule that contradicts the method or the number of sites ``asked`` a round.

    A method that sends nothing, or pools all images, has nothing to defend: every rule is accepted. ``unequal``: sites
    have adapters of different ranks or depths, so that their updates cannot be compared.

    Raises:
        ConfigError: naming ``federation.rule`` or ``federation.byzantine``, with the fix.
    """
    if rule not in RULES:
        raise ConfigError(
            f"unknown rule {rule!r}", where="federation.rule", fix=nearest(rule, RULES), code="unknown-name"
        )
    if not method.sends or method.pools:
        return
    if rule == "mean":
        if byzantine:
            fix = "use federation.rule=nearest-neighbours, or byzantine=0"
            raise ConfigError("the mean withstands no attacker", where="federation.byzantine", fix=fix, code="rule")
        return
    if rule == "clipping" and method.sends != ("shared",):
        raise ConfigError(
            f"{method.name} sends more than updates of shared tensors, which cannot be shortened alike",
            where="federation.rule",
            fix="use mean" if method.needs == "each" else "use median",
            code="rule",
        )
    if rule != "clipping" and method.needs == "each":
        raise ConfigError(
            f"{rule} gives one value for all sites, but {method.name} needs what each site sent",
            where="federation.rule",
            fix="use mean" + (" or clipping" if method.sends == ("shared",) else ""),
            code="rule",
        )
    if rule != "clipping" and unequal:
        fix = "use mean or clipping, or give all sites one rank and one depth"
        raise ConfigError(f"{rule} compares updates of one shape", where="federation.rule", fix=fix, code="rule")
    most = (asked - RULES[rule].beyond) // 2
    if byzantine > most:
        raise ConfigError(
            f"{rule} with {byzantine} attackers needs {needed(rule, byzantine)} sites a round, {asked} are asked",
            where="federation.rule" if most < 0 else "federation.byzantine",
            fix="use mean" if most < 0 else f"use at most {most}, or ask more sites",
            code="rule",
        )


def needed(rule: str, byzantine: int) -> int:
    """Return the number of replies from which a rule is defined for so many attackers."""
    return 2 * byzantine + RULES[rule].beyond


def robust(rule: str, byzantine: int, received: Mapping[str, State], replies: Sequence[Reply]) -> list[Reply]:
    """Return the replies, sorted by site, as the method's ``aggregate`` shall see them.

    A reply that holds a value that is not finite, or another set of tensors than most, is left out; each counts as
    one of the ``byzantine``. ``mean`` leaves the others as they are. If fewer remain than the rule is defined for, or
    none sent anything, what is returned holds nothing to average.

    Args:
        rule: a name in :data:`RULES`.
        byzantine: f, how many sites may send anything.
        received: what each site got this round; an update is what it sent minus this, where names and shapes match.
        replies: of the sites, in any order.
    """
    finite = sorted((r for r in replies if _finite(r)), key=lambda r: r.site)
    if rule == "mean":
        return finite
    usable = finite if rule == "clipping" else _alike(finite)
    still = max(0, byzantine - (len(replies) - len(usable)))
    if len(usable) < needed(rule, still):
        return []
    if not any(flatten(r.state) for r in usable):
        return usable
    rows = [update(r.state, received.get(r.site, {})) for r in usable]
    # Unequal ranks, which only clipping meets, are padded: zeros change no length.
    found = RULES[rule].combine(pad_sequence(rows, batch_first=True), still)
    each = found if found.dim() == 2 else found.expand(len(rows), -1)
    return [
        replace(r, weight=1.0, state=restored(row[: len(own)], r.state, received.get(r.site, {})))
        for r, row, own in zip(usable, each, rows, strict=True)
    ]


def layout(state: State) -> Layout:
    """Return names, shapes and types of all tensors, in the order of :func:`update`."""
    return tuple((name, value.shape, value.dtype) for name, value in sorted(flatten(state).items()))


def update(sent: State, received: State) -> Tensor:
    """Return what was sent minus what was received as one vector (d,), float64, sorted by group and name."""
    base = flatten(received)
    parts = [
        (value.double() - base[name].double() if _matches(name, value, base) else value.double()).flatten()
        for name, value in sorted(flatten(sent).items())
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def restored(vector: Tensor, like: State, received: State) -> dict[str, dict[str, Tensor]]:
    """Undo :func:`update`: return the payload, with the groups, shapes and types of ``like``."""
    base, flat, start = flatten(received), {}, 0
    for name, value in sorted(flatten(like).items()):
        part = vector[start : start + value.numel()].view(value.shape)
        flat[name] = (part + base[name].double() if _matches(name, value, base) else part).to(value.dtype)
        start += value.numel()
    return {**{group: {} for group in like}, **unflatten(flat)}


def _matches(name: str, value: Tensor, base: Mapping[str, Tensor]) -> bool:
    return name in base and base[name].shape == value.shape


def _finite(reply: Reply) -> bool:
    values = flatten(reply.state).values()
    return math.isfinite(reply.weight) and all(bool(torch.isfinite(value).all()) for value in values)


def _alike(replies: Sequence[Reply]) -> list[Reply]:
    """Return the replies with the most common layout."""
    layouts = [layout(reply.state) for reply in replies]
    most = Counter(layouts).most_common(1)
    return [r for r, found in zip(replies, layouts, strict=True) if found == most[0][0]]
