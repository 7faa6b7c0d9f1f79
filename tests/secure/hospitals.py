"""Sites that send given tensors without training, and a transport that drops, changes and repeats what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from confrere import methods as _methods  # noqa: F401  fills the registry
from confrere.errors import UpdateRefusedError
from confrere.federation.defence import Collected
from confrere.federation.gate import Gate
from confrere.federation.robust import layout, restored, update
from confrere.federation.secure.exchange import Secure
from confrere.federation.secure.forms import empty, sizes
from confrere.federation.secure.keys import Identity
from confrere.federation.secure.participant import Participant
from confrere.federation.secure.quantise import exponents, from_ring, to_ring
from confrere.federation.transport import Failure
from confrere.method import Reply, Request, make
from confrere.tensors import State, digest

METHOD = make("fedit")
RUN = "run"
START: State = {"shared": {"v": torch.linspace(-1, 1, 5), "w": torch.linspace(0, 2, 12).reshape(3, 4)}}


class Hospital:
    """Answers as a site does, with a given payload."""

    def __init__(self, name: str, payload: State, weight: float) -> None:
        self.name, self.payload, self.weight, self.trained = name, payload, weight, 0
        self.participant: Participant | None = None

    def train(self, request: Request) -> Reply:
        self.trained += 1
        metrics = {"examples": int(self.weight), "overlap": None, "loss": 0.5, "kept": "0" * 64, "stored": "1" * 64}
        return Reply(
            site=self.name,
            run=request.run,
            round=request.round,
            state=self.payload,
            weight=self.weight,
            metrics=metrics,
        )

    def handle(self, request: Request) -> Reply:
        assert self.participant is not None
        return self.participant.handle(request, METHOD, self.train)


Change = Callable[[str, str, Any], Any]


class Net:
    """Carries messages; ``lose`` says in which phase a site goes, ``change`` may alter a request or reply."""

    def __init__(self, hospitals: Mapping[str, Hospital]) -> None:
        self.hospitals = dict(hospitals)
        self.lose: dict[str, str] = {}
        self.change: Change = lambda kind, site, message: message
        self.requests: list[tuple[str, Request]] = []
        self.replies: list[Reply] = []

    def sites(self) -> tuple[str, ...]:
        return tuple(sorted(self.hospitals))

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        answers: list[Reply | Failure] = []
        for site, request in requests.items():
            self.requests.append((site, request))
            if self.lose.get(site) == request.kind:
                del self.hospitals[site]
            if site not in self.hospitals:
                answers.append(Failure(site, "no answer"))
                continue
            try:
                reply = self.hospitals[site].handle(self.change("request", site, request))
            except UpdateRefusedError as error:
                answers.append(Failure(site, error.reason, error.fix, error.code))
            else:
                self.replies.append(reply)
                answers.append(self.change("reply", site, reply))
        return answers


def hospitals(n: int = 4, seed: int = 0, start: State = START) -> dict[str, Hospital]:
    rng = np.random.default_rng(seed)
    made = {}
    for i in range(n):
        changed = {k: t + torch.from_numpy(rng.normal(0, 1e-3, t.shape)).float() for k, t in start["shared"].items()}
        made[f"s{i}"] = Hospital(f"s{i}", {"shared": changed}, float(rng.integers(20, 1001)))
    return made


def equipped(sites: Mapping[str, Hospital], folder: Path | None = None, threshold: int = 0, **options: Any) -> Secure:
    """Give every site an identity; return the server's half."""
    identities = {name: Identity.generate() for name in sites}
    roster = {name: identity.public for name, identity in identities.items()}
    for name, site in sites.items():
        own = None if folder is None else folder / name
        site.participant = Participant(name, identities[name], roster, threshold=threshold, folder=own, **options)
    return Secure(roster=roster, threshold=threshold)


def requests_of(sites: Mapping[str, Hospital], round_: int = 1, start: State = START) -> dict[str, Request]:
    return {name: Request(kind="train", run=RUN, round=round_, state=start) for name in sites}


def collect(secure: Secure, net: Net, round_: int = 1, start: State = START, asked: Any = None) -> Collected:
    gate = Gate(method=METHOD, run=RUN, norm=0, factor=0)
    return secure.collect(net, requests_of(asked or net.hospitals, round_, start), gate)


def sent_by(site: Any) -> State:
    """Return what a hospital sends in the clear, or what a reply holds."""
    return site.state if isinstance(site, Reply) else site.payload


def plain(sites: Mapping[str, Any], present: Any, survivors: Any, start: State = START) -> State:
    """Return the weighted mean of the quantised changes, computed in the clear."""
    form = layout(sent_by(sites[min(sites)]))
    changes = {name: update(sent_by(site), start).numpy() for name, site in sites.items()}
    limits = tuple(map(max, zip(*(exponents(changes[name], sizes(form)) for name in present), strict=True)))
    total = sum(sites[name].weight for name in present)
    summed = sum(
        to_ring(changes[name], sizes(form), limits, sites[name].weight, total).view(np.int32).astype(np.int64)
        for name in survivors
    )
    weight = sum(sites[name].weight for name in survivors)
    words = np.asarray(summed).astype(np.uint32)
    vector = from_ring(words, sizes(form), limits, weight, total, len(list(survivors)))
    return restored(torch.from_numpy(vector), empty(form), start)


def same(left: State, right: State) -> bool:
    return digest(left) == digest(right)


def altered(message: Any, tensor: str, place: int, bit: int = 1) -> Any:
    """Return a request or reply in which one byte of one tensor of its message is another."""
    group = dict(message.state["secure"])
    raw = bytearray(group[tensor].numpy().tobytes())
    raw[place % len(raw)] ^= bit
    group[tensor] = torch.frombuffer(raw, dtype=group[tensor].dtype)
    return replace(message, state={**message.state, "secure": group})
