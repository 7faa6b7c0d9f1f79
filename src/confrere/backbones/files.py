"""The files of a model's folder, looked at before a library reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from confrere import intake
from confrere.backbones.registry import Triple
from confrere.errors import BackboneError

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weights(path: Path) -> list[Path]:
    """Return the safetensors files of a folder, each looked at: a renamed pickle is refused unread."""
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
    pickled = [file for file in path.iterdir() if file.suffix in _PICKLED]
    for file in files:
        try:
            with intake.open_file(file) as stream:
                head, total = intake.peek(stream)
                if len(head) > 8 and head[8:9] != b"{":
                    pickled.append(file)
                    files = []
                    break
                intake.tensor_header(head, total)
        except (OSError, ValueError) as error:
            why = f"cannot read its file {file.name}: {getattr(error, 'strerror', error)}"
            raise BackboneError(
                why, where=str(path), fix="copy the folder again as the hub has it", code="backbone-folder"
            ) from error
    if not files:
        raise BackboneError(
            "the weights are pickled and could run code" if pickled else "there are no *.safetensors",
            where=str(path),
            fix="where you trust the file, load it in PyTorch with weights_only=True and write "
            "model.safetensors with safetensors.torch.save_file",
            code="weights-pickled",
        )
    _refuse_detours(path, files)
    return files


def _refuse_detours(path: Path, files: list[Path]) -> None:
    """Refuse files through which a library would read weights that are not among ``files``, whose digest is checked."""
    fix = "give the folder as the hub has it, with all its weights"
    if (path / "adapter_config.json").exists():
        raise BackboneError(
            "this is a folder of adapters, which names its model elsewhere",
            where=str(path),
            fix=fix,
            code="backbone-folder",
        )
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return
    named = (read_object(index) or {}).get("weight_map")
    known = {file.name for file in files}
    if not isinstance(named, dict) or not all(isinstance(name, str) and name in known for name in named.values()):
        raise BackboneError(
            f"{index.name} names files that are not in the folder", where=str(path), fix=fix, code="backbone-folder"
        )


def refuse_larger(path: Path, config: dict[str, Any], files: Iterable[Path]) -> None:
    """Refuse a config.json that asks for more numbers than the weights have bytes: a library would make room first."""

    def number(key: str) -> int:
        value = config.get(key)
        return value if isinstance(value, int) else 1

    width, total = number("hidden_size"), sum(file.stat().st_size for file in files)
    patches = (number("image_size") // max(1, number("patch_size"))) ** 2
    within = number("num_hidden_layers") * max(width, number("intermediate_size"))
    if width * max(within, patches, number("vocab_size"), number("num_register_tokens")) > total:
        raise BackboneError(
            "config.json describes a larger model than the weights hold",
            where=str(path),
            fix="weights and config.json must belong together",
            code="backbone-folder",
        )


def digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 of one file, or of the list of digests when the weights are in several."""
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the object of a JSON file, None when there is none."""
    try:
        content = intake.parse_json(intake.read_bytes(path, intake.MOST_JSON))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Turn what a number of the wrong kind leads to into an error that names the folder."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, ArithmeticError) as error:
        raise BackboneError(
            "config.json or preprocessor_config.json holds numbers of the wrong kind",
            where=str(path),
            fix="copy the folder again as the hub has it",
            code="backbone-folder",
        ) from error


def triple(values: Iterable[Any], least: float = -1e6) -> Triple:
    """Return a number for each colour; ValueError or TypeError when they are not three, or out of range."""
    red, green, blue = (float(value) for value in values)
    if not all(least <= value <= 1e6 for value in (red, green, blue)):
        raise ValueError
    return red, green, blue
