"""The experiment: every choice of a run, checked, printable, and written beside its results.

One meaning, three forms: this object, a TOML file, and ``key.path=value`` overrides on the command line.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from confrere import methods as _methods  # noqa: F401  fills the registry of methods
from confrere.data.options import DataOptions
from confrere.errors import ConfigError, nearest
from confrere.method import METHODS, Method, defaults, make


class Part(BaseModel):
    """A table of the experiment: frozen, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class BackboneChoice(Part):
    """Which frozen model. ``depth`` keeps the first blocks (default: the registry's); ``sha256`` pins the weights."""

    name: str = "dinov2-small-imgfocus"
    depth: int | None = Field(default=None, ge=1)
    image_size: int | None = Field(default=None, ge=8, le=2048)
    sha256: str | None = None


class AdapterChoice(Part):
    """LoRA. ``rank`` is a site's total, divided among the adapters its method trains; ``ranks``: sites with another."""

    rank: int = Field(default=16, ge=1, le=1024)
    ranks: dict[str, Annotated[int, Field(ge=1, le=1024)]] = {}
    blocks: int = Field(default=4, ge=1)
    targets: str = "qv"
    scale: float = Field(default=2.0, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)

    def rank_of(self, site: str) -> int:
        """Return the rank of a site; the server's (site "") is the largest."""
        return self.ranks.get(site, self.rank) if site else max(self.rank, *self.ranks.values(), 1)

    @field_validator("targets")
    @classmethod
    def _regular_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value


