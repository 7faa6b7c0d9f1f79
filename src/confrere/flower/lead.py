"""What ``confrere coordinator`` does: the experiment made fit for hospitals, the run, its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from confrere.config import Experiment, override, read, validate
from confrere.consortium.kit import Kit
from confrere.consortium.late import absent, check_late, late_of
from confrere.consortium.lead import across
from confrere.errors import ConfigError
from confrere.fingerprint import stored_experiment
from confrere.flower.coordinator import Coordinator, Notify
from confrere.record.files import read_json
from confrere.record.run import Run
from confrere.report import write_report


def lead(
    kit: Kit,
    out: Path,
    config: Path | None,
    overrides: Sequence[str],
    *,
    host: str,
    deadline: float,
    patience: float,
    watch: int,
    log: Path | None,
    notify: Notify,
    show: Notify,
    late: Sequence[str] = (),
) -> str:
    """Run an experiment across the sites of a kit into ``out``, or go on with the one there; return the headline.

    ``notify`` is called with what happens beside the run, ``show`` with the events of the run itself.
    """
    experiment, said = chosen(kit, out, config, overrides)
    awaited = late_of(out, late)
    check_late(experiment, kit.sites, awaited)
    for line in said:
        notify({"event": "note", "reason": line})

    def begun() -> None:
        """Say where to look, and serve the live page, once there is a run to look at."""
        notify({"event": "waiting", "reason": f"for the sites; follow with: confrere status {out}"})
        if watch:
            from confrere.watch.serve import start

            notify({"event": "watch", "reason": start(out, port=watch).address})

    with Coordinator(kit=kit, host=host, log_file=log, notify=notify, show=show) as processes:
        verdicts = processes.conduct(experiment, out, begun, deadline=deadline, patience=patience, late=awaited)
    for line in absent(read_json(out / "status.json")):
        notify({"event": "note", "reason": line})
    notify({"event": "report", "reason": str(write_report(out))})
    return str(verdicts.get("headline", ""))


def chosen(kit: Kit, out: Path, config: Path | None, overrides: Sequence[str]) -> tuple[Experiment, list[str]]:
    """Return the experiment of a new run, or of the one in ``out``, and what was changed so that it can run.

    Raises:
        ConfigError: there is neither; or other choices are given for a run that has begun.
    """
    if (out / "experiment.toml").exists():
        if config or overrides:
            what, fix = (
                "this run has begun; its experiment is fixed",
                "leave --config and overrides out, or use a new --out",
            )
            raise ConfigError(what, where=str(out), fix=fix, code="not-empty")
        return stored_experiment(out), []
    if config is None:
        fix = "give --config EXPERIMENT.toml"
        raise ConfigError("there is no run to go on with, and no experiment", where=str(out), fix=fix, code="no-run")
    if not (out / "job.json").exists():
        Run(out).make_new()
    values = override({**read(config), "path": f"consortium {kit.consortium}"}, overrides)
    return across(validate(values), kit.classes)
