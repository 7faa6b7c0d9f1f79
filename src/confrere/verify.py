"""``confrere verify``: every line of a run's journal checked, every round's shared adapter computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from confrere.config import Experiment
from confrere.data.paths import SLUG
from confrere.errors import ConfigError, RunError
from confrere.federation.defence import combine
from confrere.federation.events import begun as begin_event
from confrere.federation.secure.total import SUMS, read_total
from confrere.fingerprint import digest_of, stored_experiment
from confrere.method import Request
from confrere.record import journal
from confrere.record.files import Fields, file_digest, read_json
from confrere.record.run import Run
from confrere.record.signing import is_signed
from confrere.record.store import round_file
from confrere.tensors import State, digest

Answer = TypeVar("Answer")
OUT_OF_PLACE = "a record of the journal does not follow from those before it"


@dataclass(frozen=True)
class Verified:
    """What was checked of one training: the run itself, or one of its controls.

    ``recomputed`` of ``rounds`` shared states were computed again from what the sites sent, byte by byte, or under
    secure aggregation from its sum: that this is the sum of what they sent, nobody can compute. What the
    others need is not kept here (``record.keep``, hospitals over a network, simulated attackers), or a drift was
    accepted. ``signed`` signatures of the journal are valid. ``unseen``: noise came from the operating system, so that
    no round can be computed again; what the sites were sent and sent was compared all the same.
    """

    part: str
    lines: int
    rounds: int
    recomputed: int
    signed: int
    unseen: bool = False

    def sentence(self) -> str:
        """Return what a user reads."""
        kept = "" if self.recomputed == self.rounds else " (what the others need is not kept, or a drift was accepted)"
        if self.unseen:
            kept = (
                " (their noise came from the operating system and cannot be drawn again: this run is not reproducible)"
            )
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
    standing = journal.standing(events)
    rounds = _rounds(standing, finished=(path / "results.json").exists())
    openings = [e for e in events if e["event"] == "inputs"]
    if rounds and not openings:
        raise _untrue("the journal lacks its beginning", str(run.events_file))
    for opening in openings:
        _same(str(read_json(out / "federation.json")["digest"]), opening["data"], str(out / "federation.json"))
        if not drifted:
            _same(digest_of(experiment), opening["experiment"], f"experiment.toml, for {name}")
    keeps = Keeps(
        everything=not experiment.record.keep,
        sites=not (out / "job.json").exists(),
        attackers=frozenset(experiment.attack.sites),
    )
    released = experiment.build_method().release()
    unseen, again = bool(released and released["sigma"] and not released["seeded"]), 0
    for begun, event in rounds:
        if _as_recorded(run, keeps, begun, event) and not drifted:
            _again(run, experiment, begun, event, unseen=unseen)
            again += not unseen
    _made(path, standing, len(rounds))
    return Verified(name, len(events), len(rounds), again, signed, unseen)


@dataclass(frozen=True)
class Keeps:
    """What must be in a run directory: ``everything``, or the last rounds only; the ``sites``' states, or none.

    Where hospitals took part over a network, each has its own states; ``job.json`` is then in the directory. Simulated
    ``attackers`` send something else than they store.
    """

    everything: bool
    sites: bool
    attackers: frozenset[str]

    def here(self, file: Path, *, of_site: bool) -> bool:
        """Return whether a state is kept; RunError when it is missing."""
        there = _readable(file.exists, str(file))
        if not there and self.everything and (self.sites or not of_site):
            raise _untrue("a state is missing", str(file))
        return there


def _rounds(standing: Sequence[Fields], *, finished: bool) -> list[tuple[Fields, Fields]]:
    """Return the records that begin and end each round; RunError naming the first that does not follow from others."""
    rounds: list[tuple[Fields, Fields]] = []
    begun: Fields | None = None
    for event in standing:
        follows = True
        if event["event"] == "begin":
            before = rounds[-1][1]["server"] if rounds else event["server"]
            follows = event["round"] == len(rounds) + 1 and event["server"] == before
            begun = event
        elif event["event"] == "round":
            follows = begun is not None and event["round"] == len(rounds) + 1
            rounds += [(begun, event)] if begun is not None else []
            begun = None
        elif event["event"] == "end":
            follows = begun is None
        if not follows:
            raise _untrue(OUT_OF_PLACE, event.where)
    if finished and begun is not None:
        raise _untrue(OUT_OF_PLACE, begun.where)
    return rounds


def _as_recorded(run: Run, keeps: Keeps, begun: Fields, event: Fields) -> bool:
    """Compare what is kept of a round with the journal; return whether all is there that its average is made of.

    What a simulated attacker sent is not what it stored.
    """
    round_, whole = int(event["round"]), True
    for number, said in ((round_ - 1, begun["server"]), (round_, event["server"])):
        file = run.server_file(number)
        if keeps.here(file, of_site=False):
            _same(digest(run.server(number)), said, str(file))
        else:
            whole = False
    if "secure" in event:  # what the sites sent is not known, but its sum
        file = round_file(run.path / SUMS, round_)
        if not keeps.here(file, of_site=False):
            return False
        total = read_total(file.parent, round_)
        _same(digest(total.state()), event["secure"]["sum"], str(file))
        if list(total.sites) != sorted(event["sites"]):
            raise _untrue("the sum is of other sites than the journal says", str(file))
        return whole
    for site, record in {**event.get("refused", {}), **event["sites"]}.items():
        counted = site in event["sites"]
        store = run.store(_name(site, event))
        if keeps.here(store.file(round_), of_site=True):
            state, reply = store.read(round_)
            for kind, found in (("kept", state), ("stored", reply.state)):
                if counted or kind in record:  # a refused site may have said nothing
                    what = "state" if kind == "kept" else "reply"
                    _same(digest(found), record[kind], f"round {round_}, {what} of {site}")
            if counted and site not in keeps.attackers:
                _same(record["reply"], record["stored"], f"round {round_}, what the server got from {site}")
            whole = whole and (not counted or record["stored"] == record["reply"])
        else:
            whole = whole and not counted
    return whole


def _name(site: str, event: Fields) -> str:
    """Return a site's name, which names a folder."""
    if not SLUG.fullmatch(site):
        raise _untrue("a record of the journal names no site", event.where)
    return site


