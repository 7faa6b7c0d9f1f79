"""Who may not take part is refused, each in words of its own, and nothing that is sent is run at a hospital (G37)."""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hospital_processes import MARK, PATIENCE, Hospitals, hospitals, until
from members import SITES

from confrere.consortium.kit import load
from confrere.flower.coordinator import APP, Coordinator
from confrere.flower.processes import environment, flwr, free_port, start
from confrere.flower.site import refusal

pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.timeout(600)]
UNKNOWN = "an unregistered key"


class Opened(NamedTuple):
    """Hospitals, a coordinator that lets sites in, and what it said of them."""

    place: Hospitals
    coordinator: Coordinator
    events: list[dict[str, Any]]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """A coordinator that struck off south's first key, and does not know east."""
    folder, events = tmp_path_factory.mktemp("strangers"), list[dict[str, Any]]()
    with hospitals(folder) as place, pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, f"{place.mark}.coordinator")
        kits = place.kits
        with Coordinator(kit=load(kits / "coordinator", "coordinator"), host="127.0.0.1"):
            shutil.copytree(kits / "sites" / "south", folder / "revoked")
        place.provision(SITES, revoke=["south"])
        shutil.copytree(kits / "coordinator", folder / "coordinator")
        place.provision([*SITES, "east"])  # of which this coordinator gets no kit
        kit = load(folder / "coordinator", "coordinator")
        with Coordinator(kit=kit, host="127.0.0.1", notify=events.append) as coordinator:
            yield Opened(place, coordinator, events)


def refused(opened: Opened, name: str, kit: Path) -> str:
    """Return what ``confrere site`` says when it tries once; it must end, with code 9."""
    process = opened.place.site("west", "--retry", "0", kit=kit, state=f"state-{name}", process=name)
    assert opened.place.ended(name, process, PATIENCE) == 9, opened.place.said(name)
    print(f"G37: {name}: refused")
    return opened.place.said(name)


def by_hand(opened: Opened, name: str, key: bytes | None) -> str:
    """Return what Flower's own SuperNode says, started without our checks; it must end by itself."""
    kit = load(opened.place.kits / "sites" / "north", "site")
    env = environment(opened.place.folder / name, **{MARK: f"{opened.place.mark}.{name}"})
    words = ["--superlink", kit.target, "--root-certificates", str(kit.folder / "ca.crt"), "--max-retries", "1"]
    if key is not None:
        (opened.place.folder / f"{name}.key").write_bytes(key)
        words += ["--auth-supernode-private-key", str(opened.place.folder / f"{name}.key")]
    log = opened.place.folder / f"{name}.log"
    process = start("flower-supernode", [*words, "--port", str(free_port())], env, log)
    assert opened.place.ended(name, process, PATIENCE) != 0
    return log.read_text()


def openssh(key: Any) -> bytes:
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


def test_a_key_that_is_not_registered(opened: Opened) -> None:
    said = refused(opened, "unregistered", opened.place.kits / "sites" / "east")
    assert "Code: node-refused" in said, said
    assert opened.events[-1] == {"event": "refused", "code": "node-refused", "site": UNKNOWN, "address": "127.0.0.1"}


def test_a_key_that_was_revoked(opened: Opened) -> None:
    said = refused(opened, "revoked", opened.place.folder / "revoked")
    assert "Code: node-revoked" in said, said
    assert opened.events[-1] == {"event": "refused", "code": "node-revoked", "address": "127.0.0.1"}


def test_no_key(opened: Opened) -> None:
    bare = shutil.copytree(opened.place.kits / "sites" / "west", opened.place.folder / "bare")
    (bare / "node.key").unlink()
    assert "node.key is missing" in refused(opened, "no-key", bare)
    said = by_hand(opened, "no-key-by-hand", None)
    error = refusal(said, "west")
    assert error is not None, said
    assert error.code == "node-key"


