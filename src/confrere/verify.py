"""``confrere verify``: every line of a run's journal checked, every round's shared adapter computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confrere.config import Experiment
from confrere.errors import ConfigError, RunError
from confrere.federation.defence import combine
from confrere.fingerprint import digest_of, stored_experiment
from confrere.method import Method, Request
from confrere.record import journal
from confrere.record.files import read_json
from confrere.record.run import Run
from confrere.record.signing import is_signed
from confrere.tensors import State, digest

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Verified:
    """What was checked of one training: the run itself, or one of its controls.

    ``recomputed`` of ``rounds`` shared states were computed again from what the sites sent, byte by byte; what the
    others need is not kept (``record.keep``, or simulated attackers). ``signed`` signatures of the journal are valid.
    """

    part: str
    lines: int
    rounds: int
    recomputed: int
    signed: int

    def sentence(self) -> str:
        """Return what a user reads."""
        kept = "" if self.recomputed == self.rounds else " (what the others need is not kept)"
        return (
            f"{self.part}: {self.lines} records intact, {self.recomputed} of {self.rounds} rounds computed again with "
            f"the same bytes{kept}, {self.signed} signatures valid"
        )


def verify(out: Path, public: Path | None = None) -> list[Verified]:
    """Check a run and its controls against their journals; ``public`` is the signer's public key, in PEM.

    Raises:
        RunError: naming the first record that does not hold: a line of the journal, a signature, a state, what a site
            was sent or sent, a round's shared adapter, an exported file.
        ConfigError: the key cannot be read.
    """
    experiment = stored_experiment(out)
    try:
        key = public.read_bytes() if public else None
    except OSError as error:
        raise ConfigError(
            f"the public key cannot be read: {error.strerror}", where="--public-key", code="signing-key"
        ) from None
    parts = [(".", experiment)]
    for name in experiment.controls:
        if name != experiment.method["name"] and (out / "controls" / name / "events.jsonl").exists():
            parts.append((f"controls/{name}", experiment.for_method(name)))
    return [_part(name, out, own, key) for name, own in parts]


def _part(name: str, out: Path, experiment: Experiment, key: bytes | None) -> Verified:
    path = out / name
    run = Run(path)
    events, _ = journal.read(run.events_file)
    if not events:
        raise RunError(
            "there is no journal", where=str(run.events_file), fix="give the directory of a run", code="verification"
        )
    signed = _signatures(events, run.events_file, key)
    opening = events[0]
    if opening["event"] == "inputs" and not any(e["event"] == "drift" for e in events):
        _same(digest_of(experiment), opening["experiment"], f"experiment.toml, for {name}")
        _same(str(read_json(out / "federation.json")["digest"]), opening["data"], str(out / "federation.json"))
    standing = journal.standing(events)
    rounds = [e for e in standing if e["event"] == "round"]
    begun = {e["round"]: e for e in standing if e["event"] == "begin"}
    method = experiment.build_method()
    again = sum(_again(run, method, experiment, begun[e["round"]], e) for e in rounds if e["round"] in begun)
    ends = [e for e in standing if e["event"] == "end"]
    if (path / "results.json").exists() and not ends:
        raise RunError(
            "the journal lacks its end", where=str(run.events_file), fix="restore it from a copy", code="verification"
        )
    for end in ends[-1:]:
        _files(path, end["files"])
    return Verified(name, len(events), len(rounds), again, signed)


def _again(run: Run, method: Method, experiment: Experiment, begun: Event, event: Event) -> bool:
    """Return whether a round could be computed again (its states are kept); RunError if it gives other bytes."""
    round_ = int(event["round"])
    if event["sites"].keys() & set(experiment.attack.sites):
        return False  # what a simulated attacker sent is not what it stored
    stores = {site: run.store(site) for site in event["sites"]}
    files = [run.server_file(round_ - 1), run.server_file(round_)]
    if not all(f.exists() for f in [*files, *(s.folder / f"{round_:05d}.safetensors" for s in stores.values())]):
        return False
    before, after = run.server(round_ - 1), run.server(round_)
    _same(digest(before), begun["server"], f"{files[0]}, before round {round_}")
    requests = {site: Request(kind="train", round=round_, state=method.broadcast(before, site)) for site in stores}
    replies = []
    for site, store in sorted(stores.items()):
        reply = store.reply(round_)
        _same(digest(requests[site].state), begun["requests"][site], f"round {round_}, what site {site} was sent")
        _same(digest(reply.state if reply else {}), event["sites"][site]["reply"], f"round {round_}, reply of {site}")
        replies += [reply] if reply else []
    _same(digest(after), event["server"], str(files[1]))
    made: State | None = before
    if event["averaged"]:
        made, _ = combine(method, before, requests, replies, experiment.build_defence())
    _same(digest(made or before), event["server"], f"round {round_}, the shared state computed again")
    return True


def _signatures(events: Sequence[Event], file: Path, key: bytes | None) -> int:
    """Return how many signatures there are, all of them valid; with a key, the last event must be signed."""
    number = 0
    for place, (head, event) in enumerate(_heads(file, events), 1):
        if event["event"] == "signature":
            number += 1
            if event.get("of") != head or not is_signed(dict(event), key):
                fix = "give the public key of whoever ran it; if that is right, the record was forged"
                raise RunError("a signature does not hold", where=f"{file}, line {place}", fix=fix, code="signature")
    if key is not None and events[-1]["event"] != "signature":
        raise RunError(
            "the last record is not signed",
            where=f"{file}, line {len(events)}",
            fix="was a key given?",
            code="signature",
        )
    return number


def _heads(file: Path, events: Sequence[Event]) -> Iterator[tuple[str, Event]]:
    """Yield every event with the hash of the line before it."""
    head = journal.START
    for line, event in zip(file.read_bytes().split(b"\n"), events, strict=False):
        yield head, event
        head = line[-66:-2].decode()


def _files(path: Path, files: Mapping[str, str]) -> None:
    for name, expected in files.items():
        file = path / name
        found = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "nothing"
        _same(found, expected, str(file))


def _same(found: str, expected: str, where: str) -> None:
    if found != expected:
        raise RunError(
            f"not what the journal says: {found[:12]} instead of {expected[:12]}",
            where=where,
            fix="this record was changed after the run; restore it from a copy",
            code="verification",
        )
