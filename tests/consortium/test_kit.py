"""A kit is refused whole when any part of it is not as it was made."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from consortium_kits import made

from confrere.consortium import authority, keys, kit
from confrere.errors import NetworkError


def code_of(folder: Path, role: kit.Role | None = None) -> str:
    """Return the code with which a kit is refused; every refusal says how to go on."""
    with pytest.raises(NetworkError) as caught:
        kit.load(folder, role)
    assert caught.value.fix
    assert str(folder) in caught.value.where
    return caught.value.code


def resign(kits: Path, folder: Path, **changes: object) -> None:
    """Change kit.json as whoever holds the authority's key could."""
    own = authority.load_authority((kits / "ca.key").read_bytes(), (kits / "ca.crt").read_bytes())
    content = json.dumps({**json.loads((folder / "kit.json").read_bytes()), **changes}).encode()
    (folder / "kit.json").write_bytes(content)
    (folder / "kit.sig").write_bytes(own.sign(content))


def test_a_kit_says_who_takes_part(kits: Path) -> None:
    own = kit.load(kits / "sites" / "north", "site")
    assert (own.consortium, own.role, own.site, own.target) == ("Skin", "site", "north", "localhost:9092")
    assert own.classes == ("benign", "malignant")
    assert own.sites["north"].organisation == "North General"
    assert abs(own.expires - own.issued - timedelta(days=90)) < timedelta(minutes=5)  # the machine may be slow
    assert own.ca == authority.certificate_fingerprint(authority.load_certificate((kits / "ca.crt").read_bytes()))
    server = kit.load(kits / "coordinator", "coordinator")
    assert (server.site, server.sites) == ("", own.sites)


def test_an_ipv6_address_is_written_in_brackets(kits: Path) -> None:
    folder = kits / "sites" / "north"
    resign(kits, folder, address="2001:db8::7")
    assert kit.load(folder).target == "[2001:db8::7]:9092"


SITE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: shutil.rmtree(f), "kit-missing"),
    "no kit.json": (lambda f: (f / "kit.json").unlink(), "kit-missing"),
    "no kit.sig": (lambda f: (f / "kit.sig").unlink(), "kit-missing"),
    "no ca.crt": (lambda f: (f / "ca.crt").unlink(), "kit-missing"),
    "kit.json is a folder": (lambda f: ((f / "kit.json").unlink(), (f / "kit.json").mkdir()), "kit-missing"),
    "kit.json is huge": (lambda f: (f / "kit.json").write_bytes(b" " * 1_000_001), "kit-missing"),
    "kit.json is no JSON": (lambda f: (f / "kit.json").write_text("{"), "kit-damaged"),
    "kit.json is a list": (lambda f: (f / "kit.json").write_text("[]"), "kit-damaged"),
    "kit.json lacks keys": (lambda f: (f / "kit.json").write_text('{"format": 1}'), "kit-damaged"),
    "kit.json of a later version": (lambda f: (f / "kit.json").write_text('{"format": 2}'), "kit-damaged"),
    "ca.crt is damaged": (lambda f: (f / "ca.crt").write_text("x"), "kit-damaged"),
    "node.key is missing": (lambda f: (f / "node.key").unlink(), "kit-key"),
    "identity.key is missing": (lambda f: (f / "identity.key").unlink(), "kit-key"),
    "node.key is damaged": (lambda f: (f / "node.key").write_text("x"), "kit-key"),
    "node.key of another kind": (lambda f: shutil.copy(f / "identity.key", f / "node.key"), "kit-key"),
    "identity.key of another kind": (lambda f: shutil.copy(f / "node.key", f / "identity.key"), "kit-key"),
    "node.key of another site": (lambda f: shutil.copy(f.parent / "south" / "node.key", f / "node.key"), "kit-key"),
    "identity.key of another site": (
        lambda f: shutil.copy(f.parent / "south" / "identity.key", f / "identity.key"),
        "kit-key",
    ),
    "others read node.key": (lambda f: (f / "node.key").chmod(0o640), "kit-mode"),
    "others read identity.key": (lambda f: (f / "identity.key").chmod(0o604), "kit-mode"),
}


@pytest.mark.parametrize("case", SITE)
def test_a_spoilt_site_kit_is_refused(kits: Path, case: str) -> None:
    spoil, code = SITE[case]
    spoil(kits / "sites" / "north")
    assert code_of(kits / "sites" / "north") == code


def test_a_node_key_of_another_kind_is_refused(kits: Path) -> None:
    folder, ssh = kits / "sites" / "north", keys.serialization.PrivateFormat.OpenSSH
    plain = keys.serialization.Encoding.PEM, ssh, keys.serialization.NoEncryption()
    for content in (
        keys.pem(keys.ec.generate_private_key(keys.ec.SECP384R1())),  # not as OpenSSH writes it
        keys.Ed25519PrivateKey.generate().private_bytes(*plain),
    ):
        (folder / "node.key").write_bytes(content)
        assert code_of(folder) == "kit-key"
    assert keys.node_public(keys.ec.generate_private_key(keys.ec.SECP256R1()).private_bytes(*plain))


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs ssh-keygen")
def test_a_node_key_with_a_password_is_refused(kits: Path) -> None:
    folder = kits / "sites" / "north"
    (folder / "node.key").unlink()
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "secret", "-f", folder / "node.key"], check=True
    )
    with pytest.raises(NetworkError, match="without a password") as caught:
        kit.load(folder)
    assert caught.value.code == "kit-key"


