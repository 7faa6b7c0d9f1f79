"""``confrere doctor --site KIT`` finds what would keep a site from taking part, a line for each check."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consortium_kits import ROSTER, roster
from packaging.requirements import Requirement
from PIL import Image
from tls_server import answering, serving

import confrere
from confrere import cli
from confrere.consortium import kit
from confrere.consortium.doctor import examine_site
from confrere.consortium.provision import provision
from confrere.doctor import Finding, verdict

FAST = ["backbone.name=test-vit", "adapter.blocks=2", "train.batch_size=4"]
WAY = ["dns", "port", "tls", "clock"]


@pytest.fixture(autouse=True)
def _clean(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFRERE_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of one site."""
    root, rng = tmp_path_factory.mktemp("data") / "hospitals", np.random.default_rng(0)
    for label, name in enumerate(("benign", "malignant")):
        (root / "north" / name).mkdir(parents=True)
        for k in range(16):
            pixels = rng.integers(0, 120, (34, 36, 3), dtype=np.uint8)
            pixels[..., label] += 90
            Image.fromarray(pixels).save(root / "north" / name / f"{name}{k}__1.png")
    return root


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    """The kit of a site whose coordinator answers."""
    listening = socket.create_server(("127.0.0.1", 0))
    provision(roster(tmp_path, port=listening.getsockname()[1]), tmp_path / "kits")
    with serving(coordinator(tmp_path), listening):
        yield tmp_path / "kits" / "sites" / "north"


def coordinator(folder: Path, ahead: float = 0) -> Any:
    files = folder / "kits" / "coordinator"
    return answering(folder, (files / "server.crt").read_bytes(), (files / "server.key").read_bytes(), ahead=ahead)


def found(folder: Path, **options: Any) -> dict[str, Finding]:
    """Return the worst finding of every check."""
    rank = {"ok": 0, "warning": 1, "error": 2}
    worst: dict[str, Finding] = {}
    for one in examine_site(folder, timeout=2, **options):
        if one.check not in worst or rank[one.level] > rank[worst[one.check].level]:
            worst[one.check] = one
    return worst


