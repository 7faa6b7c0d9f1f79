"""The fuzzers' targets, for a moment: any bytes, and whole inputs with a few bytes changed, cut or doubled."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "fuzz"))
import fuzz_checkpoint
import fuzz_journal
import fuzz_manifest
import fuzz_update

TARGETS = (fuzz_checkpoint, fuzz_journal, fuzz_manifest, fuzz_update)


@st.composite
def damaged(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """Return a seed whose first byte, which chooses the parser, stands."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(1, max(1, len(data) - 1)))
        change = draw(st.sampled_from(("set", "cut", "double", "insert")))
        if change == "set" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif change == "cut":
            del data[at : at + draw(st.integers(1, 30))]
        elif change == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 30))]
        else:
            words = st.sampled_from(
                (b"nan", b"1e400", b"{", b"[[", b'"', b"\0", b"\xff", b"null", b"-1", b"../", b"\n")
            )
            data[at:at] = draw(words)
    return bytes(data)


@pytest.mark.parametrize("module", TARGETS, ids=lambda module: module.__name__)
def test_only_our_own_errors_come_out(module: ModuleType) -> None:
    @given(
        damaged(module.SEEDS)
        | st.tuples(st.sampled_from(module.SEEDS), st.binary(max_size=200)).map(lambda x: x[0][:1] + x[1])
    )
    @settings(max_examples=150)
    def run(data: bytes) -> None:
        module.target(data)

    run()


@pytest.mark.parametrize("module", TARGETS, ids=lambda module: module.__name__)
def test_what_is_whole_is_read(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that refused its own seeds would find nothing."""
    refused: list[str] = []
    monkeypatch.setattr(module.ConfrereError, "__str__", lambda error: refused.append(error.what) or error.what)
    for seed in module.SEEDS:
        module.target(seed)
    allowed = ("damaged", "changed", "lacks")  # seeds of a header or a seal alone are not whole
    assert not [what for what in refused if module is not fuzz_update or not any(a in what for a in allowed)]
