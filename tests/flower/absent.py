"""The run in one process that one with a late site must equal: it does not ask west before its round."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from members import in_one_process

from confrere import job
from confrere.config import Experiment
from confrere.federation.transport import Failure, InProcess
from confrere.method import Reply, Request
from confrere.record.run import Run


class Absent(InProcess):
    """All sites in this process, but west from round ``since`` on only, when the journal says so."""

    def __init__(self, sites: Mapping[str, Any], workers: int = 1, *, since: int) -> None:
        super().__init__(sites, workers)
        self.round, self.since, self.run = 1, since, Run(sites["west"].store.folder.parents[1])

    def sites(self) -> tuple[str, ...]:
        return tuple(site for site in super().sites() if site != "west" or self.round >= self.since)

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        found = super().exchange(requests)
        first = next(iter(requests.values()), None)
        if first and first.kind == "evaluate" and first.split == "val":  # the last of a round
            self.round = first.round + 1
            if self.round == self.since:
                self.run.append({"event": "joined", "site": "west", "since": self.since})
        return found


def without_west(experiment: Experiment, images: Path, out: Path, since: int = 2) -> Path:
    """Run in one process: the method's training with :class:`Absent`, its controls with everybody from the start."""
    made: list[Any] = [InProcess, partial(Absent, since=since)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "InProcess", lambda *given: (made.pop() if made else InProcess)(*given))
        in_one_process(experiment, images, out)
    return out
