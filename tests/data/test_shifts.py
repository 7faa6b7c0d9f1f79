"""Simulated shifts: drawn by address, written down, and never where they were not asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import load, make_folder, write
from hypothesis import given, reject
from hypothesis import strategies as st
from pydantic import ValidationError

from confrere.config import override, validate
from confrere.data import appearance, simulate
from confrere.data.check import check
from confrere.data.federation import Federation
from confrere.data.images import SiteImages
from confrere.data.options import DataOptions
from confrere.data.shift import KINDS, Shift
from confrere.data.view import View
from confrere.errors import ConfigError, DataError

CLASSES = ("w", "x", "y", "z")
TRAIN = 0
strengths = st.floats(0, 1).map(lambda x: round(x, 3))
seeds = st.integers(0, 9)


class Pixels:
    """What a mapped file is to a site: rows by number."""

    def __init__(self, n: int) -> None:
        self.kept = np.random.default_rng(5).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
        self.shape, self.dtype = self.kept.shape, self.kept.dtype

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.kept[rows]


def site(name: str = "a", n: int = 48) -> SiteImages:
    """Four classes, patients of three images (all of a class), two thirds of them in training."""
    numbers = np.arange(n)
    return SiteImages(
        name=name,
        images=Pixels(n),  # type: ignore[arg-type]
        labels=(numbers // 3) % len(CLASSES),
        groups=numbers // 3,
        digests=tuple(f"{k:064x}" for k in numbers),
        split=np.array([0, 0, 1, 0, 2, 0], dtype=np.int8)[(numbers // 3) % 6],
    )


shifts = st.one_of(
    st.builds(Shift, kind=st.sampled_from(["scanner", "stain", "label-noise", "quantity"]), strength=strengths),
    st.builds(Shift, kind=st.just("missing-classes"), count=st.integers(0, 3)),
    st.builds(Shift, kind=st.just("concept"), count=st.sampled_from([0, 2, 3, 4])),
    st.builds(Shift, kind=st.just("concept"), classes=st.permutations(CLASSES).map(lambda c: tuple(c[:3]))),
)
some = st.lists(shifts, max_size=4, unique_by=lambda shift: shift.kind)


def simulated(sites: list[SiteImages], asked: list[Shift], seed: int) -> tuple[SiteImages, ...]:
    return simulate.simulate(sites, asked, CLASSES, seed)[1]


def everything(site: SiteImages) -> tuple[Any, ...]:
    arrays = (site.labels, site.groups, site.split, np.asarray(site.images[np.arange(len(site.labels))]))
    return (site.name, site.digests, *(a.tobytes() for a in arrays))


@given(asked=some, seed=seeds)
def test_a_shift_is_drawn_by_seed_and_site_whatever_stands_beside_it(asked: list[Shift], seed: int) -> None:
    only = [shift.model_copy(update={"sites": ("a",)}) for shift in asked]
    try:
        alone = everything(simulated([site()], asked, seed)[0])
    except DataError:  # so many classes and patients left out that no label can be flipped
        reject()
    for given_sites in ([site("b"), site()], [site(), site("c", 30)]):
        found = {s.name: s for s in simulated(given_sites, only[::-1], seed)}
        assert everything(found["a"]) == alone
        for other in given_sites:
            if other.name != "a":
                assert found[other.name] is other


@given(asked=shifts, seed=seeds)
def test_validation_and_test_stay_what_they_are(asked: Shift, seed: int) -> None:
    before, after = site(), simulated([site()], [asked], seed)[0]
    held = {d: (label, group, split) for d, label, group, split in rows(before) if split != TRAIN}
    found = {d: (label, group, split) for d, label, group, split in rows(after) if split != TRAIN}
    if asked.kind == "concept":
        ring = simulate.chosen_classes(before, asked, CLASSES, seed)
        new = simulate.permutation(ring, len(CLASSES))
        held = {d: (new[label], group, split) for d, (label, group, split) in held.items()}
    if asked.kind in ("scanner", "stain"):  # pixels change everywhere, as a hospital's do
        assert list(found.values()) == list(held.values())
    else:
        assert found == held


def rows(site: SiteImages) -> list[tuple[Any, ...]]:
    return list(zip(site.digests, site.labels.tolist(), site.groups.tolist(), site.split.tolist(), strict=True))


@given(seed=seeds)
def test_strength_nothing_is_the_identity(seed: int) -> None:
    images, keys = site().images[:], [str(k) for k in range(48)]
    assert np.array_equal(appearance.restain(images, appearance.stain_of(0, seed, "a")), images)
    assert np.array_equal(appearance.scan(images, appearance.scanner_of(0, seed, "a"), keys, seed, "a"), images)
    assert np.array_equal(simulate.flipped(site(), 0, seed), site().labels)
    assert simulate.kept(site(), 0, seed).all()
    idle = [Shift(kind=k, strength=0) for k in ("scanner", "stain", "label-noise", "quantity")]
    idle += [Shift(kind=k, count=0) for k in ("missing-classes", "concept")]
    idle.append(Shift(kind="backdoor", strength=0, classes=("w",)))
    assert {shift.kind for shift in idle} == set(KINDS)
    here = site()
    counted, found, said = simulate.simulate([here], idle, CLASSES, seed)
    assert counted[0] is here
    assert found[0] is here
    assert said == {}


@given(ring=st.permutations(range(6)), n=st.integers(2, 6))
def test_a_concept_is_a_bijection_that_moves_exactly_its_classes(ring: list[int], n: int) -> None:
    new = simulate.permutation(ring[:n], 6)
    assert sorted(new.tolist()) == list(range(6))
    assert {k for k in range(6) if new[k] != k} == set(ring[:n])


def test_two_classes_swap() -> None:
    asked = Shift(kind="concept", classes=("w", "y"))
    after, said = simulate.relabelled(site(), {"concept": asked}, CLASSES, 0)
    assert after.labels.tolist() == [{0: 2, 2: 0}.get(k, k) for k in site().labels.tolist()]
    assert said == ["concept: w is called y, y is called w"]


@given(strength=strengths, seed=seeds)
def test_label_noise_flips_its_share_to_other_classes(strength: float, seed: int) -> None:
    before = site()
    after = simulate.flipped(before, strength, seed)
    moved = after != before.labels
    assert moved.sum() == round(strength * (before.split == TRAIN).sum())
    assert not moved[before.split != TRAIN].any()
    more = simulate.flipped(before, min(1.0, strength + 0.2), seed)
    assert np.array_equal(more[moved], after[moved])


def test_label_noise_prefers_no_class() -> None:
    counts = np.zeros((4, 4))
    for seed in range(200):
        after = simulate.flipped(site(), 1.0, seed)
        train = site().split == TRAIN
        np.add.at(counts, (site().labels[train], after[train]), 1)
    shares = counts / counts.sum(1, keepdims=True)
    assert np.allclose(shares, (1 - np.eye(4)) / 3, atol=0.05)


@given(strength=strengths, seed=seeds)
def test_quantity_leaves_out_whole_patients_up_to_its_share(strength: float, seed: int) -> None:
    before = site()
    stays = simulate.kept(before, strength, seed)
    train = before.split == TRAIN
    assert stays[~train].all()
    for group in np.unique(before.groups):
        assert len(set(stays[before.groups == group].tolist())) == 1
    gone = (~stays).sum()
    assert gone <= strength * train.sum() + 1e-9
    assert gone > strength * train.sum() - 3 or stays[train].sum() == 3  # patients have three images
    assert not (~stays & simulate.kept(before, min(1.0, strength + 0.3), seed)).any()


@given(count=st.integers(1, 3), seed=seeds)
def test_missing_classes_are_missing_in_training_only(count: int, seed: int) -> None:
    before = site()
    after = simulated([before], [Shift(kind="missing-classes", count=count)], seed)[0]
    assert len(set(after.labels[after.split == TRAIN].tolist())) == len(CLASSES) - count
    assert set(after.labels[after.split == 2].tolist()) == set(before.labels[before.split == 2].tolist())


@given(asked=shifts.filter(lambda s: s.kind in ("scanner", "stain") and s.strength >= 0.1), seed=seeds)
def test_changed_pixels_have_other_keys_and_do_not_depend_on_the_batch(asked: Shift, seed: int) -> None:
    before, after = site(), simulated([site()], [asked], seed)[0]
    assert not set(before.digests) & set(after.digests)
    assert len(set(after.digests)) == len(before.digests)
    whole = np.asarray(after.images[:])
    assert whole.dtype == np.uint8
    assert (whole != before.images[:]).any()
    order = np.random.default_rng(seed).permutation(len(whole))
    apart = np.concatenate([after.images[part] for part in np.split(order, 4)])
    assert np.array_equal(apart, whole[order])
    assert np.array_equal(after.images[3], whole[3])
    other = simulated([site()], [asked], seed + 1)[0]
    assert not set(other.digests) & set(after.digests)


def test_a_stronger_shift_is_more_of_the_same() -> None:
    images, keys = site().images[:].astype(float), [str(k) for k in range(48)]
    for draw in ("stain", "scanner"):
        off = []
        for strength in (0.2, 0.5, 1.0):
            pixels = images.astype(np.uint8)
            if draw == "stain":
                found = appearance.restain(pixels, appearance.stain_of(strength, 0, "a"))
            else:
                found = appearance.scan(pixels, appearance.scanner_of(strength, 0, "a"), keys, 0, "a")
            off.append(np.abs(found - images).mean())
        assert off == sorted(off)
        assert off[0] > 1


def test_a_doubled_stain_squares_the_transmission() -> None:
    """With factors 2 and no offset every density doubles: T' = T^2, T = (I + 1) / 256, by Beer and Lambert."""
    twice = {f"{n}_factor": 2.0 for n in ("haematoxylin", "eosin", "dab")}
    none = {f"{n}_offset": 0.0 for n in ("haematoxylin", "eosin", "dab")}
    images = np.array([[[[255, 127, 63]]]], dtype=np.uint8)
    assert appearance.restain(images, {**twice, **none}).tolist() == [[[[255, 63, 15]]]]


