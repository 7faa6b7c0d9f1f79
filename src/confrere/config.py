"""The experiment: every choice of a run, checked, printable, and written beside its results.

One meaning, three forms: this object, a TOML file, and ``key.path=value`` overrides on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from confrere import intake
from confrere import methods as _methods  # noqa: F401  fills the registry of methods
from confrere.choices import (
    AdapterChoice,
    AttackChoice,
    BackboneChoice,
    EngineChoice,
    FederationChoice,
    GateChoice,
    Part,
    PrivacyChoice,
    RecordChoice,
    SecureChoice,
    SelectionChoice,
    TrainChoice,
)
from confrere.consistency import check_choices
from confrere.data.options import DataOptions
from confrere.errors import ConfigError, nearest
from confrere.federation.defence import Defence
from confrere.federation.secure.exchange import Secure
from confrere.federation.secure.settings import hides
from confrere.method import Method, defaults, make
from confrere.tasks import TASKS, Task, make_task

_DEEPEST = 8  # tables above a key
BARE = ("method", "task")  # tables that may be given as a bare name
MAY_DIFFER = ("adapter", "attack", "backbone", "engine", "federation", "gate", "privacy", "secure", "train")
"""Tables whose keys a method's label may set in a comparison, but for those that change how many steps are taken."""
STEPS = ("train.steps", "federation.fraction", "federation.sampling")


