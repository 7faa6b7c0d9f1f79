"""What bit-identity is promised for: versions, threads and processor capability."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_threads() -> int:
    """Return how many threads may work at once on one thing: the cores, or ``OMP_NUM_THREADS`` where that is less."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores(), int(asked)) if asked.isdecimal() and int(asked) else cores()


@contextmanager
def threads_kept() -> Iterator[None]:
    """Give PyTorch back at the end as many threads as it had: its caller computes too, and bits depend on threads."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> dict[str, Any]:
    """Return what bit-identity is promised for: versions, threads and processor capability."""
    packages = ("confrere", "torch", "numpy", "transformers", "safetensors", "scikit-learn", "pillow")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "system": platform.system(),
    }
