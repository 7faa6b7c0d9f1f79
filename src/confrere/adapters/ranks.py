"""Ranks: of tensors as they are, and of a site by its memory and data."""

from __future__ import annotations

from collections.abc import Mapping

from confrere.adapters.names import side_of, slot_of
from confrere.errors import ConfigError
from confrere.tensors import Tensors


def rank_of(tensors: Tensors, slot: str = "general") -> int:
    """Return the largest rank of ``slot`` over the layers, 0 without the slot."""
    return max((len(t) for n, t in tensors.items() if slot_of(n) == slot and side_of(n) == "A"), default=0)


def rank_for(
    images: int,
    memory_mb: float,
    *,
    sizes: Mapping[str, tuple[int, int]],
    parameters_per_image: float = 50.0,
    bytes_per_parameter: int = 16,
    lowest: int = 1,
    highest: int = 64,
) -> int:
    """Return the rank of a site: the largest power of two that its memory and its images allow.

    One unit of rank has ``p = sum over layers of (d_in + d_out)`` trainable parameters. The rank is at most
    ``memory / (bytes_per_parameter p)``, ``images parameters_per_image / p`` and ``highest``. Few images never
    refuse a site: it then gets ``lowest``. A rule of thumb of ours, from no paper.

    Args:
        images: training images of the site.
        memory_mb: for the adapter and its optimiser, in 10^6 bytes; backbone and activations come on top.
        sizes: ``(d_in, d_out)`` of each adapted layer.
        parameters_per_image: how many trainable parameters one image may pay for.
        bytes_per_parameter: 16 is float32 for the value, its gradient and AdamW's two moments.
        lowest: smallest answer, a power of two.
        highest: largest answer, a power of two.

    Raises:
        ConfigError: a value out of range, or memory too small for ``lowest``.
    """
    for key, value in (("lowest", lowest), ("highest", highest)):
        if value < 1 or value & (value - 1):
            raise ConfigError(
                f"{value} is no power of two", where=key, fix="use 1, 2, 4, 8, 16, ...", code="rank-suggestion"
            )
    if lowest > highest or images < 0 or not sizes or not min(parameters_per_image, bytes_per_parameter) > 0:
        raise ConfigError(
            "a rank needs layers, and bounds that make sense",
            where="rank_for",
            fix="see its docstring",
            code="rank-suggestion",
        )
    unit = sum(d_in + d_out for d_in, d_out in sizes.values())
    room = memory_mb * 1e6 / (bytes_per_parameter * unit)
    if not room >= lowest:
        raise ConfigError(
            f"{memory_mb} MB do not hold an adapter of rank {lowest} and its optimiser",
            where="memory_mb",
            fix=f"give at least {lowest * bytes_per_parameter * unit / 1e6:.3f} MB, or adapt fewer layers",
            code="rank-suggestion",
        )
    most = min(room, images * parameters_per_image / unit, highest)
    rank = lowest
    while rank * 2 <= most:
        rank *= 2
    return rank
