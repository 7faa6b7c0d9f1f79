"""``confrere anonymise`` as a user meets it: what it writes, says and refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anon_tables as tables
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from confrere.anonymise import release
from confrere.anonymise.attacks import LEAST_STRANGERS
from confrere.anonymise.plan import Plan
from confrere.anonymise.release import write_mapped, write_release
from confrere.cli import app
from confrere.errors import ConfigError, ConfrereError, DataError, RunError

PLAN = """
k = 4
m = 2
target = "y"
patient = "p"
keep = ["lab"]
numeric.age.cuts = [0, 10, 20, 40, 60, 100]
categorical.place.hierarchy = "places.csv"
categorical.sex.values = ["f", "m"]
[items]
column = "i"
hierarchy = "items.csv"
"""


def write(path: Path, cells: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(cells[0]))
        writer.writeheader()
        writer.writerows(cells)
    return path


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    (tmp_path / "items.csv").write_text(tables.TREE)
    (tmp_path / "places.csv").write_text(tables.PLACES)
    (tmp_path / "plan.toml").write_text(PLAN)
    shared = tables.rows(20, seed=7)
    for seed, site in enumerate(("St. Mary", "north")):
        own = [{**one, "p": f"{site}-{one['p']}"} for one in tables.rows(60, seed=seed)]
        write(tmp_path / f"{site}.csv", shared + own)
    write(tmp_path / "strangers.csv", tables.rows(40, seed=3))
    return tmp_path / "plan.toml"


def test_it_writes_tables_mappings_and_a_statement(plan: Path) -> None:
    folder, out = plan.parent, plan.parent / "out"
    sites = [str(folder / name) for name in ("St. Mary.csv", "north.csv")]
    told = ["--strangers", str(folder / "strangers.csv"), "--out", str(out)]
    done = CliRunner().invoke(app, ["anonymise", str(plan), *sites, *told])
    assert done.exit_code == 0, done.output
    assert "st_mary: 80 rows in" in done.output
    names = {"north", "st_mary"}
    files = {f"{name}{end}" for name in names for end in (".csv", ".mapping.json")}
    assert {path.name for path in out.iterdir()} == files | {"mapping.json", "statement.json", "statement.md"}
    statement = json.loads((out / "statement.json").read_text())
    assert set(statement["sites"]) == names
    assert all(one["smallest_class"] >= 4 and one["smallest_support"] >= 4 for one in statement["sites"].values())
    assert statement["union"]["holds"]
    assert set(statement["attacks"]) == {
        "north and st_mary intersected",
        "membership in north",
        "membership in st_mary",
    }
    page = (out / "statement.md").read_text()
    for text in (page, json.dumps(statement), done.output):
        assert not any(word in text.lower() for word in ("anonymous", "compliant", "gdpr", "hipaa"))
        assert "p17" not in text, "no patient is named"
    assert "**Not checked:**" in page
    rows = list(csv.reader((out / "north.csv").read_text().splitlines()))
    assert rows[0] == ["age", "place", "sex", "i", "lab", "y"]
    assert len(rows) == 81
    assert not any(cell.startswith(("p", "north-")) for row in rows[1:] for cell in row), "patients are not written"


def test_new_records_are_mapped_in_their_order_without_target_and_patient(plan: Path) -> None:
    folder = plan.parent
    write_release(plan, [folder / "north.csv"], folder / "a")
    write_release(plan, [folder / "St. Mary.csv"], folder / "b")
    new = [{key: one[key] for key in ("age", "place", "sex", "i", "lab")} for one in tables.rows(15, seed=11)]
    path = write(folder / "new.csv", new)
    mappings = [str(folder / name) for name in ("a/north.mapping.json", "b/mapping.json")]
    told = [part for one in mappings for part in ("--map-with", one)]
    done = CliRunner().invoke(app, ["anonymise", str(plan), str(path), *told, "--out", str(folder / "mapped.csv")])
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((folder / "mapped.csv").read_text().splitlines()))
    assert [row["lab"] for row in rows] == [one["lab"] for one in new]
    assert set(rows[0]) == {"age", "place", "sex", "i", "lab"}
    assert all(".." in row["age"] for row in rows)
    with pytest.raises(DataError, match="there already") as caught:
        write_mapped(plan, path, [Path(mappings[0])], folder / "mapped.csv")
    assert caught.value.code == "not-empty"
    for name, content, code in (
        ("x.json", "{", "mapping"),
        ("y.json", "[1]", "mapping"),
        ("z.json", None, "unreadable-file"),
    ):
        if content is not None:
            (folder / name).write_text(content)
        with pytest.raises(DataError) as caught:
            write_mapped(plan, path, [folder / name], folder / "no.csv")
        assert caught.value.code == code
    with pytest.raises(ConfigError, match="one table"):
        CliRunner().invoke(app, ["anonymise", str(plan), *[str(path)] * 2, *told, "--out", "x"], catch_exceptions=False)


def altered(key: str, value: str) -> Callable[[dict[str, str]], dict[str, str]]:
    return lambda one: {**one, key: value}


SECRET = "Eve-Secret"


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("age", "", "age is empty in 1 lines, first in line 5"),
        ("age", SECRET, "age is no number"),
        ("age", "nan", "age is no number"),
        ("age", "1e999", "age is no number"),
        ("place", SECRET, "place is not in its list or tree"),
        ("place", "coast", "place is not in its list or tree"),
        ("sex", "", "sex is empty"),
        ("i", f"a;{SECRET}", "i has an item that is not in its list"),
        ("i", "G", "i has an item that is not in its list"),
        ("y", "", "y is empty"),
        ("p", "", "p is empty"),
        ("y", "0\x1b[31m", "y is longer than 1,000 characters or not printable"),
        ("lab", "7" * 1001, "lab is longer than 1,000"),
    ],
)
def test_a_cell_that_cannot_be_is_named_by_line_and_never_quoted(
    plan: Path, column: str, value: str, what: str
) -> None:
    cells = tables.rows(30)
    cells[3][column] = value
    table = write(plan.parent / "bad.csv", cells)
    with pytest.raises(DataError, match=what) as caught:
        write_release(plan, [table], plan.parent / "out")
    assert caught.value.code == "table-rows"
    assert SECRET not in str(caught.value)
    assert not (plan.parent / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("k = 4", "k = 1", "value"),
        ("k = 4", "k = 200", "too-few-records"),
        ("k = 4", "", "missing-key"),
        ("k = 4", "k = 4\nkk = 5", "unknown-key"),
        ("k = 4", "k = ", "not-toml"),
        ("m = 2", "m = 9", "value"),
        ('target = "y"', 'target = "z"', "table-header"),
        ('target = "y"', 'target = "lab"', "named-twice"),
        ('["f", "m"]', '["f", "f"]', "hierarchy"),
        ('["f", "m"]', "[]", "value"),
        ('sex.values = ["f", "m"]', 'sex.vales = ["f", "m"]', "unknown-key"),
        ("[0, 10, 20", "[0, 20, 10", "value"),
        ("[0, 10, 20", "[nan, 10, 20", "value"),
        ("places.csv", "nothing.csv", "unreadable-file"),
        ("places.csv", "../places.csv", "hierarchy"),
        ('hierarchy = "items.csv"', 'values = ["a;b", "c"]', "hierarchy"),
        ("numeric.age.cuts = [0, 10, 20, 40, 60, 100]\n", "", None),
    ],
)
def test_a_plan_that_cannot_be_is_refused(plan: Path, old: str, new: str, code: str | None) -> None:
    text = plan.read_text()
    assert old in text
    plan.write_text(text.replace(old, new))
    if code is None:
        assert (
            write_release(plan, [plan.parent / "north.csv"], plan.parent / "out")["plan"]["identifiers"][0] == "place"
        )
        return
    with pytest.raises(ConfrereError) as caught:
        write_release(plan, [plan.parent / "north.csv"], plan.parent / "out")
    assert caught.value.code == code
    assert not (plan.parent / "out").exists()


@pytest.mark.parametrize(
    "tree",
    [
        "a,G\nb,H\nG,H\n",  # a group that is a value
        "a,G\na,H\n",  # a value twice
        "a,G,U\nb,G,V\n",  # a group in two places
        "a\n",  # one value
        "a,G\n,G\n",  # no name
        "*\na\n",
        'a,"G\nb',
        "\xff",
        "\n".join(f"v{n}" for n in range(1001)),
        "\n".join(",".join([f"v{n}", *(f"{n}-{step}" for step in range(9))]) for n in range(300)),
    ],
)
def test_a_tree_that_is_none_is_refused(plan: Path, tree: str) -> None:
    (plan.parent / "places.csv").write_bytes(tree.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        write_release(plan, [plan.parent / "north.csv"], plan.parent / "out")
    assert caught.value.code == "hierarchy"


def test_files_that_cannot_be_read_or_written(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, north = plan.parent, plan.parent / "north.csv"
    for call, code in (
        (lambda: write_release(folder / "none.toml", [north], folder / "out"), "no-such-path"),
        (lambda: write_release(folder, [north], folder / "out"), "unreadable-file"),
        (lambda: write_release(plan, [folder / "none.csv"], folder / "out"), "unreadable-file"),
        (lambda: write_release(plan, [north, north], folder / "out"), "named-twice"),
        (lambda: write_release(plan, [north], folder), "not-empty"),
        (lambda: write_release(plan, [north], north / "out"), "cannot-write"),
    ):
        with pytest.raises(ConfrereError) as caught:
            call()
        assert caught.value.code == code
    (folder / "binary.toml").write_bytes(b"k = '\xcb'")
    with pytest.raises(ConfigError, match="it is not UTF-8"):
        write_release(folder / "binary.toml", [north], folder / "out")
    (folder / "statement.csv").write_text(north.read_text())
    with pytest.raises(ConfigError, match="reserved"):
        write_release(plan, [folder / "statement.csv"], folder / "out")
    (folder / "empty.csv").write_text("p,age,place,sex,i,y,lab\n")
    with pytest.raises(DataError, match="no rows"):
        write_release(plan, [folder / "empty.csv"], folder / "out")
    monkeypatch.setattr("confrere.anonymise.table.MOST_SETS", 100)
    with pytest.raises(DataError, match="lower m") as caught:
        write_release(plan, [north], folder / "out")
    assert caught.value.code == "too-many-items"
    monkeypatch.undo()
    monkeypatch.setattr("confrere.anonymise.records.MOST_RECORDS", 10)
    with pytest.raises(DataError, match="more than 10 rows"):
        write_release(plan, [north], folder / "out")
    monkeypatch.undo()
    monkeypatch.setattr("confrere.anonymise.records.MOST_ITEMS", 2)
    with pytest.raises(DataError, match="more than 2 items"):
        write_release(plan, [north], folder / "out")


def test_a_table_that_does_not_hold_what_was_asked_is_never_written(
    plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check before writing does not trust what made the classes."""
    real = release.rows_of

    def leaky(*given: object) -> list[tuple[str, ...]]:
        rows = real(*given)  # type: ignore[arg-type]
        rows[0] = ("0..10", *rows[0][1:])
        rows[1] = ("10..20", *rows[1][1:])
        return rows

    monkeypatch.setattr(release, "rows_of", leaky)
    with pytest.raises(RunError, match="would be written") as caught:
        write_release(plan, [plan.parent / "north.csv"], plan.parent / "out")
    assert caught.value.code == "anonymity-check"
    assert not (plan.parent / "out").exists()


