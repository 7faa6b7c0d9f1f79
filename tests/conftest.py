"""Settings of all tests, and a count of the error codes they raise (G40)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from error_codes import on_page
from hypothesis import HealthCheck, settings
from nursery import Nursery
from pages import browse

from confrere.errors import ConfrereError
from confrere.federation.transport import Failure

RAISED = pytest.StashKey[set[str]]()

# Slow, shared machines: time says nothing about correctness.
settings.register_profile("confrere", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("confrere")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begin every test, and what it sets up, with one thread: bits depend on it, and runs leave more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser without a screen."""
    yield from browse(tmp_path_factory.mktemp("profile"))


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Forks of one process that has its imports done."""
    started = Nursery({**os.environ, "OMP_NUM_THREADS": "1"}, tmp_path_factory.mktemp("nursery") / "said")
    yield started
    started.close()


def pytest_configure(config: pytest.Config) -> None:
    """Note every code that is raised in this process."""
    raised = config.stash.setdefault(RAISED, set())
    for kind in (ConfrereError, Failure):  # a failure is an error of a site, as the journal has it
        _note(kind, raised)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that are given the most time, so that no worker is left with one of them at the end."""

    def given(item: pytest.Item) -> float:
        mark = item.get_closest_marker("timeout")
        return mark.args[0] if mark else 0.0

    items.sort(key=given, reverse=True)


def _note(kind: type[Any], raised: set[str]) -> None:
    original = kind.__init__

    def noted(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        raised.add(self.code)

    kind.__init__ = noted


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist noted."""
    node.config.stash[RAISED].update(getattr(node, "workeroutput", {}).get("codes", []))


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Fail a whole run of the fast tests in which some code was never raised."""
    yield
    config, raised = session.config, session.config.stash[RAISED]
    if hasattr(config, "workeroutput"):
        config.workeroutput["codes"] = sorted(raised)
        return
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS and not config.option.keyword
    if whole and "not slow" in config.option.markexpr and session.exitstatus == 0:
        missing = on_page() - raised
        print(f"\nG40: {len(on_page()) - len(missing)} of {len(on_page())} error codes raised by a test")
        if missing:
            print(f"never raised: {', '.join(sorted(missing))}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
