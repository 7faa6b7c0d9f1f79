"""G14 and G38: what a whole run asks of the interpreter: nothing unpickled, no data executed, no socket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import confrere
from confrere.data.synthetic import make_microscopy

SOURCE = str(Path(confrere.__file__).parent)
HOOKED = Path(__file__).with_name("traced_run.py")


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    place = tmp_path_factory.mktemp("traced")
    make_microscopy(place / "data", seed=3, sites=2, images=(24, 30), size=32)
    environment = {**os.environ, "CONFRERE_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HOOKED), *(str(place / name) for name in ("data", "run", "events.json"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((place / "events.json").read_text())
    assert found["code"] == 0, done.stdout + done.stderr
    assert (place / "run" / "report.html").exists()
    return [event for event in found["events"] if event]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["socket.bind", "socket.listen", "socket.connect", "socket.getaddrinfo", "socket.sendto"]
)
def test_a_run_opens_no_socket(events: list[list[str]], kind: str) -> None:
    assert [event for event in events if event[0] == kind] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pickle.find_class", "os.system", "os.exec", "compile of data"])
def test_a_run_unpickles_nothing_and_starts_no_shell(events: list[list[str]], kind: str) -> None:
    assert [event for event in events if event[0] == kind] == []


@pytest.mark.slow
def test_code_is_only_made_by_imports_and_by_libraries_from_their_own_text(events: list[list[str]]) -> None:
    """Nothing of this package asks for code to be made; who does is the import system or an installed library."""
    made = [event for event in events if event[0] in ("exec", "compile")]
    assert made, "the hook saw nothing: it cannot have worked"
    ours = [event for event in made if event[1].startswith(SOURCE)]
    assert ours == []
    installed = [str(Path(p)) for p in sys.path if p] + ["<frozen ", "<string>", "<attrs generated", "<template>"]
    assert [event for event in made if not event[1].startswith(tuple(installed))] == []
