"""Frames as Flower's records: one ArrayRecord ``arrays``, one MetricRecord with ``num-examples``, one header.

These are Flower's own conventions, so that its mods and tools see what they expect. Torch is not needed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from confrere import intake
from confrere.consortium.frame import MOST, SAME, Arrays, contiguous, read_header, write_header
from confrere.errors import UpdateRefusedError


def to_content(header: Mapping[str, Any], arrays: Arrays) -> RecordDict:
    """Return the content of a message; the header travels as one JSON string."""
    metrics = header.get("metrics")
    examples = metrics.get("examples") if isinstance(metrics, dict) else None
    records: dict[str, Any] = {"header": ConfigRecord({"json": write_header(header)})}
    records["arrays"] = ArrayRecord({name: Array(value) for name, value in contiguous(arrays).items()})
    if isinstance(examples, int):
        records["metrics"] = MetricRecord({"num-examples": examples})
    return RecordDict(records)


def from_content(content: RecordDict) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return header and arrays of a message's content.

    Raises:
        UpdateRefusedError: it is none of ours, or an array cannot be read.
    """
    try:
        text, sent = content.config_records["header"]["json"], content.array_records["arrays"]
        if len(sent) > intake.MOST_TENSORS or sum(len(array.data) for array in sent.values()) > MOST:
            raise ValueError("it is too large")
        if any(array.stype != "numpy.ndarray" or len(name) > intake.LONGEST_NAME for name, array in sent.items()):
            raise ValueError("an array has a form that does not belong here")
        return read_header(str(text)), {
            name: array.numpy() for name, array in sent.items()
        }  # numpy.load without pickle
    except (KeyError, TypeError, ValueError, EOFError, SyntaxError, OverflowError, MemoryError) as error:
        raise UpdateRefusedError("a message cannot be read", fix=SAME, code="message-form") from error
