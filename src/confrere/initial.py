"""Tensors before training: adapters, gates, shifts, the network's own and head, each drawn at an address."""

from __future__ import annotations

from torch import Tensor, zeros

from confrere.adapters import lora
from confrere.adapters.algebra import cut
from confrere.backbones import Backbone
from confrere.method import Method
from confrere.seeds import torch_generator


def initial_params(
    backbone: Backbone, method: Method, site: str, *, classes: int, rank: int, seed: int, full: int | None = None
) -> dict[str, Tensor]:
    """Return what ``method`` trains at ``site`` before round 1 (site "" is the server).

    Slots start equal everywhere, but those a method calls its ``own``, which are drawn by the site's address. ``rank``
    is divided among the slots; the first ones get what is left over. Where sites differ in rank, all are the first
    rows of one draw of rank ``full``.
    """
    params: dict[str, Tensor] = {}
    ranks, drawn = slot_ranks(method, rank), slot_ranks(method, full or rank)
    for slot in method.slots:
        address = ("init", slot, site) if slot in method.own else ("init", slot)
        shapes = {n: s for n, s in backbone.adapter_shapes({slot: drawn[slot]}).items() if lora.slot_of(n) == slot}
        params |= cut(lora.init(shapes, torch_generator(seed, *address)), ranks[slot])
    params |= {name: zeros(shape) for name, shape in backbone.extras(ranks).items()}
    task, generator = backbone.task, torch_generator(seed, "init", "head")
    own = backbone.start(torch_generator(seed, "init", "weights"))
    return params | own | task.init(task.outputs(classes), backbone.feature_dim, generator)


def slot_ranks(method: Method, rank: int) -> dict[str, int]:
    """Return the rank of each slot; together they have ``rank``."""
    share, left = divmod(rank, len(method.slots))
    return {slot: share + (index < left) for index, slot in enumerate(method.slots)}
