"""Run one of Flower's commands so that it cannot outlive us, and so that no code of a coordinator runs at a site.

    python -m confrere.flower.child flower-supernode --superlink fed.example.org:8443 ...

Flower sends the application's folder to every site and imports from it what it names. Here such a folder is no place
to import from: only what is installed at the site runs, whatever the coordinator sends.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

POLL = 1.0
"""Seconds between two looks at whether the process that started us lives."""


class _Nothing:
    """A place to import from that holds nothing."""

    def find_spec(self, name: str, target: Any = None) -> ModuleSpec | None:
        return None


def refuse_sent_code(home: Path) -> None:
    """Make everything below Flower's folder ``home`` unimportable in this process."""
    root = home.resolve()

    def hook(entry: str) -> _Nothing:
        place = Path(entry).resolve()
        if place == root or root in place.parents:
            return _Nothing()
        raise ImportError(entry)  # as the protocol of path hooks wants it: the next hook is asked

    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()


def end_with_parent() -> None:
    """End this process when the one that started it is gone, even if that was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def hollow(name: str) -> None:
    """Let the modules of a package be imported without what its ``__init__`` imports.

    That of Flower's SuperNode commands imports a database and a web server, a third of the time that a message takes.
    """
    spec = find_spec(name)
    if spec is not None:
        spec.loader = None
        sys.modules[name] = module_from_spec(spec)


def main() -> None:
    """Run the console script named by the first argument with the others."""
    command, *arguments = sys.argv[1:]
    end_with_parent()
    sys.argv = [command, *arguments]
    if command == "flwr-clientapp":
        refuse_sent_code(Path(os.environ["FLWR_HOME"]))
        hollow("flwr.supernode.cli")
        import_module("flwr.supernode.cli.flwr_clientapp").flwr_clientapp()
        return
    (script,) = entry_points(group="console_scripts", name=command)
    if command != "flower-supernode":
        script.load()()
        return
    code = 1
    try:
        script.load()()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception:
        traceback.print_exc()
    finally:  # a SuperNode that gave up leaves a thread which never ends: whoever waits for it would wait for ever
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
