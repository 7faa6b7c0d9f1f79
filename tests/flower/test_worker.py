"""A site's process: what it answers twice, what it refuses, and what of its errors leaves it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from members import Members, experiment_for, make_images, make_members

from confrere.consortium import states
from confrere.consortium.frame import PROTOCOL
from confrere.consortium.lead import as_sent
from confrere.consortium.worker import Worker
from confrere.errors import ConfigError
from confrere.initial import initial_params
from confrere.method import Request
from confrere.tensors import digest

JOB = "0123456789abcdef"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), patients=5)


@pytest.fixture
def north(kits: Path, images: Path, tmp_path: Path) -> Worker:
    members: Members = make_members(kits, images, tmp_path)
    return members.workers["north"]


def job(kits: Path, *overrides: str, **header: Any) -> dict[str, Any]:
    sent = as_sent(experiment_for(kits, *overrides))
    return {"protocol": PROTOCOL, "job": JOB, "part": "", "experiment": sent, "kind": "describe", **header}


def request_of(worker: Worker, kits: Path, round_: int = 1, *overrides: str) -> tuple[dict[str, Any], Any]:
    """Return a frame that asks for training from the method's start."""
    assert "failure" not in worker.answer(job(kits, *overrides), {})[0]
    assert worker._open is not None
    task = worker._open.task
    params = initial_params(task.backbone, task.method, "", classes=2, rank=4, seed=0)
    state = task.method.broadcast(task.method.init_server(params), "north")
    header, arrays = states.ask(Request(kind="train", run="r", round=round_, state=state))
    return {**job(kits, *overrides), **header}, arrays


def test_a_request_that_comes_twice_gets_the_same_answer(north: Worker, kits: Path, tmp_path: Path) -> None:
    header, arrays = request_of(north, kits)
    first, payload = north.answer(header, arrays)
    file = tmp_path / "north" / JOB / "sites" / "north" / "00001.safetensors"
    written = file.read_bytes()
    second, again = north.answer(header, arrays)
    assert (first["digest"], first["weight"]) == (second["digest"], second["weight"])
    assert {name: value.tobytes() for name, value in payload.items()} == {n: v.tobytes() for n, v in again.items()}
    assert file.read_bytes() == written


def test_what_is_sent_holds_no_personal_tensor(north: Worker, kits: Path) -> None:
    answer, payload = north.answer(*request_of(north, kits))
    assert answer["groups"] == ["shared"]
    assert payload
    assert not [name for name in payload if "personal" in name]
    assert digest(states.to_state(answer, payload)) == answer["digest"]


def test_a_request_is_told_with_the_training_it_is_for(north: Worker, kits: Path) -> None:
    seen: list[dict[str, Any]] = []
    north.notify = seen.append
    for part in ("", "local", ""):
        assert "failure" not in north.answer(job(kits, 'controls=["local"]', part=part), {})[0]
    told = [(event["method"], event["control"]) for event in seen if event["event"] == "request"]
    assert told == [("fedopal", False), ("local", True), ("fedopal", False)]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"protocol": 2}, "version"),
        ({"protocol": None}, "version"),
        ({"job": "../../etc"}, "message-form"),
        ({"job": 7}, "message-form"),
        ({"part": "../x"}, "message-form"),
        ({"part": "pooled"}, "message-form"),
        ({"experiment": "rounds = "}, "message-form"),
        ({"experiment": 3}, "message-form"),
        ({"kind": "train"}, "message-form"),
        ({"kind": "delete", "groups": [], "round": 1, "split": "val", "model": "general"}, "message-form"),
    ],
)
def test_what_is_no_request_of_ours_is_refused(
    changes: dict[str, Any], code: str, north: Worker, kits: Path, tmp_path: Path
) -> None:
    answer, arrays = north.answer({**job(kits), **changes}, {})
    assert (answer["failure"]["code"], arrays) == (code, {})
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "north" not in path.parts]


def test_an_experiment_cannot_change_under_its_name(north: Worker, kits: Path) -> None:
    assert "failure" not in north.answer(job(kits), {})[0]
    answer, _ = north.answer(job(kits, "train.lr=0.5"), {})
    assert answer["failure"]["code"] == "job-changed"


