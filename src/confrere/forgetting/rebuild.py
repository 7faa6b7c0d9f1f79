"""The exact way: the rounds in which the forgotten had no part are taken over as they are, all others are done again.

A run is reproducible to the bit, so the result is that of a run which never had them. It costs what the rounds after
their first part cost: all of them for a site that took part from the start, fewer for one that was drawn late.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from confrere.errors import RunError
from confrere.federation.sampling import sample
from confrere.fingerprint import begin, differences
from confrere.forgetting.data import Opened
from confrere.forgetting.shards import retrained
from confrere.forgetting.way import Cost
from confrere.job import Notify, Prepared, initial, plan, prepare, threads, train
from confrere.methods.shards import Shards
from confrere.record.files import write_bytes
from confrere.record.run import Run
from confrere.tensors import digest


def rebuild(run: Path, opened: Opened, out: Path, notify: Notify = lambda event: None) -> Cost:
    """Write to ``out`` the run that never had the forgotten; continue what an earlier call left unfinished.

    Returns:
        what was done; rounds of ``run`` whose answers were taken over count as reused.
    """
    experiment, new = opened.experiment, Run(out)
    torch.set_num_threads(threads(experiment, opened.after))
    drifted = bool(differences(run, opened.old))
    begin(out, experiment, opened.after, accept_drift=False)
    earlier, counted = _spent(new, experiment.train.steps), list[tuple[int, int]]()
    method = experiment.build_method()
    shards = method if isinstance(method, Shards) and not drifted and _as_stored(opened) else None
    if not (out / "results.json").exists():
        task = prepare(experiment, opened.after, notify)
        torch.set_num_threads(threads(experiment, opened.after))
        if not drifted:
            take_over(Run(run), opened, task, new)
        if shards is not None:
            task = replace(task, method=retrained(shards, run, opened, counted))
        notify({"event": "method", "name": task.method.name, "rounds": experiment.rounds})
        train(task, out, notify)
    spent = _spent(new, experiment.train.steps)
    if shards is None:
        return spent
    # Steps are counted as they are taken; rounds of an earlier call count as if every shard had been trained.
    again = len({round_ for round_, _ in counted}) + earlier.rounds
    steps = earlier.steps + sum(steps for _, steps in counted)
    return Cost(rounds=again, reused=spent.rounds + spent.reused - again, steps=steps)


def _spent(run: Run, each: int) -> Cost:
    """Return rounds in which a site trained, the others as reused, and local steps, ``each`` a round and site."""
    events = [event for event in run.events() if event["event"] == "round"]
    trained = [sum(entry["seconds"] > 0 for entry in event["sites"].values()) for event in events]
    rounds = sum(sites > 0 for sites in trained)
    return Cost(rounds=rounds, reused=len(events) - rounds, steps=each * sum(trained))


def _as_stored(opened: Opened) -> bool:
    """Return whether what sites stored is what they sent, and would be again: no attack, no new noise, no masks."""
    return not (opened.experiment.attack.sites or opened.noisy or opened.experiment.masked)


def take_over(old: Run, opened: Opened, task: Prepared, new: Run) -> int:
    """Copy the sites' states and answers of all rounds that the forgotten had no part in; return how many rounds.

    A site answers a request for which it has an answer with that answer: the loop goes through these rounds without
    training, averages anew and judges anew, without those who are gone.
    """
    method = task.method
    if not _as_stored(opened):
        return 0
    own = not method.sends  # nobody learns from others: each site's states are right as long as its own data are
    if not own and digest(method.init_server(initial(task, ""))) != _start(old):
        return 0
    way, rounds = plan(task, ""), 0
    events = {event["round"]: event for event in old.events() if event["event"] == "round"}
    for round_, event in sorted(events.items()):
        asked = set(event["sites"])
        now = set(sample(task.training_sites, way.fraction, way.seed, round_, way.sampling, way.train))
        held = asked - opened.affected if own else asked
        if event["refused"] or now - opened.affected != held or (asked & opened.affected and not own):
            break
        if not all(_copied(old, new, site, round_, event["sites"][site]) for site in sorted(held)):
            break
        rounds = round_
    return rounds


def _start(old: Run) -> str:
    return digest(old.server(0)) if old.server_file(0).exists() else ""


def _copied(old: Run, new: Run, site: str, round_: int, record: Mapping[str, Any]) -> bool:
    """Copy state and answer of a round if they are there and what the journal says."""
    store = old.store(site)
    try:
        state, reply = store.read(round_)
        same = (digest(state), digest(reply.state)) == (record["kept"], record["stored"])
        if same:
            write_bytes(new.store(site).file(round_), store.file(round_).read_bytes())
    except (RunError, OSError):
        return False
    return same