def test_nothing_is_found_where_nothing_is_wrong(
    served: Path, hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("confrere.consortium.doctor.requirements", lambda extra: [Requirement("flwr>=1.41")])
    findings = found(served, data=hospitals, overrides=FAST, out=tmp_path / "state")
    assert [one for one in findings.values() if one.level != "ok"] == []
    assert {
        "kit",
        "authority",
        "node key",
        "policy",
        *WAY,
        "versions",
        "disk",
        "cache",
        "out",
        "data",
        "backbone",
    } <= set(findings)
    own = kit.load(served)
    assert own.ca[:2].upper() in findings["authority"].what
    assert "north of Skin, 2 sites" in findings["kit"].what
    assert f"confrere {confrere.__version__}, flwr 1." in findings["versions"].what
    assert "localhost, 127.0.0.1" in findings["tls"].what


def test_without_data_the_way_to_the_coordinator_is_looked_at(served: Path) -> None:
    findings = found(served)
    assert verdict(list(findings.values())) == 0
    assert "data" not in findings


def test_the_way_there_ends_at_the_first_thing_that_is_wrong(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def way(folder: Path) -> list[str]:
        return [one.level for one in found(folder).values() if one.check in WAY]

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    provision(roster(tmp_path, port=port), kits)
    folder = kits / "sites" / "north"
    assert way(folder) == ["ok", "error"]
    listening = socket.create_server(("127.0.0.1", port))
    with serving(lambda connection: None, listening):
        assert way(folder) == ["ok", "ok", "error"]
    listening = socket.create_server(("127.0.0.1", port))
    with serving(coordinator(tmp_path, ahead=900), listening):
        assert way(folder) == ["ok", "ok", "ok", "error"]
    listening = socket.create_server(("127.0.0.1", port))
    with serving(coordinator(tmp_path, ahead=60), listening):
        findings = found(folder)
    assert findings["clock"].level == "warning"
    assert "ahead" in findings["clock"].what

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert way(folder) == ["error"]
    assert found(folder)["dns"].code == "net-dns"


def test_a_spoilt_kit_ends_nothing_but_itself(kits: Path, hospitals: Path) -> None:
    folder = kits / "sites" / "north"
    (folder / "node.key").chmod(0o644)
    findings = found(folder, data=hospitals, overrides=FAST)
    assert (findings["kit"].level, findings["kit"].code, findings["kit"].exit_code) == ("error", "kit-mode", 9)
    assert {"policy", "python", "versions", "cache", "disk"} <= set(findings)
    assert not set(WAY) & set(findings)


def test_a_kit_that_ends_soon_or_of_another_version_is_a_warning(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = kit.load(served)
    monkeypatch.setattr("confrere.consortium.doctor.now", lambda: own.expires - timedelta(days=29))
    monkeypatch.setattr(confrere, "__version__", "9.9")
    findings = found(served)
    assert findings["kit"].level == "warning"
    assert "--renew" in findings["kit"].fix
    assert findings["versions"].level == "warning"
    assert "9.9 is installed" in findings["versions"].what


def test_a_missing_package_is_an_error(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("confrere.consortium.doctor.requirements", lambda extra: [Requirement("no-such-package>=1")])
    missing = found(served)["versions"]
    assert (missing.level, missing.exit_code, missing.code) == ("error", 8, "missing-extra")
    assert "no-such-package is not installed" in missing.what


def test_a_proxy_is_a_warning(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    assert found(served)["proxy"].fix == "set NO_PROXY=localhost"
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert "proxy" not in found(served)


def test_the_policy_is_read_and_asked(served: Path, hospitals: Path) -> None:
    file = served / "policy.toml"
    file.write_text("most_round = 3")
    assert found(served)["policy"].code == "unknown-key"
    file.unlink()
    assert found(served)["policy"].code == "unreadable-file"
    for text, code in (
        ("methods = ['fedit']", "policy-method"),
        ("least_examples = 500", "policy-examples"),
        (f"[backbones]\ntest-vit = '{'a' * 64}'", "policy-backbone"),
    ):
        file.write_text(text)
        findings = found(served, data=hospitals, overrides=FAST)
        assert (findings["policy"].code, findings["policy"].exit_code) == (code, 10)
        assert findings["data"].level == "ok"


def test_data_that_do_not_fit_are_found(served: Path, hospitals: Path, tmp_path: Path) -> None:
    for name in ("north", "north/benign"):
        (tmp_path / "hospitals" / name).mkdir(parents=True, exist_ok=True)
    source = hospitals / "north" / "benign" / "benign0__1.png"
    spoilt = tmp_path / "hospitals"
    (spoilt / "north" / "benign" / "a__1.png").write_bytes(b"no image")
    empty = found(served, data=spoilt, overrides=FAST)["data"]
    assert (empty.level, empty.code) == ("error", "too-few-images")
    (spoilt / "north" / "maligant").mkdir()
    (spoilt / "north" / "maligant" / "b__1.png").write_bytes(source.read_bytes())
    typed = found(served, data=spoilt, overrides=FAST)["data"]
    assert (typed.level, typed.code) == ("error", "classes")
    assert "maligant" in typed.what
    (spoilt / "north").rename(spoilt / "nroth")
    other = found(served, data=spoilt, overrides=FAST)["data"]
    assert (other.level, other.code) == ("error", "unknown-site")
    assert found(served, data=tmp_path / "none", overrides=FAST)["data"].level == "error"


def test_the_experiment_is_the_one_that_is_planned(served: Path, hospitals: Path, tmp_path: Path) -> None:
    config = tmp_path / "experiment.toml"
    config.write_text('method = "fedit"\nrounds = 500\n[backbone]\nname = "test-vit"\nsha256 = "' + "0" * 64 + '"\n')
    findings = found(served, data=hospitals, config=config, overrides=["adapter.blocks=2"])
    assert findings["policy"].code == "policy-rounds"
    assert findings["backbone"].code == "weights-hash"
    config.write_text("round = 3")
    assert found(served, data=hospitals, config=config)["experiment"].code == "unknown-key"
    assert found(served, data=hospitals, overrides=["method.name=pooled"])["experiment"].code == "across-hospitals"


def test_the_commands(
    tmp_path: Path, hospitals: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["confrere", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return int(done.value.code or 0), "".join(capsys.readouterr())

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path, kits = roster(tmp_path, ROSTER, port), tmp_path / "kits"
    code, text = run("provision", path, "--out", kits)
    assert (code, "north  new" in text, "south  new" in text) == (0, True, True)
    assert run("provision", path, "--out", kits, "--renew", "--revoke", "south")[0] == 0
    assert run("provision", path, "--out", kits, "--revoke", "west")[0] == 2
    folder = kits / "sites" / "north"
    code, text = run("doctor", "--site", folder, "--data", hospitals, *FAST, "--json")
    told = json.loads(text)
    assert code == told["exit_code"] == 9
    assert [one["code"] for one in told["findings"] if one["level"] == "error"] == ["net-refused"]
    code, text = run("doctor", "--site", folder)
    assert (code, "nothing listens on this port" in text) == (9, True)
    assert run("doctor", hospitals, "--site", folder)[0] == 2