def test_simulations_are_refused(north: Worker, kits: Path) -> None:
    sent = job(kits)
    sent["experiment"] = sent["experiment"].replace("shift = []", 'shift = [{kind = "stain", strength = 0.5}]')
    assert north.answer(sent, {})[0]["failure"]["code"] == "simulation"


def test_the_policy_is_asked_before_data_are_read(kits: Path, images: Path, tmp_path: Path) -> None:
    worker = make_members(kits, images, tmp_path, most_rounds=1).workers["north"]
    worker.data = tmp_path / "nowhere"
    assert worker.answer(job(kits), {})[0]["failure"]["code"] == "policy-rounds"


def test_a_request_beyond_the_policy_is_refused(kits: Path, images: Path, tmp_path: Path) -> None:
    worker = make_members(kits, images, tmp_path, test_scores=False).workers["north"]
    header, arrays = request_of(worker, kits)
    assert "failure" not in worker.answer(header, arrays)[0]
    answer, _ = worker.answer({**header, "kind": "evaluate", "split": "test"}, arrays)
    assert answer["failure"]["code"] == "policy-test"


def test_errors_that_could_name_files_leave_as_codes_only(kits: Path, images: Path, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    worker = make_members(kits, images, tmp_path).workers["north"]
    worker.data, worker.notify = tmp_path / "CANARY-ward-7", told.append
    answer, _ = worker.answer(job(kits), {})
    assert answer["failure"]["code"] == "no-such-path"
    assert "CANARY" not in json.dumps(answer)
    assert "CANARY" in told[-1]["reason"]  # the local user is told


def test_an_update_that_is_not_masked_never_leaves_a_site_that_masks(north: Worker, kits: Path) -> None:
    header, arrays = request_of(north, kits, 1, "secure.aggregation=true", "gate.norm=0", "gate.factor=0")
    answer, sent = north.answer(header, arrays)
    assert (answer["failure"]["code"], sent) == ("secure-off", {})


def test_a_site_sets_only_what_is_its_own(kits: Path, images: Path, tmp_path: Path) -> None:
    kit = make_members(kits, images, tmp_path).workers["north"].kit
    with pytest.raises(ConfigError) as caught:
        Worker(kit=kit, policy=None, data=images, state=tmp_path, overrides=["train.lr=1"])  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.where) == ("override", "train.lr")


def test_a_bug_is_told_without_its_text(north: Worker, kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the carrier would be told nothing, and would ask again until the deadline."""

    def broken(*args: object) -> None:
        raise RuntimeError("CANARY")

    header, arrays = request_of(north, kits)
    assert north._open is not None
    monkeypatch.setattr(type(north._open.site), "handle", broken)
    answer, _ = north.answer(header, arrays)
    assert answer["failure"]["code"] == "internal"
    assert "RuntimeError" in answer["failure"]["reason"]
    assert "CANARY" not in json.dumps(answer)


PRIVATE = ("train.balance=none", "train.batch_size=64", "privacy.unit=record", "privacy.delta=1e-3")


def test_what_jobs_spend_is_added_up_and_a_job_beyond_the_limit_is_refused(
    kits: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second job does not fit; its budget made smaller it does, whatever became of the first one's folder."""
    pytest.importorskip("dp_accounting")

    def zeros(loss: object, fixed: object, trained: Any, *others: object) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in trained.items()}

    monkeypatch.setattr("confrere.noisy.clipped_sum", zeros)  # gradients of single images take their time
    rules: dict[str, Any] = {"most_epsilon_ever": 8.0, "most_delta_ever": 0.1}
    worker = make_members(kits, images, tmp_path, **rules).workers["north"]
    private = (*PRIVATE, "privacy.epsilon=5", "method.name=fedit")
    header, arrays = request_of(worker, kits, 1, *private)
    assert "failure" not in worker.answer(header, arrays)[0]
    worker.policy, worker._open = worker.policy.model_copy(update={"most_epsilon_ever": 1.0}), None
    assert "failure" not in worker.answer({**header, "kind": "evaluate"}, arrays)[0]  # costs nothing
    assert worker.answer({**header, "round": 2}, arrays)[0]["failure"]["code"] == "policy-spent"
    debits = (tmp_path / "north" / "privacy.jsonl").read_text().splitlines()
    assert [(json.loads(line)["training"], json.loads(line)["round"]) for line in debits] == [(JOB, 1)]
    assert not list((tmp_path / "north" / JOB).rglob("privacy.jsonl"))  # one record, above all jobs
    shutil.rmtree(tmp_path / "north" / JOB)
    again = make_members(kits, images, tmp_path, **rules).workers["north"]  # another process
    other = {"job": "f" * 16}
    again.data = tmp_path / "nowhere"  # asked before data are read
    large = again.answer(job(kits, *PRIVATE, "privacy.epsilon=6", "method.name=fedit", **other), {})[0]["failure"]
    assert (large["code"], "is left" in large["reason"]) == ("policy-spent", True)
    shutil.rmtree(tmp_path / "north" / other["job"])
    again.data = images / "north"
    small = again.answer(job(kits, *PRIVATE, "privacy.epsilon=2", "method.name=fedit", **other), {})[0]
    assert "failure" not in small


