"""Flower's processes as we start them: no code that was sent, no life after their parent's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from confrere.errors import RunError
from confrere.flower.processes import SILENT, environment, flwr, lost, start, stop
from confrere.flower.site import refusal

SENT = """
from pathlib import Path
import sys
from confrere.flower.child import refuse_sent_code
home = Path(sys.argv[1])
guarded = sys.argv[2] == "guarded"
if guarded:
    refuse_sent_code(home)
sys.path.insert(0, str(home / "apps" / "evil"))
try:
    import evil_module
    print("imported")
except ModuleNotFoundError:
    print("refused")
import json, confrere.errors
print("others work")
"""


@pytest.mark.parametrize(("how", "said"), [("guarded", "refused"), ("open", "imported")])
def test_a_module_that_was_sent_is_not_importable(how: str, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "apps" / "evil"
    folder.mkdir(parents=True)
    (folder / "evil_module.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", SENT, str(tmp_path), how], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split("\n")[:2] == [said, "others work"]


def test_a_process_ends_with_the_one_that_started_it() -> None:
    inner = "import confrere.flower.child as c, time; c.end_with_parent(); print('up', flush=True); time.sleep(60)"
    outer = (
        "import subprocess, sys, time;"
        f"p = subprocess.Popen([sys.executable, '-c', {inner!r}], stdout=subprocess.PIPE, text=True);"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 30
    while time.monotonic() < until and Path(f"/proc/{child}/cmdline").exists():
        if not Path(f"/proc/{child}/cmdline").read_bytes():  # a zombie that nobody has asked after
            break
        time.sleep(0.1)
    assert time.monotonic() < until


def test_the_environment_is_silent_and_starts_our_commands(tmp_path: Path) -> None:
    env = environment(tmp_path, MORE="1")
    assert {key: env[key] for key in SILENT} == {key: SILENT[key] for key in SILENT}
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert (env["MORE"], env["FLWR_HOME"]) == ("1", str(tmp_path / "flwr"))
    shim = Path(env["PATH"].split(os.pathsep)[0]) / "flwr-clientapp"
    assert "confrere.flower.child flwr-clientapp" in shim.read_text()
    assert shim.stat().st_mode & 0o777 == 0o700


def test_a_server_that_ends_by_itself_is_said_with_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "superlink.log"
    process = start("flower-superlink", ["--no-such-option"], environment(tmp_path), log)
    assert process.wait(60) != 0
    error = lost("flower-superlink", log)
    assert error.code == "flower-ended"
    assert "--no-such-option" in error.fix
    assert log.stat().st_mode & 0o777 == 0o600
    stop(process)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("x [code: 2001] y", "node-key"),
        ("[code: 2004] Failed to activate SuperNode.", "node-refused"),
        ("Client error '409 Conflict' for url", "site-twice"),
        ("Client error '410 Gone' for url", "node-revoked"),
    ],
)
def test_being_turned_away_has_its_own_error(said: str, code: str) -> None:
    error = refusal(said, "north")
    assert error is not None
    assert (error.code, error.exit_code) == (code, 9)
    assert refusal("Connection refused", "north") is None


def test_a_failure_of_flowers_client_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="flwr supernode list failed") as caught:
        flwr(["supernode", "list", "nowhere"], environment(tmp_path))
    assert caught.value.code == "flower"


def test_a_message_needs_no_database_nor_web_server() -> None:
    """The package of Flower's commands for sites imports both; that would be a third of a message's time."""
    code = """
import sys
from confrere.flower.child import hollow
hollow("flwr.supernode.cli")
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
assert callable(flwr_clientapp)
sys.exit("sqlalchemy" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