def test_tables_that_do_not_hold_it_together_are_never_written(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = release.examine

    def wary(asked: Plan, rows: Sequence[tuple[str, ...]], units: NDArray[np.int64]) -> dict[str, Any]:
        return real(asked, rows, units) | ({"holds": False} if len(rows) > 80 else {})

    monkeypatch.setattr(release, "examine", wary)
    both = [plan.parent / name for name in ("north.csv", "St. Mary.csv")]
    with pytest.raises(RunError, match="all tables together") as caught:
        write_release(plan, both, plan.parent / "out")
    assert caught.value.code == "anonymity-check"
    assert not (plan.parent / "out").exists()
    write_release(plan, both[:1], plan.parent / "out")


def test_too_few_strangers_are_refused_before_anything_is_done(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = plan.parent
    monkeypatch.setattr(release, "anonymise", None)
    for count in (1, 2, LEAST_STRANGERS - 1):
        few = write(folder / "few.csv", tables.rows(count, seed=3))
        with pytest.raises(DataError, match=f"too short for a comparison: {count}") as caught:
            write_release(plan, [folder / "north.csv"], folder / "out", strangers=few)
        assert caught.value.code == "too-few-records"
        assert not (folder / "out").exists()
    monkeypatch.undo()
    enough = write(folder / "enough.csv", tables.rows(LEAST_STRANGERS, seed=3))
    found = write_release(plan, [folder / "north.csv"], folder / "out", strangers=enough)
    assert 0.1 < found["attacks"]["membership in north"]["strangers"] < 0.9


def test_kept_cells_and_targets_are_no_formulas_and_numbers_stay(plan: Path) -> None:
    folder, out = plan.parent, plan.parent / "out"
    given = ["=HYPERLINK(1)", "+1-1", "-cmd", "@SUM(1)", "-1.5", "+3e-4", "-1,5", "-", "", "a=b", "7"]
    cells = [
        {**one, "lab": given[n % len(given)], "y": "=1" if n % 2 else "0"} for n, one in enumerate(tables.rows(44))
    ]
    path = write(folder / "x.csv", cells)
    write_release(plan, [path], out)
    write_mapped(plan, path, [out / "mapping.json"], folder / "mapped.csv")
    expected = ["./=HYPERLINK(1)", "./+1-1", "./-cmd", "./@SUM(1)", *given[4:]]
    mapped = list(csv.DictReader((folder / "mapped.csv").read_text().splitlines()))
    assert [row["lab"] for row in mapped] == [expected[n % len(given)] for n in range(44)]
    released = list(csv.DictReader((out / "x.csv").read_text().splitlines()))
    assert sorted(row["lab"] for row in released) == sorted(expected * 4)
    assert {row["y"] for row in released} == {"./=1", "0"}
