"""Classes of new records, the union of sites' mappings, and attacks beside their controls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import anon_tables as tables
import numpy as np
import pytest

from confrere.anonymise.attacks import Target, intersection, membership
from confrere.anonymise.encode import encode, encode_items, feature_names
from confrere.anonymise.generalise import anonymise
from confrere.anonymise.mapping import as_mapping, assign, contains, entries, mapped_items, unite
from confrere.anonymise.plan import Plan
from confrere.anonymise.table import published_items
from confrere.errors import DataError


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return tables.make(tmp_path_factory.mktemp("plan"), k=5)


def target(plan: Plan, cells: list[dict[str, str]], names: dict[str, int] | None = None) -> Target:
    records = tables.records(plan, cells, names={} if names is None else names)
    return Target(plan, records, anonymise(plan, records))


@pytest.fixture(scope="module")
def sites(plan: Plan) -> dict[str, Target]:
    return {name: target(plan, tables.rows(150, seed=seed)) for seed, name in enumerate(("north", "south"))}


@pytest.fixture(scope="module")
def union(plan: Plan, sites: dict[str, Target]) -> dict[str, Any]:
    return unite([as_mapping(plan, {name: one.release}) for name, one in sites.items()])


def test_a_mapping_survives_json_and_holds_no_count_and_no_target(plan: Plan, sites: Any, union: Any) -> None:
    told = json.loads(json.dumps(union))
    assert [set(one) for one in told["sites"]["north"]] == [{"age", "place", "sex", "items"}] * len(
        sites["north"].release.classes
    )
    found = entries(plan, told)
    assert [one.site for one in found].count("south") == len(sites["south"].release.classes)
    assert [one.box for one in found if one.site == "north"] == [one.box for one in sites["north"].release.classes]
    again = as_mapping(plan, {name: one.release for name, one in sites.items()})
    assert again == union, "the union of two mappings is the mapping of two sites"


def test_records_go_to_the_smallest_box_that_holds_them(plan: Plan, sites: Any, union: Any) -> None:
    from confrere.anonymise.relational import ncp

    found = entries(plan, union)
    new = tables.records(plan, tables.rows(60, seed=9))
    for row, chosen in enumerate(assign(plan, new, found)):
        holding = [ncp(plan, one.box).mean() for one in found if contains(plan, one.box, new.codes[row : row + 1])[0]]
        if holding:
            assert contains(plan, found[chosen].box, new.codes[row : row + 1])[0]
            assert ncp(plan, found[chosen].box).mean() == min(holding)
    own = sites["north"]
    alone = entries(plan, as_mapping(plan, {"north": own.release}))
    assert contains(plan, alone[0].box, own.records.codes)[own.release.class_of == 0].all()


def test_the_nearest_centre_is_that_of_the_mahalanobis_distance(plan: Plan, union: Any) -> None:
    found = entries(plan, union)
    new = tables.records(plan, tables.rows(40, seed=9))
    centres, x = encode(plan, [one.box for one in found], None), encode(plan, None, new)
    inverse = np.linalg.inv(np.cov(centres.T, bias=True) + 0.01 * np.eye(centres.shape[1]))
    chosen = assign(plan, new, found, how="mahalanobis")
    for row, number in enumerate(chosen):
        gaps = x[row] - centres
        distance = np.einsum("ci,ij,cj->c", gaps, inverse, gaps)
        assert distance[number] == pytest.approx(distance.min(), rel=1e-9)


def test_items_of_a_new_record_are_what_its_class_publishes(plan: Plan, sites: Any) -> None:
    own = sites["north"]
    found = entries(plan, as_mapping(plan, {"north": own.release}))
    assert mapped_items(plan, own.records, found, own.release.class_of) == published_items(
        plan, own.records, own.release
    )


def test_numbers_for_a_model_are_mid_points_and_equal_chances(plan: Plan) -> None:
    names = feature_names(plan)
    place, sex = plan.categorical["place"], plan.categorical["sex"]
    box = ((1, 2), (place.number["coast"],) * 2, (sex.number["f"],) * 2)
    row = dict(zip(names, encode(plan, [box], None)[0], strict=False))
    assert row["age"] == pytest.approx(0.25), "10 to 40 of 0 to 100"
    assert (row["place=north"], row["place=south"], row["place=east"]) == (0.5, 0.5, 0)
    assert (row["sex=f"], row["sex=m"]) == (1, 0)
    assert plan.tree is not None
    items = dict(zip(names[-8:], encode_items(plan, [(plan.tree.number["G"], plan.tree.number["c"])])[0], strict=True))
    assert (items["i:a"], items["i:b"], items["i:c"], items["i:d"]) == (0.5, 0.5, 1, 0)
    clear = tables.records(plan, [{"p": "1", "age": "33", "place": "east", "sex": "m", "i": "", "y": "0"}])
    assert encode(plan, None, clear)[0].tolist() == pytest.approx([0.33, 0, 0, 1, 0, 0, 0, 1])


def test_a_second_release_narrows_down_and_the_controls_do_not(tmp_path: Path) -> None:
    plan = tables.make(tmp_path, k=5, merge_until=0.0, keep=["lab"])
    names: dict[str, int] = {}
    shared = tables.rows(60, seed=0)
    others = [[{**one, "p": f"{site}{one['p']}"} for one in tables.rows(140, seed=site)] for site in (1, 2)]
    here, there = (target(plan, shared + some, names) for some in others)
    found = intersection(here, there)
    assert found is not None
    assert found["persons"] == found["shared"] == 60
    assert found["alone"]["below_k"] == 0, "k holds in one table"
    assert found["both"]["below_k"] > 0.1
    assert found["both"]["pointed"] > 1.2 * found["alone"]["pointed"]
    assert found["stranger"]["pointed"] < found["alone"]["pointed"]
    assert intersection(here, target(plan, others[1])) is not None, "numbers of units are compared, no names"
    apart = replace(there, records=replace(there.records, units=there.records.units + 10_000))
    assert intersection(here, apart) is None


def test_a_row_that_is_the_person_s_own_always_survives_its_own_release(plan: Plan, sites: Any) -> None:
    found = intersection(sites["north"], sites["north"])
    assert found is not None
    assert found["both"] == found["alone"], "the same release twice tells nothing more"


def test_membership_is_told_less_than_by_the_table_before_and_strangers_are_alike(plan: Plan) -> None:
    own, strangers = target(plan, tables.rows(400, seed=0)), tables.records(plan, tables.rows(400, seed=1))
    found = membership(own, own.records, strangers)
    assert found["raw"] > 0.85
    assert 0.5 < found["anonymised"] < found["raw"]
    assert found["strangers"] == pytest.approx(0.5, abs=0.08)
    with pytest.raises(DataError, match="too short"):
        membership(own, own.records, strangers.take(np.arange(1)))


def test_mappings_that_do_not_fit_are_refused(plan: Plan, union: dict[str, Any], tmp_path: Path) -> None:
    other = tables.make(tmp_path, k=5, numeric={"age": {"cuts": [0, 50, 100]}})
    north = {**union, "sites": {"north": union["sites"]["north"]}}
    damaged = json.loads(json.dumps(north))
    damaged["sites"]["north"][0]["age"] = [40, 10]
    unknown = json.loads(json.dumps(north))
    unknown["sites"]["north"][0]["place"] = ["coast"]
    for made, call in (
        ("no mapping", lambda: unite([{"format": 2}])),
        ("no mapping", lambda: unite([["sites"]])),  # type: ignore[list-item]
        ("holds no sites", lambda: unite([{"format": 1, "sites": []}])),
        ("another plan", lambda: unite([north, {**north, "k": 7}])),
        ("twice", lambda: unite([north, north])),
        ("other cut points", lambda: entries(other, north)),
        ("damaged", lambda: entries(plan, damaged)),
        ("damaged", lambda: entries(plan, unknown)),
        ("damaged", lambda: entries(plan, {**north, "sites": {"north": 3}})),
        ("no class", lambda: entries(plan, {**north, "sites": {}})),
    ):
        with pytest.raises(DataError, match=made) as caught:
            call()
        assert caught.value.code == "mapping"
