from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_files import encoded, load, make_folder, picture, write
from PIL import PngImagePlugin

from confrere.data import cache as module
from confrere.data.federation import load_federation
from confrere.data.mapped import Mapped
from confrere.data.options import DataOptions
from confrere.errors import DataError


@pytest.fixture
def root(tmp_path):
    return make_folder(tmp_path / "hospitals")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_a_folder_becomes_sites_in_the_order_of_hashes(root, cache):
    federation = load(root, cache)
    assert federation.name == "hospitals"
    assert federation.classes == ("bad", "good")
    assert [site.name for site in federation.sites] == ["a", "b"]
    assert not federation.synthetic
    for site in federation.sites:
        assert isinstance(site.images, Mapped)
        assert site.images.shape == (24, 16, 16, 3)
        assert list(site.digests) == sorted(site.digests)
        assert len(set(site.groups.tolist())) == 12
        assert site.labels.dtype == site.groups.dtype == np.int64
        assert sorted(np.concatenate([site.indices(s) for s in ("train", "val", "test")]).tolist()) == list(range(24))
        for group in set(site.groups.tolist()):
            assert len(set(site.split[site.groups == group].tolist())) == 1
    assert not set(federation.sites[0].groups.tolist()) & set(federation.sites[1].groups.tolist())
    json.dumps(federation.sheet)


def known(site):
    return np.isin(site.groups, list(site.named))


def test_a_site_says_of_which_images_the_patient_is_named(root, cache):
    first, *_ = sorted((root / "a").rglob("*.png"))
    first.rename(first.with_name("unnamed.png"))
    for path in sorted((root / "b").rglob("*.png")):
        path.rename(path.with_name(path.name.replace("__", "-")))
    a, b = load(root, cache).sites
    assert known(a).sum() == 23
    assert not b.named


def test_patients_who_share_a_file_are_not_known_apart_at_that_site(root, cache):
    """Two names of one file are one group, which stands for both; at another site it has one name."""
    files = sorted((root / "a").rglob("*.png"))
    mine = files[0].name.partition("__")[0]
    other = next(path for path in files if path.name.partition("__")[0] != mine and path.parent == files[0].parent)
    shutil.copy(files[0], other.with_name(f"{other.name.partition('__')[0]}__copy.png"))
    shutil.copy(files[0], root / "b" / files[0].parent.name / "stranger__1.png")
    a, b = load(root, cache).sites
    assert (~known(a)).sum() == 4  # of two patients with two images each
    assert known(b).all()


def test_a_table_names_the_patient_of_each_image(root, tmp_path):
    lines = ["path,site,label,patient"]
    for number, path in enumerate(sorted((root / "a").rglob("*.png"))):
        lines.append(f"{path.relative_to(tmp_path)},north,{path.parent.name},{'' if number < 3 else number // 2}")
    table = tmp_path / "table.csv"
    table.write_text("\n".join(lines))
    (site,) = load(table, tmp_path / "cache").sites
    assert (~known(site)).sum() == 3


def test_renaming_files_changes_nothing(root, cache, tmp_path):
    first = load(root, cache)
    other = tmp_path / "renamed"
    for number, path in enumerate(sorted(root.rglob("*.png"), reverse=True)):
        patient = path.name.partition("__")[0][::-1]
        target = other / path.parent.relative_to(root) / f"{patient}__{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    second = load(other, tmp_path / "cache2")
    assert second.digest == first.digest


def test_unknown_site_names_the_sites(root, cache):
    federation = load(root, cache)
    assert federation.site("b") is federation.sites[1]
    with pytest.raises(DataError, match="the sites are a, b"):
        federation.site("c")


def test_the_cache_is_reused_and_private_and_mended(root, cache):
    first = load(root, cache)
    entries = sorted(cache.glob("*.npy"))
    assert len(entries) == 2
    assert cache.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in cache.iterdir())
    before = [path.stat().st_mtime_ns for path in entries]
    load(root, cache)
    assert [path.stat().st_mtime_ns for path in entries] == before
    pixels = np.array(first.sites[0].images)
    del first
    entries[0].write_bytes(entries[0].read_bytes()[:-100])
    data = bytearray(entries[1].read_bytes())
    data[500] ^= 1
    entries[1].write_bytes(data)
    again = load(root, cache)
    assert np.array_equal(again.sites[0].images, pixels)
    assert [path.name for path in cache.glob(".*")] == [".lock"]


