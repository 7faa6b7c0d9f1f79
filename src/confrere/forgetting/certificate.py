"""What was done, at what cost, and what was not shown: a file, signed where a key is given, named by both journals."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from confrere.errors import RunError
from confrere.forgetting.data import Opened
from confrere.forgetting.who import SALT, Whom, new_salt, told
from confrere.record import journal
from confrere.record.files import as_json, read_json, write_bytes, write_json
from confrere.record.machine import machine
from confrere.record.run import Run
from confrere.record.signing import is_signed, sign

NAME = "certificate.json"
ALWAYS = (
    "that copies elsewhere are gone: what hospitals took home, exports, backups, comparisons, the data themselves",
    "that people chose the method, its settings or the list of classes without the forgotten",
)
OF_EXACT = ("that it equals a run which never had them on another processor, with other packages or thread counts",)
OF_APPROXIMATE = (
    "that nothing of the forgotten is left: this way gives no guarantee, whatever the numbers say",
    "that a stronger attack than those of the judgement finds nothing",
)
UNJUDGED = "how far the result is from training again without the forgotten: give --judge 5"
OF_NOISE = "that its releases leave the epsilon of the first run as it was: they add to it, for who took part in both"


def not_shown(*, exact: bool, judged: bool, noise: bool) -> list[str]:
    """Return what a certificate does not say, in words."""
    shown = [*ALWAYS, *(OF_EXACT if exact else OF_APPROXIMATE)]
    return [*shown, *([OF_NOISE] if noise else []), *([] if exact or judged else [UNJUDGED])]


KEPT = ("events.jsonl", "experiment.toml", "federation.json", "machine.json", "backbone.json")
"""What of a run says how it was made, which a certificate rests on; it holds no tensors and no predictions."""


def left_behind(run: Path) -> list[str]:
    """Return what of the old run still has to be deleted, as paths below it, and what lies elsewhere."""
    below = sorted(path.name for path in run.iterdir() if path.name not in KEPT and not path.name.startswith(".lock"))
    return [*below, "the cache of decoded images and activations: $CONFRERE_CACHE, else ~/.cache/confrere"]


def certify(run: Path, out: Path, opened: Opened, who: Whom, found: Mapping[str, Any], made: Mapping[str, str]) -> Path:
    """Write the certificate into ``out`` and its digest into the journals of ``out`` and of ``run``; return its path.

    ``found`` is forgetting.json, ``made`` has the digest of everything that was made.
    """
    salt = new_salt()
    if who.patients:
        write_bytes(out / SALT, f"{salt}\n".encode())
    body = {
        "certificate": 1,
        "forgotten": told(who, opened.pictures, salt),
        "way": found["way"],
        "options": found["options"],
        "exact": found["exact"],
        "statement": found["statement"],
        "cost": found["cost"],
        "retraining": found["retraining"],
        "judgement": found["judgement"],
        "not_shown": found["not_shown"],
        "notes": list(opened.notes),
        "of": {"journal": journal.read(Run(run).events_file)[1], "data": read_json(run / "federation.json")["digest"]},
        "made": {"data": opened.after.digest, **made},
        "still_to_delete": found["still_to_delete"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    signature = sign(hashlib.sha256(as_json(body)).hexdigest())
    content = as_json({**body, "signature": signature})
    write_bytes(out / NAME, content)
    event = {"way": found["way"], "certificate": hashlib.sha256(content).hexdigest()}
    Run(out).append({"event": "forgetting", **event, "made": dict(made)})
    Run(run).append({"event": "forgotten", **event})
    return out / NAME


def check(path: Path, public: bytes | None = None) -> dict[str, Any]:
    """Return a certificate that was not changed: it is the one its journal names, and its signature holds.

    Args:
        path: ``OUT/certificate.json``, beside the journal ``OUT/events.jsonl``.
        public: content of the PEM file of the key that must have signed it.

    Raises:
        RunError: changed, not in the journal, or not signed by that key.
    """
    found = read_json(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    events, _ = journal.read(path.parent / "events.jsonl")
    if digest not in [event.get("certificate") for event in events if event["event"] == "forgetting"]:
        what, fix = "the certificate is not the one of the journal", "restore both from a copy"
        raise RunError(what, where=str(path), fix=fix, code="verification")
    signature = found["signature"]
    body = {key: value for key, value in found.items() if key != "signature"}
    said = hashlib.sha256(as_json(body)).hexdigest()
    if signature is None and public is None:
        return dict(found)
    if signature is None or signature.get("of") != said or not is_signed(dict(signature), public):
        what, fix = "a signature does not hold, or is missing", "give the public key of whoever made it"
        raise RunError(what, where=str(path), fix=fix, code="signature")
    return dict(found)


def report(out: Path, who: Whom, found: Mapping[str, Any]) -> Path:
    """Write forgetting.json and forgetting.md; return the latter."""
    write_json(out / "forgetting.json", found)
    write_bytes(out / "forgetting.md", ("\n".join(lines(who, found)) + "\n").encode())
    return out / "forgetting.md"


def lines(who: Whom, found: Mapping[str, Any]) -> list[str]:
    """Return the report in Markdown."""
    cost, again = found["cost"], found["retraining"]
    shown = [
        f"# Forgotten: {who.title()}",
        "",
        f"{found['title']}. {found['statement']}",
        "",
        "| | this way | training again |",
        "|---|---|---|",
        f"| rounds (taken over) | {cost['rounds']} ({cost['reused']}) | {again['rounds']} |",
        f"| optimiser steps, all sites | {cost['steps']} | {again['steps']} |",
        f"| images passed besides | {cost['passes']} | 0 |",
        f"| seconds | {cost['seconds']} | {again['seconds']} |",
    ]
    if found["judgement"]:
        shown += ["", *judged(found["judgement"])]
    shown += ["", "Not shown:", "", *(f"- {one}" for one in found["not_shown"])]
    shown += ["", "Still to delete, of the old run:", "", *(f"- {one}" for one in found["still_to_delete"])]
    return shown


def judged(found: Mapping[str, Any]) -> list[str]:
    """Return the judgement as a table: means with 95 % intervals."""
    number = found["retrained"]
    shown = [f"| | before | after | {number} retrained |", "|---|---|---|---|"]
    titles = {
        "test": "distance of predictions to the retrained, test images",
        "forgotten": "the same, forgotten images",
        "weights": "distance of weights to the retrained",
    }
    for kind, title in titles.items():
        of = found["distances"][kind]
        shown.append(f"| {title} | {_cell(of['before'])} | {_cell(of['after'])} | {_cell(of['retrained'])} |")
    for key, title in (("membership", "membership by loss, AUC"), ("attack", "membership by LiRA, AUC")):
        of = found[key]
        shown.append(f"| {title} | {_cell(of['before'])} | {_cell(of['after'])} | {_cell(of['retrained'])} |")
    for key, title in (
        ("loss", "loss of forgotten images, nats"),
        ("accuracy", "accuracy on them"),
        ("score", "score kept"),
    ):
        of = found[key]
        shown.append(f"| {title} | {of['before']:.3f} | {of['after']:.3f} | {_cell(of['retrained'])} |")
    return shown


def _cell(of: Mapping[str, Any]) -> str:
    mean = of["mean"] if "mean" in of else of["value"]
    return f"{mean:.3f}" + (f" ({of['low']:.3f} to {of['high']:.3f})" if of["low"] is not None else "")
