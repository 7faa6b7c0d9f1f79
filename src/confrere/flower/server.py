"""The ServerApp: our round loop over Flower's Grid, in the process that the SuperLink starts for it."""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from confrere.config import read, validate
from confrere.consortium.lead import Lead
from confrere.consortium.status import Status
from confrere.errors import ConfrereError, printable
from confrere.flower.grid import GridSites
from confrere.record.files import read_json
from confrere.watch.log import Log

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry out what ``confrere coordinator`` wrote down; how it ends stands in status.json."""
    settings = read_json(Path(str(context.run_config["settings"])))
    out, nodes = Path(settings["out"]), {str(site): int(node) for site, node in settings["nodes"].items()}
    status = Status(out / "status.json", str(settings["consortium"]), nodes)
    status.phase("waiting", process=os.getpid(), run=settings["run"])
    sites = GridSites(grid, nodes, status, deadline=settings["deadline"], patience=settings["patience"])
    roster = {site: bytes.fromhex(identity) for site, identity in settings["identities"].items()}
    tell = teller(Path(settings["events"]), Path(settings["log"]) if settings["log"] else None)
    try:
        lead = Lead(out=out, roster=roster, sites=sites, status=status, notify=tell, late=settings["late"])
        lead.conduct(validate(read(Path(settings["experiment"]))))
    except ConfrereError as error:
        failure: dict[str, Any] = {"what": error.what, "where": error.where, "fix": error.fix, "code": error.code}
        status.phase("failed", error=printable(error.reason), failure={**failure, "exit_code": error.exit_code})
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"internal error {type(error).__name__} [{Path(frame.filename).name}, line {frame.lineno}]"
        fix = "look at superlink.log in the coordinator's kit"
        failure = {"what": text, "where": "", "fix": fix, "code": "internal", "exit_code": 1}
        status.phase("failed", error=text, failure=failure)
        raise


def teller(events: Path, log: Path | None) -> Callable[[dict[str, Any]], None]:
    """Return what writes every event of the run to ``events``, which the coordinator shows, and into the log.

    The data sheet is left out: it is in federation.json, as the sites sent it.
    """
    structured = Log(log) if log else None

    def tell(event: dict[str, Any]) -> None:
        if event["event"] != "data":
            with contextlib.suppress(OSError), events.open("a", encoding="utf-8") as file:  # a full disk: not our end
                file.write(json.dumps(event) + "\n")
        if structured:
            structured(event)

    return tell
