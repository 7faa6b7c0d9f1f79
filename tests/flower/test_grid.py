"""Requests over a Grid that loses messages, nodes and time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity  # internal: a message needs a run outside of Flower's processes

from confrere.consortium.status import Status
from confrere.federation.transport import Failure
from confrere.flower.grid import GridSites
from confrere.flower.records import from_content, to_content

NODES = {"north": 11, "south": 22}
FRAME = ({"round": 3, "protocol": 1}, {"shared/a": np.arange(3.0)})
Behave = Callable[[str, int], Message | None]


@pytest.fixture(autouse=True)
def run_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("confrere.flower.grid.POLL", 0.05)
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class FakeGrid:
    """Answers as ``behave(site, attempt)`` says: a content, an error code, or nothing."""

    def __init__(self, behave: Callable[[str, int], Any], online: Callable[[], set[int]] = lambda: {11, 22}) -> None:
        self.behave, self.online = behave, online
        self.sent: list[tuple[str, Message]] = []
        self._names, self._ready = {v: k for k, v in NODES.items()}, dict[str, Message]()
        self._ids: Iterator[int] = itertools.count()

    def get_node_ids(self) -> list[int]:
        return sorted(self.online())

    def push_messages(self, messages: list[Message]) -> list[str]:
        identifiers = []
        for message in messages:
            site = self._names[message.metadata.dst_node_id]
            self.sent.append((site, message))
            identifier = f"m{next(self._ids)}"
            message.metadata.__dict__["_message_id"] = identifier
            found = self.behave(site, sum(s == site for s, _ in self.sent))
            if isinstance(found, int):
                self._ready[identifier] = Message(Error(code=found, reason="x"), reply_to=message)
            elif found is not None:
                self._ready[identifier] = Message(to_content(*found), reply_to=message)
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, identifiers: list[str]) -> list[Message]:
        return [self._ready.pop(one) for one in identifiers if one in self._ready]


def sites(grid: FakeGrid, path: Path, deadline: float = 30.0, patience: float = 0.0) -> GridSites:
    status = Status(path / "status.json", "fake", NODES)
    return GridSites(grid, NODES, status, deadline=deadline, patience=patience)  # type: ignore[arg-type]


def good(site: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"site": site}, {}


def test_each_site_gets_its_own_frame_with_flowers_type_and_group(tmp_path: Path) -> None:
    grid = FakeGrid(lambda site, attempt: good(site))
    found = sites(grid, tmp_path).ask("train", dict.fromkeys(NODES, FRAME))
    assert {site: answer[0] for site, answer in found.items()} == {s: {"site": s} for s in NODES}  # type: ignore[index]
    for _, message in grid.sent:
        assert (message.metadata.message_type, message.metadata.group_id) == ("train", "3")
        header, arrays = from_content(message.content)
        assert header["kind"] == "train"
        assert arrays["shared/a"].tolist() == [0.0, 1.0, 2.0]
    sites(grid, tmp_path).ask("keys", {"north": FRAME})
    assert grid.sent[-1][1].metadata.message_type == "query"


@pytest.mark.parametrize("lost", [2, 3, 4, 5, 8, ({"failure": {"code": "site-down"}}, {})])
def test_what_was_lost_is_asked_again(lost: Any, tmp_path: Path) -> None:
    grid = FakeGrid(lambda site, attempt: lost if (site, attempt) == ("south", 1) else good(site))
    found = sites(grid, tmp_path).ask("train", dict.fromkeys(NODES, FRAME))
    assert {type(answer) for answer in found.values()} == {tuple}
    assert [site for site, _ in grid.sent] == ["north", "south", "south"]


def test_a_silent_site_is_asked_again_ever_more_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SuperNode that received half a message drops it, and nobody says so."""
    monkeypatch.setattr("confrere.flower.grid.SILENCE", 0.5)
    at: list[float] = []

    def behave(site: str, attempt: int) -> Any:
        if site == "south":
            at.append(time.monotonic())
        return None if site == "south" and attempt < 4 else good(site)

    grid = FakeGrid(behave)
    found = sites(grid, tmp_path).ask("train", dict.fromkeys(NODES, FRAME))
    assert {type(answer) for answer in found.values()} == {tuple}
    assert [site for site, _ in grid.sent] == ["north", *4 * ["south"]]
    assert all(later - earlier >= 0.5 * 2**k for k, (earlier, later) in enumerate(itertools.pairwise(at)))


