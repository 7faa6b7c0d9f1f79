"""What a user may ask for in ``[[data.shift]]``: one simulated difference between sites, checked."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from confrere.data.paths import slug
from confrere.errors import ConfigError, nearest

Kind = Literal["scanner", "stain", "label-noise", "missing-classes", "quantity", "concept", "backdoor"]
KINDS: tuple[str, ...] = get_args(Kind)
BY_CLASS = ("missing-classes", "concept")


class Shift(BaseModel):
    """One kind of heterogeneity that is added to real data, at some sites.

    ``scanner`` and ``stain`` change pixels; ``label-noise``, ``missing-classes`` and ``quantity`` change training
    images only; ``concept`` permutes the names of classes in all splits; ``backdoor``, an attack, puts a mark on
    training images and calls them one class. See ``docs/heterogeneity.md``.

    Attributes:
        kind: one of the above.
        sites: names of sites; none means all.
        strength: of ``scanner`` and ``stain``, and the share of training labels flipped (``label-noise``), or of
            training images left out (``quantity``) or marked (``backdoor``); 0 changes nothing, 1 is the most.
        classes: those that are missing, or that swap names in a ring: each is called what the next one is called; or
            the one that marked images are called.
        count: so many classes, drawn at random, instead of ``classes``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # No value is None: TOML has none, and an experiment must survive being written.
    kind: Kind
    sites: tuple[str, ...] = ()
    strength: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    classes: tuple[str, ...] = ()
    count: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        """Refuse an unknown kind or key with the nearest valid one, and options that the kind does not have."""
        if not isinstance(values, dict):
            return values
        kind = values.get("kind")
        if kind not in KINDS:
            raise ConfigError(
                f"unknown kind of shift {kind!r}",
                where="data.shift.kind",
                fix=nearest(str(kind), KINDS),
                code="unknown-name",
            )
        for key in values:
            if key not in cls.model_fields:
                raise ConfigError(
                    "unknown key", where=f"data.shift.{key}", fix=nearest(key, cls.model_fields), code="unknown-key"
                )
        return values

    @field_validator("sites")
    @classmethod
    def _slugs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(slug(site) for site in value)

    @model_validator(mode="after")
    def _fitting(self) -> Shift:
        if self.kind == "backdoor":
            if len(self.classes) != 1 or self.count or "strength" not in self.model_fields_set:
                fix = 'give strength = 0.5 and classes = ["a"]'
                raise ConfigError("backdoor needs a strength and one class", where="data.shift", fix=fix, code="shift")
            return self
        by_class = self.kind in BY_CLASS
        wrong = {"strength": by_class and self.strength, "classes": not by_class and self.classes}
        wrong["count"] = self.count and (not by_class or self.classes)
        for key, found in wrong.items():
            if found:
                right = 'classes = ["a", "b"], or count = 2' if by_class else "strength = 0.5"
                raise ConfigError(
                    f"{self.kind} has no use for it", where=f"data.shift.{key}", fix=f"give {right}", code="shift"
                )
        if not by_class and "strength" not in self.model_fields_set:
            raise ConfigError(
                f"{self.kind} needs a strength", where="data.shift.strength", fix="give strength = 0.5", code="shift"
            )
        if by_class and not self.model_fields_set & {"classes", "count"}:
            raise ConfigError(
                f"{self.kind} needs classes", where="data.shift.classes", fix="give classes or count", code="shift"
            )
        if len(set(self.classes)) < len(self.classes):
            raise ConfigError("a class is named twice", where="data.shift.classes", fix="name each once", code="shift")
        if self.kind == "concept" and max(len(self.classes), self.count) == 1:
            raise ConfigError(
                "one class cannot swap its name", where="data.shift.classes", fix="give two or more", code="shift"
            )
        return self

    @property
    def idle(self) -> bool:
        """Return whether it changes nothing."""
        return not (self.strength or (self.kind in BY_CLASS and (self.classes or self.count)))
