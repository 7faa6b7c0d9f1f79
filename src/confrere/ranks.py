"""Suggest a rank for every site, from its training images and its memory."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from confrere.adapters.names import layer_of
from confrere.adapters.ranks import rank_for
from confrere.backbones import Backbone
from confrere.config import override, validate
from confrere.errors import ConfigError
from confrere.method import METHODS
from confrere.opening import depth_of, load_backbone, open_data


def suggest(path: Path, memory: Sequence[str], overrides: Sequence[str] = ()) -> list[str]:
    """Return a line a site (training images, rank) and the line ``adapter.ranks = {...}`` for the experiment.

    Between them stands what to do with a method that cannot carry different ranks.

    Args:
        path: the data.
        memory: in 10^6 bytes, ``512`` for all sites or ``north=512`` for one.
        overrides: ``key.path=value`` of the experiment: backbone, adapted blocks and layers decide the size of a rank,
            the method (by default ``local``) how many adapters share it: no site gets fewer than one for each.

    Raises:
        ConfigError: a site without memory, an unknown site, memory that is no number or too small
            for the smallest rank.
    """
    base = {"path": str(path.resolve()), "method": {"name": "local"}, "controls": []}
    experiment = validate(override(base, overrides))
    with tempfile.TemporaryDirectory() as folder:
        federation = open_data(experiment, Path(folder))
    given = _memory(memory, [site.name for site in federation.sites])
    sizes = layer_sizes(load_backbone(experiment, federation, depth_of(experiment, federation)))
    method = experiment.build_method()
    images = {site.name: int((site.split == 0).sum()) for site in federation.sites}
    lowest = 1 << (len(method.slots) - 1).bit_length()  # a power of two: one for each adapter
    ranks = {name: rank_for(count, given[name], sizes=sizes, lowest=lowest) for name, count in images.items()}
    lines = [f"{name}: {images[name]} training images, {given[name]:g} MB, rank {rank}" for name, rank in ranks.items()]
    inner = ", ".join(f'"{name}" = {rank}' for name, rank in ranks.items())
    if not (method.unequal or method.pools) and len(set(ranks.values())) > 1:
        able = ", ".join(sorted(name for name, cls in METHODS.items() if cls.unequal))
        lines += [
            f"{method.name} cannot carry different ranks. All sites bear adapter.rank = {min(ranks.values())}.",
            f"The line below is for: {able}",
        ]
    return [*lines, f"adapter.ranks = {{ {inner} }}"]


def layer_sizes(backbone: Backbone) -> dict[str, tuple[int, int]]:
    """Return ``(d_in, d_out)`` of every adapted layer."""
    found: dict[str, list[int]] = {}
    for name, shape in sorted(backbone.adapter_shapes(dict.fromkeys(backbone.spec.slots[:1], 1)).items()):
        found.setdefault(str(layer_of(name)), []).append(max(shape))
    return {layer: (sides[0], sides[1]) for layer, sides in found.items()}


def _memory(given: Sequence[str], sites: Sequence[str]) -> dict[str, float]:
    every: dict[str, float] = {}
    for text in given:
        site, _, number = text.rpartition("=")
        if site and site not in sites:
            raise ConfigError(
                f"there is no site {site!r}", where="--memory-mb", fix=f"sites: {', '.join(sites)}", code="unknown-site"
            )
        try:
            value = float(number)
        except ValueError:
            raise ConfigError(
                f"{number!r} is no number", where="--memory-mb", fix="--memory-mb 512", code="rank-suggestion"
            ) from None
        for name in [site] if site else [s for s in sites if s not in every]:
            every[name] = value
    missing = [name for name in sites if name not in every]
    if missing:
        raise ConfigError(
            f"no memory is given for {missing[0]}",
            where="--memory-mb",
            fix="give a number for all sites",
            code="rank-suggestion",
        )
    return every
