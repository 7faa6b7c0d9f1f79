"""What is said of the machine."""

from __future__ import annotations

import pytest
import torch

from confrere.record.machine import cores, most_threads, threads_kept


@pytest.mark.parametrize(("asked", "most"), [("1", 1), ("", None), ("many", None), ("0", None), ("999", None)])
def test_threads_are_at_most_those_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, asked: str, most: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert most_threads() == (most or cores())


def test_threads_are_given_back_after_an_error_too() -> None:
    @threads_kept()
    def stopped() -> None:
        torch.set_num_threads(2)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stopped()
    assert torch.get_num_threads() == 1
