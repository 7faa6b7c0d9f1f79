"""Messages over Flower's Grid: send every site its frame, ask again what was lost, give up at the deadline."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from confrere.consortium.census import Answers, Header
from confrere.consortium.frame import Arrays
from confrere.consortium.states import failed
from confrere.consortium.status import Status
from confrere.errors import UpdateRefusedError
from confrere.federation.transport import Failure
from confrere.flower.records import from_content, to_content

POLL = 1.0
"""Seconds between two looks for answers."""
TYPES = {"train": "train", "evaluate": "evaluate"}
"""Flower's message types by our kind; all others are ``query``."""
REFUSED = (1, 7)
"""Flower's error codes of a site that will not run our application, however often it is asked."""
SILENCE = 60.0
"""Seconds without an answer until a request is sent again, then twice as many: a SuperNode drops what it could not
receive whole and tells nobody. A site that got both answers both alike, and works once."""
AGAIN = ("site-down", "message-digest")
"""Failures after which the same request is sent again: whoever answered it already sends the same answer."""


class GridSites:
    """The sites of a consortium as nodes of a SuperLink.

    Args:
        grid: Flower's.
        nodes: site -> node id, as the coordinator registered them.
        status: told who is online and whom we wait for.
        deadline: seconds in which a request must be answered, re-sent or not.
        patience: seconds to wait for a site that is offline, counted once from when it was missed.
    """

    def __init__(
        self, grid: Grid, nodes: Mapping[str, int], status: Status, *, deadline: float, patience: float
    ) -> None:
        self._grid, self._nodes, self._status = grid, dict(nodes), status
        self._deadline, self._patience = deadline, patience
        self._missed: dict[str, float] = {}  # since when a site is offline

    def online(self) -> tuple[str, ...]:
        """Return the sites that can be asked at this moment, sorted."""
        return tuple(sorted(self._present()))

    def wait(self, names: Collection[str]) -> list[str]:
        """Wait until all of ``names`` are online, for each no longer than ``patience``; return those that are not."""
        while True:
            missing, now = sorted(set(names) - self._present()), time.monotonic()
            self._missed = {site: self._missed.get(site, now) for site in missing}
            if all(now - since >= self._patience for since in self._missed.values()):
                return missing
            time.sleep(POLL)

    def _present(self) -> set[str]:
        online = set(self._grid.get_node_ids())
        present = {site for site, node in self._nodes.items() if node in online}
        self._status.online(present)
        return present

    def ask(self, kind: str, frames: Mapping[str, tuple[Header, Arrays]]) -> Answers:
        """Send each site its frame; return what came back, a Failure for a site that gave none in time."""
        answers: Answers = {}
        waiting: dict[str, str] = {}  # message -> site
        due, silence = dict.fromkeys(frames, 0.0), dict.fromkeys(frames, SILENCE)  # when a site is asked (again)
        until = time.monotonic() + self._deadline
        while len(answers) < len(frames) and time.monotonic() < until:
            ready = [site for site, at in due.items() if at <= time.monotonic()]
            present = self._present() if ready else set()
            for site in sorted(set(ready) & present):
                waiting[self._send(kind, site, frames[site])] = site
                due[site] = time.monotonic() + silence[site]
                silence[site] *= 2
            self._status.waiting(list(due))
            for reply in self._grid.pull_messages(list(waiting)) if waiting else ():
                site = waiting.pop(reply.metadata.reply_to_message_id)
                if site not in due:  # its first answer came with this one
                    continue
                found = _read(site, reply)
                if found is None:
                    due[site], silence[site] = time.monotonic() + 1.0, SILENCE  # what was lost is given a moment
                else:
                    answers[site] = found
                    del due[site]
            waiting = {message: site for message, site in waiting.items() if site in due}
            time.sleep(POLL)
        self._status.waiting(())
        for site in set(frames) - answers.keys():
            what, fix = f"no answer within {self._deadline:g} s", "is the site running? `confrere status` tells"
            answers[site] = Failure(site, what, fix, code="no-answer")
        return answers

    def _send(self, kind: str, site: str, sent: tuple[Header, Arrays]) -> str:
        header, arrays = sent
        message = Message(
            content=to_content({**header, "kind": kind}, arrays),
            message_type=TYPES.get(kind, "query"),
            dst_node_id=self._nodes[site],
            ttl=self._deadline + 60.0,
            group_id=str(header.get("round", "")),
        )
        (identifier,) = self._grid.push_messages([message])
        return identifier


def _read(site: str, reply: Message) -> tuple[Header, Arrays] | Failure | None:
    """Return what a site answered; None when the request was lost and is worth sending again."""
    if reply.has_error():
        if reply.error.code in REFUSED:
            what, fix = "it does not run this application", "install confrere[flower] there, of the same version"
            return Failure(site, what, fix, "version")
        return None
    try:
        header, arrays = from_content(reply.content)
    except UpdateRefusedError as error:
        return Failure(site, error.reason, error.fix, error.code)
    failure = failed(site, header)
    if failure is not None:
        return None if failure.code in AGAIN else failure
    return header, arrays
