from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traversal import OUTSIDE

from confrere.data.paths import SLUG, Root, check_class_name, check_site_name, new_folder, slug
from confrere.errors import DataError, RunError


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_that_lead_out_are_refused_without_being_quoted(tmp_path, name):
    with pytest.raises(ValueError, match="path") as caught:
        Root(tmp_path).join(name)
    assert len(name) < 6 or name not in str(caught.value)


def test_at_least_sixty_such_paths():
    assert len(OUTSIDE) >= 60


@pytest.mark.parametrize("name", ["a.png", "a/b/c.png", "ü ö/1.png", "a b.png", "..a/x", "a..b", "x...png", "-x", "=x"])
def test_ordinary_paths_pass(tmp_path, name):
    assert Root(tmp_path).join(name) == tmp_path / name


def test_links_are_followed(tmp_path):
    inner, outer = tmp_path / "in", tmp_path / "out"
    inner.mkdir()
    outer.mkdir()
    (outer / "x.png").write_bytes(b"x")
    (inner / "file").symlink_to(outer / "x.png")
    (inner / "folder").symlink_to(outer)
    (inner / "loop").symlink_to(inner / "loop")
    (inner / "fine").symlink_to(inner / "target")
    root = Root(inner)
    for name in ("file", "folder/x.png", "folder"):
        with pytest.raises(ValueError, match="link"):
            root.join(name)
    assert root.join("fine") == inner / "fine"
    assert not Root(inner).holds(tmp_path / "in-sibling")


@given(st.text(max_size=200))
def test_a_path_stays_inside_or_is_refused(name):
    root = Root(Path("/nowhere/root"))
    try:
        path = root.join(name)
    except ValueError:
        return
    assert os.path.normpath(path).startswith("/nowhere/root")


@given(st.text(max_size=100))
def test_a_slug_always_names_a_site(text):
    assert SLUG.fullmatch(slug(text))


@pytest.mark.parametrize("name", ["", "A", "a b", "ä", "-a", "a/b", "..", "x" * 65, "con", "a\n"])
def test_site_names(name):
    with pytest.raises(DataError, match="cannot name a site"):
        check_site_name(name)


def test_no_hospital_is_called_like_the_pooled_control():
    with pytest.raises(DataError, match="pooled control"):
        check_site_name("pooled")


@pytest.mark.parametrize("name", ["", " ", "x" * 65, "a/b", "a\\b", "=cmd()", "+1", "@x", "a\x07", "a\u202eb"])
def test_class_names(name):
    with pytest.raises(DataError, match="class name"):
        check_class_name(name)


def test_a_new_folder_is_whole_or_absent(tmp_path):
    def fail() -> None:
        with new_folder(tmp_path / "out") as draft:
            (draft / "x").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as draft:
        (draft / "x").write_text("1")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "x"]
    with pytest.raises(DataError, match="not empty"), new_folder(tmp_path / "out"):
        pass


def test_only_what_may_go_is_replaced_and_only_at_the_end(tmp_path):
    out = tmp_path / "out"

    def again(content: str, intruder: str = "") -> None:
        with new_folder(out, replaces=lambda path: path.suffix == ".ours") as draft:
            (draft / f"{content}.ours").write_text(content)
            if intruder:
                (out / intruder).write_text("theirs")

    again("1")
    again("2")
    assert [p.name for p in out.iterdir()] == ["2.ours"]
    with pytest.raises(DataError, match="not empty"):
        again("3", "late.txt")
    assert sorted(p.name for p in out.iterdir()) == ["2.ours", "late.txt"]
    with pytest.raises(DataError, match="not empty"):
        again("4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_folder_that_cannot_be_written_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write the folder") as caught, new_folder(tmp_path / "file" / "out"):
        pass
    assert caught.value.code == "cannot-write"
