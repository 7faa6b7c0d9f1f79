"""Writing and reading one file: a refusal at any call keeps the old file, any other byte is noticed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from confrere.errors import RunError
from confrere.record import files
from confrere.record.files import read_json, read_state, write_bytes, write_json, write_state
from confrere.tensors import digest

STATE = {"shared": {"w": torch.arange(6.0).reshape(2, 3)}, "private": {"n": torch.tensor([1, 2])}}
META = {"round": 3, "site": "köln", "metrics": {"loss": 0.25, "overlap": None}}


class FullDisk:
    """A file that takes half of what it is given, then there is no space."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.inner.close()

    def write(self, content: bytes) -> int:
        self.inner.write(content[: len(content) // 2])
        self.inner.flush()
        raise OSError(28, os.strerror(28))


def refuse(*_: object, **__: object) -> None:
    raise OSError(28, os.strerror(28))


def break_at(patch: pytest.MonkeyPatch, call: str) -> None:
    if call == "mkstemp":
        patch.setattr(files.tempfile, "mkstemp", refuse)
    elif call == "write":
        real = os.fdopen
        patch.setattr(files.os, "fdopen", lambda *a, **k: FullDisk(real(*a, **k)))
    else:
        patch.setattr(files.os, call, refuse)


@pytest.mark.parametrize("call", ["mkstemp", "write", "fsync", "replace"])
@pytest.mark.parametrize("old", [b"old", None], ids=["over a file", "new"])
def test_a_refused_write_changes_nothing_and_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, old: bytes | None
) -> None:
    target = tmp_path / "results.json"
    if old is not None:
        target.write_bytes(old)
    with monkeypatch.context() as patch:
        break_at(patch, call)
        with pytest.raises(RunError, match=r"cannot write 5,000 bytes: No space left") as error:
            write_bytes(target, b"x" * 5000)
    assert error.value.where == str(target)
    assert [f.name for f in tmp_path.iterdir()] == ([] if old is None else ["results.json"])
    assert old is None or target.read_bytes() == old
    write_bytes(target, b"later")  # nothing is left in the way
    assert target.read_bytes() == b"later"


def test_an_interrupt_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "x", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write") as error:
        write_bytes(tmp_path / "file" / "deep" / "x.json", b"x")
    assert error.value.where == str(tmp_path / "file" / "deep" / "x.json")


def test_folders_that_are_made_belong_to_the_user_alone(tmp_path: Path) -> None:
    write_bytes(tmp_path / "sites" / "a.json", b"{}")
    assert (tmp_path / "sites").stat().st_mode & 0o077 == 0
    assert (tmp_path / "sites" / "a.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("nan")]}])
def test_numbers_that_are_no_json_are_not_written(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe\x00", b"{} {}"])
def test_damaged_json_names_the_file_and_quotes_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(RunError, match="damaged") as error:
        read_json(tmp_path / "results.json")
    assert error.value.where == str(tmp_path / "results.json")
    with pytest.raises(RunError, match="missing"):
        read_json(tmp_path / "none.json")


values = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool])
names = st.text(st.characters(codec="utf-8", exclude_categories=["C"], exclude_characters="/"), min_size=1, max_size=8)


@given(
    groups=st.dictionaries(
        names.filter(lambda n: n != "__metadata__"),
        st.dictionaries(names, st.tuples(values, st.lists(st.integers(0, 3), max_size=3)), min_size=1, max_size=3),
        max_size=3,
    ),
    meta=st.dictionaries(
        names, st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | names, max_size=3
    ),
)
def test_any_state_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, groups: dict[str, Any], meta: dict[str, Any]
) -> None:
    state = {
        g: {n: torch.from_numpy(np.arange(int(np.prod(s))).reshape(s)).to(d) for n, (d, s) in tensors.items()}
        for g, tensors in groups.items()
    }
    path = tmp_path_factory.mktemp("any") / "s.safetensors"
    write_state(path, state, meta)
    back, kept = read_state(path)
    assert digest(back) == digest(state)
    assert back.keys() == state.keys()
    assert kept == meta


def test_a_transposed_tensor_is_written_as_it_reads(tmp_path: Path) -> None:
    turned = torch.arange(6.0).reshape(2, 3).T
    write_state(tmp_path / "s.safetensors", {"g": {"w": turned}}, {})
    assert torch.equal(read_state(tmp_path / "s.safetensors")[0]["g"]["w"], turned)


@given(data=st.data(), value=st.integers(0, 255))
def test_no_other_byte_passes_for_the_state(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: int
) -> None:
    path = tmp_path_factory.mktemp("byte") / "s.safetensors"
    write_state(path, STATE, META)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = value
    path.write_bytes(bytes(content))
    try:
        state, meta = read_state(path)
    except RunError:
        with pytest.raises(RunError, match=re.escape(str(path))):
            read_state(path)
        return
    assert digest(state) == digest(STATE)  # the same byte, or white space of the header
    assert meta == META


def test_every_truncation_and_anything_appended_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    write_state(path, STATE, META)
    whole = path.read_bytes()
    for end in range(0, len(whole), 3):
        path.write_bytes(whole[:end])
        with pytest.raises(RunError, match=r"damaged|changed"):
            read_state(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(RunError, match=r"damaged|changed"):
        read_state(path)


def test_a_plain_safetensors_file_is_no_state(tmp_path: Path) -> None:
    for header in (None, {"confrere": "[]"}, {"confrere": "{"}, {"confrere": '{"meta": {}}'}):
        (tmp_path / "s.safetensors").write_bytes(save({"g/w": torch.ones(2)}, header))
        with pytest.raises(RunError, match="damaged"):
            read_state(tmp_path / "s.safetensors")


def test_a_seal_of_other_tensors_or_other_meta_data_is_refused(tmp_path: Path) -> None:
    """Swap the sealed header of one state for another's: each is whole, together they are not."""
    write_state(tmp_path / "one.safetensors", STATE, {"round": 1})
    write_state(tmp_path / "two.safetensors", STATE, {"round": 2})
    one, two = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("one", "two"))
    assert len(one) == len(two)
    mixed = one.replace(b'{\\"round\\": 1}', b'{\\"round\\": 2}')
    assert mixed != one
    (tmp_path / "one.safetensors").write_bytes(mixed)
    with pytest.raises(RunError, match="changed"):
        read_state(tmp_path / "one.safetensors")
    header = json.loads(two[8 : 8 + int.from_bytes(two[:8], "little")])["__metadata__"]
    other = {k: t + 1 for k, t in load(two).items()}
    (tmp_path / "two.safetensors").write_bytes(save(other, header))
    with pytest.raises(RunError, match="changed"):
        read_state(tmp_path / "two.safetensors")


def test_one_tensor_in_two_places_is_written_twice(tmp_path: Path) -> None:
    """A method may keep what it sends (a proximal term, a previous model)."""
    one = torch.ones(2, 2)
    write_state(tmp_path / "s.safetensors", {"state.private": {"w": one}, "reply.shared": {"w": one}}, {})
    back, _ = read_state(tmp_path / "s.safetensors")
    assert torch.equal(back["state.private"]["w"], back["reply.shared"]["w"])


def test_states_survive_bit_for_bit_and_hold_no_clock(tmp_path: Path) -> None:
    write_state(tmp_path / "a.safetensors", STATE, {"round": 2})
    write_state(tmp_path / "b.safetensors", STATE, {"round": 2})
    state, meta = read_state(tmp_path / "a.safetensors")
    assert digest(state) == digest(STATE)
    assert meta == {"round": 2}
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o600
