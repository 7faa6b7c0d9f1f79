"""The journal: no byte of it can be changed unseen, wherever it is cut it goes on, and signatures hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from confrere.errors import ConfigError, RunError
from confrere.record import journal, signing
from confrere.record.run import Run
from confrere.seeds import numpy_generator


def written(rounds: int) -> list[dict[str, object]]:
    return [
        e
        for r in range(1, rounds + 1)
        for e in ({"event": "begin", "round": r, "server": "ab" * 32}, {"event": "round", "round": r, "loss": 0.1 * r})
    ]


def content(rounds: int) -> bytes:
    return journal.seal(written(rounds), 1, journal.START)[0]


def line_of(error: RunError) -> int:
    return int(error.where.rsplit(" ", 1)[1])


def test_what_was_sealed_is_read(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for event in written(3):
        run.append(event)
    assert run.events() == written(3)
    assert run.events_file.read_bytes() == content(3), "one by one or together: the same bytes"
    assert journal.parse(content(3), "x")[1] == journal.seal(written(3), 1, journal.START)[1]


def mutated(whole: bytes, rng: np.random.Generator) -> tuple[bytes, int]:
    """Return a journal with one change, and the number of the first line that differs."""
    lines = whole.split(b"\n")[:-1]
    at, kind = int(rng.integers(len(lines))), rng.integers(6)
    other = int(rng.integers(len(lines)))
    if kind == 0:  # a byte
        line = bytearray(lines[at])
        place = int(rng.integers(len(line)))
        line[place] = (line[place] + int(rng.integers(1, 256))) % 256
        lines[at] = bytes(line)
    elif kind == 1 and at < len(lines) - 1:  # a line is gone; the last one is what a kill leaves
        del lines[at]
    elif kind == 2:  # twice
        lines.insert(at, lines[at])
    elif kind == 3 and at != other:  # moved
        at, other = min(at, other), max(at, other)
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 4:  # of another journal
        lines[at] = journal.seal([{"event": "round", "round": 1}], at + 1, "00" * 32)[0][:-1]
    else:  # cut within
        lines[at] = lines[at][: int(rng.integers(len(lines[at])))]
    changed = b"\n".join(lines) + b"\n"
    before, after = whole.split(b"\n"), changed.split(b"\n")
    return changed, next(i for i, (x, y) in enumerate(zip(before, after, strict=False), 1) if x != y)


def test_every_mutation_is_found_and_its_line_named() -> None:
    """G34."""
    whole, rng = content(10), numpy_generator(0, "mutations")
    for _ in range(10_000):
        changed, first = mutated(whole, rng)
        with pytest.raises(RunError, match="line of the journal") as error:
            journal.parse(changed, "events.jsonl")
        assert line_of(error.value) == first
    print("G34: 10000 of 10000 mutations of a journal found, the first wrong line named")


def test_a_value_that_reads_the_same_is_still_a_change() -> None:
    line = content(1).split(b"\n")[0]
    with pytest.raises(RunError):
        journal.parse(line.replace(b'"round": 1', b'"round":  1') + b"\n", "x")


@given(st.binary(max_size=300))
def test_bytes_that_are_no_journal_are_refused_by_line(rubbish: bytes) -> None:
    if b"\n" in rubbish:
        with pytest.raises(RunError, match="line of the journal") as error:
            journal.parse(rubbish, "x")
        assert line_of(error.value) == 1
    else:  # a torn write
        assert journal.parse(rubbish, "x") == ([], journal.START)


def test_deep_nesting_is_damage_not_a_crash() -> None:
    with pytest.raises(RunError, match="damaged"):
        journal.parse(b'{"event": ' + b"[" * 100_000 + b', "hash": "' + b"0" * 64 + b'"}\n', "x")


@pytest.mark.parametrize("event", [{"seq": 1}, {"hash": ""}, {"event": "x", "v": float("nan")}])
def test_an_event_that_cannot_be_sealed_is_refused(event: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"seq|JSON"):
        journal.seal([event], 1, journal.START)


def test_a_fallback_undoes_the_rounds_after_it() -> None:
    events = [*written(3), {"event": "fallback", "to": 1}, *written(3)[2:4]]
    left = journal.standing(events)
    assert [(e["event"], e.get("round")) for e in left] == [
        ("begin", 1), ("round", 1), ("fallback", None), ("begin", 2), ("round", 2),
    ]  # fmt: skip


def pem(key: Ed25519PrivateKey | X25519PrivateKey, file: Path) -> bytes:
    """Write a private key as openssl does; return the public one."""
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    file.chmod(0o600)
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, bytes]:
    file = tmp_path / "key.pem"
    monkeypatch.setenv(signing.VARIABLE, str(file))
    return file, pem(Ed25519PrivateKey.generate(), file)


def test_a_signature_holds_for_its_head_and_key_only(tmp_path: Path, key: tuple[Path, bytes]) -> None:
    run, (file, public) = Run(tmp_path / "run"), key
    run.append(*written(1))
    *events, signature = run.events()
    assert events == written(1)
    assert signature["of"] == journal.seal(written(1), 1, journal.START)[1]
    assert signing.is_signed(signature, public)
    assert not signing.is_signed({**signature, "of": "00" * 32})
    assert not signing.is_signed({**signature, "signature": "zz"})
    pem(Ed25519PrivateKey.generate(), file)
    other = signing.sign("00" * 32)
    assert other is not None
    assert signing.is_signed(other)
    assert not signing.is_signed(other, public)


@pytest.mark.parametrize("harm", ["missing", "readable by others", "no key", "not ed25519"])
def test_a_key_that_cannot_sign_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    key = tmp_path / "key.pem"
    if harm == "not ed25519":
        pem(X25519PrivateKey.generate(), key)
    elif harm != "missing":
        key.write_text("rubbish")
    if key.exists():
        key.chmod(0o644 if harm == "readable by others" else 0o600)
    monkeypatch.setenv(signing.VARIABLE, str(key))
    with pytest.raises(ConfigError) as error:
        signing.sign("00" * 32)
    assert "rubbish" not in str(error.value)
    assert error.value.fix


def test_events_are_plain_json(tmp_path: Path) -> None:
    Run(tmp_path).append({"event": "x", "name": "Zürich"})
    assert json.loads((tmp_path / "events.jsonl").read_text())["name"] == "Zürich"
