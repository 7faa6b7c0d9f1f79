"""Public sets by name, written to disk ready for ``load_federation``, with their licence beside them.

``ham10000`` comes from a data hub as Parquet, with the sites it was collected at; ``medmnist:<flag>`` is one
NumPy archive of 28-pixel images that a ``federation.toml`` deals out to simulated sites.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from confrere.data.paths import new_folder
from confrere.errors import DataError, MissingExtraError

_HUB_SET = "flwrlabs/fed-isic2019"
_HUB_FILES = ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet")
# Numbers of centres and classes as in FLamby's Fed-ISIC2019; centres 0 and 4 are not part of HAM10000.
_HUB_SITES = {1: "vidir_molemax", 2: "vidir_modern", 3: "rosendahl", 5: "vienna_dias"}
_HUB_CLASSES = ("mel", "nv", "bcc", "ak", "bkl", "df", "vasc", "scc")
_HUB_NOTICE = """HAM10000 (Tschandl, Rosendahl, Kittler, Scientific Data 2018, doi:10.7910/DVN/DBW86T),
CC BY-NC 4.0: non-commercial use with attribution. Sites as in FLamby's Fed-ISIC2019.
This copy does not say which pictures show the same lesion: some lesions will be in train and in test, so
scores are higher than on new patients. Prefer a copy with lesion numbers where you have one.
"""

_ARCHIVE = "https://zenodo.org/record/6496656/files"
_ARCHIVE_NOTICE = """MedMNIST (Yang et al., Scientific Data 2023, doi:10.1038/s41597-022-01721-8),
CC BY 4.0 or as the subset's page says. The pictures are 28 x 28 pixels and name no patient; sites are
simulated. Not intended for clinical use.
"""
_BLOOD = (
    "basophil",
    "eosinophil",
    "erythroblast",
    "immature granulocyte",
    "lymphocyte",
    "monocyte",
    "neutrophil",
    "platelet",
)
_FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bloodmnist": ("7053d0359d879ad8a5505303e11de1dc", _BLOOD),
    "breastmnist": ("750601b1f35ba3300ea97c75c52ff8f6", ("malignant", "normal or benign")),
    "dermamnist": ("0744692d530f8e62ec473284d019b0c7", ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")),
    "pneumoniamnist": ("28209eda62fecd6e6a2d98b1501bb15f", ("normal", "pneumonia")),
}
_SECONDS = 60
_MOST_BYTES = 2_000_000_000


def names() -> tuple[str, ...]:
    """Return the sets that :func:`get` knows."""
    return ("ham10000", *(f"medmnist:{flag}" for flag in sorted(_FLAGS)))


def get(name: str, out: Path, *, endpoint: str | None = None) -> Path:
    """Download a public set into the new folder ``out``; return the path for ``load_federation``.

    Args:
        name: one of :func:`names`.
        out: a folder that does not exist or is empty; it also receives the licence, ``README.txt``.
        endpoint: where to download from instead of the public hub or archive.

    Raises:
        DataError: unknown name, not reachable, or not the expected file.
        MissingExtraError: ``ham10000`` without the ``hub-data`` extra.
    """
    if name not in names():
        raise DataError(
            f"there is no public set {name!r}", fix=f"choose one of {', '.join(names())}", code="unknown-name"
        )
    with new_folder(out) as folder:
        (folder / "images").mkdir()
        if name == "ham10000":
            _from_hub(folder, endpoint)
        else:
            _from_archive(folder, name.partition(":")[2], endpoint or _ARCHIVE)
    return out / "federation.toml"


def _from_hub(folder: Path, endpoint: str | None) -> None:
    rows: dict[str, list[tuple[str, str]]] = {site: [] for site in _HUB_SITES.values()}
    with tempfile.TemporaryDirectory() as cache:
        for file in _HUB_FILES:
            for record in _read_parquet(_fetch_from_hub(file, Path(cache), endpoint)):
                site = _HUB_SITES.get(record["center"])
                if site is None:
                    continue
                number = sum(map(len, rows.values()))
                path = f"images/{number:05d}.img"
                (folder / path).write_bytes(record["image"]["bytes"])
                rows[site].append((path, _HUB_CLASSES[record["label"]]))
    lines = ['[federation]\nname = "HAM10000"\n']
    for site, pairs in rows.items():
        _write_table(folder / f"{site}.csv", pairs)
        lines.append(f'[[site]]\nname = "{site}"\npath = "{site}.csv"\n')
    (folder / "federation.toml").write_text("\n".join(lines), encoding="utf-8")
    (folder / "README.txt").write_text(_HUB_NOTICE, encoding="utf-8")


def _fetch_from_hub(file: str, cache: Path, endpoint: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        # token=False: the set is public, and a mirror must not be sent the user's token.
        path = hf_hub_download(_HUB_SET, file, repo_type="dataset", endpoint=endpoint, cache_dir=cache, token=False)
    except Exception as error:  # the client passes on the errors of whichever HTTP library it came with
        raise _unreachable(f"the data set {_HUB_SET}", str(endpoint or "the hub")) from error
    return Path(path)


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "hub-data", needed_for="the set ham10000") from error
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64, columns=["image", "center", "label"]):
                yield from batch.to_pylist()
    except (pa.ArrowException, KeyError) as error:
        raise DataError(
            "the download is not the expected Parquet table", fix="download again", code="download"
        ) from error


def _from_archive(folder: Path, flag: str, endpoint: str) -> None:
    digest, classes = _FLAGS[flag]
    with tempfile.TemporaryDirectory() as temporary:
        archive = Path(temporary) / f"{flag}.npz"
        _fetch(f"{endpoint.rstrip('/')}/{flag}.npz?download=1", archive)
        with archive.open("rb") as file:
            if hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() != digest:
                raise DataError(
                    f"{flag}.npz is not the published file", fix="download again, or elsewhere", code="download"
                )
        rows = list(_unpack(archive, folder, classes))
    _write_table(folder / "images.csv", rows)
    text = (
        f"[federation]\nname = {json.dumps(flag)}\nclasses = {json.dumps(classes)}\n\n"
        '[pool]\npath = "images.csv"\n\n[partition]\nby = "dirichlet"\nalpha = 0.5\nsites = 4\n'
    )
    (folder / "federation.toml").write_text(text, encoding="utf-8")
    (folder / "README.txt").write_text(_ARCHIVE_NOTICE, encoding="utf-8")


def _unpack(archive: Path, folder: Path, classes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Write each picture as PNG; yield its path and class."""
    try:
        with zipfile.ZipFile(archive) as file:
            if sum(info.file_size for info in file.infolist()) > _MOST_BYTES:
                raise DataError(
                    "the archive unpacks to more than 2 GB", fix="download again, or elsewhere", code="download"
                )
        with np.load(archive, allow_pickle=False) as arrays:
            for part in ("train", "val", "test"):
                labels: NDArray[np.int64] = arrays[f"{part}_labels"].reshape(-1).astype(np.int64)
                for index, (image, label) in enumerate(zip(arrays[f"{part}_images"], labels, strict=True)):
                    path = f"images/{part}_{index:05d}.png"
                    Image.fromarray(image).save(folder / path)
                    yield path, classes[label]
    except (zipfile.BadZipFile, KeyError, ValueError, IndexError) as error:
        raise DataError(
            "the archive does not hold the expected arrays", fix="download again", code="download"
        ) from error


def _fetch(url: str, path: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "confrere"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as reply, path.open("wb") as file:
            while part := reply.read(1_000_000):
                file.write(part)
                if file.tell() > _MOST_BYTES:
                    raise DataError(
                        "the download has more than 2 GB", where=url, fix="download elsewhere", code="download"
                    )
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise _unreachable("the file", url) from error


def _unreachable(what: str, where: str) -> DataError:
    return DataError(
        f"cannot download {what}",
        where=where,
        fix="check the network or proxy, give a mirror as endpoint, or copy the files here by hand",
        code="download",
    )


def _write_table(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label"))
        writer.writerows(rows)
