"""A kit: the folder with which one site, or the coordinator, takes part; checked whole before anything is used.

kit.json, signed by the consortium's authority, says who takes part with which public keys. The private keys beside it
must be the halves that belong to it. What an attacker could still do is replace the whole folder: hence the
authority's fingerprint is compared by telephone.
"""

from __future__ import annotations

import os
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from pydantic import AwareDatetime, TypeAdapter, ValidationError

from confrere import intake
from confrere.consortium import keys
from confrere.consortium.authority import (
    CLOCKS,
    certificate_fingerprint,
    covers,
    holds,
    issued,
    load_certificate,
    load_private,
    now,
)
from confrere.errors import NetworkError
from confrere.record.files import as_json

FORMAT = 1
Role = Literal["site", "coordinator"]
AGAIN = "ask for a new kit from whoever ran `confrere provision`"
_MOST = 1_000_000  # bytes of a file of a kit


@dataclass(frozen=True, kw_only=True)
class Member:
    """What everyone knows of a site: OpenSSH public key of its node, Ed25519 public key (base64 of 32 bytes)."""

    node: str
    identity: str
    organisation: str = ""


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What a kit says; ``site`` is empty for the coordinator, ``ca`` the SHA-256 of the authority's certificate."""

    folder: Path
    consortium: str
    role: Role
    site: str
    address: str
    port: int
    classes: tuple[str, ...]
    issued: AwareDatetime
    expires: AwareDatetime
    sites: Mapping[str, Member]
    ca: str
    confrere: str

    @property
    def target(self) -> str:
        """Address and port, as programs take them."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    @property
    def identities(self) -> dict[str, bytes]:
        """Raw Ed25519 public keys of all sites, by which messages of secure aggregation are checked."""
        return {name: b64decode(member.identity) for name, member in self.sites.items()}

    def content(self) -> bytes:
        """Return the bytes of kit.json, which are signed."""
        values = _ADAPTER.dump_python(self, mode="json")
        return as_json({"format": FORMAT, **{key: value for key, value in values.items() if key != "folder"}})


_ADAPTER = TypeAdapter(Kit)


def load(path: Path, role: Role | None = None) -> Kit:
    """Return the kit in the folder ``path``, all of it checked.

    Args:
        path: the folder; nothing is read but the files of a kit.
        role: whose kit it must be; None for either.

    Raises:
        NetworkError: a file is missing (``kit-missing``) or damaged (``kit-damaged``), was changed since it was signed
            (``kit-changed``), belongs to another authority (``kit-ca``) or role (``kit-role``); the kit has expired
            (``kit-expired``) or is not valid yet (``kit-early``); others may read a private key (``kit-mode``), it is
            not there or not the one of the roster (``kit-key``); the server's certificate does not fit
            (``kit-certificate``).
    """
    kit = read(path)
    if role is not None and kit.role != role:
        raise NetworkError(
            f"this is the kit of {_whose(kit)}, not of a {role}",
            where=str(path),
            fix=f"give a folder of {'sites/' if role == 'site' else 'coordinator'} as `confrere provision` made it",
            code="kit-role",
        )
    _check_dates(kit)
    if kit.role == "site":
        _check_site(kit)
    else:
        _check_coordinator(kit)
    return kit


def read(path: Path) -> Kit:
    """Return what the kit in ``path`` says if its signature holds, whatever its dates and private keys.

    Raises:
        NetworkError: ``kit-missing``, ``kit-damaged``, ``kit-ca`` or ``kit-changed``.
    """
    content, signature = file(path, "kit.json"), file(path, "kit.sig")
    authority = certificate(path, "ca.crt")
    kit = _parse(content, path)
    if certificate_fingerprint(authority) != kit.ca:
        raise NetworkError(
            "ca.crt is not the certificate of the authority that made this kit",
            where=str(path / "ca.crt"),
            fix=AGAIN,
            code="kit-ca",
        )
    if not holds(authority, content, signature):
        raise NetworkError(
            "kit.json was changed since it was signed",
            where=str(path),
            fix=f"do not use it; {AGAIN}",
            code="kit-changed",
        )
    return kit


def file(path: Path, name: str) -> bytes:
    """Return the bytes of a file of the kit in ``path``; NetworkError ``kit-missing`` where it cannot be read."""
    try:
        return intake.read_bytes(path / name, _MOST)
    except OSError as error:
        raise NetworkError(
            f"a file of the kit cannot be read: {error.strerror}",
            where=str(path / name),
            fix=f"give the folder that holds kit.json, whole and readable; else {AGAIN}",
            code="kit-missing",
        ) from None


def certificate(path: Path, name: str) -> x509.Certificate:
    """Return a certificate of the kit in ``path``; NetworkError where it is missing or damaged."""
    try:
        return load_certificate(file(path, name))
    except ValueError:
        what = "a certificate of the kit is damaged"
        raise NetworkError(what, where=str(path / name), fix=AGAIN, code="kit-damaged") from None


def _parse(content: bytes, path: Path) -> Kit:
    why = "it holds no kit"
    try:
        values: Any = intake.parse_json(content)
        if isinstance(values, dict) and values.get("format") == FORMAT:
            return _ADAPTER.validate_python({**values, "folder": path})
        if isinstance(values, dict) and isinstance(values.get("format"), int):
            why = f"it has format {values['format']}, this Confrere reads {FORMAT}: use the same version everywhere"
    except ValidationError as error:
        why = f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
    except ValueError as error:
        why = str(error)
    raise NetworkError(f"kit.json is damaged: {why}", where=str(path), fix=AGAIN, code="kit-damaged")


def _check_dates(kit: Kit) -> None:
    at = now()
    ends = min(kit.expires, certificate(kit.folder, "ca.crt").not_valid_after_utc)
    if at >= ends:
        raise NetworkError(
            f"the kit of {_whose(kit)} expired on {ends:%Y-%m-%d}",
            where=str(kit.folder),
            fix="ask for a renewed kit (`confrere provision --renew`); check this machine's clock",
            code="kit-expired",
        )
    if at < kit.issued - CLOCKS:
        raise NetworkError(
            f"the kit of {_whose(kit)} is not valid before {kit.issued:%Y-%m-%d %H:%M} UTC",
            where=str(kit.folder),
            fix="check this machine's clock and its time zone",
            code="kit-early",
        )


def _check_site(kit: Kit) -> None:
    member = kit.sites.get(kit.site)
    if member is None:
        what = f"the roster of this kit does not name its own site {kit.site!r}"
        raise NetworkError(what, where=str(kit.folder), fix=AGAIN, code="kit-damaged")
    for name, public, known in (
        ("node.key", keys.node_public, member.node),
        ("identity.key", keys.identity_public, member.identity),
    ):
        try:
            found = public(_private(kit, name))
        except ValueError as error:
            raise _wrong_key(kit, name, f"{name} holds {error}") from None
        if found != known:
            raise _wrong_key(kit, name, f"{name} is not the key that the roster names for {kit.site}")


def _check_coordinator(kit: Kit) -> None:
    server, why = certificate(kit.folder, "server.crt"), ""
    if not issued(server, certificate(kit.folder, "ca.crt")):
        why = "is not signed by the authority"
    elif not server.not_valid_before_utc <= now() < server.not_valid_after_utc:
        why = f"is valid from {server.not_valid_before_utc:%Y-%m-%d} to {server.not_valid_after_utc:%Y-%m-%d} only"
    elif not covers(server, kit.address):
        why = f"is not for {kit.address}"
    if why:
        fix = "run `confrere provision --renew` and take the new coordinator folder"
        raise NetworkError(f"server.crt {why}", where=str(kit.folder), fix=fix, code="kit-certificate")
    try:
        key = load_private(_private(kit, "server.key"))
    except ValueError as error:
        raise _wrong_key(kit, "server.key", f"server.key holds {error}") from None
    if key.public_key() != server.public_key():
        raise _wrong_key(kit, "server.key", "server.key does not belong to server.crt")
    for site, member in kit.sites.items():
        try:
            same = keys.parse_node_public(file(kit.folder / "nodes", f"{site}.pub")) == member.node
        except ValueError:
            same = False
        if not same:
            raise _wrong_key(kit, f"nodes/{site}.pub", f"nodes/{site}.pub is not the key that the roster names")


def _private(kit: Kit, name: str) -> bytes:
    """Return a private key, which only its owner may read."""
    path = kit.folder / name
    if not path.exists():
        raise _wrong_key(kit, name, f"{name} is missing")
    if os.name == "posix" and path.stat().st_mode & 0o077:
        fix = f"chmod 600 {path}; if others did read it, ask for a new key"
        raise NetworkError(f"others may read {name}", where=str(path), fix=fix, code="kit-mode")
    return file(kit.folder, name)


def _wrong_key(kit: Kit, name: str, what: str) -> NetworkError:
    fix = f"put the right {name} there; a site that made its keys itself holds them; else {AGAIN}"
    return NetworkError(what, where=str(kit.folder / name), fix=fix, code="kit-key")


def _whose(kit: Kit) -> str:
    return f"site {kit.site}" if kit.role == "site" else "the coordinator"
