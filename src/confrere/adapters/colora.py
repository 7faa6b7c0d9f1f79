"""Co-LoRA: small matrices between fixed orthonormal factors, and how much sites matter to each other (FedMosaic).

A layer's adapter is ``B (P A x + q)`` with A (r, i) and B (o, r) orthonormal, common and frozen, P (r, r) and q (r,)
trained. As A and B are common, the mean of P is exactly the mean of the products ``B P A``; and as P and q have the
same shape in a narrow and in a wide network, such networks can share. Networks of different depth meet by position:
only the last block of each of four parts carries P and q.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from confrere.adapters.algebra import Pair, pairs
from confrere.adapters.names import shift_name, slot_of, tensor_name
from confrere.seeds import torch_generator
from confrere.tensors import Tensors

PARTS = 4
SIMILARITIES = ("columns", "flattened")
HIDDEN, KEEP = 32, 0.4  # rows of the probe's gradient, and which share of them is sent
_PATH = re.compile(r"(?P<stem>.*?)(?P<block>\d+)\.(?P<inner>.+)")


def places(layers: Iterable[str], parts: int = PARTS) -> dict[str, str]:
    """Return ``{layer: place}`` of the layers that carry P and q; a place is ``<part>.<path inside the block>``.

    Of L adapted blocks these are numbers ``k floor(L / 4) - 1`` for k = 1..3 and ``L - 1``; of fewer than four, all.

    >>> places(["h.4.q", "h.5.q"])
    {'h.4.q': '0.q', 'h.5.q': '1.q'}
    """
    found = {layer: match for layer in layers if (match := _PATH.fullmatch(layer))}
    blocks = sorted({int(match["block"]) for match in found.values()})
    parts = min(parts, len(blocks))
    step = len(blocks) // max(1, parts)
    part = {blocks[(k + 1) * step - 1 if k < parts - 1 else -1]: k for k in range(parts)}
    return {n: f"{part[int(m['block'])]}.{m['inner']}" for n, m in found.items() if int(m["block"]) in part}


def p_name(place: str) -> str:
    """Return the name of a place's P (r, r), the same at every site."""
    return f"{place}.lora_P.weight"


def q_name(place: str) -> str:
    """Return the name of a place's q (r,)."""
    return f"{place}.lora_Q.weight"


def inner(name: str) -> bool:
    """Return whether ``name`` is a P or a q."""
    return name.endswith((".lora_P.weight", ".lora_Q.weight"))


def nearest_orthonormal(weight: Tensor) -> Tensor:
    """Return the matrix with orthonormal rows (columns, if it is tall) nearest to ``weight``: its polar factor."""
    u, _, v_t = torch.linalg.svd(weight.double(), full_matrices=False)
    nearest: Tensor = (u @ v_t).to(weight.dtype)
    return nearest


def fixed_factors(a: Tensor, b: Tensor, place: str) -> tuple[Tensor, Tensor]:
    """Return orthonormal A (r, i) and B (o, r) for one layer; a B of zeros is drawn at the address of its place."""
    if not b.any():
        b = torch.randn(b.shape, generator=torch_generator(0, "colora", place))
    return nearest_orthonormal(a), nearest_orthonormal(b)


def fix(params: Tensors) -> dict[str, Tensor]:
    """Return ``params`` without shifts (q is one), with fixed factors in the layers that carry P and q."""
    kept = {name: value for name, value in params.items() if ".lora_shift." not in name}
    factors = in_order(pairs(kept, "personal"))
    for layer, place in places(factors).items():
        names = (tensor_name(layer, "A", "personal"), tensor_name(layer, "B", "personal"))
        kept.update(zip(names, fixed_factors(*factors[layer], place), strict=True))
    return kept


def in_order(factors: Mapping[str, Pair]) -> dict[str, Pair]:
    """Return factors before training with the A of the n-th layer by name at the n-th layer by number.

    They were drawn by name, where block 10 comes before block 9: without this, networks of 8 and of 12 blocks would
    have the A of one place at another. Factors that are not fresh (B is not zero) are aligned, and stay.
    """
    found = {layer: match for layer in factors if (match := _PATH.fullmatch(layer))}
    if any(bool(factors[layer][1].any()) for layer in found):
        return dict(factors)
    by_number = sorted(found, key=lambda layer: (found[layer]["stem"], int(found[layer]["block"]), layer))
    drawn = {layer: factors[name][0] for layer, name in zip(by_number, sorted(found), strict=True)}
    return {layer: (drawn.get(layer, a), b) for layer, (a, b) in factors.items()}


def first(fixed: Tensors) -> dict[str, Tensor]:
    """Return what a site trains, before training: P and q of zero, and all of ``fixed`` that is no fixed factor."""
    factors = pairs(fixed, "personal")
    at = places(factors)
    held = {tensor_name(layer, "A", "personal") for layer in at} | {tensor_name(layer, "B", "personal") for layer in at}
    start = {name: value for name, value in fixed.items() if name not in held}
    for layer, place in at.items():
        rank = len(factors[layer][0])
        start |= {p_name(place): torch.zeros(rank, rank), q_name(place): torch.zeros(rank)}
    return start