def test_what_a_hiding_site_tells_it_tells_once_and_without_noise_nothing(
    kits: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dp_accounting")
    worker = make_members(kits, images, tmp_path).workers["north"]
    private = (*PRIVATE, "privacy.epsilon=5", "method.name=fedit", "controls=['local']")
    header, arrays = request_of(worker, kits, 1, *private)
    told, plain = worker.answer(job(kits, *private), {})[0]["data"], worker._open.task.federation.digest  # type: ignore[union-attr]
    again = make_members(kits, images, tmp_path).workers["north"]  # another process
    assert again.answer(job(kits, *private), {})[0]["data"] == told != plain
    elsewhere = {"job": "f" * 16}
    assert again.answer(job(kits, *private, **elsewhere), {})[0]["data"] not in (told, plain)

    alone = {**job(kits, *private, part="local"), "kind": "train", "round": 1, "split": "val", "model": "personalised"}
    sent, nothing = states.to_arrays({"shared": {}})
    answer, _ = worker.answer({**alone, **nothing}, sent)
    assert "failure" not in answer, answer
    assert "loss" not in answer["metrics"]

    def examine(**changes: Any) -> str:
        asked = {**header, "kind": "evaluate", "split": "test", **changes}
        return str(worker.answer(asked, arrays)[0].get("failure", {}).get("code"))

    assert [examine(), examine(), examine(model="general")] == ["None"] * 3
    assert [examine(round=2), examine(model="general", round=0)] == ["privacy-tested"] * 2


def test_numbers_that_could_overflow_are_refused_before_they_are_computed_with(north: Worker, kits: Path) -> None:
    header, _ = request_of(north, kits)
    assert north._open is not None
    params = initial_params(north._open.task.backbone, north._open.task.method, "", classes=2, rank=4, seed=0)
    state = north._open.task.method.broadcast(north._open.task.method.init_server(params), "north")
    for value in (3e38, float("nan")):
        state["shared"]["head.weight"][0, 0] = value
        asked, arrays = states.ask(Request(kind="train", run="r", round=1, state=state))
        assert north.answer({**header, **asked}, arrays)[0]["failure"]["code"] == "update-values"


def test_a_job_without_noise_is_entered_before_it_trains(
    north: Worker, kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, arrays = request_of(north, kits)
    assert not (tmp_path / "north" / "privacy.jsonl").exists()  # it has only described itself
    assert north._open is not None
    with monkeypatch.context() as patch:
        patch.setattr(type(north._open.site), "handle", lambda *args: (_ for _ in ()).throw(MemoryError))
        north.answer(header, arrays)
    for _ in range(2):
        north.answer(header, arrays)
    (line,) = (tmp_path / "north" / "privacy.jsonl").read_text().splitlines()
    assert (json.loads(line)["training"], json.loads(line)["steps"], json.loads(line)["sigma"]) == (JOB, 1, 0.0)
