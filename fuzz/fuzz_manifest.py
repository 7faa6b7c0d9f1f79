"""Any bytes as a federation's manifest, an experiment, a table or assignments: read, or refused by name."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from confrere.config import override, read, validate
from confrere.data.manifest import read_manifest
from confrere.data.numbers import holds_numbers, read_numbers
from confrere.data.options import DataOptions
from confrere.data.table import read_table
from confrere.errors import ConfrereError

_PLACE = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
atexit.register(shutil.rmtree, _PLACE, ignore_errors=True)
for _folder in ("a/x", "a/y", "b/x", "b/y"):
    (_PLACE / _folder).mkdir(parents=True)
    (_PLACE / _folder / "1.png").touch()

SEEDS = (
    b'm[federation]\nname = "f"\n[[site]]\nname = "a"\npath = "a"\n[[site]]\nname = "b"\npath = "b"\n',
    b'm[federation]\nname = "f"\nclasses = ["x", "y"]\n[pool]\npath = "a"\n[partition]\nby = "dirichlet"\n',
    b'erounds = 3\nmethod = {name = "fedprox", mu = 0.1}\n[train]\nlr = 1e-3\n[data]\nval = 0.2\n',
    b"tpath,label,site,patient,split\na/x/1.png,x,a,p1,train\nb/y/1.png,y,b,p2,test\n",
    b"nsite,label,age\na,x,1\nb,y,2\n",
    b"otrain.lr=1e-3",
)


def target(data: bytes) -> None:
    """Read ``data[1:]`` as what its first byte says."""
    kind, content = data[:1], data[1:]
    try:
        if kind == b"o":
            validate(override({"path": "p"}, [content.decode("utf-8", "surrogateescape")]))
        elif kind == b"e":
            path = _PLACE / "e.toml"
            path.write_bytes(content)
            validate({"path": "p", **read(path)}).toml()
        elif kind in (b"t", b"n"):
            path = _PLACE / "t.csv"
            path.write_bytes(content)
            read_table(path) if kind == b"t" else read_numbers(path, DataOptions())
            holds_numbers(path, DataOptions())
        else:
            path = _PLACE / "f.toml"
            path.write_bytes(content)
            read_manifest(path)
    except ConfrereError as error:
        str(error)
