"""Whole rounds through the loop: the same result as in the clear to the quantisation, and nothing of a site to see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hospitals import plain
from method_variants import VARIANTS
from tiny_federation import SITES, backbone_of, initial_params, tiny_plan, tiny_sites

from confrere.federation.defence import Collected, Defence
from confrere.federation.gate import Gate
from confrere.federation.loop import federate
from confrere.federation.secure.exchange import Secure
from confrere.federation.secure.messages import PHASES
from confrere.federation.secure.settings import hides
from confrere.federation.secure.simulated import equip
from confrere.federation.site import Site
from confrere.federation.transport import Failure, InProcess
from confrere.method import Method, Reply, Request
from confrere.record.run import Run
from confrere.tensors import State, digest, flatten, n_bytes

SUMS = sorted(name for name, method in VARIANTS.items() if hides(method) and method.needs == "sum")


class Tap(InProcess):
    """Keeps every byte that passes the server, and loses what it is told to."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        super().__init__(sites)
        self.requests: list[tuple[str, Request]] = []
        self.replies: list[Reply] = []

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        self.requests += requests.items()
        answers = super().exchange(requests)
        self.replies += [answer for answer in answers if isinstance(answer, Reply)]
        return answers


def start(method: Method) -> State:
    return method.init_server(initial_params(backbone_of(method), method, ""))


def federated(
    method: Method, folder: Path, *, masked: bool, rounds: int = 3, **options: Any
) -> tuple[State, dict[str, Site], Tap, Run]:
    sites = tiny_sites(method, rounds=rounds)
    for site, weight in zip(sites.values(), (20.0, 333.0, 1000.0), strict=True):
        site.weight = 1.0 if method.release() else weight
    run, gate = Run(folder), Gate(method=method, norm=0, factor=0)
    defence = Secure(roster=equip(sites, folder / "own"), folder=folder / "sums", **options) if masked else None
    tap = Tap(sites)
    final = federate(method, start(method), tap, tiny_plan(method, rounds=rounds), run, gate=gate, defence=defence)
    return final, sites, tap, run


def of(run: Run, kind: str) -> list[dict[str, Any]]:
    return [e for e in run.events() if e["event"] == kind]


FAST = ("fedit-ft", "rolora", "scaffold")
ALL = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in SUMS]


@pytest.mark.parametrize("name", ALL)
def test_a_masked_run_is_the_plain_run(name: str, tmp_path: Path) -> None:
    method = VARIANTS[name]
    plain, *_ = federated(method, tmp_path / "plain", masked=False)
    masked, _, _, run = federated(method, tmp_path / "masked", masked=True)
    assert of(run, "failure") == []
    assert all(e["averaged"] for e in of(run, "round"))
    right = flatten(plain)
    for tensor, value in flatten(masked).items():
        torch.testing.assert_close(value, right[tensor], rtol=1e-3, atol=1e-4)


def test_the_server_sees_neither_update_nor_digest_and_counts_the_bytes(tmp_path: Path) -> None:
    method = VARIANTS["fedopal"]
    _, sites, tap, run = federated(method, tmp_path, masked=True, rounds=1)
    sent = [reply for reply in tap.replies if reply.state]
    raw = b"".join(t.numpy().tobytes() for reply in sent for t in flatten(reply.state).values())
    for site in sites.values():
        stored = site.store.reply(1)
        assert stored is not None
        for tensor, value in flatten(stored.state).items():
            before = start(method)["shared"][tensor.removeprefix("shared/")]
            for secret in (value, value - before, (value.double() - before.double())):
                assert secret.numpy().tobytes() not in raw
        assert digest(stored.state).encode() not in raw
    record = of(run, "round")[0]
    for name, one in record["sites"].items():
        assert one["sent_bytes"] == sum(n_bytes(r.state) for r in sent if r.site == name)
        assert one["received_bytes"] == sum(n_bytes(r.state) for s, r in tap.requests if s == name and r.kind in PHASES)
        assert not {"kept", "stored"} & one.keys()
    assert record["secure"]["threshold"] == 2
    assert record["diagnostics"]["similarity"] is None


