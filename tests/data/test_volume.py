"""Volumes: every orientation, slow truths of resampling, and files that must be refused."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from confrere.data import decode, grid, nifti
from confrere.data import series as dicom
from confrere.data import volume as module
from confrere.data.decode import BadImageError
from confrere.data.volume import Volume, prepared, prepared_labels, read_labels, read_volume
from confrere.errors import MissingExtraError

SHAPE, SPACING = (5, 6, 7), (1.0, 1.5, 2.0)
ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


def values(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)


def ras(spacing: tuple[float, ...] = SPACING, origin: tuple[float, ...] = (-30.0, 20.0, 5.0)) -> np.ndarray:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def turned(array: np.ndarray, affine: np.ndarray, order: Any, signs: Any) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels at the same places, stored along other axes: index by index."""
    moved = array.transpose(order)
    flips = tuple(slice(None, None, sign) for sign in signs)
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for new, (old, sign) in enumerate(zip(order, signs, strict=True)):
        change[old, new] = sign
        change[old, 3] = 0 if sign == 1 else array.shape[old] - 1
    return moved[flips], affine @ change


def save(path: Path, array: np.ndarray, affine: np.ndarray, change: Any = None) -> Path:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    if change is not None:
        change(image.header)
    nib.save(image, path)
    return path


def reason(path: Path, **options: Any) -> str:
    with pytest.raises(BadImageError) as caught:
        read_volume(path, **options)
    return str(caught.value)


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_all_48_orientations_give_the_same_volume(tmp_path: Path, order: Any, signs: Any) -> None:
    array, affine = turned(values(), ras(), order, signs)
    found = read_volume(save(tmp_path / "a.nii", array, affine))
    assert found.voxels.dtype == np.float32
    assert found.voxels.flags["C_CONTIGUOUS"]
    assert np.array_equal(found.voxels, values())
    assert found.spacing == pytest.approx(SPACING, abs=1e-5)
    np.testing.assert_allclose(found.affine, ras(), atol=1e-4)
    assert "".join(nib.aff2axcodes(found.affine)) == "RAS"


