"""Several findings an image: read from tables, written as 1, 0 and -1, drawn by the rarest."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from confrere.data.check import check, render_sheet
from confrere.data.federation import Federation, load_federation
from confrere.data.findings import NONE, findings_of
from confrere.data.options import DataOptions, Partition
from confrere.errors import DataError
from confrere.report.sheet import arrange
from confrere.seeds import numpy_generator

CELLS = ["mass|nodule", "", "nodule;?mass", "nodule", "effusion", "nodule", "nodule|effusion|mass", "mass"]


def write(folder: Path, cells: list[str], sites: tuple[str, ...] = ("north",)) -> Path:
    folder.mkdir(exist_ok=True)
    lines = ["path,labels,site,patient"]
    for site in sites:
        for i, cell in enumerate(cells):
            name = f"{site}{i}.png"
            pixels = numpy_generator(i, "findings", site).integers(0, 255, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name)
            lines.append(f"{name},{cell},{site},{site}{i}")
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    return folder / "t.csv"


def read(path: Path, cache: Path, **options: object) -> Federation:
    chosen = DataOptions(target="labels", **options)  # type: ignore[arg-type]
    return load_federation(path, options=chosen, image_size=(8, 8), seed=0, cache=cache)


def test_findings_are_targets_and_the_rarest_one_is_drawn_by(tmp_path: Path) -> None:
    federation = read(write(tmp_path / "d", CELLS), tmp_path / "c")
    assert federation.classes == ("effusion", "mass", "nodule")
    assert federation.strata == ("effusion", "mass", NONE, "nodule")
    site = federation.sites[0]
    assert site.targets is not None
    rows = sorted(zip(site.targets[np.arange(8)].tolist(), (federation.strata[k] for k in site.labels), strict=True))
    assert rows == [
        ([0, -1, 1], "nodule"),
        ([0, 0, 0], NONE),
        ([0, 0, 1], "nodule"),
        ([0, 0, 1], "nodule"),
        ([0, 1, 0], "mass"),
        ([0, 1, 1], "mass"),
        ([1, 0, 0], "effusion"),
        ([1, 1, 1], "effusion"),
    ]
    changed = read(write(tmp_path / "e", ["mass", *CELLS[1:]]), tmp_path / "c")
    assert changed.digest != federation.digest
    assert check(tmp_path / "d" / "t.csv", DataOptions(target="labels"))["ok"]


def test_classes_are_agreed_mapped_and_may_be_absent_at_a_site(tmp_path: Path) -> None:
    table = write(tmp_path / "d", CELLS)
    agreed = ("fracture", "effusion", "lump")
    found = read(table, tmp_path / "c", classes=agreed, class_map={"mass": "lump", "nodule": "lump"})
    targets = found.sites[0].targets
    assert found.classes == agreed
    assert targets is not None
    assert not (targets[np.arange(8)][:, 0] != 0).any()
    with pytest.raises(DataError, match="'mass'") as caught:
        read(table, tmp_path / "c", classes=agreed)
    assert caught.value.code == "classes"


@pytest.mark.parametrize(
    ("cells", "code"),
    [
        (["mass|mass", *CELLS], "table-rows"),
        (["mass|?mass", *CELLS], "table-rows"),
        (["=1+1", *CELLS], "table-rows"),
        (["mass", "mass", "", "mass"], "classes"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, cells: list[str], code: str) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "d", cells), tmp_path / "c")
    assert caught.value.code == code


def test_a_folder_of_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "h" / "north" / "mass").mkdir(parents=True)
    with pytest.raises(DataError, match="one class an image") as caught:
        read(tmp_path / "h", tmp_path / "c")
    assert caught.value.code == "folder-tree"


def test_a_picture_with_two_sets_of_findings_is_a_conflict_and_pools_are_dealt(tmp_path: Path) -> None:
    table = write(tmp_path / "d", CELLS, ("north", "south"))
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, "north0.png,effusion,north,north0"]) + "\n")
    assert read(table, tmp_path / "c").sheet["sites"]["north"]["conflicts"] == 2
    dealt = read(table, tmp_path / "c", partition=Partition(by="dirichlet", sites=2))
    assert [site.name for site in dealt.sites] == ["site_01", "site_02"]


def test_cells_read_as_written() -> None:
    assert findings_of(" b ; ?a|| c") == ("?a", "b", "c")
    assert findings_of("") == ()


def test_the_sheet_counts_what_is_present_absent_and_not_known(tmp_path: Path) -> None:
    federation = read(
        write(tmp_path / "d", CELLS, ("north", "south")), tmp_path / "c", classes=("effusion", "mass", "nodule", "rare")
    )
    counts = federation.sheet["sites"]["north"]["findings"]
    for name, kinds in counts.items():  # against the cells themselves
        cells = [cell.split(";") if ";" in cell else cell.split("|") for cell in CELLS]
        assert kinds["present"] == sum(name in cell for cell in cells)
        assert kinds["unknown"] == sum(f"?{name}" in cell for cell in cells)
        assert sum(kinds.values()) == len(CELLS)
    assert list(counts) == ["effusion", "mass", "nodule", "rare"]
    assert counts["mass"] == {"present": 3, "absent": 4, "unknown": 1}
    assert "boxes" not in federation.sheet["sites"]["north"]
    text = StringIO()
    Console(file=text, width=150).print(render_sheet(federation.sheet))
    assert re.search(r"mass +3/4/1 +3/4/1", text.getvalue())
    page = arrange(federation.sheet, list(federation.strata), "stratum")
    assert page is not None
    (table,) = page["counts"]
    assert [row["name"] for row in table["rows"]] == list(counts)
    assert table["parts"] == ["present", "absent", "unknown"]
    assert "Findings" not in (page["rest"] or {"columns": []})["columns"]
