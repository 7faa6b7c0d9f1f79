"""TOML files that people write: read, checked, and every mistake named by its file, key and mending."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from confrere.config import read as read_toml
from confrere.errors import ConfigError, ConfrereError, nearest

Form = TypeVar("Form", bound=BaseModel)


def read(path: Path, model: type[Form]) -> Form:
    """Return the TOML file at ``path`` as a ``model``.

    Raises:
        ConfigError: it cannot be read or is no TOML; or its first wrong key, with the nearest valid one or the range.
        ConfrereError: what a check within the model raises.
    """
    values = read_toml(path, fix="give the path of the file")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _mistake(error.errors()[0], str(path), model) from None
    except ConfrereError as error:  # of a check within the model, which does not know the file
        raise type(error)(error.what, where=f"{path}, {error.where}", fix=error.fix, code=error.code) from None


def _mistake(first: Any, file: str, model: type[BaseModel]) -> ConfigError:
    keys = [str(part) for part in first["loc"]]
    where = f"{file}, {'.'.join(keys)}" if keys else file
    if first["type"] == "extra_forbidden":
        return ConfigError("unknown key", where=where, fix=nearest(keys[-1], _keys(model)), code="unknown-key")
    if first["type"] == "missing":
        return ConfigError("a required key is missing", where=where, fix=f"set {keys[-1]}", code="missing-key")
    return ConfigError(f"{first['msg']}; got {first['input']!r:.100}", where=where, fix="correct this value")


def _keys(model: type[BaseModel]) -> list[str]:
    """Return the keys of ``model`` and of the tables in it."""
    found = list(model.model_fields)
    for field in model.model_fields.values():
        for inner in get_args(field.annotation):
            found += list(getattr(inner, "model_fields", ()))
    return found