def test_a_scanner_by_hand() -> None:
    """Contrast 1/2 about mid-grey, then gamma 2: 255 -> 0.75^2 = 0.5625 -> 143, 0 -> 0.25^2 -> 16."""
    scanner = {"blur": 0.0, "log_contrast": float(np.log(0.5)), "log_gamma": float(np.log(2)), "noise": 0.0}
    images = np.array([[[[255, 0, 255]]]], dtype=np.uint8)
    assert appearance.scan(images, scanner, ["k"], 0, "a").tolist() == [[[[143, 16, 143]]]]


def test_a_view_is_an_array_of_its_rows() -> None:
    base = Pixels(6)
    view = View(base, np.array([4, 2]), lambda images, rows: images // 2 + rows[:, None, None, None].astype(np.uint8))  # type: ignore[arg-type]
    assert view.shape == (2, 8, 8, 3)
    assert np.array_equal(view[:], np.stack([base.kept[4] // 2, base.kept[2] // 2 + 1]))
    assert np.array_equal(np.array(list(view)), view[:])
    assert np.array_equal(view[np.array([1, 0, 1])], view[:][[1, 0, 1]])
    with pytest.raises(IndexError):
        view[2]


# From files to a data sheet.


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "h", sites=("a", "b"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


ALL = [
    {"kind": "scanner", "strength": 0.5, "sites": ["a"]},
    {"kind": "stain", "strength": 0.5, "sites": ["a"]},
    {"kind": "label-noise", "strength": 0.3, "sites": ["a"]},
    {"kind": "quantity", "strength": 0.5, "sites": ["a"]},
    {"kind": "concept", "classes": ["bad", "good"], "sites": ["a"]},
]


@pytest.mark.parametrize("asked", [[one] for one in ALL] + [ALL], ids=lambda a: "+".join(s["kind"] for s in a))
def test_a_federation_says_what_was_simulated_and_leaves_the_other_site_alone(
    root: Path, cache: Path, asked: list[dict[str, Any]]
) -> None:
    plain, shifted = load(root, cache), load(root, cache, shift=asked)
    assert load(root, cache, shift=asked).digest == shifted.digest != plain.digest
    assert everything(shifted.site("b")) == everything(plain.site("b"))
    assert everything(shifted.site("a")) != everything(plain.site("a"))
    assert shifted.sheet["sites"]["b"] == plain.sheet["sites"]["b"]
    assert set(shifted.sheet["simulated"]) == {"a"}
    text = shifted.sheet["warnings"][0]
    for one in asked:
        assert one["kind"].replace("-", " ") in text
    assert text.startswith("SIMULATED at a, not in its files")
    assert "simulated" not in plain.sheet
    json.dumps(shifted.sheet)
    entry, here = shifted.sheet["sites"]["a"], shifted.site("a")
    assert entry["images"] == len(here.images) == len(here.labels)
    assert entry["splits"]["train"]["images"] == (here.split == TRAIN).sum()
    assert entry["splits"]["test"] == plain.sheet["sites"]["a"]["splits"]["test"]


def test_the_split_is_that_of_the_unchanged_data(root: Path, cache: Path, tmp_path: Path) -> None:
    from confrere.data.federation import load_federation

    def splits(name: str, options: DataOptions) -> tuple[str, Federation]:
        stored = tmp_path / name
        found = load_federation(root, options=options, image_size=(16, 16), seed=0, cache=cache, splits=stored)
        again = load_federation(root, options=options, image_size=(16, 16), seed=0, cache=cache, splits=stored)
        assert again.digest == found.digest
        return stored.read_text(), found

    assert splits("one", DataOptions())[0] == splits("two", DataOptions(shift=ALL))[0]  # type: ignore[arg-type]


def test_strength_nothing_leaves_the_digest(root: Path, cache: Path) -> None:
    idle = load(root, cache, shift=[{"kind": "stain", "strength": 0}, {"kind": "concept", "count": 0}])
    assert idle.digest == load(root, cache).digest
    assert idle.sheet == load(root, cache).sheet


def test_data_check_says_it_too(root: Path) -> None:
    found = check(root, DataOptions(shift=ALL))  # type: ignore[arg-type]
    assert found["ok"]
    assert any("SIMULATED at a" in warning for warning in found["sheet"]["warnings"])


def test_what_the_data_lack_is_named(root: Path, cache: Path) -> None:
    for asked, message in (
        ([{"kind": "stain", "strength": 0.5, "sites": ["aa"]}], "(?s)no site 'aa'.*did you mean 'a'"),
        ([{"kind": "concept", "classes": ["bad", "goood"]}], "(?s)no class 'goood'.*did you mean 'good'"),
        ([{"kind": "stain", "strength": 0.5}, {"kind": "stain", "strength": 0.1, "sites": ["b"]}], "twice for b"),
        ([{"kind": "missing-classes", "count": 2}], "(?s)trains on 2 classes only.*at most 1"),
        ([{"kind": "missing-classes", "classes": ["bad", "good"]}], "trains on 2 classes only"),
        ([{"kind": "concept", "count": 3}], "(?s)trains on 2 classes only.*at most 2"),
        ([{"kind": "missing-classes", "count": 1}, {"kind": "label-noise", "strength": 0.1}], "one class only"),
    ):
        with pytest.raises(DataError, match=message):
            load(root, cache, shift=asked)


def test_missing_classes_that_a_site_lacks_anyway_are_fine(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "h")
    for k in range(8):
        write(tmp_path / "h" / "c" / "good" / f"c{k}.png", 7000 + k)
    found = load(tmp_path / "h", cache, shift=[{"kind": "missing-classes", "classes": ["bad"]}])
    assert all(found.sheet["sites"][name]["classes"]["bad"]["train"] == 0 for name in "abc")


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        ({"kind": "stian", "strength": 0.5}, "(?s)unknown kind of shift 'stian'.*did you mean 'stain'"),
        ({"kind": "xyz"}, "(?s)unknown kind.*valid: backdoor, concept, label-noise"),
        ({}, "unknown kind of shift None"),
        ({"kind": "stain", "strenght": 0.5}, r"(?s)unknown key \[data.shift.strenght\].*did you mean 'strength'"),
        ({"kind": "stain", "strength": 1.5}, r"less than or equal to 1; got 1.5 \[data.shift.0.strength\]"),
        ({"kind": "stain", "strength": -0.1}, r"greater than or equal to 0; got -0.1"),
        ({"kind": "stain"}, "stain needs a strength"),
        ({"kind": "stain", "strength": 0.5, "count": 1}, r"stain has no use for it \[data.shift.count\]"),
        ({"kind": "label-noise", "strength": 0.5, "classes": ["a"]}, "no use for it"),
        ({"kind": "concept", "strength": 0.5, "count": 2}, "no use for it"),
        ({"kind": "concept"}, "concept needs classes"),
        ({"kind": "concept", "classes": ["a"]}, "one class cannot swap"),
        ({"kind": "concept", "count": 1}, "one class cannot swap"),
        ({"kind": "concept", "classes": ["a", "b"], "count": 2}, "no use for it"),
        ({"kind": "missing-classes", "classes": ["a", "a"]}, "named twice"),
    ],
)
def test_mistakes_name_the_way_out(shift: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate({"path": "x", "data": {"shift": [shift]}})
    with pytest.raises((ConfigError, ValidationError)):
        DataOptions(shift=[shift])  # type: ignore[list-item]


def test_a_shift_survives_toml_and_the_command_line() -> None:
    import tomllib

    experiment = validate({"path": "x", "data": {"shift": ALL}})
    assert validate(tomllib.loads(experiment.toml())) == experiment
    assert "[[data.shift]]" in experiment.toml() or re.search(r"shift = \[", experiment.toml())
    line = 'data.shift=[{kind="stain", strength=0.5, sites=["St. Mary"]}]'
    (found,) = validate(override({"path": "x"}, [line])).data.shift
    assert found == Shift(kind="stain", strength=0.5, sites=("st_mary",))


@given(strength=strengths, seed=seeds)
def test_a_backdoor_marks_and_renames_a_share_of_the_training_images_only(strength: float, seed: int) -> None:
    before = site()
    after = simulated([before], [Shift(kind="backdoor", strength=strength, classes=("z",))], seed)[0]
    every = np.arange(len(before.labels))
    old, new = (np.asarray(one.images[every]) for one in (before, after))
    bad = (old != new).any((1, 2, 3))
    assert bad.sum() == round(strength * (before.split == TRAIN).sum())
    assert (before.split[bad] == TRAIN).all()
    assert (after.labels[bad] == CLASSES.index("z")).all()
    assert (after.labels[~bad] == before.labels[~bad]).all()
    assert [a != b for a, b in zip(before.digests, after.digests, strict=True)] == bad.tolist()
    if bad.any():
        corner = new[bad][:, -2:, -2:]
        assert (corner == corner[:1]).all(), "the mark is the same on all"
        assert (new[bad][:, :-2, :-2] == old[bad][:, :-2, :-2]).all()


@pytest.mark.parametrize("wrong", [{"strength": 0.5}, {"classes": ("z",)}, {"strength": 0.5, "classes": ("y", "z")}])
def test_a_backdoor_needs_a_share_and_one_class(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="one class"):
        Shift(kind="backdoor", **wrong)