def _again(run: Run, experiment: Experiment, begun: Fields, event: Fields, *, unseen: bool) -> None:
    """Compute again what a round sent and, unless its noise is ``unseen``, made; RunError if it gives other bytes."""
    round_, method = int(event["round"]), experiment.build_method()
    before = run.server(round_ - 1)

    def compute() -> tuple[dict[str, Any], State]:
        sites = sorted({*begun["requests"], *event["sites"]})
        asked = {s: Request(kind="train", round=round_, state=method.broadcast(before, s)) for s in sites}
        made: State | None = None
        if unseen:
            return begin_event(round_, before, asked)["requests"], {}
        if event["averaged"] and "secure" in event:
            total = read_total(run.path / SUMS, round_)
            made = method.aggregate(before, [total.reply(asked[total.sites[0]].state, round_)])
        elif event["averaged"]:
            replies = [run.store(site).read(round_)[1] for site in sorted(event["sites"])]
            made, _ = combine(method, before, asked, replies, experiment.build_defence(), 1)
        return begin_event(round_, before, asked)["requests"], made or before

    sent, made = _readable(compute, event.where)
    for site in sent:
        _same(sent[site], begun["requests"][site], f"round {round_}, what {site} was sent")
    if not unseen:
        _same(digest(made), event["server"], f"round {round_}, the shared state computed again")


def _made(path: Path, standing: Sequence[Fields], rounds: int) -> None:
    """Compare the files that a training and a comparison made with what the journal says of them."""
    exports = [f.relative_to(path).as_posix() for f in sorted((path / "adapters").rglob("*")) if f.is_file()]
    for kind, last, others in (("end", "results.json", exports), ("verdicts", "verdicts.json", [])):
        said = [e for e in standing if e["event"] == kind][-1:]
        if (path / last).exists() and not said:
            raise _untrue("the journal lacks its end", str(path / "events.jsonl"))
        for event in said:
            for name in sorted({*event["files"], last, *others}):
                if name not in event["files"]:
                    raise _untrue("a file is not in the journal", str(path / name))
                if name not in (last, *others):
                    raise _untrue("a file of the journal is missing", event.where)
                found = _readable(partial(file_digest, path / name), str(path / name))
                _same(found, event["files"][name], str(path / name))
            if kind == "end" and not 1 <= event["round"] == read_json(path / last)["round"] <= rounds:
                raise _untrue("a record of the journal names another round than the results", event.where)


def _signatures(events: Sequence[Fields], heads: Sequence[str], file: Path, key: bytes | None) -> int:
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


def _readable(ask: Callable[[], Answer], where: str) -> Answer:
    """Return an answer that comes from a run's files; RunError when they hold what no run writes."""
    try:
        return ask()
    except (OSError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _untrue("it cannot be read or computed again", where) from error


def _same(found: object, expected: object, where: str) -> None:
    if found != expected:
        raise _untrue(f"not what the journal says: {str(found)[:12]} instead of {str(expected)[:12]}", where)


def _untrue(what: str, where: str) -> RunError:
    fix = "this record was changed after the run; restore it from a copy"
    return RunError(what, where=where, fix=fix, code="verification")