class TrainChoice(Part):
    """Local training in one round; see :class:`confrere.learner.TrainSettings`."""

    lr: float = Field(default=1e-3, gt=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    batch_size: int = Field(default=16, ge=1, le=4096)
    steps: int = Field(default=10, ge=1)
    balance: Literal["sampling", "weights", "none"] = "sampling"
    loss: Literal["cross-entropy", "focal"] = "cross-entropy"
    clip: float = Field(default=1.0, gt=0)
    views: Literal[1, 2, 4, 8] = 1


class FederationChoice(Part):
    """Who takes part. ``weights``: a site counts by its training ``images`` or every site ``equal``."""

    fraction: float = Field(default=1.0, gt=0, le=1)
    min_replies: int = Field(default=1, ge=1)
    weights: Literal["images", "equal"] = "images"


class SelectionChoice(Part):
    """Which round is kept: the best on validation images, judged ``every`` so many rounds.

    The criterion is the mean probability of the true class, averaged over classes and then over sites: with few
    images of a class it is steadier than the balanced accuracy, which is shown beside it.

    ``patience`` judgements without a better one end the run (0: never); ``images`` bounds the validation
    images of a site that judge a round (0: all).
    """

    every: int = Field(default=1, ge=1)
    patience: int = Field(default=0, ge=0)
    images: int = Field(default=0, ge=0)


class EngineChoice(Part):
    """How the arithmetic is done.

    ``precision``: ``bf16`` keeps the frozen model and its activations in bfloat16; adapters, head, loss and optimiser
    stay float32. ``device``: ``cpu`` or ``cuda``.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:[0-9]+)?)$")


class Experiment(Part):
    """All choices of one run."""

    path: str = Field(min_length=1)
    method: dict[str, Any] = Field(default={"name": "fedopal"})
    seed: int = Field(default=0, ge=0, lt=2**31)
    split_seed: int = Field(default=0, ge=0, lt=2**31)
    rounds: int = Field(default=10, ge=1, le=10_000)
    controls: tuple[str, ...] = ("local", "pooled")
    hold_out: str | None = None
    threads: int = Field(default=0, ge=0, le=256)
    workers: int = Field(default=0, ge=0, le=256)
    track: tuple[Literal["tensorboard", "mlflow"], ...] = ()
    backbone: BackboneChoice = BackboneChoice()
    adapter: AdapterChoice = AdapterChoice()
    train: TrainChoice = TrainChoice()
    federation: FederationChoice = FederationChoice()
    selection: SelectionChoice = SelectionChoice()
    engine: EngineChoice = EngineChoice()
    data: DataOptions = DataOptions()

    @field_validator("controls", "track", mode="before")
    @classmethod
    def _lists(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("method", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        """Accept a bare name, and options without a name (then they are the default method's)."""
        if isinstance(value, str):
            return {"name": value}
        return {"name": "fedopal", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if len(set(self.controls)) != len(self.controls):
            raise ConfigError("a control is named twice", where="controls", fix="name each once")
        # A comparison, which has no controls, may set such a method beside others.
        if self.hold_out and self.controls and not self.build_method().has_general():
            raise ConfigError(
                f"{self.method['name']} makes no general model: a held-out site could not be scored",
                where="hold_out",
                fix="use a method that shares its head, or leave hold_out out",
            )
        for method in (self.build_method(), *map(make, self.controls)):
            method.check(self.train.steps, self.rounds)
            if min([self.adapter.rank, *self.adapter.ranks.values()]) < len(method.slots):
                raise ConfigError(
                    f"a rank of less than {len(method.slots)} cannot be divided among the adapters of {method.name}",
                    where="adapter.rank",
                    fix=f"use at least {len(method.slots)}",
                )
            if self.adapter.ranks and not (method.unequal or method.pools):
                able = ", ".join(sorted(name for name, cls in METHODS.items() if cls.unequal))
                raise ConfigError(
                    f"{method.name} cannot carry adapters of different ranks",
                    where="adapter.ranks",
                    fix=f"leave adapter.ranks out, or use one of: {able}",
                )
        return self

    def build_method(self) -> Method:
        """Return the method this experiment trains."""
        options = {key: value for key, value in self.method.items() if key != "name"}
        return make(str(self.method["name"]), options)

    def for_method(self, label: str, **changes: Any) -> Experiment:
        """Return the same experiment for another method, with no controls.

        Args:
            label: a method's name, with options after colons: ``fedopal:head=local:lam=1.0``. The options of this
                experiment's own method are kept for a method that has them with the same default, so that
                what is not compared stays equal.
            changes: other keys to change.
        """
        name, *options = label.split(":")
        ours, theirs = defaults(str(self.method["name"])), defaults(name)
        own = {key: value for key, value in self.method.items() if key in theirs and theirs[key] == ours.get(key)}
        method = override({**own, "name": name}, options)
        return validate({**self.model_dump(), "method": method, "controls": (), **changes})

    def choices(self) -> dict[str, Any]:
        """Return every choice that results depend on, under its dotted key (``experiment.train.lr``)."""
        return _flat(self.model_dump(mode="json", exclude={"path", "workers"}), "experiment")

    def toml(self) -> str:
        """Return the experiment as TOML; :func:`read` gives an equal object back."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))


def validate(values: Mapping[str, Any]) -> Experiment:
    """Return the experiment of ``values``.

    Raises:
        ConfigError: naming the first wrong key, its value, and the nearest valid key or range.
    """
    try:
        return Experiment.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError("unknown key", where=where, fix=_valid_keys(where)) from None
        if first["type"] == "missing":
            raise ConfigError("a required key is missing", where=where, fix=f"set {where}") from None
        raise ConfigError(
            f"{first['msg']}; got {first['input']!r}", where=where, fix="see `confrere run --help`"
        ) from None


def read(path: Path) -> dict[str, Any]:
    """Return the values of a TOML file; ConfigError names line and column of a mistake."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"not valid TOML: {error}", where=str(path), fix="mend this line") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return ``values`` with ``key.path=value`` assignments applied; a value is TOML, or else a plain string.

    >>> override({}, ["train.lr=1e-3", "method.regulariser=R-cos"])
    {'train': {'lr': 0.001}, 'method': {'regulariser': 'R-cos'}}
    """
    result: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{assignment!r} is not an assignment", fix="write key.path=value, e.g. train.lr=1e-3")
        *tables, last = key.strip().split(".")
        target = result
        for table in tables:
            target = target.setdefault(table, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{table!r} holds a value, not a table", where=key)
        target[last] = _parse(text.strip())
    return result


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _valid_keys(where: str) -> str:
    *tables, last = where.split(".")
    model: Any = Experiment
    for table in tables:
        annotation = model.model_fields[table].annotation
        model = next((t for t in get_args(annotation) if hasattr(t, "model_fields")), annotation)  # of Table | None
    if hasattr(model, "model_fields"):
        everywhere = {last_part: key for key in _all_keys() if (last_part := key.rsplit(".", 1)[-1])}
        if last not in model.model_fields and last in everywhere:
            return f"did you mean {everywhere[last]!r}?"
        return nearest(last, list(model.model_fields))
    return ""


def _all_keys() -> list[str]:
    keys = []
    for name, info in Experiment.model_fields.items():
        inner = getattr(info.annotation, "model_fields", None)
        keys += [f"{name}.{key}" for key in inner] if inner else [name]
    return keys


def _flat(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {name: leaf for part, inner in value.items() for name, leaf in _flat(inner, f"{key}.{part}").items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value
