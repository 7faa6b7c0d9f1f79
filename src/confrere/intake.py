"""What others wrote, on its way in: ordinary files of bounded size, TOML, JSON and tensors that cannot do harm.

Nothing here knows what a file is for: whoever reads one turns ``OSError`` and ``ValueError`` into an error that names
it and says what to do. Their texts quote nothing of the contents.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tomllib
import unicodedata
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MOST_TENSORS, LONGEST_NAME, MOST_HEADER = 10_000, 256, 10_000_000
MOST_TOML, MOST_JSON = 500_000, 100_000_000  # bytes
NUMBERS = frozenset({"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL"})
"""Types of tensors in a state: those that NumPy has, too."""
WEIGHTS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of tensors that a model multiplies with."""
# tomllib takes time that grows with the square of the number of parts of one key.
_DOTTED = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){8}""")


def open_file(path: Path) -> BufferedReader:
    """Open an ordinary file for reading.

    Raises:
        OSError: there is none, or it is a folder, pipe, socket or device, which could hang or never end.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise OSError(errno.EINVAL, "it is not an ordinary file", str(path))


def read_bytes(path: Path, most: int) -> bytes:
    """Return all bytes of an ordinary file.

    Raises:
        OSError: as :func:`open_file`; or there are more than ``most`` bytes, of which none is read.
    """
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
        return file.read(most)


def parse_toml(content: bytes) -> dict[str, Any]:
    """Return the values of a TOML document in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: not TOML (with line and column); longer, deeper or with larger numbers than any honest one.
    """
    if len(content) > MOST_TOML:
        raise ValueError(f"it has more than {MOST_TOML:,} bytes")
    text = content.decode("utf-8-sig")
    if _DOTTED.search(text):
        raise ValueError("a key has more than 8 parts")
    try:
        values = tomllib.loads(text)
        _check(values)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:  # of int(), which names a setting of the interpreter
        raise ValueError("a whole number has more than 64 bits, or a key more than 256 characters") from None
    return values


def _check(value: Any) -> None:
    if isinstance(value, dict):
        if any(len(key) > LONGEST_NAME for key in value):
            raise ValueError
        for inner in value.values():
            _check(inner)
    elif isinstance(value, list):
        for inner in value:
            _check(inner)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError


def parse_json(content: bytes) -> Any:
    """Return the value of a JSON document in UTF-8.

    Raises:
        ValueError: not JSON, NaN or infinity, a key twice in one object, nested too deeply.
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def tensor_header(head: bytes, total: int, kinds: frozenset[str] | None = None) -> dict[str, Any]:
    """Return the header of a safetensors file, all of it checked before any tensor is made.

    Args:
        head: the file's first bytes, with at least its header.
        total: bytes of the whole file.
        kinds: types that tensors may have; None for all.

    Raises:
        ValueError: cut short, continued, another format; more than 10,000 tensors (100,000 take seconds to make), names
            that are not printable or longer than 256 characters, other types.
    """
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or 8 + length > min(total, MOST_HEADER):
        raise ValueError("it is cut short, or no safetensors file")
    if head.count(b'"data_offsets"') > MOST_TENSORS:  # so that a header of megabytes need not be parsed
        raise ValueError(f"it has more than {MOST_TENSORS:,} tensors")
    header = parse_json(head[8 : 8 + length])
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError("it is no safetensors file")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(tensors) > MOST_TENSORS:
        raise ValueError(f"it has more than {MOST_TENSORS:,} tensors")
    if not all(map(_is_name, tensors)):
        raise ValueError("the name of a tensor is not printable or longer than 256 characters")
    if 8 + length + max((_end(entry, kinds) for entry in tensors.values()), default=0) != total:
        raise ValueError("it is cut short, or something was appended")
    return header


def _is_name(name: str) -> bool:
    plain = name.isprintable() or not any(unicodedata.category(char)[0] == "C" for char in name)
    return 0 < len(name) <= LONGEST_NAME and plain


def _end(entry: Any, kinds: frozenset[str] | None) -> int:
    """Return the offset at which a tensor ends; that shapes and offsets fit together is the library's to check."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise ValueError("its header is damaged")
    if kinds is not None and entry["dtype"] not in kinds:
        raise ValueError("a tensor has a type that does not belong here")
    offsets = entry.get("data_offsets")
    if not isinstance(offsets, list) or len(offsets) != 2 or not isinstance(offsets[1], int):
        raise ValueError("its header is damaged")
    return offsets[1]


def peek(file: BufferedReader) -> tuple[bytes, int]:
    """Return the start of a safetensors file with its header, and the bytes of the whole; the file is read no further.

    Raises:
        OSError: the file cannot be read.
    """
    total, head = os.fstat(file.fileno()).st_size, file.read(8)
    return head + file.read(min(int.from_bytes(head, "little"), MOST_HEADER)), total


def load_weights(path: Path, kinds: frozenset[str] = WEIGHTS) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, of the types ``kinds`` and all finite.

    Raises:
        OSError: the file cannot be read.
        ValueError: what :func:`tensor_header` refuses, other types, NaN or infinity.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    with open_file(path) as file:
        tensor_header(*peek(file), kinds)
        file.seek(0)
        content = file.read()
    try:
        tensors = load(content)
    except (SafetensorError, RuntimeError, OverflowError, TypeError):  # the last three: shapes such as (0, 2**63)
        raise ValueError("its header is damaged") from None
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise ValueError("a tensor holds a value that is not finite")
    return tensors
