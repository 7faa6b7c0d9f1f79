"""The examination at the end of a training: results.json from every hospital's test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from confrere.config import Experiment
from confrere.errors import RunError
from confrere.federation.transport import Failure, Transport
from confrere.listing import describe_method
from confrere.method import Request
from confrere.metrics.across_sites import summary
from confrere.record.machine import machine
from confrere.record.run import Run


def examine_sites(
    experiment: Experiment,
    classes: Sequence[str],
    names: Sequence[str],
    run: Run,
    transport: Transport,
    round_: int,
) -> dict[str, Any]:
    """Return results.json: test metrics of every hospital in ``names`` for its personalised and the general model.

    Raises:
        RunError: a site could not be examined.
    """
    method, server = experiment.build_method(), run.server(round_)
    sites: dict[str, Any] = {name: {"models": {}} for name in sorted(names)}
    for model in ("personalised", "general"):
        asked = [
            s
            for s in sites
            if (model == "general" and method.has_general()) or (model == "personalised" and s != experiment.hold_out)
        ]
        requests = {
            s: Request(kind="evaluate", round=round_, state=method.broadcast(server, s), split="test", model=model)
            for s in asked
        }
        for reply in transport.exchange(requests):
            if isinstance(reply, Failure):
                raise RunError(
                    f"the examination failed: {reply.reason}", where=f"site {reply.site}", code="examination"
                )
            sites[reply.site]["models"][model] = reply.metrics["metrics"]
            if model == "personalised" or reply.site == experiment.hold_out:
                sites[reply.site] |= {k: v for k, v in reply.metrics.items() if k != "metrics"}
    task = experiment.build_task()
    events = [e for e in run.events() if e["event"] == "round"]
    for name, entry in sites.items():
        entry["held_out"] = name == experiment.hold_out
        entry["models"] = {m: entry["models"].get(m) for m in ("personalised", "general")}
        own = [e["sites"][name] for e in events if name in e["sites"]]
        entry["sent_bytes"], entry["received_bytes"] = (
            sum(x[k] for x in own) for k in ("sent_bytes", "received_bytes")
        )
    return {
        "method": method.name,
        "title": method.title,
        "seed": experiment.seed,
        "round": round_,
        "rounds": len(events),
        "held_out": experiment.hold_out,
        "task": task.describe(),
        "classes": list(classes),
        "method_info": describe_method(method),
        "sites": sites,
        "summary": {m: _summary(sites, m, task.headline) for m in ("personalised", "general")},
        "machine": machine(),
    }


def _summary(sites: Mapping[str, Any], model: str, metric: str) -> dict[str, Any] | None:
    values = {name: entry["models"][model][metric]["value"] for name, entry in sites.items() if entry["models"][model]}
    return summary(values) if values else None
