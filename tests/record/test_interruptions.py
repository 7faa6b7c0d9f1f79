"""What a run leaves behind when it was interrupted, and what the next start makes of it.

Every call of the file system that fails or is the last one: tests/reliability/test_filesystem.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from confrere.errors import RunError
from confrere.record.files import read_json, write_json
from confrere.record.run import BEFORE_TRAINING, Run
from confrere.record.store import DirectoryStore


def test_other_files_beside_the_states_are_not_taken_for_states(tmp_path: Path) -> None:
    for name in ("00001 (copy).safetensors", "test-general.safetensors", "1a.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    assert DirectoryStore(tmp_path, "a").before(9) is None


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot be written[\s\S]*file/run"), Run(tmp_path / "file" / "run").lock():
        pass


def test_an_error_inside_a_lock_passes_and_frees_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), Run(tmp_path).lock():
        raise FileNotFoundError("another matter")
    with Run(tmp_path).lock():
        pass


def test_a_start_that_failed_before_training_leaves_the_place_free(tmp_path: Path) -> None:
    with Run(tmp_path / "run").lock():
        for name in BEFORE_TRAINING:
            write_json(tmp_path / "run" / name, {})
    (tmp_path / "run" / ".tmp-x").write_bytes(b"torn")
    Run(tmp_path / "run").make_new()
    assert {f.name for f in (tmp_path / "run").iterdir()} <= {".lock", ".lock-holder"}
    Run(tmp_path / "none").make_new()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["thesis.doc", "splits.csv", "backbone.json"])
def test_what_is_not_ours_or_has_trained_is_not_touched(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / name, {"kept": True})
    with pytest.raises(RunError, match="already there" if name == "backbone.json" else "not empty"):
        Run(tmp_path).make_new()
    assert read_json(tmp_path / name) == {"kept": True}


@pytest.mark.parametrize("line", ["3", '"x"', "null", "{", "[1]"])
def test_a_journal_line_that_is_no_event_is_named(tmp_path: Path, line: str) -> None:
    Run(tmp_path).append({"event": "round", "round": 1})
    with Run(tmp_path).events_file.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunError, match="line 2"):
        Run(tmp_path).events()
