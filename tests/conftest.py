"""Settings of all tests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# Slow, shared machines: time says nothing about correctness.
settings.register_profile("confrere", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("confrere")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
