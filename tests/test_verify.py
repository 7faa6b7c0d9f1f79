"""``confrere verify`` finds what was changed after a run, and names the first record that does not hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from confrere.config import validate
from confrere.data.synthetic import make_microscopy
from confrere.errors import RunError
from confrere.fingerprint import stored_experiment
from confrere.job import run_experiment
from confrere.record import journal
from confrere.record.files import read_state, write_bytes, write_state
from confrere.record.run import Run
from confrere.record.signing import VARIABLE
from confrere.tensors import digest
from confrere.verify import verify


def finished(folder: Path, **changes: Any) -> Path:
    make_microscopy(folder / "data", seed=3, sites=3, images=(16, 18, 20), size=32)
    values = {
        "path": str(folder / "data"),
        "backbone": {"name": "test-vit"},
        "adapter": {"blocks": 2, "rank": 4},
        "rounds": 3,
        "threads": 1,
        "train": {"steps": 2, "batch_size": 4},
        "controls": ["local"],
        **changes,
    }
    run_experiment(validate(values), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def test_an_untouched_run_holds(run: Path) -> None:
    main, local = verify(run)
    assert (main.rounds, main.recomputed, local.rounds, local.recomputed) == (3, 3, 3, 3)
    print(f"G35: {main.recomputed} of {main.rounds} rounds computed again with the same bytes")


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "clipping"])
def test_a_robust_rule_is_computed_again_too(tmp_path: Path, rule: str) -> None:
    federation = {"rule": rule, "byzantine": 1, "canonical": True}
    out = finished(tmp_path, federation=federation, controls=[], method={"name": "fedit"})
    assert verify(out)[0].recomputed == 3


def other_values(file: Path) -> None:
    """Write other tensors with a valid seal of their own, as someone would who knows the format."""
    state, meta = read_state(file)
    group = next(g for g, tensors in state.items() if tensors)
    name = next(iter(state[group]))
    state[group][name] = state[group][name] + 1e-3
    write_state(file, state, meta)


def reseal(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the journal anew with changed events and a chain that holds."""
    events, _ = journal.read(Run(run).events_file)
    for event in events:
        change(event)
    write_bytes(Run(run).events_file, journal.seal(events, 1, journal.START)[0])


def test_another_shared_state_is_found(run: Path) -> None:
    other_values(run / "server" / "00002.safetensors")
    with pytest.raises(RunError, match=r"not what the journal says.*00002\.safetensors"):
        verify(run)


def test_another_reply_is_found(run: Path) -> None:
    site = sorted((run / "sites").iterdir())[0]
    file = site / "00002.safetensors"
    groups, meta = read_state(file)
    groups["reply.shared"] = {n: t * 2 for n, t in groups["reply.shared"].items()}
    write_state(file, groups, meta)
    with pytest.raises(RunError, match=f"round 2, reply of {site.name}"):
        verify(run)


def test_a_shared_adapter_that_does_not_follow_from_the_replies_is_found(run: Path) -> None:
    """State and journal agree with each other, but no average of what was sent gives this."""
    file = Run(run).server_file(3)
    other_values(file)
    made = digest(Run(run).server(3))

    def change(event: dict[str, Any]) -> None:
        if event["event"] == "round" and event["round"] == 3:
            event["server"] = made

    reseal(run, change)
    with pytest.raises(RunError, match="round 3, the shared state computed again"):
        verify(run)


@pytest.mark.parametrize("name", ["results.json", "adapters"])
def test_changed_results_and_adapters_are_found(run: Path, name: str) -> None:
    file = run / name if name == "results.json" else next((run / name).rglob("*.safetensors"))
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(RunError, match=file.name):
        verify(run)


def test_another_experiment_and_other_data_are_found(run: Path) -> None:
    file = run / "experiment.toml"
    file.write_text(file.read_text().replace("lr = 0.001", "lr = 0.002"))
    with pytest.raises(RunError, match=r"experiment\.toml"):
        verify(run)


def test_a_control_is_verified_too(run: Path) -> None:
    file = run / "controls" / "local" / "events.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"loss": 0', b'"loss": 9', 1).replace(b'"loss": 1', b'"loss": 9', 1))
    with pytest.raises(RunError, match=r"controls.local.events\.jsonl, line"):
        verify(run)


def test_a_finished_run_whose_end_was_cut_off_is_found(run: Path) -> None:
    file = Run(run).events_file
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-2]))
    with pytest.raises(RunError, match="lacks its end"):
        verify(run)


def test_states_that_were_not_kept_are_counted(tmp_path: Path) -> None:
    out = finished(tmp_path, record={"keep": 1}, controls=[])
    found = verify(out)[0]
    assert found.recomputed < found.rounds == 3
    assert "not kept" in found.sentence()


def test_a_signed_run_cannot_be_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "key.pem").chmod(0o600)
    public = tmp_path / "public.pem"
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "key.pem"))
    out = finished(tmp_path, controls=[])
    assert verify(out, public)[0].signed > 3

    def prettier(event: dict[str, Any]) -> None:
        if event["event"] == "evaluation":
            event["mean"] = 0.99

    reseal(out, prettier)
    with pytest.raises(RunError, match="a signature does not hold"):
        verify(out, public)

    def unsigned(event: dict[str, Any]) -> None:
        if event["event"] == "signature":
            event["event"] = "note"

    reseal(out, unsigned)
    verify(out)
    with pytest.raises(RunError, match="not signed"):
        verify(out, public)


