"""What does secure aggregation cost? Bytes and seconds of one round, beside the same round in the clear.

    python benchmarks/secure_aggregation.py --out benchmarks/results/secure_aggregation.json

Sites send tensors that are drawn, not trained; all of them in one process, one after another. ``site`` is the mean
time of one site over its four phases, ``server`` what is left. With ``--dropped`` that many sites vanish after they
masked: the server then makes their masks from the others' shares.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from confrere import methods as _methods  # noqa: F401  fills the registry
from confrere.errors import UpdateRefusedError
from confrere.federation.defence import combine
from confrere.federation.gate import Gate
from confrere.federation.secure.exchange import Secure
from confrere.federation.secure.keys import Identity
from confrere.federation.secure.participant import Participant
from confrere.federation.transport import Failure
from confrere.method import Reply, Request, make
from confrere.tensors import State, n_bytes

METHOD = make("fedit")


class Sites:
    """A transport whose sites send drawn tensors; counts bytes and times."""

    def __init__(self, count: int, start: State, dropped: int) -> None:
        names = [f"site_{i:02d}" for i in range(count)]
        identities = {name: Identity.generate() for name in names}
        self.roster = {name: identity.public for name, identity in identities.items()}
        self.parts = {name: Participant(name, identities[name], self.roster) for name in names}
        self.gone, self.start, self.seconds = set(names[count - dropped :]), start, 0.0
        self.sent = self.received = 0
        self.away = 0.0  # seconds in here, with what is drawn

    def sites(self) -> tuple[str, ...]:
        """Return all names."""
        return tuple(self.parts)

    def train(self, name: str, request: Request) -> Reply:
        """Return drawn tensors, the same in every run."""
        generator = torch.Generator().manual_seed(sorted(self.parts).index(name))
        state = {
            group: {n: t + 1e-4 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
            for group, tensors in self.start.items()
        }
        metrics = {"examples": 100, "overlap": None, "loss": 0.5}
        return Reply(site=name, run=request.run, round=request.round, state=state, weight=100.0, metrics=metrics)

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        """Answer, masked or in the clear; count bytes and seconds."""
        started = time.perf_counter()
        answers: list[Reply | Failure] = []
        for name, request in requests.items():
            if name in self.gone and request.kind == "unmask":
                continue
            drawn = self.train(name, request) if request.kind in ("train", "keys") else None
            begun = time.perf_counter()
            try:
                handle = self.parts[name].handle
                reply = drawn if request.kind == "train" else handle(request, METHOD, lambda _, drawn=drawn: drawn)
            except UpdateRefusedError as error:
                raise SystemExit(str(error)) from error
            self.seconds += time.perf_counter() - begun
            self.received += n_bytes(request.state)
            self.sent += n_bytes(reply.state)
            lost = name in self.gone and request.kind == "masked"
            answers.append(Failure(name, "no answer") if lost else reply)
        self.away += time.perf_counter() - started
        return answers


def measure(count: int, parameters: int, dropped: int) -> dict[str, Any]:
    """Return bytes and seconds of a round of so many sites, masked and in the clear."""
    side = 1000
    start: State = {"shared": {f"layer_{i}": torch.zeros(10, side) for i in range(parameters // (10 * side))}}
    gate = Gate(method=METHOD, norm=0, factor=0)
    clear, masked = Sites(count, start, 0), Sites(count, start, dropped)
    requests = {name: Request(kind="train", round=1, state=start) for name in clear.parts}
    plain, _ = gate.admit(requests, clear.exchange(requests))
    secure = Secure(roster=masked.roster)
    begun = time.perf_counter()
    came = secure.collect(masked, requests, gate)
    whole = time.perf_counter() - begun
    if came.total is None:
        raise SystemExit("; ".join(f"{failed.site}: {failed.reason}" for failed in came.failures))
    server = METHOD.init_server(start["shared"])
    left = plain[: count - dropped]
    right, _ = combine(METHOD, server, requests, left, Secure(roster={}), 1)
    found, _ = combine(METHOD, server, requests, came.replies, secure, 1, came.total)
    if right is None or found is None:
        raise SystemExit("nothing was averaged")
    both = [torch.cat([t.flatten().double() for _, t in sorted(s["shared"].items())]) for s in (right, found)]
    return {
        "sites": count,
        "parameters": parameters,
        "dropped": dropped,
        "sent_ratio": masked.sent / clear.sent,
        "all_ratio": (masked.sent + masked.received) / (clear.sent + clear.received),
        "overhead_bytes_a_site": (masked.sent + masked.received - clear.sent - clear.received) / count,
        "site_seconds": masked.seconds / count,
        "server_seconds": whole - masked.away,
        "relative_error": float((both[0] - both[1]).norm() / both[0].norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for count, parameters, dropped in (
        (10, 1_000_000, 0),
        (10, 1_000_000, 3),
        (10, 100_000, 0),
        (3, 1_000_000, 0),
        (30, 1_000_000, 0),
    ):
        row = measure(count, parameters, dropped)
        rows.append(row)
        print(
            f"{count:3d} sites, {parameters:9,d} parameters, {dropped} gone: {row['sent_ratio']:.3f} x the bytes sent, "
            f"{row['all_ratio']:.3f} x all bytes; a site {row['site_seconds']:.2f} s, server "
            f"{row['server_seconds']:.2f} s; relative error {row['relative_error']:.1e}"
        )
    first = rows[0]
    print(f"G33: {first['all_ratio']:.3f} x the bytes in the clear (goal 1.8), 10 sites and 1 M parameters")
    if args.out:
        found = {"date": str(date.today()), "torch": torch.__version__, "threads": torch.get_num_threads()}
        args.out.write_text(json.dumps({**found, "rounds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
