"""Atomic, durable writes and checked reads of the three file kinds a run uses."""

from __future__ import annotations

import contextlib
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

from confrere import intake
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
        _sync_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, content, error) from error


def append_bytes(path: Path, at: int, content: bytes) -> None:
    """Write ``content`` durably behind the first ``at`` bytes of ``path``, in place of what stood there.

    A process that is killed leaves some part of it; whoever reads the file tells a torn line by its missing end.

    Raises:
        RunError: as :func:`write_bytes`; then the file ends at ``at`` if the file system allows that.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = not path.exists()
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0) as file:
            try:
                file.truncate(at)
                left = content
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    file.truncate(at)
                raise
        if new:
            _sync_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, content, error) from error


def _unwritable(path: Path, content: bytes, error: OSError) -> RunError:
    return RunError(
        f"cannot write {len(content):,} bytes: {error.strerror}",
        where=str(path),
        fix="free space, mend the permissions or choose another place; a run continues with `confrere resume`",
        code="cannot-write",
    )


def _sync_folder(folder: Path) -> None:
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write each of ``files`` into ``folder`` as :func:`write_bytes` does."""
    for name, content in files.items():
        write_bytes(folder / name, content)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN is refused."""
    write_bytes(path, as_json(value))


def as_json(value: Any) -> bytes:
    """Return ``value`` as indented JSON; NaN is refused."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of an ordinary file's bytes, as the journal holds it; OSError when it cannot be read."""
    with intake.open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Fields(dict[str, Any]):
    """A JSON object of a file: a key that is asked for and not there is a RunError that names the file.

    Attributes:
        where: the file, and the line where it is one of many.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise RunError(
            f"a file of the run lacks {key!r}", where=self.where, fix="restore it, or start a new run", code="run-file"
        )


def fields(value: Any, where: str) -> Any:
    """Return a JSON value in which every object is :class:`Fields`; RunError when it is nested too deeply."""
    try:
        return _fields(value, where)
    except RecursionError:
        what, fix = "a file of the run is damaged: it is nested too deeply", "restore it, or start a new run"
        raise RunError(what, where=where, fix=fix, code="run-file") from None


def _fields(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return Fields({key: _fields(inner, where) for key, inner in value.items()}, where)
    return [_fields(inner, where) for inner in value] if isinstance(value, list) else value


def read_json(path: Path) -> Any:
    """Read a JSON file that holds an object; RunError names the file when it is missing, damaged or lacks a key."""
    try:
        value = intake.parse_json(intake.read_bytes(path, intake.MOST_JSON))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    except FileNotFoundError:
        raise RunError(
            "a file of the run is missing", where=str(path), fix="is this a run directory?", code="run-file"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise RunError(
            "a file of the run is damaged", where=str(path), fix="restore it, or start a new run", code="run-file"
        ) from error
    return fields(value, str(path))


def _unreadable(path: Path, error: OSError) -> RunError:
    fix = "mend it, or restore it from a copy"
    return RunError(f"a file of the run cannot be read: {error.strerror}", where=str(path), fix=fix, code="run-file")


def write_state(path: Path, state: State, meta: Mapping[str, Any]) -> None:
    """Write ``state`` as safetensors with ``group/name`` keys, JSON ``meta`` and a digest over both."""
    # Copies, because a method may keep the very tensor it sends and safetensors refuses shared memory.
    flat = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in flatten(state).items()}
    header = {"confrere": json.dumps({"meta": meta, "digest": _digest(state, meta)}, sort_keys=True, allow_nan=False)}
    write_bytes(path, save(flat, header))


def read_state(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Read what :func:`write_state` wrote; a file that cannot be a state is refused by its header, unread.

    Raises:
        RunError: missing, truncated or changed since it was written.
    """
    try:
        with intake.open_file(path) as file:
            header = intake.tensor_header(*intake.peek(file), intake.NUMBERS)
            file.seek(0)
            content = file.read()
    except FileNotFoundError:
        raise RunError(
            "a state file is missing", where=str(path), fix="resume from an earlier round", code="state-missing"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise _damaged(str(path), error) from error
    return _unsealed(content, header, str(path))


def parse_state(
    content: bytes, *, where: str, limit: int | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return state and meta data of the bytes that :func:`write_state` writes, from a file or from another machine.

    The header is checked before any tensor is made: see :func:`confrere.intake.tensor_header`.

    Args:
        content: safetensors whose keys are ``group/name``, with a seal.
        where: what the error names: a file, or site and round.
        limit: most bytes; None for any number.

    Raises:
        RunError: too large, damaged, or changed since it was written.
    """
    try:
        if limit is not None and len(content) > limit:
            raise ValueError(f"it has {len(content):,} bytes, at most {limit:,} are expected")
        header = intake.tensor_header(content, len(content), intake.NUMBERS)
    except ValueError as error:
        raise _damaged(where, error) from error
    return _unsealed(content, header, where)


def _unsealed(
    content: bytes, header: Mapping[str, Any], where: str
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return state and meta data of ``content``, whose header was checked, if its seal holds."""
    try:
        if not all("/" in key for key in header if key != "__metadata__"):
            raise ValueError("a tensor belongs to no group")
        sealed = intake.parse_json(header["__metadata__"]["confrere"].encode())
        state = unflatten(load(content))
        meta, found = fields(sealed["meta"], where), sealed["digest"]
        if not isinstance(meta, dict):
            raise ValueError("its meta data are no table")
        expected = _digest(state, meta)
    # The last two: shapes such as (0, 2**63), which the library lets pass and torch or NumPy cannot make.
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
        raise _damaged(where, error) from error
    if found != expected:
        raise RunError(
            "a state file was changed since it was written",
            where=where,
            fix="delete it and resume",
            code="state-damaged",
        )
    return state, meta


def _damaged(where: str, error: Exception) -> RunError:
    why = f": {error}" if type(error) is ValueError else ""
    return RunError(
        f"a state file is damaged{why}", where=where, fix="delete it and resume the run", code="state-damaged"
    )


def _digest(state: State, meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([digest(state), meta], sort_keys=True).encode()).hexdigest()