def attacked(folder: Path) -> Path:
    return finished(folder, controls=[], method={"name": "fedit"}, attack={"name": "sign-flip", "sites": ["ashford"]})


def test_what_attackers_sent_is_compared_but_not_computed_again(tmp_path: Path) -> None:
    out = attacked(tmp_path)
    assert verify(out)[0].recomputed == 0
    other_values(out / "server" / "00003.safetensors")
    with pytest.raises(RunError, match="not what the journal says"):
        verify(out)


@pytest.mark.parametrize("kind", ["attack", "refused", "keep", "drift"])
def test_a_resume_changes_no_state_and_verifies(tmp_path: Path, kind: str) -> None:
    """The attacker's and a refused site's stored states are the right ones; a drift is no forgery."""
    if kind == "attack":
        out = attacked(tmp_path)
    elif kind == "keep":
        out = finished(tmp_path, controls=[], record={"keep": 1})
    else:
        attack = {"name": "not-finite", "sites": ["ashford"]} if kind == "refused" else {}
        out = finished(tmp_path, controls=[], method={"name": "fedsa-lora"}, attack=attack)
    states = {f: f.read_bytes() for f in out.rglob("*.safetensors")}
    if kind == "refused":
        (out / "sites" / "ashford" / "00003.safetensors").unlink()
    (out / "results.json").unlink()
    experiment = stored_experiment(out)
    if kind == "drift":
        experiment = validate({**experiment.model_dump(), "federation": {"rule": "median", "byzantine": 1}})
        write_bytes(out / "experiment.toml", experiment.toml().encode())
    run_experiment(experiment, out, accept_drift=kind == "drift")
    assert {f: f.read_bytes() for f in out.rglob("*.safetensors")} == states
    kinds = [e["event"] for e in Run(out).events()]
    assert ("fallback" in kinds, "drift" in kinds) == (kind == "refused", kind == "drift")
    verify(out)


def test_states_are_compared_even_where_rounds_cannot_be_computed_again(tmp_path: Path) -> None:
    out = finished(tmp_path, record={"keep": 1}, controls=[])
    other_values(sorted((out / "server").glob("*.safetensors"))[-1])
    with pytest.raises(RunError, match="not what the journal says"):
        verify(out)


def test_what_a_refused_site_kept_is_compared_too(tmp_path: Path) -> None:
    attack = {"name": "not-finite", "sites": ["ashford"]}
    out = finished(tmp_path, controls=[], method={"name": "fedsa-lora"}, attack=attack)
    assert verify(out)[0].recomputed == 3
    other_values(out / "sites" / "ashford" / "00002.safetensors")
    with pytest.raises(RunError, match=r"round 2, (state|reply) of ashford"):
        verify(out)


def test_only_a_simulated_attacker_sends_what_it_does_not_store(run: Path) -> None:
    def change(event: dict[str, Any]) -> None:
        if event["event"] == "round" and event["round"] == 2:
            event["sites"]["ashford"]["reply"] = "0" * 64

    reseal(run, change)
    with pytest.raises(RunError, match="round 2, what the server got from ashford"):
        verify(run)


def test_what_a_site_was_sent_is_compared(run: Path) -> None:
    def change(event: dict[str, Any]) -> None:
        if event["event"] == "begin" and event["round"] == 2:
            event["requests"]["ashford"] = "0" * 64

    reseal(run, change)
    with pytest.raises(RunError, match="round 2, what ashford was sent"):
        verify(run)


def test_an_adapter_that_was_added_is_found(run: Path) -> None:
    (run / "adapters" / "more.safetensors").write_bytes(b"x")
    with pytest.raises(RunError, match=r"not in the journal.*more\.safetensors"):
        verify(run)


def test_a_coordinator_has_no_states_of_sites(run: Path) -> None:
    """Over a network each hospital keeps its own; what the coordinator has is compared."""
    for part in (run, run / "controls" / "local"):
        shutil.rmtree(part / "sites")
    with pytest.raises(RunError, match="a state is missing"):
        verify(run)
    (run / "job.json").write_text('{"job": "0123456789abcdef"}')
    main, local = verify(run)
    assert (main.rounds, main.recomputed, local.recomputed) == (3, 0, 0)
    other_values(run / "server" / "00002.safetensors")
    with pytest.raises(RunError, match=r"not what the journal says.*00002\.safetensors"):
        verify(run)


@pytest.mark.parametrize("gone", ["server/00002.safetensors", "controls/local/events.jsonl", "verdicts"])
def test_what_is_gone_is_found(run: Path, gone: str) -> None:
    if gone == "verdicts":
        (run / "verdicts.json").write_text("{}")
    else:
        (run / gone).unlink()
    with pytest.raises(RunError, match=r"missing|no journal|verdicts\.json"):
        verify(run)


def test_there_must_be_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run here"):
        verify(tmp_path)


def test_nothing_is_changed_by_verifying(run: Path) -> None:
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    verify(run)
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before
    assert torch.get_num_threads() >= 1
