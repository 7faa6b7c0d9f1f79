"""Any bytes as what a site sent: parsed, or refused."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save

from confrere.errors import ConfrereError
from confrere.record.files import parse_state
from confrere.tensors import digest, unflatten

LIMIT = 1_000_000
_FLAT = {"shared/head.weight": torch.arange(6.0).reshape(2, 3), "shared/l.lora_A.general.weight": torch.ones(2, 2)}
_META = {"site": "a", "round": 1, "weight": 3.0, "metrics": {"loss": 0.5}}


def whole() -> bytes:
    """Return an update that is accepted."""
    import hashlib

    sealed = hashlib.sha256(json.dumps([digest(unflatten(_FLAT)), _META], sort_keys=True).encode()).hexdigest()
    return save(_FLAT, {"confrere": json.dumps({"meta": _META, "digest": sealed}, sort_keys=True)})


_WHOLE = whole()
_HEADER = _WHOLE[8 : 8 + int.from_bytes(_WHOLE[:8], "little")]
SEEDS = (
    b"r" + _WHOLE,
    b"h" + _HEADER,
    b"s" + json.dumps({"meta": _META, "digest": "0"}).encode(),
    b"c" + bytes([3, 0, 0, 7]),
)


def target(data: bytes) -> None:
    """Parse ``data[1:]`` as it is, as the header or the seal of an update, or as changes to one."""
    kind, rest = data[:1], data[1:]
    if kind == b"h":  # past the length field, which a fuzzer seldom gets right
        content = len(rest).to_bytes(8, "little") + rest + bytes(40)
    elif kind == b"s":
        content = save(_FLAT, {"confrere": rest.decode("utf-8", "replace")})
    elif kind == b"c":
        changed = bytearray(_WHOLE)
        for at in range(0, len(rest) - 3, 4):
            changed[int.from_bytes(rest[at : at + 3], "little") % len(changed)] = rest[at + 3]
        content = bytes(changed)
    else:
        content = rest
    try:
        state, meta = parse_state(content, where="site a, round 1", limit=LIMIT)
    except ConfrereError as error:
        str(error)
        return
    if kind == b"c" and (digest(state) != digest(unflatten(_FLAT)) or meta != _META):
        raise RuntimeError("a changed update passed for the one that was sent")
