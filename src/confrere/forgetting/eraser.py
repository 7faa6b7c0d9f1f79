"""FedEraser: the recorded updates of those who stay, turned into the direction they would take today."""

from __future__ import annotations

from confrere.errors import ConfigError, RunError
from confrere.forgetting.frame import Frame
from confrere.forgetting.way import share, way
from confrere.tensors import Tensors, dot, sub


@way(
    "federaser",
    title="FedEraser",
    paper="Liu et al., FedEraser: Enabling Efficient Client-Level Data Removal from Federated Learning Models, "
    "IWQoS 2021",
)
def erased(frame: Frame, *, every: int = 2, ratio: float = 0.5) -> Tensors:
    """Replay every ``every``-th round with recorded updates turned into today's direction, ``||U|| V / ||V||``.

    V is what a site that stays changes in ``ratio`` of a round's steps from where the replay is, U its recorded update.
    The replay begins with the adapters before round 1. The first recorded update of a site is taken over as it was,
    unless it has patients to forget.

    Differences from the paper: lengths are of all shared tensors together; AdamW. Lengths, and for patients the
    site's own ones, still come from a training with the forgotten: this is no exact way.
    """
    share("ratio", ratio)
    shared: Tensors = _server(frame, 0)
    events = {event["round"]: event for event in frame.old.events() if event["event"] == "round"}
    for number in range(1, frame.round + 1, every):
        before = _server(frame, number - 1)
        made = {}
        for site in [name for name in frame.sites if name in events[number]["sites"]]:
            update: Tensors = sub(_answer(frame, site, number), before)
            if number > 1 or site in frame.gone:
                learner = frame.learner(site, number)
                steps = max(1, round(ratio * learner.settings.steps))
                turned = sub(frame.fit(learner, shared, "calibrate", steps=steps), shared)
                update = _as_long(turned, update)
            made[site] = {name: shared[name] + value for name, value in update.items()}
        shared = {**shared, **frame.mean(made)} if made else shared
        frame.cost.rounds += 1
    return shared


def _as_long(turned: Tensors, update: Tensors) -> Tensors:
    """Return ``turned`` with the length of ``update``."""
    length, wanted = (float(dot(value, value)) ** 0.5 for value in (turned, update))
    return {name: value * (wanted / length if length else 0.0) for name, value in turned.items()}


def _server(frame: Frame, round_: int) -> Tensors:
    try:
        return frame.old.server(round_)["shared"]
    except RunError as error:
        raise _missing(error) from error


def _answer(frame: Frame, site: str, round_: int) -> Tensors:
    try:
        return frame.old.store(site).read(round_)[1].state["shared"]
    except RunError as error:
        raise _missing(error) from error


def _missing(error: RunError) -> ConfigError:
    what, fix = "the sites' answers of old rounds are not kept", "use --by rebuild; keep them with record.keep=0"
    return ConfigError(what, where=error.where, fix=fix, code="forgetting")
