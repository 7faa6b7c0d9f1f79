"""What a request or an answer is on the wire: a header of plain JSON, and named arrays.

The frame is a safetensors file, so that a site's long-lived process reads what it is sent by the same bounded reader as
every other foreign file. Nothing here needs torch: the short-lived process that carries a frame
starts in half the time.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from confrere import intake
from confrere.errors import UpdateRefusedError

PROTOCOL = 1
"""Number of this format. Sites and coordinator must have the same."""
MOST = 2**31
"""Bytes of the largest frame."""
SOCKET = "CONFRERE_SITE_SOCKET"
"""Environment variable with the path of the socket at which a site's process answers."""
Arrays = Mapping[str, np.ndarray]
SAME = "use the same version of confrere on both sides"


def failure(reason: str, fix: str, code: str) -> dict[str, Any]:
    """Return the header of an answer that says why there is none."""
    return {"failure": {"reason": reason, "fix": fix, "code": code}}


def write_header(header: Mapping[str, Any]) -> str:
    """Return a header as JSON; ValueError where it holds NaN."""
    return json.dumps(header, sort_keys=True, allow_nan=False)


def read_header(text: str) -> dict[str, Any]:
    """Return the header of its JSON; ValueError where it is none."""
    header = intake.parse_json(text.encode())
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    return header


def contiguous(arrays: Arrays) -> dict[str, np.ndarray]:
    """Return arrays whose bytes are in order; those without dimensions keep having none."""
    return {name: np.asarray(value, order="C") for name, value in arrays.items()}


def pack(header: Mapping[str, Any], arrays: Arrays) -> bytes:
    """Return one frame; ``header`` must be JSON without NaN."""
    return save(contiguous(arrays), {"confrere": write_header(header)})


def unpack(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return header and arrays of a frame.

    Raises:
        UpdateRefusedError: it is damaged, of another format, or larger than any honest one.
    """
    try:
        if len(content) > MOST:
            raise ValueError("it is too large")
        metadata = intake.tensor_header(content, len(content), intake.NUMBERS)["__metadata__"]
        return read_header(metadata["confrere"]), load(content)
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        why = f": {error}" if type(error) is ValueError else ""
        raise UpdateRefusedError(f"a message cannot be read{why}", fix=SAME, code="message-form") from error


def send(line: socket.socket, content: bytes) -> None:
    """Write one frame, its length in front of it."""
    line.sendall(len(content).to_bytes(8, "little"))
    line.sendall(content)


def receive(line: socket.socket) -> bytes | None:
    """Read one frame; None when the other side closed the connection before it was whole."""
    length = int.from_bytes(_read(line, 8), "little")
    if not 0 < length <= MOST:
        return None
    content = _read(line, length)
    return content if len(content) == length else None


def _read(line: socket.socket, n: int) -> bytes:
    parts: list[bytes] = []
    left = n
    while left:
        part = line.recv(min(left, 1 << 20))
        if not part:
            return b"".join(parts)
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
