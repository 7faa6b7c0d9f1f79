"""Make the kits of a consortium, or bring them up to date: private keys that are there are kept, never printed.

Written so that it may be killed at any point: a first run appears whole or not at all, a later one is run again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import confrere
from confrere.consortium import keys, kit, roster
from confrere.consortium.authority import (
    Authority,
    certificate_fingerprint,
    certificate_pem,
    covers,
    load_authority,
    new_authority,
    new_server,
    now,
)
from confrere.consortium.kit import Kit, Member
from confrere.consortium.policy import TEMPLATE
from confrere.consortium.roster import Entrant, Roster
from confrere.errors import ConfigError, NetworkError, RunError
from confrere.record.files import write_bytes

Change = Literal["new", "kept", "removed"]


@dataclass(frozen=True)
class Provisioned:
    """What was made: the authority's fingerprint, and of every site what became of it and its node's fingerprint."""

    ca: str
    expires: datetime
    sites: Mapping[str, tuple[Change, str]]


def provision(path: Path, out: Path, *, renew: bool = False, revoke: Collection[str] = ()) -> Provisioned:
    """Write the kits of the roster at ``path`` into ``out``; where kits are there, add what is new.

    Args:
        path: consortium.toml, see :class:`confrere.consortium.roster.Roster`.
        out: new or empty, or the folder of an earlier run of the same consortium.
        renew: make a new server certificate; all kits are then valid for ``valid_days`` from now.
        revoke: sites whose keys are deleted. One that the roster still names gets new ones.

    Raises:
        ConfigError: the roster is wrong; a public key of a site cannot be used (``site-key``); ``out`` holds something
            else (``kit-exists``), another consortium or address, or a site that the roster does not name
            (``provision``).
        NetworkError: what is in ``out`` was changed or is damaged.
        RunError: a file cannot be written.
    """
    wanted = roster.read(path)
    publics = {site.name: _own_keys(site, path.parent) for site in wanted.sites}
    if (out / "ca.key").is_file():
        _check_known(wanted, publics, out, revoke)
        return _write(wanted, publics, out, renew=renew, revoke=revoke)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            "the folder holds something else than the kits of an earlier run",
            where=str(out),
            fix="choose a new folder; for a later run give the one that holds ca.key",
            code="kit-exists",
        )
    if revoke:
        raise _refusal(f"there is no kit of {sorted(revoke)[0]!r} to revoke", str(out), "give the folder of the kits")
    return _first(wanted, publics, out)


def _first(wanted: Roster, publics: Mapping[str, Member | None], out: Path) -> Provisioned:
    """Write a new consortium into a draft of mode 0700, which becomes ``out``."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=out.parent, prefix=".provision-"))
    except OSError as error:
        fix = "mend the permissions, or choose another place"
        raise RunError(f"cannot write: {error.strerror}", where=str(out), fix=fix, code="cannot-write") from None
    try:
        authority = new_authority(wanted.name)
        write_bytes(draft / "ca.crt", certificate_pem(authority.certificate))
        write_bytes(draft / "ca.key", keys.pem(authority.key))
        made = _write(wanted, publics, draft, renew=True, revoke=())
        if out.exists():
            out.rmdir()  # it is empty
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return made


def _write(
    wanted: Roster, publics: Mapping[str, Member | None], out: Path, *, renew: bool, revoke: Collection[str]
) -> Provisioned:
    """Write all that is missing or out of date; private keys first, signatures last."""
    authority = _authority(out)
    if authority.consortium != wanted.name:
        what = f"these are the kits of {authority.consortium!r}, the roster's name is {wanted.name!r}"
        raise _refusal(what, str(out), "choose a new folder, or restore the name")
    expires = _server(wanted, authority, out / "coordinator", renew=renew)
    nodes = out / "coordinator" / "nodes"
    for name in revoke:
        _delete(out / "sites" / name)
        (nodes / f"{name}.pub").unlink(missing_ok=True)
    members = {site.name: _member(site, publics[site.name], out / "sites" / site.name) for site in wanted.sites}
    _check_unique(members, str(out))
    made = Kit(
        folder=out / "coordinator",
        consortium=wanted.name,
        role="coordinator",
        site="",
        address=wanted.address,
        port=wanted.port,
        classes=wanted.classes,
        issued=now(),
        expires=expires,
        sites=members,
        ca=certificate_fingerprint(authority.certificate),
        confrere=confrere.__version__,
    )
    kits = [made, *(replace(made, folder=out / "sites" / name, role="site", site=name) for name in members)]
    for one in kits:
        write_bytes(one.folder / "ca.crt", certificate_pem(authority.certificate))
        write_bytes(one.folder / "kit.json", one.content())
        write_bytes(one.folder / "kit.sig", authority.sign(one.content()))
    sites: dict[str, tuple[Change, str]] = {name: ("removed", "") for name in revoke}
    for name, member in members.items():
        line = f"{member.node} {name}\n".encode()
        file = nodes / f"{name}.pub"
        known = file.exists() and file.read_bytes() == line
        sites[name] = "kept" if known else "new", keys.fingerprint(member.node)
        write_bytes(file, line)
    return Provisioned(made.ca, expires, sites)


def _authority(out: Path) -> Authority:
    try:
        return load_authority(kit.file(out, "ca.key"), kit.file(out, "ca.crt"))
    except ValueError:
        what, fix = "ca.key and ca.crt are damaged or do not belong together", "restore them from a copy"
        raise NetworkError(what, where=str(out), fix=fix, code="kit-damaged") from None


