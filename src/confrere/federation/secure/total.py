"""The opened sum of a round: what it means, and how it is kept for ``confrere verify``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from confrere.errors import RunError, UpdateRefusedError
from confrere.federation.robust import Layout, restored
from confrere.federation.secure.forms import as_json, empty, from_json, sizes
from confrere.federation.secure.masks import Words
from confrere.federation.secure.quantise import from_ring
from confrere.method import Reply
from confrere.record.files import read_state, write_state
from confrere.record.store import round_file
from confrere.tensors import State

SUMS = "sums"
"""The folder of a run directory in which the sums are."""


@dataclass(frozen=True, kw_only=True)
class Total:
    """What a session gave.

    Args:
        form: of what was added up.
        words: the sum (d,) modulo 2^32.
        exponents: of each tensor.
        weights: of all sites that could have come into the sum: the step follows from them.
        sites: those that did, sorted.
    """

    form: Layout
    words: Words
    exponents: tuple[int, ...]
    weights: Mapping[str, float]
    sites: tuple[str, ...]

    @property
    def weight(self) -> float:
        """Return the weight of what was added up."""
        return sum(self.weights[site] for site in self.sites)

    def mean(self, received: State) -> State:
        """Return the weighted mean of what the sites would have sent in the clear, given what all of them received.

        Raises:
            UpdateRefusedError: a number is larger than its parts can be.
        """
        limits, total = self.exponents, sum(self.weights.values())
        vector = from_ring(self.words, sizes(self.form), limits, self.weight, total, len(self.sites))
        return restored(torch.from_numpy(vector), empty(self.form), received)

    def reply(self, received: State, round_: int, run: str = "") -> Reply:
        """Return the one reply that stands for those of all sites; the arguments are as above, and its stamps."""
        return Reply(site="sum", round=round_, run=run, state=self.mean(received), weight=self.weight)

    def state(self) -> State:
        """Return the numbers as tensors."""
        exponents = torch.tensor(self.exponents, dtype=torch.int16)
        return {"sum": {"words": torch.from_numpy(self.words.view("int32")), "exponents": exponents}}

    def write(self, folder: Path, round_: int) -> None:
        """Keep the sum of a round in a folder."""
        meta = {"round": round_, "form": as_json(self.form), "weights": dict(self.weights), "sites": list(self.sites)}
        write_state(round_file(folder, round_), self.state(), meta)


def read_total(folder: Path, round_: int) -> Total:
    """Return the sum of a round that :meth:`Total.write` kept.

    Raises:
        RunError: it is missing or damaged, or of another round.
    """
    path = round_file(folder, round_)
    state, meta = read_state(path)
    try:
        numbers = state["sum"]
        total = Total(
            form=from_json(meta["form"]),
            words=numbers["words"].numpy().view("uint32"),
            exponents=tuple(numbers["exponents"].tolist()),
            weights=meta["weights"],
            sites=tuple(meta["sites"]),
        )
    except (KeyError, TypeError, UpdateRefusedError):
        total = None
    if total is None or meta.get("round") != round_:
        fix = "restore it from a copy"
        raise RunError("this is not the sum of that round", where=str(path), fix=fix, code="state-misplaced")
    return total