class Quantised(Defence):
    """Sees every update, and averages their quantised changes."""

    def collect(self, transport: Any, requests: Mapping[str, Request], gate: Gate) -> Collected:
        came = super().collect(transport, requests, gate)
        replies = {reply.site: reply for reply in came.replies}
        received = next(iter(requests.values())).state
        mean = plain(replies, replies, replies, received)  # type: ignore[arg-type]
        total = Reply(site="sum", round=came.replies[0].round, state=mean, weight=sum(r.weight for r in came.replies))
        return replace(came, total=total)


@pytest.mark.parametrize("name", ["fedopal", "scaffold"])
def test_a_masked_run_is_the_plain_quantised_run_bit_for_bit(name: str, tmp_path: Path) -> None:
    method = VARIANTS[name]
    masked, *_ = federated(method, tmp_path / "masked", masked=True, rounds=2)
    sites, gate = tiny_sites(method, rounds=2), Gate(method=method, norm=0, factor=0)
    for site, weight in zip(sites.values(), (20.0, 333.0, 1000.0), strict=True):
        site.weight = weight
    plan, run = tiny_plan(method, rounds=2), Run(tmp_path / "plain")
    quantised = federate(method, start(method), InProcess(sites), plan, run, gate=gate, defence=Quantised())
    assert digest(masked) == digest(quantised)


class Leaving(Tap):
    """Site ``b`` answers up to the phase ``until`` of round 2."""

    until = ""

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        here = {s: r for s, r in requests.items() if (r.round, r.kind, s) != (2, self.until, "b")}
        return [*super().exchange(here), *(Failure(s, "no answer") for s in requests.keys() - here.keys())]


def led(
    folder: Path, sites: dict[str, Site], transport: InProcess, threshold: int = 0, **plan: Any
) -> tuple[State, Run]:
    method, run = VARIANTS["fedit"], Run(folder)
    secure = Secure(roster=equip(sites, folder / "sites"), folder=folder / "sums", threshold=threshold)
    gate = Gate(method=method, norm=0, factor=0)
    return federate(method, start(method), transport, tiny_plan(method, **plan), run, gate=gate, defence=secure), run


def test_a_round_below_the_threshold_is_lost_and_the_run_goes_on(tmp_path: Path) -> None:
    sites = tiny_sites(VARIANTS["fedit"])
    transport = Leaving(sites)
    transport.until = "masked"
    _, run = led(tmp_path, sites, transport, threshold=3, every=3)
    assert [e["averaged"] for e in of(run, "round")] == [True, False, True]
    assert {e["code"] for e in of(run, "failure")} == {"", "secure-threshold", "quorum"}
    assert digest(run.server(2)) == digest(run.server(1))
    assert set(of(run, "round")[1]["refused"]) == {"a", "b", "c"}  # they have trained all the same


class Killed(Tap):
    """Breaks off before the phase ``at`` of round 2, as a process that is killed does."""

    at = ""

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        first = next(iter(requests.values()))
        if (first.round, first.kind) == (2, self.at):
            raise KeyboardInterrupt
        return super().exchange(requests)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    sites = tiny_sites(VARIANTS["fedit"], rounds=2)
    return digest(led(tmp_path_factory.mktemp("whole"), sites, Tap(sites), rounds=2, every=2)[0])


@pytest.mark.parametrize("at", [*PHASES, "evaluate"])
def test_after_a_kill_the_round_is_done_again_with_new_masks_to_the_same_bytes(
    at: str, undisturbed: str, tmp_path: Path
) -> None:
    method = VARIANTS["fedit"]
    run = Run(tmp_path / "cut")
    stores = {name: run.store(name) for name in SITES}
    sites = tiny_sites(method, stores=stores, rounds=2)  # type: ignore[arg-type]
    killed = Killed(sites)
    killed.at = at
    with pytest.raises(KeyboardInterrupt):
        led(tmp_path / "cut", sites, killed, rounds=2, every=2)
    again = tiny_sites(method, stores=stores, rounds=2)  # type: ignore[arg-type]
    second = Tap(again)
    resumed, _ = led(tmp_path / "cut", again, second, rounds=2, every=2)
    assert digest(resumed) == undisturbed
    vectors = [
        {
            r.site: r.state["secure"]["vector"]
            for r in tap.replies
            if r.round == 2 and "vector" in r.state.get("secure", {})
        }
        for tap in (killed, second)
    ]
    assert len(vectors[1]) == 3
    for site, vector in vectors[0].items():
        assert int((vector == vectors[1][site]).sum()) <= 2  # of thousands, by chance
