from __future__ import annotations

import io
import json

import pytest
from data_files import load, make_folder
from rich.console import Console

from confrere.data.check import check, render_check
from confrere.data.options import DataOptions
from confrere.data.sheet import mark_outliers, similar_names


def shown(report: dict[str, object]) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=140).print(render_check(report))
    return buffer.getvalue()


def test_good_data(tmp_path):
    root = make_folder(tmp_path / "h")
    (root / "SYNTHETIC.txt").write_text("generated")
    report = check(root, DataOptions())
    json.dumps(report)
    assert report["ok"]
    assert report["error"] is None
    assert report["synthetic"]
    text = shown(report)
    assert "synthetic, not from patients" in text
    assert "8/2/2" in text
    assert "can be used" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h"]


def test_the_digest_is_that_of_the_run(tmp_path):
    root = make_folder(tmp_path / "h")
    assert check(root, DataOptions())["digest"] == load(root, tmp_path / "cache").digest


def test_bad_files_are_named_for_the_local_user(tmp_path):
    root = make_folder(tmp_path / "h")
    (root / "a/good/notes[red].txt").write_text("x")
    report = check(root, DataOptions())
    assert report["ok"]
    assert report["problems"] == [
        {"site": "a", "name": "good/notes[red].txt", "reason": "not a PNG, JPEG, TIFF or DICOM file"}
    ]
    assert "good/notes[red].txt" in shown(report)
    strict = check(root, DataOptions(on_bad="stop"))
    assert not strict["ok"]
    assert strict["problems"] == report["problems"]
    assert "1 files cannot be used" in shown(strict)


def test_an_empty_site_fails_with_its_files(tmp_path):
    root = make_folder(tmp_path / "h")
    (root / "c/good").mkdir(parents=True)
    (root / "c/good/x\x1b[2J.png").write_text("x")
    report = check(root, DataOptions())
    assert not report["ok"]
    assert "no usable image at c" in report["error"]["what"]
    assert len(report["problems"]) == 1
    assert "\x1b" not in shown(report)


def test_a_wrong_tree_fails_with_the_right_one(tmp_path):
    report = check(tmp_path, DataOptions())
    assert not report["ok"]
    assert "p012__1.png" in shown(report)


def test_many_problems_are_cut(tmp_path):
    root = make_folder(tmp_path / "h")
    for i in range(30):
        (root / f"a/good/{i}.png").write_text(str(i))
    assert "and 10 more" in shown(check(root, DataOptions()))


def test_outliers():
    def sites(*means: float) -> dict[str, dict[str, object]]:
        return {str(i): {"channel_mean": [mean] * 3, "outlier": False} for i, mean in enumerate(means)}

    assert mark_outliers(sites(100, 101, 99, 180)) == ["3"]
    assert mark_outliers(sites(100, 101, 99, 103)) == []
    assert mark_outliers(sites(100, 101, 180)) == []


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["nv", "NV", "mel"], [["NV", "nv"]]),
        (["basal cell", "basal_cell", "Basal-Cell"], [["Basal-Cell", "basal cell", "basal_cell"]]),
        (["a", "b"], []),
    ],
)
def test_similar_names(names, groups):
    assert similar_names(names) == groups
