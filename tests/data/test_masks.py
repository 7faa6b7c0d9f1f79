"""Masks: found beside their images, unchanged in value, cut as their images are; what will not do is named."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from confrere.data.decode import DAMAGED, LOSSY, NUMBERS, BadImageError, decode, values
from confrere.data.federation import Federation, load_federation
from confrere.data.masks import NONE, OTHER_SIZE, VALUES
from confrere.data.options import DataOptions
from confrere.errors import DataError
from confrere.seeds import numpy_generator

SIZE = (16, 16)


def write_site(root: Path, site: str, images: int = 8, shape: tuple[int, int] = (20, 24)) -> None:
    """Write images whose red channel says, pixel by pixel, what their mask says: 0, 100, 200 for 0, 1, 2."""
    rng = numpy_generator(0, "mask files", site)
    for part in ("images", "masks"):
        (root / site / part).mkdir(parents=True, exist_ok=True)
    for i in range(images):
        mask = rng.integers(0, 3, (shape[0] // 4, shape[1] // 4)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        pixels = np.stack([100 * mask, rng.integers(0, 255, shape).astype(np.uint8), np.full(shape, i, np.uint8)], -1)
        Image.fromarray(pixels).save(root / site / "images" / f"p{i // 2}__{i}.png")
        Image.fromarray(mask).save(root / site / "masks" / f"p{i // 2}__{i}.png")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for site in ("north", "south"):
        write_site(tmp_path / "hospitals", site)
    return tmp_path / "hospitals"


def read(path: Path, cache: Path, **options: object) -> Federation:
    chosen = DataOptions(target="mask", **{"classes": ("background", "a", "b"), **options})  # type: ignore[arg-type]
    return load_federation(path, options=chosen, image_size=SIZE, seed=0, cache=cache)


def problems(federation: Federation, site: str) -> dict[str, int]:
    return dict(federation.sheet["sites"][site]["bad_files"])


def test_masks_lie_where_their_images_do(place: Path, tmp_path: Path) -> None:
    federation = read(place, tmp_path / "cache")
    assert federation.classes == ("background", "a", "b")
    assert federation.strata == ("images",)
    for site in federation.sites:
        rows = np.arange(len(site.labels))
        images = site.images[rows]
        assert site.targets is not None
        found = site.targets[rows]
        assert found.shape == (8, *SIZE)
        near = np.abs(images[..., 0].astype(int) - 100 * found.astype(int)) <= 30  # bicubic against nearest
        assert near.mean() > 0.7
        assert set(np.unique(found)) <= {0, 1, 2}


def test_a_table_names_masks_and_labels_only_stratify(place: Path, tmp_path: Path) -> None:
    lines = ["path,mask,label,site,patient"]
    for site in ("north", "south"):
        for file in sorted((place / site / "images").iterdir()):
            label = "even" if int(file.stem.split("__")[1]) % 2 == 0 else "odd"
            lines.append(
                f"{site}/images/{file.name},{site}/masks/{file.name},{label},{site},{file.stem.split('__')[0]}"
            )
    (place / "t.csv").write_text("\n".join(lines) + "\n")
    table = read(place / "t.csv", tmp_path / "cache")
    assert table.strata == ("even", "odd")
    folder = read(place, tmp_path / "cache")
    for one, two in zip(table.sites, folder.sites, strict=True):
        assert one.target_digests == two.target_digests
        assert one.targets is not None
        assert two.targets is not None
        np.testing.assert_array_equal(one.targets[np.arange(8)], two.targets[np.arange(8)])
    (place / "t.csv").write_text("\n".join(line.replace(",label", "", 1) for line in lines[:1]) + "\n")
    with pytest.raises(DataError, match="no rows"):
        read(place / "t.csv", tmp_path / "cache")


def test_unusable_masks_are_left_out_and_named(place: Path, tmp_path: Path) -> None:
    files = sorted((place / "north" / "masks").iterdir())
    files[0].unlink()
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(files[1])
    Image.fromarray(np.full((20, 24), 3, np.uint8)).save(files[2])
    files[3].write_bytes(files[3].read_bytes()[:60])
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(files[4])
    Image.fromarray(np.zeros((20, 24), np.uint8)).save(files[5], format="JPEG")
    federation = read(place, tmp_path / "cache")
    north = federation.site("north")
    assert len(north.labels) == len(north.target_digests) == 2
    assert problems(federation, "north") == {
        NONE: 1,
        OTHER_SIZE: 1,
        VALUES: 1,
        f"mask: {DAMAGED}": 1,
        f"mask: {NUMBERS}": 1,
        f"mask: {LOSSY}": 1,
    }
    again = read(place, tmp_path / "cache")  # from the cache
    assert again.digest == federation.digest
    assert problems(again, "north") == problems(federation, "north")
    with pytest.raises(DataError) as caught:
        read(place, tmp_path / "cache", on_bad="stop")
    assert caught.value.code == "bad-files"
    for file in files:
        file.unlink(missing_ok=True)
    with pytest.raises(DataError) as caught:
        read(place, tmp_path / "cache")
    assert caught.value.code == "too-few-images"


def test_another_mask_is_another_data_set(place: Path, tmp_path: Path) -> None:
    before = read(place, tmp_path / "cache").digest
    file = sorted((place / "south" / "masks").iterdir())[0]
    Image.fromarray(np.ones((20, 24), np.uint8)).save(file)
    federation = read(place, tmp_path / "cache")
    assert federation.digest != before
    assert any((federation.site("south").targets or [])[[i]].all() for i in range(8))


def test_a_damaged_cache_is_made_anew(place: Path, tmp_path: Path) -> None:
    before = read(place, tmp_path / "cache")
    (one, *_) = sorted((tmp_path / "cache").glob("masks-*.npy"))
    content = bytearray(one.read_bytes())
    content[-40] ^= 1
    one.write_bytes(content)
    after = read(place, tmp_path / "cache")
    for a, b in zip(before.sites, after.sites, strict=True):
        np.testing.assert_array_equal((a.targets or [])[np.arange(8)], (b.targets or [])[np.arange(8)])


def test_black_and_white_means_two_classes(tmp_path: Path) -> None:
    for site in ("north", "south"):
        write_site(tmp_path / "h", site)
        for i, file in enumerate(sorted((tmp_path / "h" / site / "masks").iterdir())):
            white = np.asarray(Image.open(file)) > 0
            Image.fromarray(white if i % 2 else white.astype(np.uint8) * 255).save(file)
    federation = read(tmp_path / "h", tmp_path / "cache", classes=())
    assert federation.classes == ("background", "foreground")
    for site in federation.sites:
        assert site.targets is not None
        assert set(np.unique(site.targets[np.arange(8)])) == {0, 1}


def test_a_mask_that_leads_out_of_the_folder_is_not_opened(place: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.fromarray(np.zeros((20, 24), np.uint8)).save(secret)
    file = sorted((place / "north" / "masks").iterdir())[0]
    file.unlink()
    file.symlink_to(secret)
    assert problems(read(place, tmp_path / "cache"), "north") == {"mask: link leading out of the folder": 1}


@pytest.mark.parametrize(
    "shift",
    [
        {"kind": "label-noise", "strength": 0.5},
        {"kind": "concept", "classes": ["images", "images2"]},
        {"kind": "backdoor", "strength": 0.5, "classes": ["images"]},
    ],
    ids=lambda shift: shift["kind"],
)
def test_shifts_of_labels_are_refused(place: Path, tmp_path: Path, shift: dict[str, object]) -> None:
    for site in ("north", "south"):  # a second stratum
        (place / site / "images2").mkdir()
        for file in sorted((place / site / "images").iterdir())[:4]:
            file.rename(place / site / "images2" / file.name)
    with pytest.raises(DataError) as caught:
        read(place, tmp_path / "cache", shift=[shift])
    assert caught.value.code == "shift"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 400))
def test_no_damage_escapes(seed: int, at: int) -> None:
    """A damaged mask is refused, or read as some whole numbers; never an exception of Pillow's."""
    rng, buffer = numpy_generator(seed, "damage"), io.BytesIO()
    Image.fromarray(rng.integers(0, 3, (12, 12)).astype(np.uint8)).save(buffer, format="PNG")
    content = bytearray(buffer.getvalue())
    content[at % len(content)] ^= int(rng.integers(1, 256))
    try:
        found = values(bytes(content))
    except BadImageError:
        return
    assert found.ndim == 2
    assert np.issubdtype(found.dtype, np.integer)
    assert decode(bytes(content), SIZE, max_pixels=10_000).pixels.shape == (*SIZE, 3)


def test_masks_taken_for_a_class_are_suspected(place: Path, tmp_path: Path) -> None:
    federation = load_federation(place, options=DataOptions(), image_size=SIZE, seed=0, cache=tmp_path / "cache")
    assert federation.classes == ("images", "masks")
    assert any("task=segmentation" in warning for warning in federation.sheet["warnings"])
