"""Folders of pictures or volumes beside a prediction: replaced as a whole, so that none of an earlier one stays."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from confrere import intake, pictures
from confrere.data import grid
from confrere.data.paths import new_folder


@contextmanager
def picture_folders(out: Path, **wanted: bool) -> Iterator[dict[str, Path]]:
    """Yield a draft of the folder ``<out>_<kind>`` for each kind that is wanted; they become the folders in the end.

    A kind that is not wanted has no folder in the end: what an earlier prediction wrote there would belong to none.

    Args:
        out: CSV beside which they lie.
        wanted: kinds of pictures, e.g. ``masks=True``; those of a prediction of another kind are to go, too.

    Raises:
        DataError: a folder holds what no prediction wrote; nothing is changed. RunError: it cannot be written.
    """
    places = {kind: out.absolute().with_name(f"{out.absolute().stem}_{kind}") for kind in wanted}
    with ExitStack() as stack:
        yield {
            kind: stack.enter_context(new_folder(place, replaces=made_here))
            for kind, place in places.items()
            if wanted[kind] or place.is_dir()
        }
    for kind, place in places.items():
        if not wanted[kind] and place.is_dir():
            place.rmdir()


def made_here(path: Path) -> bool:
    """Return whether the path is an ordinary file, marked by :func:`confrere.pictures.png` or ``grid.nifti_bytes``."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with intake.open_file(path) as file:
            start = (gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file).read(grid.DESCRIPTION.stop)
    except (OSError, EOFError, zlib.error):  # it cannot be read, or is no gzip file
        return False
    return pictures.MADE_HERE in start[:100] or start[grid.DESCRIPTION].rstrip(b"\0") == grid.MADE_HERE