def _server(wanted: Roster, authority: Authority, folder: Path, *, renew: bool) -> datetime:
    """Return when the server's certificate ends, made anew where it is asked for."""
    last = authority.certificate.not_valid_after_utc
    if renew:
        until = now() + timedelta(days=wanted.valid_days)
        if until > last:
            what = f"the authority ends on {last:%Y-%m-%d}, before {wanted.valid_days} days are over"
            raise _refusal(what, str(folder.parent), "provision a new consortium into a new folder")
        key, certificate = new_server(authority, wanted.address, until)
        write_bytes(folder / "server.key", key)
        write_bytes(folder / "server.crt", certificate)
    found = kit.certificate(folder, "server.crt")
    if not covers(found, wanted.address):
        what = f"the server's certificate is not for {wanted.address}, the roster's address"
        raise _refusal(what, str(folder), "add --renew, and hand over all kits again")
    if found.not_valid_after_utc <= now():
        what = f"the server's certificate ended on {found.not_valid_after_utc:%Y-%m-%d}"
        raise _refusal(what, str(folder), "add --renew, and hand over all kits again")
    return found.not_valid_after_utc


def _member(site: Entrant, own: Member | None, folder: Path) -> Member:
    """Return what everyone will know of a site; make its keys where it has none.

    Of keys that were handed over and deleted here the public halves are enough.
    """
    if not (folder / "policy.toml").exists():  # the site's own from then on
        write_bytes(folder / "policy.toml", TEMPLATE.encode())
    if own is not None:
        for name in ("node.key", "node.pub", "identity.key", "identity.pub"):
            (folder / name).unlink(missing_ok=True)
        return own
    for name, make in (("node", keys.new_node_key), ("identity", keys.new_identity_key)):
        if not (folder / f"{name}.key").exists() and not (folder / f"{name}.pub").exists():
            write_bytes(folder / f"{name}.key", make())  # before the public half, without which it is read again
    try:
        if (folder / "node.key").exists():
            public = keys.node_public(kit.file(folder, "node.key"))
            write_bytes(folder / "node.pub", f"{public} {site.name}\n".encode())
        if (folder / "identity.key").exists():
            public = keys.identity_public(kit.file(folder, "identity.key"))
            write_bytes(folder / "identity.pub", keys.identity_pem(public))
        node = keys.parse_node_public(kit.file(folder, "node.pub"))
        identity = keys.parse_identity_public(kit.file(folder, "identity.pub"))
    except ValueError as error:
        fix = f"restore it, or make new keys: --revoke {site.name}"
        raise NetworkError(f"a key holds {error}", where=str(folder), fix=fix, code="kit-key") from None
    return Member(node=node, identity=identity, organisation=site.organisation)


def _own_keys(site: Entrant, beside: Path) -> Member | None:
    """Return the public keys of a site that made its keys itself, None of another one."""
    if site.public_key is None or site.identity_key is None:
        return None
    found = []
    for path, parse in (
        (beside / site.public_key, keys.parse_node_public),
        (beside / site.identity_key, keys.parse_identity_public),
    ):
        try:
            found.append(parse(kit.file(path.parent, path.name)))
        except (ValueError, NetworkError) as error:
            why = error.what if isinstance(error, NetworkError) else str(error)
            what = f"the public key of site {site.name} cannot be used: {why}"
            fix = "let the site make one: see docs/consortium.md"
            raise ConfigError(what, where=str(path), fix=fix, code="site-key") from None
    return Member(node=found[0], identity=found[1], organisation=site.organisation)


def _check_known(wanted: Roster, publics: Mapping[str, Member | None], out: Path, revoke: Collection[str]) -> None:
    """Refuse to revoke a site that never was, and to lose one because its name is missing or misspelt."""
    there = {folder.name for folder in (out / "sites").iterdir()} if (out / "sites").is_dir() else set()
    for name in sorted(revoke):
        if name not in there:
            fix = "give the name of a site of this folder; one whose keys are gone already needs no --revoke"
            raise _refusal(f"there is no kit of {name!r} to revoke", str(out), fix)
        own, file = publics.get(name), out / "coordinator" / "nodes" / f"{name}.pub"
        if own is not None and file.exists() and file.read_bytes().startswith(own.node.encode()):
            what, fix = f"the roster still gives the key of {name} that is to be revoked", "let the site make a new one"
            raise ConfigError(what, where=str(out), fix=fix, code="site-key")
    lost = sorted(there - set(revoke) - {site.name for site in wanted.sites})
    if lost:
        what, fix = f"the roster does not name {lost[0]!r}, which has a kit", f"restore it, or give --revoke {lost[0]}"
        raise _refusal(what, str(out), fix)


def _check_unique(members: Mapping[str, Member], where: str) -> None:
    """Refuse two sites with one key: either could speak for the other."""
    for kind in ("node", "identity"):
        found = [getattr(member, kind) for member in members.values()]
        if len(set(found)) < len(found):
            fix = "let every site make its own"
            raise ConfigError(f"two sites have the same {kind} key", where=where, fix=fix, code="site-key")


def _delete(folder: Path) -> None:
    """Delete a site's keys; RunError where that fails, as they would be used again."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        what, fix = f"cannot delete the keys: {error.strerror}", "mend the permissions and run this again"
        raise RunError(what, where=str(folder), fix=fix, code="cannot-write") from None


def _refusal(what: str, where: str, fix: str) -> ConfigError:
    return ConfigError(what, where=where, fix=fix, code="provision")