COORDINATOR: dict[str, tuple[Callable[[Path], object], str]] = {
    "server.key is missing": (lambda f: (f / "server.key").unlink(), "kit-key"),
    "server.key is damaged": (lambda f: (f / "server.key").write_text("x"), "kit-key"),
    "server.key is another": (lambda f: shutil.copy(f.parent / "ca.key", f / "server.key"), "kit-key"),
    "server.key of another kind": (
        lambda f: shutil.copy(f.parent / "sites" / "north" / "identity.key", f / "server.key"),
        "kit-key",
    ),
    "others read server.key": (lambda f: (f / "server.key").chmod(0o644), "kit-mode"),
    "server.crt is damaged": (lambda f: (f / "server.crt").write_text("x"), "kit-damaged"),
    "server.crt is missing": (lambda f: (f / "server.crt").unlink(), "kit-missing"),
    "a node key is missing": (lambda f: (f / "nodes" / "north.pub").unlink(), "kit-missing"),
    "a node key is damaged": (lambda f: (f / "nodes" / "north.pub").write_text("x"), "kit-key"),
    "node keys are swapped": (lambda f: shutil.copy(f / "nodes" / "north.pub", f / "nodes" / "south.pub"), "kit-key"),
}


@pytest.mark.parametrize("case", COORDINATOR)
def test_a_spoilt_coordinator_kit_is_refused(kits: Path, case: str) -> None:
    spoil, code = COORDINATOR[case]
    spoil(kits / "coordinator")
    assert code_of(kits / "coordinator") == code


def test_a_server_certificate_that_does_not_fit_is_refused(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, at = kits / "coordinator", authority.now()
    own = authority.load_authority((kits / "ca.key").read_bytes(), (kits / "ca.crt").read_bytes())
    other, messages = authority.new_authority("Skin"), set()
    for signer, address, start, end in (
        (other, "localhost", 0, 9),
        (own, "elsewhere.example", 0, 9),
        (own, "localhost", -9, -1),
        (own, "localhost", 5, 9),
    ):
        monkeypatch.setattr(authority, "now", lambda start=start: at + timedelta(days=start))
        key, certificate = authority.new_server(signer, address, at + timedelta(days=end))
        (folder / "server.crt").write_bytes(certificate)
        (folder / "server.key").write_bytes(key)
        with pytest.raises(NetworkError) as caught:
            kit.load(folder)
        assert caught.value.code == "kit-certificate"
        messages.add(caught.value.what)
    assert len(messages) == 4


def test_a_kit_of_the_other_role_is_refused(kits: Path) -> None:
    assert code_of(kits / "coordinator", "site") == "kit-role"
    assert code_of(kits / "sites" / "north", "coordinator") == "kit-role"


def test_a_kit_is_refused_before_and_after_its_time(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kits / "sites" / "north"
    own = kit.load(folder)
    for at, code in (
        (own.issued - timedelta(minutes=61), "kit-early"),
        (own.issued - timedelta(minutes=59), ""),
        (own.expires - timedelta(seconds=1), ""),
        (own.expires, "kit-expired"),
        (own.expires + timedelta(days=4000), "kit-expired"),
    ):
        monkeypatch.setattr(kit, "now", lambda at=at: at)
        if code:
            assert code_of(folder) == code
        else:
            kit.load(folder)


def test_a_roster_without_the_site_itself_is_refused(kits: Path) -> None:
    folder = kits / "sites" / "north"
    resign(kits, folder, site="west")
    assert code_of(folder) == "kit-damaged"


def test_any_change_of_what_is_signed_is_found(kits: Path) -> None:
    """G37 (kit): flipped bits, cut and continued files, and every field that means something."""
    folder, draw, found = kits / "sites" / "north", random.Random(0), 0
    for name in ("kit.json", "kit.sig"):
        whole = (folder / name).read_bytes()
        changed = [whole[: draw.randrange(len(whole))] for _ in range(20)] + [whole + b" "]
        for _ in range(120):
            at = draw.randrange(len(whole))
            changed.append(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :])
        for content in changed:
            (folder / name).write_bytes(content)
            assert code_of(folder) in {"kit-changed", "kit-damaged", "kit-ca"}
            found += 1
        (folder / name).write_bytes(whole)
    values = json.loads((folder / "kit.json").read_bytes())
    for key, value in {
        "address": "evil.example",
        "port": 1,
        "expires": "2099-01-01T00:00:00Z",
        "site": "south",
    }.items():
        (folder / "kit.json").write_text(json.dumps({**values, key: value}))
        assert code_of(folder) == "kit-changed"
        found += 1
    print(f"\nG37 (kit): {found} of {found} changes refused")


def test_a_changed_authority_is_another_one_or_damaged(kits: Path) -> None:
    """One flipped bit of ca.crt leaves the same certificate (in its armour), or is refused."""
    folder, draw = kits / "sites" / "north", random.Random(0)
    known, whole = kit.load(folder), (folder / "ca.crt").read_bytes()
    for _ in range(200):
        at = draw.randrange(len(whole))
        (folder / "ca.crt").write_bytes(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :])
        try:
            found: object = kit.load(folder)
        except NetworkError as error:
            found = error.code
        assert found in (known, "kit-ca", "kit-damaged")


def test_another_authority_is_refused(kits: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    other = made(tmp_path / "b")[0]
    folder = kits / "sites" / "north"
    shutil.copy(other / "ca.crt", folder / "ca.crt")
    assert code_of(folder) == "kit-ca"
    for name in ("kit.json", "kit.sig"):
        shutil.copy(other / "sites" / "north" / name, folder / name)
    assert code_of(folder) == "kit-key"  # a whole foreign kit around this site's own keys


def test_an_authority_of_another_kind_signs_nothing() -> None:
    own = authority.new_authority("Skin")
    assert authority.holds(own.certificate, b"x", own.sign(b"x"))
    assert not authority.holds(own.certificate, b"y", own.sign(b"x"))
    assert not authority.holds(own.certificate, b"x", b"")
