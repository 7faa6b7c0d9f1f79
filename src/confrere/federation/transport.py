"""Transports carry requests to sites and replies back; they neither learn nor sample."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from confrere.errors import TrainingError, UpdateRefusedError
from confrere.federation.site import Site
from confrere.method import Reply, Request


@dataclass(frozen=True)
class Failure:
    """A site that did not answer, or whose answer was refused: why, what would help, and a code of docs/errors.md."""

    site: str
    reason: str
    fix: str = ""
    code: str = ""


class Transport(Protocol):
    """The seam between the round loop and wherever the sites are."""

    def sites(self) -> tuple[str, ...]:
        """Return the names of the sites that can be asked now."""

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        """Send each site its request; return what came back, in any order."""


class InProcess:
    """All sites in this process, ``workers`` of them at a time, each in a thread.

    Sites share nothing but frozen weights, and every random draw has an address: the number of workers changes
    no byte. The time goes into tensor operations, which release the interpreter's lock.
    """

    def __init__(self, sites: Mapping[str, Site], workers: int = 1) -> None:
        self._sites = dict(sites)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="site") if workers > 1 else None

    def sites(self) -> tuple[str, ...]:
        """Return the names of all sites, sorted."""
        return tuple(sorted(self._sites))

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        """Ask each site; one that diverges or would break the rules is a failure, not a crash."""
        ask = self._pool.map if self._pool else map
        return list(ask(self._ask, requests.keys(), requests.values()))

    def _ask(self, name: str, request: Request) -> Reply | Failure:
        try:
            return self._sites[name].handle(request)
        except (TrainingError, UpdateRefusedError) as error:
            return Failure(name, error.reason, error.fix, error.code)
        except (MemoryError, torch.OutOfMemoryError):
            return Failure(name, "the site ran out of memory", "lower train.batch_size", code="out-of-memory")
