"""k and k^m against counting what an attacker finds; losses against their definition."""

from __future__ import annotations

import itertools
from pathlib import Path

import anon_tables as tables
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from confrere.anonymise import table
from confrere.anonymise.generalise import anonymise, losses
from confrere.anonymise.itemsets import protect
from confrere.anonymise.plan import Plan
from confrere.anonymise.table import as_csv, examine, rows_of
from confrere.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


def published(plan: Plan, cells: list[dict[str, str]]) -> list[tuple[str, ...]]:
    known = tables.records(plan, cells)
    return rows_of(plan, known, anonymise(plan, known))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    k=st.integers(2, 6),
    m=st.integers(1, 3),
    count=st.integers(12, 60),
    patients=st.sampled_from([0, 10]),
    until=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_whatever_is_known_of_a_record_fits_k_patients(
    folder: Path, k: int, m: int, count: int, patients: int, until: float, seed: int
) -> None:
    plan = tables.make(folder, k=k, m=m, merge_until=until)
    cells = tables.rows(count, seed=seed, patients=patients)
    if len({one["p"] for one in cells}) < k:
        with pytest.raises(DataError, match="fewer than k") as caught:
            published(plan, cells)
        assert caught.value.code == "too-few-records"
        return
    rows = published(plan, cells)
    assert tables.fewest(plan, cells, rows) >= k


NUMBERS = st.one_of(st.floats(-1e15, 1e15), st.integers(-(10**9), 10**9).map(float))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(NUMBERS, min_size=3, max_size=8, unique=True).map(sorted))
def test_cut_points_are_read_back_from_what_is_written(folder: Path, cuts: list[float]) -> None:
    plan = tables.make(folder, numeric={"age": {"cuts": cuts}}, categorical={}, items=None)
    written = [table.cells(plan, ((low, low),), (), ("0",))[0] for low in range(len(cuts) - 1)]
    assert [tuple(map(float, one.split(".."))) for one in written] == list(itertools.pairwise(cuts))


def test_days_as_numbers_stay_apart(folder: Path) -> None:
    cuts = [20200101, 20200106, 20200111, 0.5e15]
    plan = tables.make(folder, k=2, numeric={"age": {"cuts": cuts}}, categorical={}, items=None)
    rows = [{"p": str(day), "age": str(20200101 + day), "y": "0"} for day in range(10)]
    assert sorted(set(published(plan, rows))) == [("20200101..20200106", "0"), ("20200106..20200111", "0")]


def test_the_truth_and_the_check_both_notice_a_table_that_was_not_anonymised(folder: Path) -> None:
    plan = tables.make(folder, k=3)
    cells = tables.rows(60)
    bare = [("0..10", one["place"], one["sex"], one["i"], one["y"]) for one in cells]
    for one in cells:
        one["age"] = "5"
    assert tables.fewest(plan, cells, bare) < 3
    assert not examine(plan, bare, np.arange(60))["holds"]
    coarse = [("0..100", "*", "*", one["i"], one["y"]) for one in cells]
    assert examine(plan, coarse, np.arange(60))["smallest_class"] == 60
    assert examine(plan, coarse, np.zeros(60, dtype=np.int64))["smallest_class"] == 1, "patients are counted, no rows"
    pair = [("0..100", "*", "*", "a;b" if n == 0 else "a" if n < 9 else "b", "0") for n in range(20)]
    assert examine(plan, pair, np.arange(20))["smallest_support"] == 1
    assert not examine(plan, pair, np.arange(20))["holds"]
    assert examine(tables.make(folder, k=3, m=1), pair, np.arange(20))["holds"], "m = 1 looks at no pair"


def test_the_check_counts_what_is_told_of_the_target(folder: Path) -> None:
    plan = tables.make(folder, k=2)
    rows = [("0..10", "*", "*", "", "1")] * 3 + [("10..20", "*", "*", "", y) for y in "001"]
    found = examine(plan, rows, np.arange(6))
    assert (found["classes"], found["l"], found["smallest_support"]) == (2, 1, None)
    assert found["t"] == pytest.approx(1 / 3)


def test_nothing_of_a_sparse_table_is_lost_but_what_must_be(folder: Path) -> None:
    """Forty equal records lose only the width of a bin; one odd item among them is left out."""
    plan = tables.make(folder, k=5)
    cells = [{"p": str(n), "age": "15", "place": "north", "sex": "f", "i": "a;h", "y": "0"} for n in range(40)]
    cells[0] = {**cells[0], "i": "a;h;g"}
    known = tables.records(plan, cells)
    release = anonymise(plan, known)
    assert {row[:4] for row in rows_of(plan, known, release)} == {("10..20", "north", "f", "a;h")}
    assert losses(plan, known, release) == pytest.approx(
        {"identifier age": 0.1, "identifier place": 0, "identifier sex": 0, "identifiers": 0.1 / 3, "items": 1 / 81}
    )


def test_an_item_is_raised_where_that_is_cheaper_and_left_out_where_not(folder: Path) -> None:
    tree = tables.make(folder).tree
    assert tree is not None
    a, b, g = (tree.number[name] for name in "abg")
    G = tree.number["G"]
    units = np.arange(8)
    rare = protect(tree, [[a]] * 2 + [[b]] * 6, units, k=3, m=1)
    assert rare.nodes == (G,), "2 + 6 items under G lose 2/8 each: 2; leaving a out loses 2, and says less"
    assert rare.lost == pytest.approx(2.0)
    alone = protect(tree, [[g]] * 2 + [[b]] * 6, units, k=3, m=1)
    assert (alone.nodes, alone.lost) == ((b,), 2.0)
    assert protect(tree, [[]] * 8, units, k=3, m=2).nodes == ()


def test_merging_classes_spares_items_and_costs_identifiers(folder: Path) -> None:
    cells = tables.rows(300, seed=3)
    found = {}
    for until in (0.0, 0.6):
        plan = tables.make(folder, k=5, merge_until=until)
        known = tables.records(plan, cells)
        found[until] = losses(plan, known, anonymise(plan, known))
    assert found[0.6]["items"] < found[0.0]["items"] - 0.02
    assert found[0.6]["identifiers"] > found[0.0]["identifiers"]


def test_loss_of_identifiers_grows_with_k(folder: Path) -> None:
    cells = tables.rows(300, seed=1)
    lost = []
    for k in (2, 5, 20, 100):
        plan = tables.make(folder, k=k, merge_until=0.0)
        known = tables.records(plan, cells)
        lost.append(losses(plan, known, anonymise(plan, known))["identifiers"])
    assert lost == sorted(lost)
    assert lost[0] < lost[-1]


def test_a_table_without_items_and_one_without_patients(folder: Path) -> None:
    values = {"patient": "", "items": None, "keep": ["lab"]}
    plan = tables.make(folder, k=4, **values)
    cells = tables.rows(50)
    known = tables.records(plan, cells)
    release = anonymise(plan, known)
    text = as_csv(plan, rows_of(plan, known, release)).decode()
    assert text.startswith("age,place,sex,lab,y\n")
    assert text.splitlines()[1:] == sorted(text.splitlines()[1:]), "the order of rows tells nothing"
    assert "items" not in losses(plan, known, release)
    groups = [",".join(line.split(",")[:3]) for line in text.splitlines()[1:]]
    assert min(groups.count(one) for one in groups) >= 4


def test_the_order_of_rows_changes_nothing_that_is_written(folder: Path) -> None:
    plan = tables.make(folder, k=4)
    cells = tables.rows(80, seed=5)
    one, other = (as_csv(plan, published(plan, some)) for some in (cells, cells[::-1]))
    assert one == other