class Experiment(Part):
    """All choices of one run."""

    path: str = Field(min_length=1)
    task: dict[str, Any] = Field(default={"name": "classification"})
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
    gate: GateChoice = GateChoice()
    secure: SecureChoice = SecureChoice()
    privacy: PrivacyChoice = PrivacyChoice()
    attack: AttackChoice = AttackChoice()
    selection: SelectionChoice = SelectionChoice()
    record: RecordChoice = RecordChoice()
    engine: EngineChoice = EngineChoice()
    data: DataOptions = DataOptions()

    @field_validator("task", mode="before")
    @classmethod
    def _task_named(cls, value: object) -> object:
        """Accept a bare name."""
        return {"name": value} if isinstance(value, str) else value

    @field_validator("method", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        """Accept a bare name, and options without a name (then they are the default method's)."""
        if isinstance(value, str):
            return {"name": value}
        return {"name": "fedopal", **value} if isinstance(value, dict) else value

    @model_validator(mode="before")
    @classmethod
    def _data_of_task(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Read of the data what the task learns, unless that is given."""
        given, data = values.get("task"), values.get("data", {})
        name = given.get("name") if isinstance(given, dict) else given
        if isinstance(name, str) and name in TASKS and isinstance(data, dict):
            return {**values, "data": {"target": TASKS[name].target, **data}}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        check_choices(self)
        return self

    @property
    def other_controls(self) -> list[str]:
        """Return the controls that are trained beside the method: one that is the method itself is there already."""
        return [name for name in self.controls if name != self.method["name"]]

    def build_task(self) -> Task:
        """Return what this experiment predicts."""
        return make_task(self.task)

    def build_method(self) -> Method:
        """Return the method this experiment trains."""
        options = {key: value for key, value in self.method.items() if key != "name"}
        return make(str(self.method["name"]), options)

    @property
    def masked(self) -> bool:
        """Return whether updates leave their sites masked; the controls, which send nothing or pool, have none."""
        return self.secure.aggregation and hides(self.build_method())

    def build_defence(self, roster: Mapping[str, bytes] | None = None, sums: Path | None = None) -> Defence:
        """Return what guards the average; the controls have nothing to guard. See :class:`Secure` for the arguments."""
        method, choice = self.build_method(), self.federation
        if self.masked:
            return Secure(roster=roster or {}, threshold=self.secure.threshold, folder=sums)
        if method.pools or not method.sends:
            return Defence()
        return Defence(rule=choice.rule, byzantine=choice.byzantine, canonical=choice.canonical)

    def for_method(self, label: str, **changes: Any) -> Experiment:
        """Return the same experiment for another method, with no controls.

        Args:
            label: a method's name, with options after colons: ``fedopal:head=local:lam=1.0``. One with a dot is a key
                of the experiment: ``fedit:federation.rule=median``. The options of this experiment's own method are
                kept for a method that has them with the same default, so that what is not compared stays equal.
            changes: other keys to change.

        Raises:
            ConfigError: an unknown name, option or key, or a key of data or steps, which are the same for all.
        """
        name, *options = label.split(":")
        keys = [one for one in options if "." in one.partition("=")[0]]
        for one in keys:
            _refuse_unequal(one.partition("=")[0].strip())
        ours, theirs = defaults(str(self.method["name"])), defaults(name)
        own = {key: value for key, value in self.method.items() if key in theirs and theirs[key] == ours.get(key)}
        method = override({**own, "name": name}, [one for one in options if one not in keys])
        return validate({**override(self.model_dump(), keys), "method": method, "controls": (), **changes})

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
            raise ConfigError("unknown key", where=where, fix=_valid_keys(where), code="unknown-key") from None
        if first["type"] == "missing":
            raise ConfigError(
                "a required key is missing", where=where, fix=f"set {where}", code="missing-key"
            ) from None
        raise ConfigError(
            f"{first['msg']}; got {first['input']!r:.200}", where=where, fix="see `confrere run --help`"
        ) from None


def read(
    path: Path, *, fix: str = "give a TOML file as `confrere run` writes it: RUN/experiment.toml"
) -> dict[str, Any]:
    """Return the values of a TOML file; ConfigError names line and column of a mistake, or ``fix`` if unreadable."""
    try:
        return intake.parse_toml(intake.read_bytes(path, intake.MOST_TOML))
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error.strerror}", where=str(path), fix=fix, code="unreadable-file"
        ) from None
    except ValueError as error:
        raise ConfigError(f"not valid TOML: {error}", where=str(path), fix="mend this line", code="not-toml") from None


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return ``values`` with ``key.path=value`` assignments applied; a value is TOML, or else a plain string.

    >>> override({}, ["train.lr=1e-3", "method.regulariser=R-cos"])
    {'train': {'lr': 0.001}, 'method': {'regulariser': 'R-cos'}}
    """
    result: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            fix = "write key.path=value, e.g. train.lr=1e-3"
            raise ConfigError(
                f"{assignment!r:.100} is not an assignment", where="command line", fix=fix, code="override"
            )
        *tables, last = key.strip().split(".")
        if len(tables) > _DEEPEST:
            raise ConfigError("a key has too many parts", where=key[:80], fix="write key.path=value", code="override")
        target = result
        head = tables[0] if tables else ""
        if head in BARE and isinstance(result.get(head), str):
            result[head] = {"name": result[head]}
        for table in tables:
            target = target.setdefault(table, {})
            if not isinstance(target, dict):
                fix = "write key.path=value, e.g. train.lr=1e-3"
                raise ConfigError(f"{table!r} holds a value, not a table", where=key, fix=fix, code="override")
        target[last] = _parse(text.strip())
    return result


def _parse(text: str) -> Any:
    try:
        found = intake.parse_toml(f"v = {text}".encode())
    except ValueError:
        return text
    return found["v"] if len(found) == 1 else text


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


def _refuse_unequal(key: str) -> None:
    """Raise ConfigError unless methods of one comparison may differ in ``key``: in data and steps they may not."""
    known = _all_keys()
    may = [one for one in known if one.partition(".")[0] in MAY_DIFFER and one not in STEPS]
    table = ".".join(key.split(".")[:2])  # adapter.ranks of adapter.ranks.north
    if table in may:
        return
    if table in known:
        fix = "leave it out of --methods and give it for all, beside the data"
        raise ConfigError(
            "methods of one comparison have the same data and steps", where=key, fix=fix, code="comparison"
        )
    own = key.removeprefix("method.")
    fix = nearest(key, may) if own == key else f"an option of the method stands there without the prefix: {own}"
    raise ConfigError("unknown key", where=key, fix=fix, code="unknown-key")


def _flat(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {name: leaf for part, inner in value.items() for name, leaf in _flat(inner, f"{key}.{part}").items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value
