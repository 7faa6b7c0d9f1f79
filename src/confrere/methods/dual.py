"""Dual adapters without orthogonality: FedOPAL's own ablation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from confrere.errors import ConfigError
from confrere.method import register
from confrere.methods.fedopal import FedOPAL


@register(
    "dual",
    title="General + personal, no orthogonality",
    paper="the additive dual adapter of Med-DualLoRA, arXiv 2603.10967, and FedDPA, NeurIPS 2024",
)
@dataclass(frozen=True, kw_only=True)
class Dual(FedOPAL):
    """FedOPAL with the orthogonality term switched off; everything else is equal.

    Differences from the papers: joint training as in FedOPAL; FedDPA alternates and mixes by input.
    """

    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"head": ("choice", "shared", "local")}

    regulariser: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regulariser != "none":
            raise ConfigError("dual has no orthogonality term", where="method.regulariser", fix="use method fedopal")
