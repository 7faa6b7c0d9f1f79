"""``consortium.toml``: who takes part and where the coordinator is reached."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from confrere.choices import Part
from confrere.consortium import forms
from confrere.data.paths import check_class_name, check_site_name
from confrere.errors import ConfigError

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DNS = re.compile(rf"{_LABEL}(\.{_LABEL})*", re.IGNORECASE)


class Entrant(Part):
    """A site. One that makes its keys itself gives both public halves, as paths beside the roster."""

    name: str
    organisation: str = Field(default="", max_length=100)
    public_key: str | None = None
    identity_key: str | None = None

    @model_validator(mode="after")
    def _usable(self) -> Entrant:
        check_site_name(self.name, where="sites.name")
        if (self.public_key is None) != (self.identity_key is None):
            raise ValueError("a site that makes its own keys gives both public_key and identity_key")
        if not self.organisation.isprintable():
            raise ValueError("organisation holds control characters")
        return self


class Roster(Part):
    """Everyone who takes part.

    Attributes:
        name: of the consortium, 1 to 64 printable characters.
        address: DNS name or IP address by which sites reach the coordinator; its certificate is for this one.
        port: TCP port of the coordinator, 1 to 65535.
        classes: of all sites, in the order of the model's outputs; empty leaves them to the experiment's data.
        valid_days: life of kits and of the server's certificate, 1 to 825.
        sites: at least two.
    """

    name: str = Field(min_length=1, max_length=64)
    address: str = Field(max_length=253)
    port: int = Field(default=9092, ge=1, le=65535)
    classes: tuple[str, ...] = ()
    valid_days: int = Field(default=365, ge=1, le=825)
    sites: tuple[Entrant, ...]

    @field_validator("address")
    @classmethod
    def _reachable(cls, value: str) -> str:
        try:
            nowhere = ipaddress.ip_address(value).is_unspecified
        except ValueError:
            nowhere = not _DNS.fullmatch(value) or value.rpartition(".")[2].isdigit()
        if nowhere:
            raise ValueError("give a DNS name or an IP address that sites can reach; no scheme, port or path")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Roster:
        if not self.name.isprintable() or self.name != self.name.strip():
            raise ValueError("name holds control characters, or blanks around it")
        for name in self.classes:
            check_class_name(name, where="classes")
        if len(self.classes) == 1:
            raise ConfigError("there is only one class", where="classes", fix="give two or more, or leave them out")
        if len(self.sites) < 2:
            raise ConfigError("a consortium has at least two sites", where="sites", fix="add another [[sites]]")
        for what, names in (("classes", self.classes), ("sites", tuple(site.name for site in self.sites))):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ConfigError(f"{twice[0]!r} is named twice", where=what, fix="name each once", code="named-twice")
        return self


def read(path: Path) -> Roster:
    """Return the roster of a TOML file.

    Raises:
        ConfigError: naming file, key and what would be right.
        DataError: a name that cannot name a site or class.
    """
    return forms.read(path, Roster)
