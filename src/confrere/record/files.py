"""Atomic, durable writes and checked reads of the three file kinds a run uses."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from confrere.errors import RunError
from confrere.tensors import State, digest, flatten, unflatten


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` holds either all of it or what it held before.

    Raises:
        RunError: the file system refused (full disk, permissions), naming the path and the bytes needed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")  # mode 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise RunError(
            f"cannot write {len(content):,} bytes: {error.strerror}",
            where=str(path),
            fix="free space, mend the permissions or choose another place; a run continues with `confrere resume`",
        ) from error


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write each of ``files`` into ``folder`` as :func:`write_bytes` does."""
    for name, content in files.items():
        write_bytes(folder / name, content)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN is refused."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; RunError names the file when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError("a file of the run is missing", where=str(path), fix="is this a run directory?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError("a file of the run is damaged", where=str(path), fix="delete it and resume the run") from error


def write_state(path: Path, state: State, meta: Mapping[str, Any]) -> None:
    """Write ``state`` as safetensors with ``group/name`` keys, JSON ``meta`` and a digest over both."""
    # Copies, because a method may keep the very tensor it sends and safetensors refuses shared memory.
    flat = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in flatten(state).items()}
    header = {"confrere": json.dumps({"meta": meta, "digest": _digest(state, meta)}, sort_keys=True)}
    write_bytes(path, save(flat, header))


def read_state(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Read what :func:`write_state` wrote.

    Raises:
        RunError: missing, truncated or changed since it was written.
    """
    try:
        content = path.read_bytes()
        state = unflatten(load(content))
        length = int.from_bytes(content[:8], "little")
        sealed = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["confrere"])
        meta, found = sealed["meta"], sealed["digest"]
    except FileNotFoundError:
        raise RunError("a state file is missing", where=str(path), fix="resume from an earlier round") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError("a state file is damaged", where=str(path), fix="delete it and resume the run") from error
    if found != _digest(state, meta):
        raise RunError("a state file was changed since it was written", where=str(path), fix="delete it and resume")
    return state, meta


def _digest(state: State, meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([digest(state), meta], sort_keys=True).encode()).hexdigest()
