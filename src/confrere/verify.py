"""``confrere verify``: every line of a run's journal checked, every round's shared adapter computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confrere.config import Experiment
from confrere.errors import ConfigError, RunError
from confrere.federation.defence import combine
from confrere.fingerprint import digest_of, stored_experiment
from confrere.method import Request
from confrere.record import journal
from confrere.record.files import file_digest, read_json
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
    drifted = any(e["event"] == "drift" for e in Run(out).events())
    parts = [(".", experiment)]
    for name in experiment.other_controls:
        if (out / "controls" / name).exists():
            parts.append((f"controls/{name}", experiment.for_method(name)))
    return [_part(name, out, own, key, drifted=drifted) for name, own in parts]


def _part(name: str, out: Path, experiment: Experiment, key: bytes | None, *, drifted: bool) -> Verified:
    path = out / name
    run = Run(path)
    lines = journal.content(run.events_file)
    events, _ = journal.parse(lines, str(run.events_file))
    if not events:
        fix = "give the directory of a run, or restore the journal"
        raise RunError("there is no journal", where=str(run.events_file), fix=fix, code="verification")
    signed = _signatures(events, journal.heads(lines), run.events_file, key)
    for opening in [e for e in events if e["event"] == "inputs"]:
        _same(str(read_json(out / "federation.json")["digest"]), opening["data"], str(out / "federation.json"))
        if not drifted:
            _same(digest_of(experiment), opening["experiment"], f"experiment.toml, for {name}")
    standing = journal.standing(events)
    rounds = [e for e in standing if e["event"] == "round"]
    begun = {e["round"]: e for e in standing if e["event"] == "begin"}
    again = 0
    for event in rounds:
        if _as_recorded(run, experiment, begun[event["round"]], event) and not drifted:
            _again(run, experiment, event)
            again += 1
    for kind, made in (("end", "results.json"), ("verdicts", "verdicts.json")):
        said = [e for e in standing if e["event"] == kind][-1:]
        if (path / made).exists() and not said:
            where, fix = str(run.events_file), "restore it from a copy"
            raise RunError("the journal lacks its end", where=where, fix=fix, code="verification")
        for last in said:
            _files(path, last["files"])
    return Verified(name, len(events), len(rounds), again, signed)


def _as_recorded(run: Run, experiment: Experiment, begun: Event, event: Event) -> bool:
    """Compare what is kept of a round with the journal; return whether all is there that its average is made of.

    What ``record.keep`` does not keep may be gone. What a simulated attacker sent is not what it stored.
    """
    round_, whole = int(event["round"]), True
    for number, said in ((round_ - 1, begun["server"]), (round_, event["server"])):
        file = run.server_file(number)
        if _is_kept(file, experiment):
            _same(digest(run.server(number)), said, str(file))
        else:
            whole = False
    for site, record in event["sites"].items():
        store = run.store(site)
        if _is_kept(store.file(round_), experiment):
            state, reply = store.read(round_)
            _same(digest(state), record["kept"], f"round {round_}, state of {site}")
            _same(digest(reply.state), record["stored"], f"round {round_}, reply of {site}")
            whole = whole and record["stored"] == record["reply"]
        else:
            whole = False
    return whole


def _is_kept(file: Path, experiment: Experiment) -> bool:
    if not file.exists() and not experiment.record.keep:
        raise RunError("a state is missing", where=str(file), fix="restore it from a copy", code="verification")
    return file.exists()


def _again(run: Run, experiment: Experiment, event: Event) -> None:
    """Compute a round's shared state from what the sites sent; RunError if it gives other bytes."""
    round_, method = int(event["round"]), experiment.build_method()
    before = run.server(round_ - 1)
    asked = {s: Request(kind="train", round=round_, state=method.broadcast(before, s)) for s in event["sites"]}
    replies = [run.store(site).read(round_)[1] for site in sorted(event["sites"])]
    made: State | None = before
    if event["averaged"]:
        made, _ = combine(method, before, asked, replies, experiment.build_defence(), 1)
    _same(digest(made or before), event["server"], f"round {round_}, the shared state computed again")


def _signatures(events: Sequence[Event], heads: Sequence[str], file: Path, key: bytes | None) -> int:
    """Return how many signatures there are, all valid for the hash before them; with a key, the last event is one."""
    number = 0
    for place, (head, event) in enumerate(zip(heads, events, strict=True), 1):
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


def _files(path: Path, files: Mapping[str, str]) -> None:
    for name, expected in files.items():
        file = path / name
        _same(file_digest(file) if file.exists() else "nothing", expected, str(file))


def _same(found: str, expected: str, where: str) -> None:
    if found != expected:
        raise RunError(
            f"not what the journal says: {found[:12]} instead of {expected[:12]}",
            where=where,
            fix="this record was changed after the run; restore it from a copy",
            code="verification",
        )
