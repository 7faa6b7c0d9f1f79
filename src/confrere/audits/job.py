"""Run audits on a finished run and write what they found: ``RUN/audits/NAME.json``, signed where a key is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from confrere.audits.audit import Choice, find, known_audits
from confrere.audits.tapped import open_run
from confrere.errors import ConfigError, GuaranteeError, RunError
from confrere.record.files import as_json, file_digest, read_json, write_json
from confrere.record.machine import threads_kept
from confrere.record.run import Run
from confrere.record.signing import is_signed, sign

FOLDER = "audits"


@threads_kept()
def audit(
    path: Path,
    *,
    only: Sequence[str] = (),
    data: Path | None = None,
    choice: Choice | None = None,
    done: Callable[[dict[str, Any]], None] = lambda found: None,
) -> list[dict[str, Any]]:
    """Return what the audits found, written as ``audits/NAME.json`` each; one that does not apply is left out.

    Args:
        path: a finished run in one process.
        only: names of audits; all by default, of which those that do not apply say so.
        data: where the run's images lie now, if not where they were.
        choice: how thorough.
        done: called with the result of each.

    Raises:
        ConfigError: an unknown audit, or one of ``only`` that does not apply to the run.
        RunError: no finished run, or its data changed.
    """
    names = list(dict.fromkeys(only)) or list(known_audits())
    functions = {name: find(name).function for name in names}
    choice = choice or Choice()
    run, written = open_run(path, data), []
    with Run(path).lock():
        for name, function in functions.items():
            choice.notify(f"audit {name}")
            try:
                found = function(run, choice).as_json()
            except ConfigError as error:
                if only or error.code != "audit":
                    raise
                choice.notify(f"{name} is left out: {error.reason}")
                continue
            found["run"] = {"results": file_digest(path / "results.json"), "round": run.round}
            signature = sign(_head(found))
            write_json(path / FOLDER / f"{name}.json", found | ({"signature": signature} if signature else {}))
            written.append(found)
            done(found)
    return written


def hold(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Make sure that no row of what the audits found is above its bound.

    Raises:
        GuaranteeError: one is, by its interval.
    """
    rows = [(one["audit"], row) for one in found for row in one["rows"] if row["finding"] == "above bound"]
    if rows:
        named = [f"{name} {row['measure']}, {row['model']} at {row['subject']}" for name, row in rows[:5]]
        what = f"{len(rows)} strengths are above what the run's epsilon allows: {'; '.join(named)}"
        fix = "release nothing of this run; look for noise or clipping that is not what the ledger says"
        raise GuaranteeError(what, where=str(path), fix=fix)


def check(file: Path, public: bytes | None = None) -> None:
    """Make sure that a written audit is as it was signed, by the key of the PEM ``public`` where one is given.

    Raises:
        RunError: it is not signed, or was changed.
    """
    found = read_json(file)
    signature = found.pop("signature", None)
    if not isinstance(signature, dict) or signature.get("of") != _head(found) or not is_signed(signature, public):
        fix = "audit again; with the key of whoever signs"
        raise RunError("the audit is not as it was signed", where=str(file), fix=fix, code="signature")


def _head(found: dict[str, Any]) -> str:
    return sha256(as_json(found)).hexdigest()
