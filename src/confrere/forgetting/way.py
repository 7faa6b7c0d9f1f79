"""The ways to forget, by name, and what each costs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from confrere.errors import ConfigError, nearest
from confrere.tensors import Tensors

if TYPE_CHECKING:
    from confrere.forgetting.frame import Frame


@dataclass(kw_only=True)
class Cost:
    """What was done: ``rounds`` of exchange, those ``reused``, optimiser ``steps`` of all sites, wall ``seconds``.

    ``passes``: images that went through the model besides, e.g. for a Fisher information or a sum of features.
    """

    rounds: int = 0
    reused: int = 0
    steps: int = 0
    passes: int = 0
    seconds: float = 0.0

    def told(self) -> dict[str, Any]:
        """Return it for a file."""
        return {**asdict(self), "seconds": round(self.seconds, 1)}


@dataclass(frozen=True, kw_only=True)
class Way:
    """One approximate way: ``make`` returns the shared tensors after forgetting.

    Attributes:
        title: for reports. paper: citation. options: its defaults.
    """

    name: str
    title: str
    paper: str
    make: Callable[..., Tensors] = field(repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """Return the options with their defaults."""
        found = inspect.signature(self.make).parameters.values()
        return {p.name: p.default for p in found if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def __call__(self, frame: Frame, options: Mapping[str, Any]) -> Tensors:
        """Forget."""
        return self.make(frame, **options)


WAYS: dict[str, Way] = {}
EXACT = {
    "rebuild": "Rebuild from the journal (exact)",
    "downdate": "Downdate of the closed-form head (exact to rounding)",
}


def way(name: str, *, title: str, paper: str) -> Callable[[Callable[..., Tensors]], Callable[..., Tensors]]:
    """Register an approximate way under ``name``."""

    def add(make: Callable[..., Tensors]) -> Callable[..., Tensors]:
        WAYS[name] = Way(name=name, title=title, paper=paper, make=make)
        return make

    return add


def parse(label: str) -> tuple[str, dict[str, Any]]:
    """Return name and options of ``name:key=value:key=value``, with all defaults.

    Raises:
        ConfigError: an unknown name or option, or no number in range (rounds and steps from 1, others not negative).
    """
    name, *given = label.split(":")
    known = [*EXACT, *WAYS]
    if name not in known:
        what, fix = f"there is no way {name!r:.40} to forget", nearest(name, known)
        raise ConfigError(what, where="--by", fix=fix, code="unknown-name")
    options = WAYS[name].options if name in WAYS else {}
    for one in given:
        key, _, text = (part.strip() for part in one.partition("="))
        if key not in options:
            fix = nearest(key, options)
            raise ConfigError(f"{name} has no option {key!r:.40}", where="--by", fix=fix, code="unknown-key")
        kind, least = type(options[key]), 1 if isinstance(options[key], int) else 0
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            what, fix = f"{key} is no {kind.__name__} of at least {least}", f"the default is {options[key]}"
            raise ConfigError(what, where="--by", fix=fix, code="value")
        options[key] = value
    return name, options


def share(name: str, value: float) -> float:
    """Return a share in [0, 1]; ConfigError otherwise."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is no share", where="--by", fix="use a number from 0 to 1", code="value")
    return value
