"""What was ever spent on a site's data, over all jobs: never less than what was made, and a limit that holds."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dp_accounting")

from hypothesis import given, settings
from hypothesis import strategies as st

from confrere.config import Experiment, validate
from confrere.consortium.doctor import _spent
from confrere.consortium.policy import Policy, check
from confrere.consortium.spent import Budget, budgets, check_ever, spent_ever, total
from confrere.errors import PolicyError, RunError
from confrere.federation import ledger as ledgers
from confrere.federation.ledger import FILE, Ledger, enter_unhidden
from confrere.privacy import epsilon
from confrere.privacy.mechanism import Mechanism
from confrere.record import journal

MECHANISM = Mechanism(unit="record", units=20, rate=1.0, sigma=20.0, clip=1.0)
A, B, C = "a" * 16, "b" * 16, "c" * 16
DELTA = 1e-5


def job(*controls: str, **privacy: Any) -> Experiment:
    own = {"unit": "record", "epsilon": 4.0, "delta": DELTA, **privacy}
    return validate(
        {"path": "x", "method": "fedit", "controls": controls, "train": {"balance": "none"}, "privacy": own}
    )


def ledger(state: Path, training: str, **changes: Any) -> Ledger:
    options = {"mechanism": MECHANISM, "delta": DELTA, "limit": 4.0, "file": state / FILE, "training": training}
    return Ledger(**{**options, **changes})


def trained(state: Path, training: str, *rounds: int, steps: int = 5, **changes: Any) -> None:
    """Debit rounds and keep their answers, as a site does."""
    folder = state / training / "sites" / "north"
    folder.mkdir(parents=True, exist_ok=True)
    for round_ in rounds:
        ledger(state, training, **changes).debit(round_, steps)
        (folder / f"{round_:05d}.safetensors").touch()


def spends(state: Path) -> float:
    return total(spent_ever(state / FILE).values())[0]


def cost(steps: int) -> float:
    return epsilon(20.0, rounds=steps, delta=DELTA, rate=1.0)


def refusal(state: Path, asked: Experiment, name: str = C, **rules: Any) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        check_ever(Policy(**rules), state / FILE, budgets(asked, name))
    assert caught.value.code == "policy-spent"
    return caught.value


def test_epsilons_and_deltas_of_all_trainings_add_up(tmp_path: Path) -> None:
    assert total(spent_ever(tmp_path / FILE).values()) == (0.0, 0.0)
    trained(tmp_path, A, 1, 2)
    trained(tmp_path, f"{A}/controls/ffa-lora", 1)
    trained(tmp_path, B, 1, 2, 3, delta=2e-5)
    every = spent_ever(tmp_path / FILE)
    assert every[A] == Budget(cost(10), DELTA, "record")
    assert every[f"{A}/controls/ffa-lora"].epsilon == cost(5)
    third = epsilon(20.0, rounds=15, delta=2e-5, rate=1.0)
    assert total(every.values()) == (pytest.approx(cost(10) + cost(5) + third), pytest.approx(4e-5))
    assert [d["round"] for d in ledger(tmp_path, A).debits()] == [1, 2]  # each training sees its own
    assert ledger(tmp_path, C).debits() == []


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(st.sampled_from([A, B]), st.sampled_from(["answer", "kill", "kill in debit", "delete"])), max_size=12
    )
)
def test_the_sum_is_never_less_than_the_steps_that_were_made(
    tmp_path_factory: pytest.TempPathFactory, story: list[tuple[str, str]]
) -> None:
    """Two jobs in turns, killed between debit and steps or within the debit; a job whose folder is deleted."""
    state, made, round_ = tmp_path_factory.mktemp("state"), {A: 0, B: 0}, {A: 0, B: 0}
    for name, event in story:
        book = ledger(state, name, limit=0.0)
        if event == "delete":
            shutil.rmtree(state / name, ignore_errors=True)
            continue
        if event == "answer":
            round_[name] += 1
            trained(state, name, round_[name], limit=0.0)
        else:
            before = book.file.read_bytes() if book.file.exists() else b""  # type: ignore[union-attr]
            book.debit(round_[name] + 1, 5)
            if event == "kill in debit":  # no step was made
                whole = book.file.read_bytes()  # type: ignore[union-attr]
                book.file.write_bytes(whole[: len(before) + 20])  # type: ignore[union-attr]
                continue
        made[name] += 5
    every = spent_ever(state / FILE)
    for name, steps in made.items():
        assert every.get(name, Budget(0.0, 0.0, "")).epsilon >= (cost(steps) if steps else 0.0)


def test_a_record_that_was_lost_or_harmed_is_no_beginning_at_nought(tmp_path: Path) -> None:
    trained(tmp_path, A, 1, 2)
    trained(tmp_path, f"{B}/controls/ffa-lora", 1)
    file = tmp_path / FILE
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    harms = {
        "privacy-ledger": (None, b"", lines[0], lines[0] + lines[1]),
        "journal": (whole.replace(b'"steps": 5', b'"steps": 1', 1), lines[1] + lines[2], b"\x00" * 9 + whole),
    }
    for code, contents in harms.items():
        for content in contents:
            file.unlink(missing_ok=True)
            if content is not None:
                file.write_bytes(content)
            for ask in (
                lambda: spent_ever(file),
                lambda: ledger(tmp_path, C).debit(1, 5),  # another job, without a limit
                lambda: check_ever(Policy(most_epsilon_ever=9.0), file, budgets(job(), C)),
            ):
                with pytest.raises(RunError) as caught:
                    ask()
                assert (caught.value.code, "delete" in caught.value.fix) == (code, False)
            (finding,) = _spent(tmp_path, Policy())
            assert (finding.level, finding.code) == ("error", code)
    file.write_bytes(whole)
    assert len(spent_ever(file)) == 2


def test_a_record_that_is_harmed_between_two_rounds_of_a_process_stops_it(tmp_path: Path) -> None:
    trained(tmp_path, A, 1, 2)
    trained(tmp_path, B, 1)
    file, book = tmp_path / FILE, ledger(tmp_path, C)
    book.debit(1, 5)
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    swapped = lines[0] + lines[2] + lines[1] + lines[3]
    for content, code in (
        (None, "privacy-ledger"),
        (lines[0], "privacy-ledger"),  # as a copy from earlier has it
        (swapped, "journal"),
        (whole + swapped, "journal"),
        (whole.replace(b'"steps": 5', b'"steps": 1', 1), "journal"),
    ):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(RunError) as caught:
            book.debit(2, 5)
        assert caught.value.code == code
        file.write_bytes(whole)
    file.write_bytes(whole + b'{"event": "debit", "rou')  # torn by a crash
    book.debit(2, 5)
    assert [d["round"] for d in book.debits()] == [d["round"] for d in ledger(tmp_path, C).debits()] == [1, 2]
    assert file.read_bytes().startswith(whole)


def test_a_debit_reads_the_record_once_and_looks_at_the_folders_of_all_jobs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path, A, 1, 2)
    read, looked, parsed = list[Path](), list[Path](), list[int]()
    content, folders, parse = journal.content, ledgers._folders, journal.parse
    monkeypatch.setattr(journal, "content", lambda file: read.append(file) or content(file))
    monkeypatch.setattr(ledgers, "_folders", lambda root: looked.append(root) or folders(root))
    monkeypatch.setattr(journal, "parse", lambda new, *a, **o: parsed.append(new.count(b"\n")) or parse(new, *a, **o))
    book = ledger(tmp_path, B)
    for round_ in (1, 2, 3):
        book.debit(round_, 5)
    assert (len(read), len(looked), parsed) == (3, 1, [2, 1, 1])
    enter_unhidden(tmp_path / FILE, C, sends=False)
    enter_unhidden(tmp_path / FILE, C, sends=False)
    assert len(read) == 5
    monkeypatch.undo()
    assert [d["round"] for d in ledger(tmp_path, B).debits()] == [1, 2, 3]


def test_a_limit_that_is_exactly_met_is_kept(tmp_path: Path) -> None:
    trained(tmp_path, A, 1, 2)
    limit = cost(10) + 4.0
    check_ever(Policy(most_epsilon_ever=limit), tmp_path / FILE, budgets(job(), B))
    over = refusal(tmp_path, job(), B, most_epsilon_ever=limit - 1e-4)
    assert over.where == "policy: most_epsilon_ever"
    assert "this one may spend 4" in over.what
    fitting = float(over.fix.split("=")[1].split()[0])
    check_ever(Policy(most_epsilon_ever=limit - 1e-4), tmp_path / FILE, budgets(job(epsilon=fitting), B))
    assert 3.99 < fitting < 4
    deltas = {"most_epsilon_ever": 99.0, "most_delta_ever": 2 * DELTA}
    check_ever(Policy(**deltas), tmp_path / FILE, budgets(job(), B))
    trained(tmp_path, B, 1)
    assert refusal(tmp_path, job(), **deltas).where == "policy: most_delta_ever"
    spent = refusal(tmp_path, job(), most_epsilon_ever=0.1, most_delta_ever=0.1)
    assert spent.fix.startswith("change the experiment, or talk to the site")


def test_a_job_that_goes_on_is_not_counted_twice(tmp_path: Path) -> None:
    rules = Policy(most_epsilon_ever=4.0)
    for round_ in (1, 2, 3):
        check_ever(rules, tmp_path / FILE, budgets(job(), A))  # as often as its training is opened
        trained(tmp_path, A, round_)
    assert refusal(tmp_path, job(), B, most_epsilon_ever=4.0)
    check_ever(Policy(most_epsilon_ever=8.0), tmp_path / FILE, budgets(job(), B))


def test_every_training_of_a_job_that_sends_is_asked_for_at_once(tmp_path: Path) -> None:
    asked = job("ffa-lora", "local")  # the last sends nothing
    assert list(budgets(asked, A)) == [A, f"{A}/controls/ffa-lora"]
    check_ever(Policy(most_epsilon_ever=8.0), tmp_path / FILE, budgets(asked, A))
    assert "privacy.epsilon=3.95 or less" in refusal(tmp_path, asked, A, most_epsilon_ever=7.9).fix


def test_two_jobs_in_turns_stay_below_the_limit(tmp_path: Path) -> None:
    """Each fits as long as the other has not begun; together they do not: one is stopped on the way."""
    limit, rounds = 6.0, {A: 0, B: 0}
    stopped: set[str] = set()
    for turn in range(200):
        name = (A, B)[turn % 2]
        if name in stopped:
            continue
        try:
            check_ever(Policy(most_epsilon_ever=limit), tmp_path / FILE, budgets(job(), name))
        except PolicyError:
            stopped.add(name)
            continue
        rounds[name] += 1
        trained(tmp_path, name, rounds[name], steps=20, limit=0.0)  # its own budget ends it below, not here
        if spent_ever(tmp_path / FILE)[name].epsilon > 3.5:
            stopped.add(name)
    assert 2.0 < spends(tmp_path) <= limit
    assert min(rounds.values()) >= 1


def test_what_was_trained_without_noise_has_no_epsilon(tmp_path: Path) -> None:
    trained(tmp_path, A, 1)
    enter_unhidden(tmp_path / FILE, f"{A}/controls/local", sends=False)
    assert spends(tmp_path) == cost(5)
    enter_unhidden(tmp_path / FILE, B, sends=True)
    whole = (tmp_path / FILE).read_bytes()
    enter_unhidden(tmp_path / FILE, B, sends=True)
    assert (tmp_path / FILE).read_bytes() == whole  # once a training, not once a round
    assert math.isinf(spends(tmp_path))
    assert "without noise" in refusal(tmp_path, job(), most_epsilon_ever=99.0).what
    for sent in (
        job(epsilon=0.0, sigma=1.0),
        validate({"path": "x", "method": "fedit", "controls": ()}),
        validate({"path": "x", "method": "local", "controls": ()}),
    ):  # no budget, no noise, nothing hidden
        with pytest.raises(PolicyError) as caught:
            check(Policy(most_epsilon_ever=99.0), sent, examples=None)
        assert (caught.value.code, caught.value.where) == ("policy-privacy", "policy: most_epsilon_ever")
    silent = validate({"path": "x", "method": "local", "controls": (), "privacy": {"unit": "record"}})
    check_ever(Policy(most_epsilon_ever=1.0), tmp_path / FILE, budgets(silent, C))


def test_noise_that_can_be_made_again_or_hides_another_unit_has_no_sum(tmp_path: Path) -> None:
    trained(tmp_path / "seeded", A, 1, mechanism=replace(MECHANISM, noise_seed=3))
    assert math.isinf(spends(tmp_path / "seeded"))
    trained(tmp_path, A, 1)
    assert "privacy.unit=record" in refusal(tmp_path, job(unit="patient"), most_epsilon_ever=99.0).fix
    trained(tmp_path, B, 1, mechanism=replace(MECHANISM, unit="patient", images=2))
    assert math.isinf(spends(tmp_path))
    trained(tmp_path, A, 2, mechanism=replace(MECHANISM, unit="patient", images=2))
    assert math.isinf(spent_ever(tmp_path / FILE)[A].epsilon)


def test_the_doctor_tells_the_sum(tmp_path: Path) -> None:
    def said(**rules: Any) -> tuple[str, str]:
        (found,) = _spent(tmp_path, Policy(**rules))
        return found.level, found.what

    assert said() == ("ok", "epsilon 0, delta 0 in all, nothing was trained")
    trained(tmp_path, A, 1)
    trained(tmp_path, f"{A}/controls/ffa-lora", 1)
    expected = f"epsilon {2 * cost(5):.4g}, delta 2e-05 in all, after 2 trainings of 1 jobs"
    assert said() == ("ok", expected)
    assert said(most_epsilon_ever=9.0) == ("ok", f"{expected}; the policy allows 9")
    assert said(most_epsilon_ever=0.1) == ("warning", expected)
    enter_unhidden(tmp_path / FILE, B, sends=True)
    assert said() == ("ok", "no epsilon holds any more, after 3 trainings of 2 jobs, 1 of them without noise")