@pytest.mark.parametrize("name", ["mean", "width", "digest"])
def test_a_changed_fact_of_the_cache_is_found_and_mended(root, cache, name):
    first = load(root, cache)
    entry = sorted(cache.glob("*.json"))[0]
    content, meta = entry.read_bytes(), json.loads(entry.read_text())
    value = meta["facts"][0][name]
    meta["facts"][0][name] = {"mean": [0.5] * 3, "width": 61, "digest": str(value)[::-1]}[name]
    entry.write_text(json.dumps(meta))
    assert load(root, cache).sheet == first.sheet
    assert entry.read_bytes() == content


def test_another_size_is_another_entry(root, cache):
    load(root, cache)
    federation = load(root, cache, image_size=(8, 12))
    assert federation.image_size == (8, 12)
    assert len(list(cache.glob("*.npy"))) == 4


def test_an_unwritable_cache_is_said(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the image cache"):
        load(root, tmp_path / "file" / "cache")


def test_bad_files_take_no_row(root, cache):
    names = ["trunc.png", "text.png", "empty.png", "big.png"]
    (root / "a/good/trunc.png").write_bytes(encoded(picture(900, (60, 60)))[:-3000])
    (root / "a/good/text.png").write_text("no image")
    (root / "a/good/empty.png").touch()
    (root / "a/good/big.png").write_bytes(encoded(picture(901, (100, 100))))
    (root / "a/good/.DS_Store").write_text("x")
    (root / "a/Thumbs.db").write_text("x")
    os.mkfifo(root / "a/good/pipe.png")
    (root / "a/good/away.png").symlink_to("/etc/hostname")
    federation = load(root, cache, max_pixels=8000)
    assert len(federation.sites[0].images) == 24
    assert federation.sheet["sites"]["a"]["bad_files"] == {
        "damaged or truncated": 1,
        "empty file": 1,
        "link leading out of the folder": 1,
        "more pixels than max_pixels": 1,
        "not a PNG, JPEG, TIFF or DICOM file": 1,
        "not an ordinary file": 1,
    }
    assert any("6 files are left out" in warning for warning in federation.sheet["warnings"])
    with pytest.raises(DataError, match="6 files cannot be used") as caught:
        load(root, cache, max_pixels=8000, on_bad="stop")
    assert not any(name in str(caught.value) for name in names)


def test_copies_are_kept_once_and_conflicts_dropped(root, cache):
    shutil.copy(root / "a/good/agood0__0.png", root / "a/good/zz__9.png")
    shutil.copy(root / "a/good/agood1__0.png", root / "b/good/other__9.png")
    shutil.copy(root / "a/good/agood2__0.png", root / "a/bad/agood2__7.png")
    federation = load(root, cache)
    a, b = federation.sites
    assert (len(a.images), len(b.images)) == (23, 25)
    sheet = federation.sheet["sites"]["a"]
    assert (sheet["duplicates"], sheet["conflicts"]) == (1, 2)
    assert federation.sheet["shared_pictures"] == 1
    shared = set(a.digests) & set(b.digests)
    row_a, row_b = (site.digests.index(next(iter(shared))) for site in (a, b))
    assert a.groups[row_a] == b.groups[row_b]
    assert a.split[row_a] == b.split[row_b]
    load(root, cache, on_bad="skip")
    (root / "a/bad/agood2__7.png").unlink()
    assert load(root, cache, on_bad="stop").sheet["sites"]["a"]["duplicates"] == 1


def test_a_patient_at_two_sites_is_one_person(root, cache):
    write(root / "b/good/agood3__5.png", 999)
    federation = load(root, cache)
    assert federation.sheet["shared_patients"] == 1
    a, b = federation.sites
    common = set(a.groups.tolist()) & set(b.groups.tolist())
    assert len(common) == 1
    group = common.pop()
    assert set(a.split[a.groups == group]) == set(b.split[b.groups == group])


def test_a_site_without_images_is_refused(root, cache):
    (root / "empty_site" / "good").mkdir(parents=True)
    with pytest.raises(DataError, match="no usable image at empty_site"):
        load(root, cache)


def test_one_class_at_a_site_is_fine_and_said(root, cache):
    shutil.rmtree(root / "b/bad")
    federation = load(root, cache)
    assert federation.classes == ("bad", "good")
    text = " ".join(federation.sheet["warnings"])
    assert "b has images of one class only" in text
    assert "Only a has images of class 'bad'" in text


@pytest.mark.parametrize("images", [1, 2, 3])
def test_tiny_sites(tmp_path, cache, images):
    make_folder(tmp_path / "h", patients=images, views=1)
    for i in range(images):
        write(tmp_path / f"h/tiny/good/x{i}.png", 5000 + i)
    federation = load(tmp_path / "h", cache)
    assert len(federation.site("tiny").indices("train")) >= 1


def test_one_class_in_all_is_refused(tmp_path, cache):
    write(tmp_path / "h/a/only/1.png")
    with pytest.raises(DataError, match="only one class"):
        load(tmp_path / "h", cache)


def test_names_that_differ_in_spelling_are_kept_apart_and_mended_by_a_map(root, cache):
    (root / "b/good").rename(root / "b/Good ")
    federation = load(root, cache)
    assert federation.classes == ("Good ", "bad", "good")
    assert any('"good" = "Good "' in warning for warning in federation.sheet["warnings"])
    assert load(root, cache, class_map={"Good ": "good"}).classes == ("bad", "good")
    with pytest.raises(DataError, match="class_map names 'gut'"):
        load(root, cache, class_map={"gut": "good"})


@pytest.mark.parametrize("wrong", ["site_level", "too_deep", "no_level", "site_name", "empty", "missing", "suffix"])
def test_trees_that_do_not_fit_show_the_expected_one(tmp_path, cache, wrong):
    root = tmp_path / "h"
    root.mkdir()
    path, message = root, "(?s)an image lies where.*p012__1.png"
    if wrong == "site_level":
        write(root / "a/1.png")
    elif wrong == "too_deep":
        write(root / "a/x/y/1.png")
        message = "(?s)holds another folder.*p012__1.png"
    elif wrong == "no_level":
        write(root / "1.png")
    elif wrong == "site_name":
        write(root / "St. Mary/x/1.png")
        write(root / "st mary/x/2.png")
        message = "would both be site 'st_mary'"
    elif wrong == "empty":
        message = "(?s)no image found.*p012__1.png"
    elif wrong == "missing":
        path, message = root / "nowhere", "no such folder"
    else:
        path, message = write(root / "x.zip"), "a .zip is not a federation"
    with pytest.raises(DataError, match=message):
        load(path, cache)


def test_patients_csv(tmp_path, cache):
    root = tmp_path / "h"
    lines = ["file,patient"]
    for i in range(12):
        name = f"{'ab'[i % 2]}/{'xy'[i // 6]}/{i}.png"
        write(root / name, i)
        lines.append(f"{name},p{i // 4}")
    (root / "patients.csv").write_text("\n".join(lines))
    federation = load(root, cache)
    assert len({int(g) for site in federation.sites for g in site.groups}) == 3


def test_stored_splits_are_used_and_checked(root, cache, tmp_path):
    stored = tmp_path / "run" / "splits.csv"

    def again(seed: int) -> list[int]:
        federation = load_federation(
            root, options=DataOptions(), image_size=(16, 16), seed=seed, cache=cache, splits=stored
        )
        return [int(split) for site in federation.sites for split in site.split]

    first = again(0)
    assert stored.read_text().startswith("site,sha256,split\n")
    assert again(1) == first
    stored.write_text(stored.read_text().replace(",train\n", ",test\n", 1))
    with pytest.raises(DataError, match="1 patients are in more than one"):
        again(1)
    stored.unlink()
    assert again(1) != first
    write(root / "a/good/new.png", 777)
    with pytest.raises(DataError, match="1 new, 0 gone"):
        again(1)


CANARY = "Erika_Mustermann"


def test_names_and_tags_never_leave(tmp_path, cache, capfd):
    root = make_folder(tmp_path / "h")
    tags = PngImagePlugin.PngInfo()
    tags.add_text("PatientName", CANARY)
    (root / f"a/good/{CANARY}__1.png").write_bytes(encoded(picture(55), "PNG", pnginfo=tags))
    (root / f"a/good/{CANARY}__2.png").write_text(CANARY)
    (root / "patients.csv").write_text(f"file,patient\na/good/agood0__0.png,{CANARY}\n")
    stored = tmp_path / "splits.csv"
    federation = load_federation(root, options=DataOptions(), image_size=(16, 16), seed=0, cache=cache, splits=stored)
    with pytest.raises(DataError) as caught:
        load(root, cache, on_bad="stop")
    shown = json.dumps(federation.sheet) + repr(federation) + str(caught.value) + "".join(capfd.readouterr())
    written = [path.read_bytes() for path in [stored, *cache.iterdir()]]
    assert CANARY not in shown
    assert not any(CANARY.encode() in data for data in written)
    assert not any(CANARY in path.name for path in cache.iterdir())


def test_files_that_change_while_read_are_refused(root, cache, monkeypatch):
    victim = root / "a/good/agood0__0.png"
    real = module.read_picture

    def read(path: Path, *, max_pixels: int) -> bytes:
        return real(path, max_pixels=max_pixels) + b"x" * (path == victim)

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_picture", read)
        assert load(root, cache).sheet["sites"]["a"]["bad_files"] == {"changed while it was read": 1}
    assert load(root, cache).sheet["sites"]["a"]["bad_files"] == {}, "what was passing is not remembered"
