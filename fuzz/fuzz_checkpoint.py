"""Any bytes as a file that a run wrote: a site's or the server's state, JSON, an exported adapter."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

import torch

from confrere.adapters.folder import CONFIG, WEIGHTS, export, import_
from confrere.adapters.names import tensor_name
from confrere.errors import ConfrereError
from confrere.method import Reply
from confrere.record.files import read_json
from confrere.record.run import Run
from confrere.record.store import DirectoryStore

_PLACE = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
atexit.register(shutil.rmtree, _PLACE, ignore_errors=True)
_RUN, _STORE = Run(_PLACE / "run"), DirectoryStore(_PLACE / "a", "a")
_STATE = {"shared": {"w": torch.ones(2)}}
_STORE.write(1, {"private": {"w": torch.ones(2)}}, Reply(site="a", round=1, state=_STATE, weight=2.0))
_RUN.commit(1, _STATE)
_SITE, _SERVER = _PLACE / "a" / "00001.safetensors", _RUN.server_file(1)
_PAIR = {tensor_name("l.q", side, "general"): torch.ones(2, 2) for side in ("A", "B")}
_FILES = export(_PAIR, scale=2.0, base_name="m")
(_PLACE / "adapter").mkdir()

SEEDS = (
    b"s" + _SITE.read_bytes(),
    b"g" + _SERVER.read_bytes(),
    b'j{"classes": ["x", "y"], "temperature": 1.0, "nested": {"a": [1, null, true]}}',
    b"a" + _FILES[CONFIG],
    b"w" + _FILES[WEIGHTS],
)


def target(data: bytes) -> None:
    """Read ``data[1:]`` as the file that its first byte names."""
    kind, content = data[:1], data[1:]
    try:
        if kind == b"s":
            _SITE.write_bytes(content)
            _STORE.before(2)
            _STORE.reply(1)
        elif kind == b"g":
            _SERVER.write_bytes(content)
            _RUN.server(1)
        elif kind in (b"a", b"w"):
            for name, whole in _FILES.items():
                (_PLACE / "adapter" / name).write_bytes(content if (kind == b"a") == (name == CONFIG) else whole)
            import_(_PLACE / "adapter", slot="general", scale=1.0)
        else:
            (_PLACE / "x.json").write_bytes(content)
            read_json(_PLACE / "x.json").get("classes")
    except ConfrereError as error:
        str(error)
