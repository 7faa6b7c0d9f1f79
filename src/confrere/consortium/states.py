"""States and requests as frames, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import numpy as np
import torch

from confrere.consortium.frame import Arrays
from confrere.errors import UpdateRefusedError
from confrere.federation.transport import Failure
from confrere.method import Reply, Request
from confrere.tensors import State, digest, flatten, unflatten

KINDS = get_args(get_type_hints(Request)["kind"])


def to_arrays(state: State) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return a state's tensors under ``group/name`` with what the header must say of it: its groups and digest."""
    arrays = {key: value.detach().cpu().contiguous().numpy() for key, value in flatten(state).items()}
    return arrays, {"groups": list(state), "digest": digest(state)}


def to_state(header: Mapping[str, Any], arrays: Arrays) -> dict[str, dict[str, torch.Tensor]]:
    """Return the state of a frame.

    Raises:
        UpdateRefusedError: a name has no group, a group is not announced, or the digest is another one.
    """
    groups = header.get("groups", [])
    announced = isinstance(groups, list) and all(isinstance(group, str) for group in groups)
    if not announced or not all(name.partition("/")[0] in groups and "/" in name for name in arrays):
        raise UpdateRefusedError(
            "a message holds tensors of a group it does not announce", fix="use the same version", code="message-form"
        )
    found = unflatten({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})
    state = {group: dict(found.get(group, {})) for group in groups}
    if header.get("digest") != digest(state):
        fix = "nothing to do: it is sent again; if it happens again, look at the network"
        raise UpdateRefusedError("a message was changed on its way", fix=fix, code="message-digest")
    return state


def ask(request: Request) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return header and arrays of a request."""
    arrays, said = to_arrays(request.state)
    header = {"kind": request.kind, "round": request.round, "run": request.run, "split": request.split}
    return {**header, "model": request.model, **said}, arrays


def asked(header: Mapping[str, Any], arrays: Arrays) -> Request:
    """Return the request of a frame; UpdateRefusedError when it is none."""
    round_, kind, split, model = (header.get(key) for key in ("round", "kind", "split", "model"))
    listed = kind in KINDS and split in ("val", "test") and model in ("personalised", "general")
    if type(round_) is not int or round_ < 0 or not listed:
        raise UpdateRefusedError("a request is not understood", fix="use the same version", code="message-form")
    run, state = str(header.get("run", "")), to_state(header, arrays)
    return Request(kind=kind, round=round_, run=run, state=state, split=split, model=model)  # type: ignore[arg-type]


def answer(reply: Reply) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return header and arrays of a reply."""
    arrays, said = to_arrays(reply.state)
    header = {"site": reply.site, "round": reply.round, "run": reply.run, "weight": reply.weight}
    return {**header, "metrics": dict(reply.metrics), **said}, arrays


def failed(site: str, header: Mapping[str, Any]) -> Failure | None:
    """Return the failure that ``site`` answered with, None for any other answer."""
    told = header.get("failure")
    if not isinstance(told, dict):
        return None
    return Failure(site, *(str(told.get(key, "")) for key in ("reason", "fix", "code")))


def answered(site: str, header: Mapping[str, Any], arrays: Arrays) -> Reply | Failure:
    """Return what ``site`` answered; what is no reply is a failure, and its stamps are the gate's to check."""
    try:
        state = to_state(header, arrays)
    except UpdateRefusedError as error:
        return Failure(site, error.reason, error.fix, error.code)
    if header.get("site") != site:
        return Failure(site, "an answer came under another site's name", "find out who sent it", code="update-stamp")
    given = {key: header.get(key) for key in ("round", "run", "weight", "metrics")}
    return Reply(site=site, state=state, **given)  # type: ignore[arg-type]  # the gate refuses what is of another type