@pytest.mark.parametrize("kind", ["uint8", "int16", "int32", "uint16", "float32", "float64", ">i2", ">f4"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_types_and_rescaling_are_those_of_nibabel(tmp_path: Path, kind: str, suffix: str) -> None:
    array = (values() % 200).astype(kind)
    image = nib.Nifti1Image(array, ras(), nib.Nifti1Header(endianness=">" if kind[0] == ">" else "<"))
    image.set_data_dtype(kind)
    image.header.set_slope_inter(0.25, -3.0)
    nib.save(image, tmp_path / f"a{suffix}")
    expected = nib.load(tmp_path / f"a{suffix}").get_fdata(dtype=np.float64)
    found = read_volume(tmp_path / f"a{suffix}")
    assert np.array_equal(found.voxels, expected.astype(np.float32))


def test_nifti_2_and_a_header_extension_are_read_past(tmp_path: Path) -> None:
    image = nib.Nifti2Image(values(), ras())
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"JOHN DOE"))
    nib.save(image, tmp_path / "a.nii.gz")
    assert np.array_equal(read_volume(tmp_path / "a.nii.gz").voxels, values())


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    import hashlib

    path = save(tmp_path / "a.nii.gz", values(), ras())
    assert read_volume(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def _set(name: str, value: Any) -> Any:
    def change(header: Any) -> None:
        header[name] = value

    return change


HEADERS = {
    "no_orientation": (lambda h: (_set("qform_code", 0)(h), _set("sform_code", 0)(h)), nifti.UNPLACED),
    "disagree": (lambda h: h.set_sform(ras(origin=(-30, 20, 8)), 1), nifti.DISAGREE),
    "flipped sform": (lambda h: h.set_sform(np.diag([-1.0, 1.5, 2.0, 1.0]), 1), nifti.DISAGREE),
    "sheared": (lambda h: (_shear(h), _set("qform_code", 0)(h)), grid.SHEARED),
    "metres": (lambda h: h.set_xyzt_units("meter"), nifti.UNITS),
    "tiny": (lambda h: (h.set_sform(ras((1e-4, 1, 1)), 1), _set("qform_code", 0)(h)), grid.SPACING),
    "huge": (lambda h: (h.set_sform(ras((1e5, 1, 1)), 1), _set("qform_code", 0)(h)), grid.SPACING),
    "zero": (lambda h: _set("pixdim", [1, 0, 1, 1, 0, 0, 0, 0])(h), grid.SPACING),
    "nan": (lambda h: (_set("srow_x", [np.nan, 0, 0, 0])(h), _set("qform_code", 0)(h)), grid.SPACING),
    "quaternion": (lambda h: _set("quatern_b", 7)(h), decode.DAMAGED),
}


def _shear(header: Any) -> None:
    affine = ras()
    affine[0, 1] = 0.2
    header.set_sform(affine, 1)


def patched(path: Path, change: Any) -> Path:
    """Change the header of a file that was written well: nibabel would mend it while writing."""
    data = path.read_bytes()
    header = nib.Nifti1Header(data[:348], check=False)
    change(header)
    path.write_bytes(header.binaryblock + data[348:])
    return path


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_do_not_place_the_volume_are_refused(tmp_path: Path, name: str) -> None:
    change, expected = HEADERS[name]
    assert reason(patched(save(tmp_path / "a.nii", values(), ras()), change)) == expected


FIELDS = {
    "rgb": ({"datatype": 128, "bitpix": 24}, nifti.KIND),
    "rgba": ({"datatype": 2304, "bitpix": 32}, nifti.KIND),
    "complex": ({"datatype": 32, "bitpix": 64}, nifti.KIND),
    "float128": ({"datatype": 1536, "bitpix": 128}, nifti.KIND),
    "unknown type": ({"datatype": 77}, nifti.KIND),
    "negative": ({"dim": [3, -5, 6, 7, 1, 1, 1, 1]}, grid.DIMENSIONS),
    "flat": ({"dim": [2, 30, 7, 1, 1, 1, 1, 1]}, grid.DIMENSIONS),
    "a slice": ({"dim": [3, 30, 7, 1, 1, 1, 1, 1]}, grid.DIMENSIONS),
    "many axes": ({"dim": [9, 5, 6, 7, 1, 1, 1, 1]}, grid.DIMENSIONS),
    "several": ({"dim": [4, 5, 6, 7, 3, 1, 1, 1]}, nifti.SEVERAL),
    "vectors": ({"dim": [5, 5, 6, 7, 1, 3, 1, 1]}, nifti.SEVERAL),
    "bomb": ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, grid.LARGE),
    "longer": ({"dim": [3, 5, 6, 8, 1, 1, 1, 1]}, grid.TRUNCATED),
    "shorter": ({"dim": [3, 5, 6, 6, 1, 1, 1, 1]}, grid.TRAILING),
    "offset before": ({"vox_offset": 100}, decode.DAMAGED),
    "offset far": ({"vox_offset": 1e12}, decode.DAMAGED),
    "offset nan": ({"vox_offset": np.nan}, decode.DAMAGED),
    "slope": ({"scl_slope": np.inf, "scl_inter": 0}, grid.NONFINITE),
    "two files": ({"magic": b"ni1"}, nifti.PAIR),
    "no magic": ({"magic": b""}, nifti.FOREIGN),
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("packed", [False, True])
def test_headers_that_lie_about_the_voxels_are_refused(tmp_path: Path, name: str, packed: bool) -> None:
    fields, expected = FIELDS[name]
    path = patched(
        save(tmp_path / "a.nii", values(), ras()),
        lambda h: [h.__setitem__(key, value) for key, value in fields.items()],
    )
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert reason(path) == expected


def test_one_volume_of_four_dimensions_is_read(tmp_path: Path) -> None:
    found = read_volume(save(tmp_path / "a.nii", values((*SHAPE, 1)), ras()))
    assert np.array_equal(found.voxels, values((*SHAPE, 1))[..., 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_in_float32_are_refused(tmp_path: Path, bad: float) -> None:
    array = values().astype(np.float64)
    array[1, 2, 3] = bad
    assert reason(save(tmp_path / "a.nii", array, ras())) == grid.NONFINITE


def test_a_volume_of_one_value_is_refused(tmp_path: Path) -> None:
    assert reason(save(tmp_path / "a.nii", np.full(SHAPE, 7, np.int16), ras())) == module.CONSTANT


def rotated(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    affine = np.diag([*SPACING, 1.0])
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ affine[:3, :3]
    return affine


def test_oblique_axes_are_taken_up_to_the_tolerance(tmp_path: Path) -> None:
    found = read_volume(save(tmp_path / "a.nii", values(), rotated(19)))
    assert np.array_equal(found.voxels, values())
    assert found.spacing == pytest.approx(SPACING, abs=1e-5)
    assert reason(save(tmp_path / "b.nii", values(), rotated(21))) == grid.OBLIQUE
    assert reason(save(tmp_path / "c.nii", values(), rotated(6)), max_oblique=5) == grid.OBLIQUE


def test_damaged_bytes_are_refused_each_with_its_reason(tmp_path: Path) -> None:
    good = save(tmp_path / "a.nii.gz", values((20, 20, 20)), ras()).read_bytes()
    plain = gzip.decompress(good)
    cases = {
        b"": decode.EMPTY,
        b"GIF89a" + bytes(400): nifti.FOREIGN,
        good[:40]: grid.TRUNCATED,
        good[:-9]: grid.TRUNCATED,
        good[: len(good) // 2]: grid.TRUNCATED,
        good + b"more": grid.TRAILING,
        gzip.compress(plain + b"more"): grid.TRAILING,
        plain + b"more": grid.TRAILING,
        plain[:-1]: grid.TRUNCATED,
        plain[:100]: nifti.FOREIGN,
        good[:-8] + b"\0\0\0\0" + good[-4:]: decode.DAMAGED,
        good[:200] + bytes(50) + good[250:]: decode.DAMAGED,
        b"\x1f\x8b" + bytes(100): decode.DAMAGED,
        good + gzip.compress(b"") * 4000: decode.HEAVY,
    }
    for data, expected in cases.items():
        (tmp_path / "b").write_bytes(data)
        assert reason(tmp_path / "b") == expected, (expected, len(data))


def test_several_parts_of_gzip_are_one_file(tmp_path: Path) -> None:
    plain = gzip.decompress(save(tmp_path / "a.nii.gz", values(), ras()).read_bytes())
    (tmp_path / "b").write_bytes(gzip.compress(plain[:400]) + gzip.compress(plain[400:]))
    assert np.array_equal(read_volume(tmp_path / "b").voxels, values())


def test_a_gzip_bomb_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gzip.decompress(save(tmp_path / "a.nii.gz", values(), ras()).read_bytes())
    (tmp_path / "bomb").write_bytes(gzip.compress(plain + bytes(50_000_000), 9))
    most = []
    inflate = nifti._inflated
    monkeypatch.setattr(nifti, "_inflated", lambda data, n: (most.append(n), inflate(data, n))[1])
    assert reason(tmp_path / "bomb") == grid.TRAILING
    assert max(most) < 2000


def test_special_files_and_missing_ones_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert reason(tmp_path / "pipe") == decode.SPECIAL
    assert reason(tmp_path / "none") == "cannot be read"


@settings(max_examples=40)
@given(st.data())
def test_whatever_is_changed_in_a_file_it_is_read_or_refused(tmp_path_factory: Any, data: Any) -> None:
    path = tmp_path_factory.mktemp("m") / "a.nii"
    save(path, values(), ras())
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 420))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        found = read_volume(path)
    except BadImageError:
        return
    assert np.isfinite(found.voxels).all()
    assert all(0.01 <= length <= 100 for length in found.spacing)


# Labels


def test_labels_in_another_orientation_and_type_lie_on_the_image(tmp_path: Path) -> None:
    like = read_volume(save(tmp_path / "a.nii", values(), ras()))
    truth = (values() % 3).astype(np.uint8)
    for kind in (np.uint8, np.float32, np.int16):
        array, affine = turned(truth.astype(kind), ras(), (2, 0, 1), (-1, 1, -1))
        found = read_labels(save(tmp_path / "b.nii.gz", array, affine), 3, like)
        assert found.dtype == np.uint8
        assert np.array_equal(found, truth)


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    like = read_volume(save(tmp_path / "a.nii", values(), ras()))
    truth = values() % 3

    def refused(array: np.ndarray, affine: np.ndarray, classes: int = 3) -> str:
        with pytest.raises(BadImageError) as caught:
            read_labels(save(tmp_path / "b.nii", array, affine), classes, like)
        return str(caught.value)

    assert refused(truth, ras(), classes=2) == module.UNKNOWN_LABEL
    assert refused(truth - 1, ras()) == module.UNKNOWN_LABEL
    assert refused(truth + 0.5, ras()) == module.NOT_WHOLE
    assert refused(np.where(truth == 1, np.nan, 0), ras()) == grid.NONFINITE
    assert refused(truth[:4], ras()) == module.OTHER_GRID
    assert refused(truth, ras(origin=(-30, 20, 6))) == module.OTHER_GRID
    assert refused(truth, ras((1, 1.5, 2.1))) == module.OTHER_GRID
    with pytest.raises(BadImageError, match=module.LABEL_FOLDER):
        read_labels(tmp_path, 3, like)


# Preparation


def slow(array: np.ndarray, old: Any, new: Any, size: Any, nearest: bool, pad: float) -> np.ndarray:
    """Voxel by voxel: where a new voxel lies among the old ones, and the eight around it."""
    result = np.full(size, pad, dtype=np.float64)
    there = [max(1, round(n * o / w)) for n, o, w in zip(array.shape, old, new, strict=True)]
    for index in np.ndindex(*size):
        inner = [i - (s - t) // 2 for i, s, t in zip(index, size, there, strict=True)]
        if any(i < 0 or i >= t for i, t in zip(inner, there, strict=True)):
            continue
        at = [
            min(max((i - (t - 1) / 2) * w / o + (n - 1) / 2, 0), n - 1)
            for i, t, n, o, w in zip(inner, there, array.shape, old, new, strict=True)
        ]
        if nearest:
            result[index] = array[tuple(int(np.floor(x + 0.5)) for x in at)]
            continue
        low = [min(int(np.floor(x)), n - 2) for x, n in zip(at, array.shape, strict=True)]
        result[index] = sum(
            array[low[0] + a, low[1] + b, low[2] + c]
            * np.prod([(x - lo) if d else (1 - x + lo) for d, x, lo in zip((a, b, c), at, low, strict=True)])
            for a, b, c in itertools.product((0, 1), repeat=3)
        )
    return result


def halfway(shape: Any, old: Any, new: Any) -> bool:
    """Whether some new voxel lies in the middle between two old ones."""
    for n, o, w in zip(shape, old, new, strict=True):
        there = max(1, round(n * o / w))
        at = (np.arange(there) - (there - 1) / 2) * w / o + (n - 1) / 2
        if (abs(at % 1 - 0.5) < 1e-6).any():
            return True
    return False


def lengths(low: float, high: float) -> st.SearchStrategy[tuple[float, ...]]:
    return st.tuples(*[st.floats(low, high).map(lambda x: round(x, 2))] * 3)


@settings(max_examples=15)
@given(st.tuples(*[st.integers(2, 6)] * 3), lengths(0.5, 2), lengths(0.5, 2), st.tuples(*[st.integers(1, 9)] * 3))
def test_resampling_against_a_slow_truth(shape: Any, old: Any, new: Any, size: Any) -> None:
    array = values(shape).astype(np.float32)
    linear = module._resampled(array, old, new, size, order=1, pad=-5.0)
    np.testing.assert_allclose(linear, slow(array, old, new, size, False, -5), rtol=1e-4, atol=1e-2)
    labels = (values(shape) % 5).astype(np.uint8)
    found = prepared_labels(labels, old, new, size)
    expected = slow(labels, old, new, size, True, 0)
    if not halfway(shape, old, new):  # there rounding decides
        assert np.array_equal(found, expected)


def made(array: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Volume:
    affine = ras(spacing)
    return Volume(voxels=array.astype(np.float32), spacing=spacing, affine=affine, stored_affine=affine, sha256="")


@pytest.mark.parametrize("size", [(5, 6, 7), (9, 9, 9), (4, 3, 2), (8, 4, 7)])
def test_an_unchanged_spacing_only_cuts_and_pads(size: tuple[int, int, int]) -> None:
    """Also where a volume of even length goes into an odd one: no voxel moves by half."""
    array = values()
    found = prepared_labels(array.astype(np.uint8), SPACING, SPACING, size)
    assert set(np.unique(found)) <= {0, *np.unique(array.astype(np.uint8))}
    starts = [(want - n) // 2 for want, n in zip(size, SHAPE, strict=True)]
    for index in np.ndindex(*size):
        at = tuple(i - s for i, s in zip(index, starts, strict=True))
        inside = all(0 <= i < n for i, n in zip(at, SHAPE, strict=True))
        assert found[index] == (array.astype(np.uint8)[at] if inside else 0)
    linear = module._resampled(array.astype(np.float32), SPACING, SPACING, size, order=1, pad=0)
    assert np.array_equal(linear.astype(np.uint8), found)


def test_normalisation_by_hand() -> None:
    array = np.zeros((10, 10, 10))
    array[2:8, 2:8, 2:8] = values((6, 6, 6))
    array[5, 5, 5] = 1e6
    found = prepared(made(array), (1, 1, 1), (10, 10, 10))
    known = np.sort(array[array != 0])
    low, high = np.quantile(known, [0.005, 0.995])
    clipped = np.clip(known, low, high)
    expected = (np.clip(array, low, high) - clipped.mean()) / clipped.std()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert abs(found[array != 0].mean()) < 1e-5
    assert abs(found[array != 0].std() - 1) < 1e-5
    assert found[5, 5, 5] == found.max() < 10  # an outlier does not flatten the rest


@settings(max_examples=20)
@given(st.floats(1e-3, 1e4), st.integers(0, 1000))
def test_the_scale_of_a_scanner_does_not_matter(scale: float, seed: int) -> None:
    array = values(seed=seed)
    first = prepared(made(array), (1, 1, 1), SHAPE)
    np.testing.assert_allclose(prepared(made(array * scale), (1, 1, 1), SHAPE), first, rtol=1e-3, atol=1e-3)


def test_padding_is_as_dark_as_the_darkest_voxel() -> None:
    found = prepared(made(values()), (1, 1, 1), (11, 12, 13))
    assert found[0, 0, 0] == found.min() == found[3:8, 3:9, 3:10].min()


def test_a_volume_of_one_value_beside_zeros_cannot_be_normalised() -> None:
    array = np.zeros(SHAPE)
    array[2:] = 0.1
    with pytest.raises(BadImageError, match=module.CONSTANT):
        prepared(made(array), (1, 1, 1), SHAPE)


# DICOM

ROW, COLUMN = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)


def one_slice(k: int, pixels: np.ndarray, step: float = 2.0, **tags: Any) -> Dataset:
    found = Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = found.SOPClassUID = CTImageStorage
    found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID = f"1.2.5.{k + 1}"
    found.PatientName = "CANARY^JOHN"
    found.SeriesInstanceUID, found.FrameOfReferenceUID = "1.2.3", "1.2.4"
    found.Rows, found.Columns = pixels.shape
    found.PixelSpacing, found.ImageOrientationPatient = [1.5, 1.0], [*ROW, *COLUMN]
    found.ImagePositionPatient = [30.0, -20.0, 5.0 + step * k]
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.BitsAllocated, found.BitsStored, found.HighBit, found.PixelRepresentation = 16, 16, 15, 1
    found.RescaleSlope, found.RescaleIntercept = "2", "-100"
    found.PixelData = pixels.astype("<i2").tobytes()
    for key, value in tags.items():
        if value is None:
            delattr(found, key)
        else:
            setattr(found, key, value)
    return found


def write(folder: Path, slices: list[Dataset]) -> Path:
    folder.mkdir(exist_ok=True)
    for index, one in enumerate(slices):
        # A name says nothing about the place.
        one.save_as(folder / f"{(index * 7) % 11}-{index}.dcm", enforce_file_format=True)
    return folder


def series(folder: Path, count: int = 7, **changed: dict[int, dict[str, Any]]) -> Path:
    """A stack whose columns run to the left, rows to the back, slices to the head; ``changed`` tags by slice."""
    array = values((count, 6, 5))
    tags = changed.get("tags", {})
    return write(folder, [one_slice(k, array[k], **tags.get(k, {})) for k in range(count)])


def test_a_series_is_sorted_rescaled_and_turned(tmp_path: Path) -> None:
    found = read_volume(series(tmp_path / "s"))
    array = values((7, 6, 5)).transpose(2, 1, 0) * 2.0 - 100  # (left, back, head)
    assert np.array_equal(found.voxels, array[::-1, ::-1].astype(np.float32))
    assert found.spacing == pytest.approx((1.0, 1.5, 2.0))
    np.testing.assert_allclose(found.affine[:3, 3], [-30 - 4, 20 - 7.5, 5])
    assert "".join(nib.aff2axcodes(found.affine)) == "RAS"


@pytest.mark.parametrize(("row", "column"), [(ROW, COLUMN), (COLUMN, (0, 0, -1.0)), (ROW, (0, 0, -1.0))])
def test_axial_sagittal_and_coronal_stacks_put_a_voxel_where_it_was(tmp_path: Path, row: Any, column: Any) -> None:
    normal = np.cross(row, column)
    array = values((7, 6, 5))
    slices = [
        one_slice(k, array[k], ImageOrientationPatient=[*row, *column], ImagePositionPatient=list(2.0 * k * normal))
        for k in range(7)
    ]
    found = read_volume(write(tmp_path / "s", slices))
    to_index = np.linalg.inv(found.affine)
    for k, i, j in itertools.product(range(7), range(6), range(5)):
        place = 2.0 * k * normal + 1.0 * j * np.array(row) + 1.5 * i * np.array(column)
        x, y, z = np.rint(to_index @ [-place[0], -place[1], place[2], 1])[:3].astype(int)
        assert found.voxels[x, y, z] == array[k, i, j] * 2 - 100


def test_the_digest_of_a_series_does_not_know_names(tmp_path: Path) -> None:
    one = series(tmp_path / "a")
    before = read_volume(one).sha256
    for index, path in enumerate(sorted(one.iterdir())):
        path.rename(one / f"new{index}")
    assert read_volume(one).sha256 == before


def test_a_run_length_encoded_series_is_read(tmp_path: Path) -> None:
    array = values((4, 6, 5))
    slices = [one_slice(k, array[k]) for k in range(4)]
    for one in slices:
        one.compress(RLELossless)
    plain = read_volume(write(tmp_path / "a", [one_slice(k, array[k]) for k in range(4)]))
    assert np.array_equal(read_volume(write(tmp_path / "b", slices)).voxels, plain.voxels)


SERIES: dict[str, tuple[dict[int, dict[str, Any]], str]] = {
    "several series": ({3: {"SeriesInstanceUID": "1.2.9"}}, dicom.SERIES),
    "several frames of reference": ({3: {"FrameOfReferenceUID": "1.2.9"}}, dicom.REFERENCE),
    "a localiser": ({0: {"ImageOrientationPatient": [*COLUMN, 0, 0, -1.0]}}, dicom.ORIENTATIONS),
    "another pixel spacing": ({2: {"PixelSpacing": [1.5, 1.01]}}, dicom.RESOLUTIONS),
    "twice": ({3: {"ImagePositionPatient": [30.0, -20.0, 9.0]}}, dicom.DUPLICATE),
    "an unequal gap": ({3: {"ImagePositionPatient": [30.0, -20.0, 11.4]}}, dicom.GAPS),
    "a shifted slice": ({3: {"ImagePositionPatient": [32.0, -20.0, 11.0]}}, dicom.SHIFTED),
    "no position": ({3: {"ImagePositionPatient": None}}, dicom.NO_POSITION),
    "half a position": ({3: {"ImagePositionPatient": [1.0, 2.0]}}, dicom.NO_POSITION),
    "no orientation": ({3: {"ImageOrientationPatient": None}}, dicom.NO_ORIENTATION),
    "no right angle": ({3: {"ImageOrientationPatient": [1, 0, 0, 0.6, 0.8, 0]}}, dicom.NO_ORIENTATION),
    "no spacing": ({3: {"PixelSpacing": None}}, dicom.NO_SPACING),
    "spacing zero": ({3: {"PixelSpacing": [0, 1]}}, dicom.NO_SPACING),
    "no pixels": ({3: {"PixelData": None}}, dicom.NO_PIXELS),
    "frames": ({3: {"NumberOfFrames": 2}}, dicom.FRAMES),
    "inverted": ({3: {"PhotometricInterpretation": "MONOCHROME1"}}, dicom.COLOUR),
    "colour": ({3: {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}}, dicom.COLOUR),
    "short pixels": ({3: {"PixelData": bytes(40)}}, grid.TRUNCATED),
    "long pixels": ({3: {"PixelData": bytes(80)}}, grid.TRAILING),
    "slope": ({3: {"RescaleSlope": "1e300"}}, grid.NONFINITE),
    "bits": ({3: {"PixelRepresentation": 3}}, decode.DAMAGED),
    "a bomb": ({3: {"Rows": 60000, "Columns": 60000}}, grid.LARGE),
}


@pytest.mark.parametrize("name", SERIES)
def test_series_that_are_none_are_refused(tmp_path: Path, name: str) -> None:
    tags, expected = SERIES[name]
    if expected == grid.TRAILING:
        tags = {3: {"PixelData": bytes(62)}}
    assert reason(series(tmp_path / "s", tags=tags)) == expected


def test_a_missing_slice_is_noticed_between_others(tmp_path: Path) -> None:
    folder = series(tmp_path / "s")
    next(path for path in folder.iterdir() if path.name.endswith("-3.dcm")).unlink()
    assert reason(folder) == dicom.GAPS


def test_another_size_a_gantry_tilt_and_too_few_slices_are_refused(tmp_path: Path) -> None:
    slices = [one_slice(k, values((6, 5 + (k == 2)))) for k in range(4)]
    assert reason(write(tmp_path / "a", slices)) == dicom.SIZES
    tilted = [one_slice(k, values((6, 5)), ImagePositionPatient=[0.0, 0.5 * k, 2.0 * k]) for k in range(4)]
    assert reason(write(tmp_path / "b", tilted)) == grid.SHEARED
    assert reason(write(tmp_path / "c", [one_slice(0, values((6, 5)))])) == grid.DIMENSIONS
    (tmp_path / "d").mkdir()
    assert reason(tmp_path / "d") == grid.DIMENSIONS


def test_foreign_files_and_links_among_slices_are_refused(tmp_path: Path) -> None:
    folder = series(tmp_path / "s")
    (folder / ".DS_Store").write_bytes(b"x")
    read_volume(folder)
    (folder / "notes.txt").write_text("CANARY")
    assert reason(folder) == dicom.NOT_DICOM
    (folder / "notes.txt").unlink()
    (tmp_path / "outside.dcm").write_bytes(b"x")
    (folder / "z.dcm").symlink_to(tmp_path / "outside.dcm")
    assert reason(folder) == decode.SPECIAL


def test_a_missing_codec_is_named_and_a_deflated_file_refused(tmp_path: Path) -> None:
    for syntax, expected in (
        (JPEGLSLossless, f"{dicom.CODEC} JPEG-LS Lossless Image Compression"),
        (JPEG2000Lossless, decode.DAMAGED),  # Pillow has a decoder, and these bytes are none
        ("1.2.826.0.1.3680043.8.498.1", f"{dicom.CODEC} a private transfer syntax"),
        (DeflatedExplicitVRLittleEndian, dicom.DEFLATED),
    ):
        folder = tmp_path / expected[-8:-1]
        folder.mkdir()
        for k in range(3):
            one = one_slice(k, values((6, 5)))
            one.file_meta.TransferSyntaxUID = syntax
            if syntax in (JPEG2000Lossless, JPEGLSLossless):
                one.PixelData = encapsulate([one.PixelData])
            one.save_as(folder / str(k), implicit_vr=False, little_endian=True, enforce_file_format=True)
        assert reason(folder) == expected


def test_nothing_of_a_tag_is_told(tmp_path: Path, capfd: Any, caplog: Any, recwarn: Any) -> None:
    """Values that break their own rules, of which pydicom would warn with the value."""
    folder = series(tmp_path / "s")
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"1.2.3\0", b"CANARY"))
    read_volume(folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"MONOCHROME2 ", b"CANARY      "))
    assert reason(folder) == dicom.COLOUR
    out = capfd.readouterr()
    told = [out.out, out.err, caplog.text, *(str(w.message) for w in recwarn.list)]
    assert not any("CANARY" in text for text in told)


@settings(max_examples=12)
@given(st.data())
def test_whatever_is_changed_in_a_slice_it_is_read_or_refused(tmp_path_factory: Any, data: Any) -> None:
    folder = series(tmp_path_factory.mktemp("m") / "s", 3)
    path = sorted(folder.iterdir())[1]
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(128, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(len(raw) // 2, len(raw)))])
    with contextlib.suppress(BadImageError):
        assert np.isfinite(read_volume(folder).voxels).all()


@pytest.mark.parametrize("package", ["nibabel", "pydicom"])
def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    path = series(tmp_path / "s") if package == "pydicom" else save(tmp_path / "a.nii", values(), ras())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match="volumes"):
        read_volume(path)


HIPPOCAMPUS = Path(os.environ.get("CONFRERE_DATA", "data")) / "msd_hippocampus" / "volumes.zip"


@pytest.mark.skipif(not HIPPOCAMPUS.exists(), reason="set CONFRERE_DATA to a folder holding msd_hippocampus")
def test_real_hippocampus_volumes(tmp_path: Path) -> None:
    with zipfile.ZipFile(HIPPOCAMPUS) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("images/") and name.endswith(".gz"))
        for name in names[::40]:
            image, labels = (Path(archive.extract(n, tmp_path)) for n in (name, name.replace("images", "labels")))
            found = read_volume(image)
            truth = nib.as_closest_canonical(nib.load(image))
            assert np.array_equal(found.voxels, truth.get_fdata(dtype=np.float32))
            known = read_labels(labels, 3, found)
            assert set(np.unique(known)) == {0, 1, 2}
            whole = prepared_labels(known, found.spacing, (1, 1, 1), (48, 64, 48))
            assert whole.sum() == known.sum()  # 48 x 64 x 48 holds every volume of the set
            voxels = prepared(found, (1, 1, 1), (48, 64, 48))
            assert np.isfinite(voxels).all()
            assert voxels.std() < 3