def assemble(others: Tensors, own: Tensors, fixed: Tensors) -> dict[str, Tensor]:
    """Return what a backbone needs: slot ``general`` from ``others``, the rest from ``own``, over ``fixed`` tensors.

    ``B (P A x + q)`` is an adapter ``(P A, B)`` with the shift q. What is missing counts as before training.
    """
    made = {name: own.get(name, value) for name, value in fixed.items() if slot_of(name) is None}
    factors = pairs(fixed, "personal")
    at = places(factors)
    for layer, (a, b) in factors.items():
        rank, place = len(a), at.get(layer)
        sides: tuple[tuple[Literal["A", "B"], Tensor], ...] = (("A", a), ("B", b))
        for slot, model in (("general", others), ("personal", own)):
            shift = torch.zeros(rank)
            if place is None:
                left, right = (model.get(tensor_name(layer, s, "personal"), f) for s, f in sides)
            else:
                p = model.get(p_name(place), torch.zeros(rank, rank))
                left, right, shift = p @ a.to(p.device), b, model.get(q_name(place), shift)
            made |= {tensor_name(layer, "A", slot): left, tensor_name(layer, "B", slot): right}
            made[shift_name(layer, slot)] = shift
    return made


def probe_gradient(features: Tensor, labels: Tensor, classes: int, keep: float = KEEP) -> Tensor:
    """Return the mean gradient (ceil(keep 32), F) of a frozen public probe's hidden layer, its first rows only.

    The probe is ``V2 gelu(V1 z)`` with seeded random V1 (32, F) and V2 (K, 32) on features z (B, F) of the frozen
    model; its loss is cross-entropy. By autograd, so exactly.
    """
    with torch.enable_grad():
        shapes = {"V1": (HIDDEN, features.shape[1]), "V2": (classes, HIDDEN)}
        v1, v2 = (
            (torch.randn(s, generator=torch_generator(0, "probe", n)) * s[1] ** -0.5).to(features.device)
            for n, s in shapes.items()
        )
        scores = torch.nn.functional.gelu(features.detach() @ v1.requires_grad_().T) @ v2.T
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(scores, labels), [v1])
    return gradient[: math.ceil(keep * HIDDEN)].detach()


def blurred(gradients: Sequence[Tensor], noise: float, draw: torch.Generator) -> Tensor:
    """Return the mean of gradients of one shape, plus normal noise of standard deviation ``noise``."""
    mean = torch.stack(list(gradients)).mean(0)
    return mean + noise * torch.randn(mean.shape, generator=draw)


def similarity(left: Tensor, right: Tensor, how: str) -> float:
    """Return how alike two gradients (h, F) are, -1 to 1; 0 when their shapes differ.

    ``flattened`` is the cosine of all entries (the paper), ``columns`` the mean of the columns' cosines (its code).
    """
    if left.shape != right.shape:
        return 0.0
    if how == "flattened":
        left, right = left.flatten()[:, None], right.flatten()[:, None]
    return float(torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=0).mean())


def relevance(probes: Mapping[str, Tensor], site: str, how: str, temperature: float) -> dict[str, float]:
    """Return ``softmax over j != site of S_ij / temperature``; a site without a gradient counts all others equally."""
    others = [name for name in sorted(probes) if name != site]
    own = probes.get(site)
    alike = [0.0 if own is None else similarity(own, probes[name], how) for name in others]
    weights = torch.tensor(alike, dtype=torch.float64).div(temperature).softmax(0).tolist()
    return dict(zip(others, weights, strict=True))


def mix(models: Mapping[str, Tensors], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the weighted mean of each name over the models that have it, in float64; weights are renormalised.

    Raises:
        ValueError: shapes of one name differ, e.g. P of different ranks.
    """
    mixed = {}
    for name in sorted({name for site in weights for name in models[site]}):
        parts = [(weights[site], models[site][name]) for site in sorted(weights) if name in models[site]]
        if len({part.shape for _, part in parts}) > 1:
            raise ValueError(f"{name} has different shapes: all sites need the same rank")
        total = sum(weight for weight, _ in parts)
        mixed[name] = torch.stack([part.double() * (weight / total) for weight, part in parts]).sum(0).to(parts[0][1])
    return mixed


def last_sent(server: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """Return what each site sent last, from a server's groups ``own:<site>``."""
    return {group.removeprefix("own:"): tensors for group, tensors in server.items() if group.startswith("own:")}


def message(server: Mapping[str, Tensors], site: str, how: str, temperature: float) -> dict[str, Tensor]:
    """Return the mixture for ``site``: P and q of all others by relevance, plain adapters of those of equal shapes.

    ``server`` holds what each site sent last as ``own:<site>`` and its gradient as ``probe:<site>``.
    """
    models = last_sent(server)
    probes = {name: server[f"probe:{name}"]["gradient"] for name in models}
    weights = relevance(probes, site, how, temperature)
    shapes = {name: {n: t.shape for n, t in model.items()} for name, model in models.items()}
    kin = {name: weight for name, weight in weights.items() if shapes[name] == shapes[site]}
    shared = {name: {n: t for n, t in models[name].items() if inner(n)} for name in weights}
    return {**mix(models, kin), **mix(shared, weights)}
