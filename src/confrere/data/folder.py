"""Folders ``<site>/<class>/<image>``; the patient stands before ``__`` in a file's name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from confrere.data import table
from confrere.data.options import Target
from confrere.data.paths import Root, check_class_name, is_ignored, site_id
from confrere.data.sources import Listing, Problem, Row
from confrere.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom", ".nii", ".gz"})
MASKS = "masks"
_TREE = """arrange the images like this (the part before __ names the patient and is optional):
    hospitals/
      st_mary/
        melanoma/  p012__1.png  p012__2.png
        naevus/    p031__1.png
      riverside/
        naevus/    p107__1.jpg"""
_POOLED_TREE = _TREE.replace("      st_mary/\n", "").replace("      riverside/\n        naevus/    p107__1.jpg", "")


def read_folder(root: Path, *, pooled: bool = False, target: Target = "label", volumes: bool = False) -> Listing:
    """List a folder of sites, or of classes when ``pooled``.

    With the ``target`` mask or boxes, beside a site's classes lies ``masks`` with a ``<name of the image>.png`` each.
    Volumes are NIfTI files, or folders with a DICOM series each; their masks are ``<name>.nii.gz`` or ``.nii``.
    With the target image, a site's images lie in its folder or in folders below, whose names say nothing.

    Raises:
        DataError: the tree does not have exactly these levels, or a name cannot be used.
    """
    guard = Root(root)
    if not guard.holds(root / "patients.csv"):
        raise DataError(
            "patients.csv is a link that leads out of the data",
            where=root.name,
            fix="copy it there",
            code="path-leaves-data",
        )
    patients = table.read_patients(root / "patients.csv") if (root / "patients.csv").is_file() else {}
    rows: list[Row] = []
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    sites = [("", root)] if pooled else [(entry.name, entry) for entry in _folders(root, guard, _TREE)]
    for site, folder in sites:
        made = "" if pooled else site_id(site, seen, where=root.name)
        _read_site(guard, made, folder, patients, rows, problems, target, volumes)
    if not sites or not rows:
        raise DataError("no image found", where=root.name, fix=_POOLED_TREE if pooled else _TREE, code="folder-tree")
    synthetic = (root / "SYNTHETIC.txt").is_file()
    return Listing(name=root.resolve().name, rows=tuple(rows), problems=tuple(problems), synthetic=synthetic)


def read_site(folder: Path, site: str, *, target: Target = "label", volumes: bool = False) -> Listing:
    """List one site's folder of classes."""
    rows: list[Row] = []
    problems: list[Problem] = []
    _read_site(Root(folder), site, folder, {}, rows, problems, target, volumes)
    return Listing(name=site, rows=tuple(rows), problems=tuple(problems))


def _read_site(
    root: Root,
    site: str,
    folder: Path,
    patients: dict[str, str],
    rows: list[Row],
    problems: list[Problem],
    target: Target,
    volumes: bool,
) -> None:
    if target == "labels":
        what, fix = "folders name one class an image", "give a table with the columns path, labels, site and patient"
        raise DataError(what, where=site or root.path.name, fix=fix, code="folder-tree")
    tree, unlabelled = _TREE if site else _POOLED_TREE, target == "image"
    before = len(rows) + len(problems)
    for folder_of_class in [folder] * unlabelled + list(_folders(folder, root, tree, among_images=unlabelled)):
        if target in ("mask", "boxes", "image") and folder_of_class.name == MASKS:
            continue
        label = table.ALL if unlabelled else check_class_name(folder_of_class.name, where=site or root.path.name)
        for path in sorted(folder_of_class.iterdir()):
            if is_ignored(path.name) or (folder_of_class == folder and path.is_dir()):
                continue
            name = path.relative_to(folder).as_posix()
            if not root.holds(path):
                problems.append(Problem(site=site, name=name, reason="link leading out of the folder"))
                continue
            if path.is_dir() and not volumes:
                raise DataError(
                    "a class folder holds another folder", where=site or root.path.name, fix=tree, code="folder-tree"
                )
            patient = patients.get(path.relative_to(root.path).as_posix()) or _prefix(path.name)
            mask = _mask(folder / MASKS, path, volumes=volumes) if target in ("mask", "boxes") else None
            if mask is not None and not root.holds(mask):
                problems.append(Problem(site=site, name=name, reason="mask: link leading out of the folder"))
                continue
            rows.append(Row(path=path, name=name, site=site, label=label, patient=patient, mask=mask))
    if len(rows) + len(problems) == before:
        problems.append(Problem(site=site, name=site, reason="no file in a class folder"))


def _folders(folder: Path, root: Root, tree: str, *, among_images: bool = False) -> Iterator[Path]:
    """Yield the folders of one level; images at this level mean that a level is missing, unless they are expected."""
    for path in sorted(folder.iterdir()):
        if is_ignored(path.name):
            continue
        if not root.holds(path):
            raise DataError(
                "a folder is a link that leads out of the data", where=folder.name, fix=tree, code="path-leaves-data"
            )
        if path.is_dir():
            yield path
        elif path.suffix.lower() in IMAGE_SUFFIXES and not among_images:
            raise DataError(
                "an image lies where only folders are expected", where=folder.name, fix=tree, code="folder-tree"
            )


def _mask(folder: Path, path: Path, *, volumes: bool) -> Path:
    """Return where the mask of an image or volume has to be."""
    if not volumes:
        return folder / f"{path.stem}.png"
    name = path.name.removesuffix(".gz").removesuffix(".nii")
    plain = folder / f"{name}.nii"
    return plain if plain.exists() else folder / f"{name}.nii.gz"


def _prefix(name: str) -> str | None:
    before, mark, _ = name.partition("__")
    return before if mark and before else None
