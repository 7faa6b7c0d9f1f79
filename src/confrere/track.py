"""Send a run's numbers to TensorBoard or MLflow as they come: metrics and settings, never images or predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from confrere.errors import MissingExtraError

Notify = Callable[[dict[str, Any]], None]


def scalars(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (tag, value) of a round or evaluation event."""
    if event["event"] == "round":
        yield "seconds", event["seconds"]
        for site, record in event["sites"].items():
            yield from (
                (f"{key}/{site}", float(record[key]))
                for key in ("loss", "sent_bytes", "received_bytes")
                if record[key] is not None
            )
        if event["diagnostics"]["aggregation_error"] is not None:
            yield "aggregation_error", event["diagnostics"]["aggregation_error"]
        for moment in ("overlap_before", "overlap_after"):
            for site, measures in (event["diagnostics"][moment] or {}).items():
                yield from ((f"{moment}_{k}/{site}", v) for k, v in measures.items() if v is not None)
    elif event["event"] == "evaluation":
        yield from ((f"validation/{site}", v) for site, v in event["sites"].items() if v is not None)
        if event["mean"] is not None:
            yield "validation/mean", event["mean"]


@contextmanager
def trackers(names: Sequence[str], out: Path) -> Iterator[Notify]:
    """Open the named trackers for a run directory; yields a function that takes each event.

    TensorBoard writes to ``out/tensorboard``, MLflow to ``out/mlflow.db`` unless MLFLOW_TRACKING_URI is set.

    Raises:
        MissingExtraError: a tracker is not installed.
    """
    with ExitStack() as stack:
        writers = [stack.enter_context(_OPEN[name](out)) for name in names]
        method = [""]

        def notify(event: dict[str, Any]) -> None:
            if event["event"] == "method":
                method[0] = event["name"]
            for tag, value in scalars(event) if event["event"] in ("round", "evaluation") else ():
                for write in writers:
                    write(f"{method[0]}/{tag}", value, event["round"])

        yield notify


@contextmanager
def _tensorboard(out: Path) -> Iterator[Callable[[str, float, int], None]]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "track", needed_for="track = ['tensorboard']") from error
    with SummaryWriter(str(out / "tensorboard")) as writer:
        yield writer.add_scalar


@contextmanager
def _mlflow(out: Path) -> Iterator[Callable[[str, float, int], None]]:
    import os

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
    try:
        import mlflow
    except ImportError as error:
        raise MissingExtraError("mlflow", "track", needed_for="track = ['mlflow']") from error
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{(out / 'mlflow.db').resolve()}")
    mlflow.set_experiment("confrere")
    nobody = {"mlflow.user": "confrere", "mlflow.source.name": "confrere"}  # else who is logged in, and where
    with mlflow.start_run(run_name=out.name, tags=nobody):
        yield lambda tag, value, step: mlflow.log_metric(tag, value, step=step)


_OPEN = {"tensorboard": _tensorboard, "mlflow": _mlflow}