def test_a_key_of_the_wrong_type(opened: Opened) -> None:
    other = shutil.copytree(opened.place.kits / "sites" / "west", opened.place.folder / "other")
    (other / "node.key").write_bytes(openssh(ed25519.Ed25519PrivateKey.generate()))
    said = refused(opened, "wrong-type", other)
    assert "node.key holds no OpenSSH private key on a NIST curve" in said, said
    assert "Code: kit-key" in said
    assert "Unable to parse" in by_hand(opened, "ed25519", openssh(ed25519.Ed25519PrivateKey.generate()))
    assert refusal(by_hand(opened, "p256", openssh(ec.generate_private_key(ec.SECP256R1()))), "west") is not None


CONTROL = ("control/start-run", "control/list-runs", "control/register-node", "control/pull-artifacts")
RUNTIME = ("runtime/acquire-task", "runtime/push-messages", "runtime/pull-messages", "runtime/create-task")
ROUNDABOUT = ("/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "//v1/control/start-run", "/")


@pytest.mark.parametrize("path", [*(f"/v1/{name}" for name in CONTROL + RUNTIME), *ROUNDABOUT])
def test_hospitals_reach_only_what_they_need(opened: Opened, path: str) -> None:
    kit = opened.coordinator.kit
    trusted = ssl.create_default_context(cafile=str(kit.folder / "ca.crt"))
    with httpx.Client(verify=trusted, trust_env=False, timeout=60.0) as client:
        before = len(opened.events)
        assert client.post(f"https://{kit.target}{path}", content=b"").status_code == 404
        assert [event["code"] for event in opened.events[before:]] == ["not-fleet"]
        fleet = client.post(f"https://{kit.target}/v1/fleet/activate-node", content=b"")
    assert fleet.status_code not in (404, 503)


EVIL_SERVER = """
import time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    while {node} not in grid.get_node_ids():
        time.sleep(0.5)
    content = RecordDict({{"header": ConfigRecord({{"json": "{{}}"}})}})
    message = Message(content=content, message_type="query", dst_node_id={node}, ttl=600.0)
    (reply,) = grid.send_and_receive([message], timeout=300.0)
    said = reply.error.reason if reply.has_error() else reply.content["header"]["json"]
    Path({report!r}).with_suffix(".part").write_text(said)
    Path({report!r}).with_suffix(".part").rename({report!r})
"""
EVIL_CLIENT = """
from pathlib import Path
from flwr.clientapp import ClientApp

Path({canary!r}).write_text("ran")
app = ClientApp()
"""


@pytest.mark.parametrize("entry", ["evil.client:app", "confrere.flower.client:app"])
def test_sent_code_is_not_run_at_a_hospital(opened: Opened, tmp_path: Path, entry: str) -> None:
    """Neither a module that the coordinator names, nor one that stands in the way of an installed one."""
    place, canary, report = opened.place, tmp_path / "canary", tmp_path / "report"
    app = tmp_path / "app"
    sent = {"evil/server.py": EVIL_SERVER, "evil/client.py": EVIL_CLIENT, "safetensors/__init__.py": EVIL_CLIENT}
    for name, text in sent.items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(
            text.format(node=opened.coordinator.nodes["west"], report=str(report), canary=str(canary))
        )
    (app / "evil/__init__.py").touch()
    ours = APP.format(version=opened.coordinator.kit.confrere)
    ours = ours.replace("confrere.flower.server:app", "evil.server:app").replace("confrere.flower.client:app", entry)
    (app / "pyproject.toml").write_text(ours)
    if not place.running("west"):
        place.site("west")
    flwr(["run", str(app), "here"], opened.coordinator.env)
    until(report.exists, PATIENCE, "the hospital answered")
    files = [file.read_text() for file in (place.state / "west" / "flower").rglob("evil/client.py")]
    delivered = [text for text in files if str(canary) in text]  # an earlier run's may lie there too
    assert delivered, "the code never reached the hospital: nothing was tested"
    assert not canary.exists()
    exec(compile(delivered[0], "evil", "exec"), {})  # what it would have done
    assert canary.exists()
    said = report.read_text()
    assert ("message-form" in said) == (entry == "confrere.flower.client:app"), said
