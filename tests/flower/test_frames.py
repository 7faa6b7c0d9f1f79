"""Frames, states and Flower's records: what goes in comes out, and nothing else does."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from confrere.consortium import frame, states
from confrere.errors import UpdateRefusedError
from confrere.federation.transport import Failure
from confrere.method import Reply, Request
from confrere.tensors import digest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from confrere.flower.records import from_content, to_content

DTYPES = (np.float32, np.float64, np.float16, np.int64, np.uint8, np.bool_)
ARRAYS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6).map(lambda name: f"shared/{name}"),
    st.sampled_from(DTYPES).flatmap(
        lambda kind: arrays_of.arrays(kind, arrays_of.array_shapes(min_dims=0, min_side=0))
    ),
    max_size=4,
)


@given(ARRAYS)
def test_a_frame_and_a_message_hold_what_was_put_in(arrays: dict[str, np.ndarray]) -> None:
    header = {"kind": "train", "metrics": {"examples": 3, "loss": 0.1 + 0.2}}
    for there, back in ((frame.pack, frame.unpack), (to_content, lambda content: from_content(content))):
        told, found = back(there(header, arrays))  # type: ignore[operator, arg-type]
        assert told == header
        assert found.keys() == arrays.keys()
        for name, value in arrays.items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            assert found[name].tobytes() == value.tobytes()


def test_flowers_conventions_are_kept() -> None:
    content = to_content({"metrics": {"examples": 7}}, {"shared/a": np.ones(2, np.float32)})
    assert list(content.array_records) == ["arrays"]
    assert content.metric_records["metrics"]["num-examples"] == 7


def test_a_request_and_a_reply_survive_the_way() -> None:
    state = {"shared": {"a.lora_A": torch.arange(6.0).reshape(2, 3)}, "control": {}, "tier": {"n": torch.tensor(3)}}
    request = Request(kind="evaluate", run="r", round=4, state=state, split="test", model="general")
    back = states.asked(*frame.unpack(frame.pack(*states.ask(request))))
    assert (back.kind, back.run, back.round, back.split, back.model) == ("evaluate", "r", 4, "test", "general")
    assert list(back.state) == ["shared", "control", "tier"]
    assert digest(back.state) == digest(state)
    reply = Reply(site="north", run="r", round=4, state=state, weight=32.0, metrics={"loss": 0.25, "overlap": None})
    found = states.answered("north", *frame.unpack(frame.pack(*states.answer(reply))))
    assert isinstance(found, Reply)
    assert digest(found.state) == digest(state)
    assert (found.weight, found.metrics) == (32.0, {"loss": 0.25, "overlap": None})


def test_a_changed_tensor_is_noticed() -> None:
    header, arrays = states.ask(Request(kind="train", round=1, state={"shared": {"a": torch.ones(3)}}))
    arrays["shared/a"] = arrays["shared/a"] + 1
    with pytest.raises(UpdateRefusedError, match="changed on its way") as caught:
        states.asked(header, arrays)
    assert caught.value.code == "message-digest"


@pytest.mark.parametrize(
    "header",
    [
        {"groups": ["control"]},
        {"groups": "shared"},
        {"groups": [1]},
        {"groups": ["shared"], "round": "1", "kind": "train", "split": "val", "model": "general"},
        {"groups": ["shared"], "round": 1, "kind": 7, "split": "val", "model": "general"},
        {"groups": ["shared"], "round": 1, "kind": "train", "split": "all", "model": "general"},
        {"groups": ["shared"], "round": 1, "kind": "train", "split": "val", "model": "best"},
    ],
)
def test_what_is_no_request_is_refused(header: dict[str, Any]) -> None:
    arrays, said = states.to_arrays({"shared": {"a": torch.ones(1)}})
    with pytest.raises(UpdateRefusedError) as caught:
        states.asked({**said, **header}, arrays)
    assert caught.value.code == "message-form"


def test_an_answer_under_another_name_is_a_failure() -> None:
    reply = Reply(site="south", run="r", round=1)
    found = states.answered("north", *states.answer(reply))
    assert isinstance(found, Failure)
    assert found.code == "update-stamp"


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 7, b"\xff" * 64, (10).to_bytes(8, "little") + b'{"a":1}   ', frame.pack({}, {})[:-3] + b"}}}"],
    ids=["empty", "short", "length", "foreign", "cut"],
)
def test_what_is_no_frame_is_refused(content: bytes) -> None:
    with pytest.raises(UpdateRefusedError) as caught:
        frame.unpack(content)
    assert caught.value.code == "message-form"


def record(**changes: Any) -> RecordDict:
    given = {"header": ConfigRecord({"json": "{}"}), "arrays": ArrayRecord({"shared/a": Array(np.ones(1))}), **changes}
    return RecordDict({name: value for name, value in given.items() if value is not None})


def damaged() -> Array:
    array = Array(np.ones(4))
    array.data = array.data[:-9]
    return array


def pickled() -> Array:
    array = Array(np.ones(1))
    array.stype = "python.pickle"
    return array


@pytest.mark.parametrize(
    "content",
    [
        record(header=None),
        record(arrays=None),
        record(header=ConfigRecord({"json": "[1]"})),
        record(header=ConfigRecord({"json": "{"})),
        record(header=ConfigRecord({"json": '{"a": NaN}'})),
        record(header=ConfigRecord({"other": "{}"})),
        record(arrays=ArrayRecord({"shared/a": damaged()})),
        record(arrays=ArrayRecord({"shared/a": pickled()})),
        record(arrays=ArrayRecord({"x" * 300: Array(np.ones(1))})),
    ],
)
def test_what_is_no_message_of_ours_is_refused(content: RecordDict) -> None:
    with pytest.raises(UpdateRefusedError) as caught:
        from_content(content)
    assert caught.value.code == "message-form"


def test_a_header_is_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        frame.pack({"loss": float("nan")}, {})
    assert json.loads(json.dumps(frame.unpack(frame.pack({"a": [1]}, {}))[0])) == {"a": [1]}
