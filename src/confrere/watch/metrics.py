"""What Prometheus scrapes: numbers of a run, by site; no data, no names but those of sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from confrere.watch.state import PHASES, State

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(state: State) -> bytes:
    """Return a state in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_OfRun(state))
    return generate_latest(registry)


class _OfRun(Collector):
    def __init__(self, state: State) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the state."""
        state = self._state
        yield GaugeMetricFamily("confrere_round", "Last committed round", value=state.round)
        yield GaugeMetricFamily("confrere_rounds", "Rounds planned", value=state.rounds)
        yield SummaryMetricFamily(
            "confrere_round_seconds", "Seconds of committed rounds", len(state.seconds), sum(state.seconds)
        )
        at = GaugeMetricFamily("confrere_updated_timestamp_seconds", "Unix time of the last sign of life")
        at.add_metric([], state.updated)
        yield at
        yield _gauge("confrere_phase", "1 for the phase of the run", "phase", {p: p == state.phase for p in PHASES})
        sites = state.sites
        up = {site.name: site.online for site in sites}
        yield _gauge("confrere_site_up", "1 for a site that is online", "site", up)
        yield _gauge("confrere_site_waiting", "1 for a site that owes an answer", "site",
                     {site.name: site.waiting for site in sites})  # fmt: skip
        yield _gauge("confrere_site_loss", "Last training loss", "site", {site.name: site.loss for site in sites})
        yield _gauge("confrere_site_score", "Last validation score in [0, 1], of the run's task", "site",
                     {site.name: site.score for site in sites})  # fmt: skip
        moved = CounterMetricFamily(
            "confrere_site_bytes", "Bytes of tensors that a site sent or received", labels=["site", "direction"]
        )
        for site in sites:
            moved.add_metric([site.name, "sent"], site.sent_bytes)
            moved.add_metric([site.name, "received"], site.received_bytes)
        yield moved
        failed = CounterMetricFamily(
            "confrere_failures", "Answers that failed or were refused; no site: the server", labels=["site", "code"]
        )
        for (name, code), count in sorted(Counter((f.site, f.code) for f in state.failures).items()):
            failed.add_metric([name, code or "unknown"], count)
        yield failed
        seen = state.participation
        if seen is not None:
            yield GaugeMetricFamily("confrere_participation_rank", "Rank of who took part when", value=seen.rank)
            singles = "Sites whose own part follows from the sums of the rounds so far"
            yield GaugeMetricFamily("confrere_identifiable_sites", singles, value=len(seen.single))
        if seen is not None and seen.condition is not None:
            condition = "Condition number of who took part when: the larger, the more noise hides single sites"
            yield GaugeMetricFamily("confrere_participation_condition", condition, value=seen.condition)


def _gauge(name: str, text: str, label: str, values: Mapping[str, float | bool | None]) -> GaugeMetricFamily:
    """Return a metric with a value for each label whose value is known."""
    made = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        if value is not None:
            made.add_metric([key], float(value))
    return made
