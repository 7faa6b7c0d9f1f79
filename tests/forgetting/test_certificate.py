"""A certificate says what was done and not who the patients are; both journals name it, and a signature holds it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from forgetting_runs import SITE, patients_of, trained
from typer.testing import CliRunner

from confrere.cli import app
from confrere.errors import DataError, RunError
from confrere.fingerprint import stored_experiment
from confrere.forgetting.certificate import check
from confrere.forgetting.forget import forget
from confrere.forgetting.who import SALT, Whom, is_of
from confrere.job import run_experiment
from confrere.record.files import read_json
from confrere.record.run import Run
from confrere.record.signing import VARIABLE
from confrere.verify import verify


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def key(folder: Path) -> tuple[Path, bytes]:
    made = Ed25519PrivateKey.generate()
    (folder / "key.pem").write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / "key.pem").chmod(0o600)
    return folder / "key.pem", made.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_patients_are_counted_and_not_named(tmp_path: Path, run: Path, data: Path) -> None:
    names = patients_of(data, SITE, run)[:2]
    forget(run, Whom(patients=frozenset(names)), tmp_path / "new")
    for path in (tmp_path / "new").rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".md", ".toml", ".csv", ".salt"):
            assert not [name for name in names if name in path.read_text()], path.name
    found = read_json(tmp_path / "new" / "certificate.json")
    assert (found["forgotten"]["kind"], found["forgotten"]["patients"]) == ("patients", 2)
    assert found["forgotten"]["pictures"] == sum(len(list((data / SITE).rglob(f"{name}__*"))) for name in names)
    salt = (tmp_path / "new" / SALT).read_text().strip()
    assert salt not in (tmp_path / "new" / "certificate.json").read_text()
    assert (tmp_path / "new" / SALT).stat().st_mode & 0o077 == 0
    assert is_of(found, frozenset(names), salt)
    assert not is_of(found, frozenset(names[:1]), salt)
    assert not is_of(found, frozenset(names), "00" * 32)


def test_both_journals_name_it_and_both_runs_verify(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = key(tmp_path)
    monkeypatch.setenv(VARIABLE, str(private))
    (run / "audits" / "references").mkdir(parents=True)  # models of the same patients
    forget(run, Whom(site=SITE), tmp_path / "new")
    path = tmp_path / "new" / "certificate.json"
    found = check(path, public)
    assert found["signature"]
    assert (found["way"], found["exact"], found["forgotten"]["site"]) == ("rebuild", True, SITE)
    assert {"sites", "audits", "server", "splits.csv"} <= set(found["still_to_delete"])
    assert "events.jsonl" not in found["still_to_delete"]
    ours = next(e for e in Run(run).events() if e["event"] == "forgotten")
    theirs = next(e for e in Run(tmp_path / "new").events() if e["event"] == "forgetting")
    assert ours["certificate"] == theirs["certificate"]
    (tmp_path / "public.pem").write_bytes(public)
    for place in (run, tmp_path / "new"):
        assert verify(place, tmp_path / "public.pem")[0].signed >= 1


def test_a_changed_certificate_is_noticed(tmp_path: Path, run: Path) -> None:
    forget(run, Whom(site=SITE), tmp_path / "new", by="neggrad:rounds=1")
    path = tmp_path / "new" / "certificate.json"
    assert check(path)["exact"] is False
    with pytest.raises(RunError, match="signature") as caught:
        check(path, key(tmp_path)[1])
    assert caught.value.code == "signature"
    path.write_text(path.read_text().replace('"exact": false', '"exact": true'))
    with pytest.raises(RunError, match="not the one of the journal") as caught:
        check(path)
    assert caught.value.code == "verification"


@pytest.mark.slow
def test_a_signature_of_something_else_does_not_hold(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = key(tmp_path)
    monkeypatch.setenv(VARIABLE, str(private))
    forget(run, Whom(site=SITE), tmp_path / "new", by="neggrad:rounds=1")
    path = tmp_path / "new" / "certificate.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "exact": True}))
    Run(tmp_path / "new").append({"event": "forgetting", "certificate": hashlib.sha256(path.read_bytes()).hexdigest()})
    with pytest.raises(RunError, match="signature"):
        check(path, public)


def test_what_an_approximate_way_makes_predicts_and_cannot_be_resumed(tmp_path: Path, run: Path, data: Path) -> None:
    cli = CliRunner()
    listed = tmp_path / "list.csv"
    listed.write_text("patient\n" + "\n".join(patients_of(data, SITE, run)[:2]) + "\n")
    out = tmp_path / "new"
    done = cli.invoke(
        app, ["forget", str(run), "--patients", str(listed), "--by", "neggrad:rounds=1", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "Forgotten: 2 patients" in done.output
    assert "How far" not in done.output
    assert "--judge 5" in done.output
    picture = next((data / SITE).iterdir())
    told = ["predict", str(out), str(picture), "--site", SITE, "--out", str(tmp_path / "p.csv")]
    assert cli.invoke(app, told).exit_code == 0
    with pytest.raises(DataError) as caught:
        run_experiment(stored_experiment(out), out)
    assert caught.value.code == "data-changed"
    assert verify(out)[0].rounds == 0


@pytest.mark.slow
def test_an_approximate_result_of_data_that_are_gone_cannot_be_resumed_either(tmp_path: Path, data: Path) -> None:
    place = Path(shutil.copytree(data, tmp_path / "data"))
    run = trained(place, tmp_path / "run", rounds=1)
    forget(run, Whom(site=SITE), tmp_path / "new", by="federaser")
    shutil.rmtree(place / SITE)
    with pytest.raises(RunError, match="missing"):
        run_experiment(stored_experiment(tmp_path / "new"), tmp_path / "new")


def test_the_command_says_what_is_wrong(tmp_path: Path, run: Path) -> None:
    done = CliRunner().invoke(app, ["forget", str(run), "--site", "nowhere", "--out", str(tmp_path / "new")])
    assert done.exception is not None
    assert getattr(done.exception, "code", "") == "unknown-site"