def test_a_site_that_said_it_was_down_is_not_waited_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence after four restarts is as long as after none."""
    monkeypatch.setattr("confrere.flower.grid.SILENCE", 0.5)
    down = {"failure": {"code": "site-down"}}, {}
    answers: dict[int, Any] = {**dict.fromkeys(range(1, 5), down), 5: None}
    grid = FakeGrid(lambda site, attempt: answers.get(attempt, good(site)))
    started = time.monotonic()
    found = sites(grid, tmp_path).ask("train", {"south": FRAME})
    assert isinstance(found["south"], tuple)
    assert len(grid.sent) == 6
    assert time.monotonic() - started < 15.0  # four moments and one silence; 0.5 * 2**5 s of it alone would be 16


def test_a_slow_site_that_was_asked_twice_answers_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("confrere.flower.grid.SILENCE", 0.5)
    grid, late = FakeGrid(lambda site, attempt: good(site)), dict[str, Message]()
    original = grid.pull_messages

    def pull(identifiers: list[str]) -> list[Message]:
        """Both answers of south come at once, when it has been asked twice."""
        late.update({message.metadata.reply_to_message_id: message for message in original(identifiers)})
        souths = [one for one in identifiers if one != "m0"]
        ready = identifiers if len(souths) > 1 else [one for one in identifiers if one == "m0"]
        return [late.pop(one) for one in ready if one in late]

    grid.pull_messages = pull  # type: ignore[method-assign]
    found = sites(grid, tmp_path).ask("train", dict.fromkeys(NODES, FRAME))
    assert [site for site, _ in grid.sent] == ["north", "south", "south"]
    assert {site: answer[0] for site, answer in found.items()} == {s: {"site": s} for s in NODES}  # type: ignore[index]


def test_a_node_that_comes_back_is_asked_again(tmp_path: Path) -> None:
    calls = itertools.count()
    grid = FakeGrid(lambda site, attempt: good(site), lambda: {11} if next(calls) < 3 else {11, 22})
    found = sites(grid, tmp_path).ask("train", dict.fromkeys(NODES, FRAME))
    assert isinstance(found["south"], tuple)


def test_nothing_is_pending_for_ever(tmp_path: Path) -> None:
    grid = FakeGrid(lambda site, attempt: None if site == "south" else good(site))
    found = sites(grid, tmp_path, deadline=0.5).ask("train", dict.fromkeys(NODES, FRAME))
    assert isinstance(found["north"], tuple)
    assert isinstance(found["south"], Failure)
    assert found["south"].code == "no-answer"


@pytest.mark.parametrize("code", [1, 7])
def test_a_site_that_will_not_run_us_is_not_asked_again(code: int, tmp_path: Path) -> None:
    grid = FakeGrid(lambda site, attempt: code if site == "south" else good(site))
    found = sites(grid, tmp_path).ask("train", dict.fromkeys(NODES, FRAME))
    assert isinstance(found["south"], Failure)
    assert found["south"].code == "version"
    assert len(grid.sent) == 2


def test_a_damaged_answer_is_a_failure(tmp_path: Path) -> None:
    grid = FakeGrid(lambda site, attempt: good(site))
    grid.pull_messages = lambda ids: [  # type: ignore[method-assign]
        Message(to_content({}, {}), reply_to=m) for _, m in grid.sent if m.metadata.message_id in ids
    ]
    original, broken = grid.pull_messages, []

    def damage(ids: list[str]) -> list[Message]:
        found = original(ids)
        for message in found:
            message.content.config_records["header"]["json"] = "{"
            broken.append(message)
        return found

    grid.pull_messages = damage  # type: ignore[method-assign]
    found = sites(grid, tmp_path).ask("train", {"north": FRAME})
    assert broken
    assert isinstance(found["north"], Failure)
    assert found["north"].code == "message-form"


def test_who_is_online_is_told_after_a_bounded_wait(tmp_path: Path) -> None:
    grid = FakeGrid(lambda site, attempt: good(site), lambda: {22, 99})
    assert sites(grid, tmp_path).online() == ("south",)  # without any wait
    assert sites(grid, tmp_path).wait(["north", "south"]) == ["north"]


def test_a_site_that_is_gone_is_waited_for_once(tmp_path: Path) -> None:
    """Else every round of a long run would wait for it anew."""
    grid = FakeGrid(lambda site, attempt: good(site), lambda: {11})
    these = sites(grid, tmp_path, patience=1.0)
    started = time.monotonic()
    assert [these.wait(NODES) for _ in range(20)] == [["south"]] * 20
    assert 1.0 <= time.monotonic() - started < 10.0
