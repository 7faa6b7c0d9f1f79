"""Kits are made whole, brought up to date without touching keys, and never printed."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from consortium_kits import ROSTER, made, roster
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from confrere.consortium import authority, commands, keys, kit
from confrere.consortium.policy import TEMPLATE
from confrere.consortium.provision import provision
from confrere.errors import ConfigError, NetworkError, RunError

PRIVATE = ("ca.key", "coordinator/server.key", "sites/north/node.key", "sites/north/identity.key")
THIRD = ROSTER + '\n[[sites]]\nname = "west"\n'


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_every_file_is_there_and_nobody_else_reads_it(tmp_path: Path) -> None:
    kits, found = made(tmp_path)
    site = {"kit.json", "kit.sig", "ca.crt", "node.key", "node.pub", "identity.key", "identity.pub", "policy.toml"}
    coordinator = {"kit.json", "kit.sig", "ca.crt", "server.crt", "server.key", "nodes/north.pub", "nodes/south.pub"}
    files = {f"sites/{name}/{file}" for name in ("north", "south") for file in site}
    assert set(content(kits)) == {"ca.key", "ca.crt"} | {f"coordinator/{file}" for file in coordinator} | files
    for path in (kits, *kits.rglob("*")):
        if path != kits / "sites":  # within a folder that only its owner opens
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert {change for change, _ in found.sites.values()} == {"new"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_server_certificate_is_one_that_strict_checks_accept(kits: Path) -> None:
    ca, server = (authority.load_certificate((kits / "coordinator" / n).read_bytes()) for n in ("ca.crt", "server.crt"))
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.key_encipherment
    assert isinstance(ca.public_key(), ec.EllipticCurvePublicKey)
    assert ca.public_key().curve.name == "secp384r1"
    use = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [one.dotted_string for one in use] == ["1.3.6.1.5.5.7.3.1"]
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    verifier = x509.verification.PolicyBuilder().store(x509.verification.Store([ca]))
    assert len(verifier.build_server_verifier(x509.DNSName("localhost")).verify(server, [])) == 2


@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("coordinator.example.org", ["coordinator.example.org"]),
        ("10.0.0.7", ["10.0.0.7"]),
        ("localhost", ["localhost", "127.0.0.1"]),
        ("127.0.0.1", ["127.0.0.1", "localhost"]),
    ],
)
def test_the_certificate_names_the_address_and_this_machine_only_where_it_is_this_one(
    address: str, names: list[str]
) -> None:
    own = authority.new_authority("Skin")
    certificate = authority.load_certificate(authority.new_server(own, address, authority.now() + timedelta(days=9))[1])
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in found] == names
    assert authority.covers(certificate, address)
    assert not authority.covers(certificate, "other.example.org")


def test_node_keys_are_what_flower_takes(kits: Path) -> None:
    """As ``flower-supernode --auth-supernode-private-key`` and ``flwr supernode register`` load them."""
    from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve

    site = kits / "sites" / "north"
    private = serialization.load_ssh_private_key((site / "node.key").read_bytes(), None)
    public = serialization.load_ssh_public_key((kits / "coordinator" / "nodes" / "north.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert uses_nist_ec_curve(public)
    assert private.public_key() == public


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs ssh-keygen")
def test_fingerprints_are_those_of_other_programs(kits: Path) -> None:
    site = kits / "sites" / "north"
    done = subprocess.run(["ssh-keygen", "-lf", site / "node.pub"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:3] == ["384", keys.fingerprint(kit.load(site).sites["north"].node), "north"]


def test_the_command_prints_fingerprints_and_no_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands.provision(roster(tmp_path), tmp_path / "kits")
    said = capsys.readouterr().out
    own = kit.load(tmp_path / "kits" / "sites" / "north")
    assert authority.colons(own.ca) in said
    assert keys.fingerprint(own.sites["north"].node) in said
    for name in PRIVATE:
        for line in (tmp_path / "kits" / name).read_text().splitlines():
            assert line.strip() not in said


def test_later_runs_add_sites_and_keep_keys(kits: Path, tmp_path: Path) -> None:
    before = content(kits)
    (kits / "sites" / "north" / "policy.toml").write_text("most_rounds = 3\n")
    found = provision(roster(tmp_path, THIRD), kits)
    after = content(kits)
    assert {name: change for name, (change, _) in found.sites.items()} == {
        "north": "kept",
        "south": "kept",
        "west": "new",
    }
    same = {name for name in before if before[name] == after[name]}
    assert {*PRIVATE, "ca.crt", "coordinator/server.crt", "sites/south/node.key"} <= same
    assert after["sites/north/policy.toml"] == b"most_rounds = 3\n"
    assert after["sites/west/policy.toml"] == TEMPLATE.encode()
    for folder in (kits / "coordinator", *(kits / "sites").iterdir()):
        assert set(kit.load(folder).sites) == {"north", "south", "west"}


def test_keys_may_be_deleted_here_and_a_site_takes_two_files_of_a_later_kit(kits: Path, tmp_path: Path) -> None:
    before, here = kit.load(kits / "coordinator"), kits / "sites" / "north"
    there = Path(shutil.copytree(here, tmp_path / "north"))
    for name in ("node.key", "identity.key"):
        (here / name).unlink()
    provision(roster(tmp_path, THIRD), kits)
    assert not {"node.key", "identity.key"} & {file.name for file in here.iterdir()}
    after = kit.load(kits / "coordinator")
    assert {name: after.sites[name] for name in before.sites} == before.sites
    for name in ("kit.json", "kit.sig"):
        shutil.copy(here / name, there)
    assert kit.load(there).sites == after.sites


def test_a_run_that_was_killed_is_run_again(kits: Path, tmp_path: Path) -> None:
    """Whatever of the last writes is missing, or half there, the next run makes it whole."""
    for name in ("south/kit.sig", "south/identity.key", "south/identity.pub", "north/node.pub", "north/policy.toml"):
        (kits / "sites" / name).unlink()
    (kits / "coordinator" / "nodes" / "north.pub").unlink()
    shutil.copy(kits / "coordinator" / "kit.sig", kits / "sites" / "north" / "kit.sig")
    provision(roster(tmp_path), kits)
    for folder in (kits / "coordinator", *(kits / "sites").iterdir()):
        kit.load(folder)


def test_renewing_makes_a_new_certificate_and_new_dates(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, before = kit.load(kits / "sites" / "north"), content(kits)
    later = old.expires + timedelta(days=1)
    for module in ("authority", "kit", "provision"):
        monkeypatch.setattr(f"confrere.consortium.{module}.now", lambda: later)
    with pytest.raises(ConfigError, match="ended on") as caught:
        provision(roster(tmp_path), kits)
    assert caught.value.code == "provision"
    found = provision(roster(tmp_path), kits, renew=True)
    new = kit.load(kits / "sites" / "north")
    assert new.expires == found.expires == later + timedelta(days=90)
    assert kit.load(kits / "coordinator").expires == new.expires
    assert (new.ca, new.sites) == (old.ca, old.sites)
    changed = {name for name, value in content(kits).items() if before[name] != value}
    assert {name.rsplit("/", 1)[-1] for name in changed} == {"kit.json", "kit.sig", "server.crt", "server.key"}
    monkeypatch.setattr("confrere.consortium.provision.now", lambda: later + timedelta(days=3600))
    with pytest.raises(ConfigError, match="authority ends"):
        provision(roster(tmp_path), kits, renew=True)


def test_a_revoked_site_is_gone_and_one_that_is_rekeyed_has_new_keys(kits: Path, tmp_path: Path) -> None:
    old = kit.load(kits / "sites" / "north").sites["north"]
    three = provision(roster(tmp_path, THIRD), kits)
    assert set(three.sites) == {"north", "south", "west"}
    found = provision(roster(tmp_path), kits, revoke=["west", "north"])
    assert (found.sites["west"], found.sites["north"][0], found.sites["south"][0]) == (("removed", ""), "new", "kept")
    assert not (kits / "sites" / "west").exists()
    assert not (kits / "coordinator" / "nodes" / "west.pub").exists()
    new = kit.load(kits / "coordinator")
    assert set(new.sites) == {"north", "south"}
    assert new.sites["north"].node != old.node
    assert new.sites["north"].identity != old.identity


def own_keys(folder: Path, name: str) -> str:
    """Make keys as a site may, and return its lines of the roster."""
    node, identity = keys.new_node_key(), keys.new_identity_key()
    (folder / f"{name}.key").write_bytes(node)
    (folder / f"{name}.pub").write_text(keys.node_public(node) + " it@north\n")
    (folder / f"{name}-identity.key").write_bytes(identity)
    (folder / f"{name}-identity.pem").write_bytes(keys.identity_pem(keys.identity_public(identity)))
    return f'public_key = "{name}.pub"\nidentity_key = "{name}-identity.pem"\n'


def test_a_site_may_make_its_keys_itself(tmp_path: Path) -> None:
    text = ROSTER.replace('organisation = "North General"\n', own_keys(tmp_path, "n"))
    provision(roster(tmp_path, text), tmp_path / "kits")
    folder = tmp_path / "kits" / "sites" / "north"
    assert {file.name for file in folder.iterdir()} == {"kit.json", "kit.sig", "ca.crt", "policy.toml"}
    with pytest.raises(NetworkError, match=r"node\.key is missing") as caught:
        kit.load(folder)
    assert caught.value.code == "kit-key"
    for own, name in (("n.key", "node.key"), ("n-identity.key", "identity.key")):
        shutil.copy(tmp_path / own, folder / name)
        (folder / name).chmod(0o600)
    assert kit.load(folder).site == "north"
    with pytest.raises(ConfigError) as refused:
        provision(roster(tmp_path, text), tmp_path / "kits", revoke=["north"])
    assert refused.value.code == "site-key"
    assert "still gives the key" in str(refused.value)


@pytest.mark.skipif(not (shutil.which("ssh-keygen") and shutil.which("openssl")), reason="needs ssh-keygen, openssl")
def test_the_page_says_how_a_site_makes_its_keys(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "consortium.md").read_text()
    (script,) = [block for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if "ssh-keygen -q" in block]
    subprocess.run(["sh", "-e", "-c", script], cwd=tmp_path, check=True)
    lines = 'public_key = "node.key.pub"\nidentity_key = "identity.pem"\n'
    provision(roster(tmp_path, ROSTER.replace('organisation = "North General"\n', lines)), tmp_path / "kits")
    folder = tmp_path / "kits" / "sites" / "north"
    for name in ("node.key", "identity.key"):
        shutil.move(tmp_path / name, folder)
    assert kit.load(folder).site == "north"


def test_two_sites_cannot_have_one_key(tmp_path: Path) -> None:
    lines = own_keys(tmp_path, "n")
    text = ROSTER.replace('organisation = "North General"\n', lines) + lines
    with pytest.raises(ConfigError, match="two sites have the same node key") as caught:
        provision(roster(tmp_path, text), tmp_path / "kits")
    assert caught.value.code == "site-key"
    assert not (tmp_path / "kits").exists()


@pytest.mark.parametrize("spoil", ["missing", "other kind", "private", "damaged"])
def test_a_public_key_that_cannot_be_used_is_refused(tmp_path: Path, spoil: str) -> None:
    text = ROSTER.replace('organisation = "North General"\n', own_keys(tmp_path, "n"))
    file = tmp_path / "n.pub"
    if spoil == "missing":
        file.unlink()
    elif spoil == "other kind":
        key = keys.Ed25519PrivateKey.generate().public_key()
        file.write_bytes(key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH))
    else:
        file.write_bytes((tmp_path / "n.key").read_bytes() if spoil == "private" else b"ecdsa-sha2-nistp384 AAAA")
    with pytest.raises(ConfigError, match="site north cannot be used") as caught:
        provision(roster(tmp_path, text), tmp_path / "kits")
    assert caught.value.code == "site-key"
    assert "BEGIN" not in str(caught.value)


def test_what_is_there_is_not_overwritten(kits: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    cases = [
        (ROSTER, other, (), "kit-exists", "something else"),
        (ROSTER, tmp_path / "new", ("north",), "provision", "no kit of 'north'"),
        (ROSTER, kits, ("nroth",), "provision", "no kit of 'nroth'"),
        (ROSTER.replace("north", "nroth"), kits, (), "provision", "'north', which has a kit"),
        (ROSTER.replace("Skin", "Eye"), kits, (), "provision", "kits of 'Skin'"),
        (ROSTER.replace('"localhost"', '"10.0.0.7"'), kits, (), "provision", "not for 10.0.0.7"),
    ]
    before = content(kits), content(other)
    for text, out, revoke, code, words in cases:
        with pytest.raises(ConfigError) as caught:
            provision(roster(tmp_path, text), out, revoke=revoke)
        assert (caught.value.code, words in str(caught.value)) == (code, True), str(caught.value)
        assert caught.value.fix
    assert (content(kits), content(other)) == before


def test_damaged_keys_are_named_not_replaced(kits: Path, tmp_path: Path) -> None:
    (kits / "sites" / "south" / "node.key").write_text("x")
    with pytest.raises(NetworkError, match="--revoke south") as caught:
        provision(roster(tmp_path), kits)
    assert caught.value.code == "kit-key"
    (kits / "ca.key").write_text("x")
    with pytest.raises(NetworkError, match="belong together") as damaged:
        provision(roster(tmp_path), kits)
    assert damaged.value.code == "kit-damaged"


def test_a_failed_first_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RunError("cannot write 9 bytes: No space left on device", code="cannot-write")

    monkeypatch.setattr("confrere.consortium.provision.new_server", full)
    path = roster(tmp_path)
    with pytest.raises(RunError):
        provision(path, tmp_path / "kits")
    assert list(tmp_path.iterdir()) == [path]


def test_keys_that_cannot_be_deleted_are_told(kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", denied)
    with pytest.raises(RunError, match="cannot delete the keys"):
        provision(roster(tmp_path), kits, revoke=["north"])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    commands.check_extra("cryptography")
    with pytest.raises(Exception, match=r"confrere\[flower\]"):
        commands.check_extra("no_such_package")
