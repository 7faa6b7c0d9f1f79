"""Folders of pictures beside a prediction: replaced as a whole, so that none of an earlier prediction stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from confrere import intake
from confrere.data.paths import new_folder
from confrere.pictures import MADE_HERE


@contextmanager
def picture_folders(out: Path, **wanted: bool) -> Iterator[dict[str, Path]]:
    """Yield a draft of the folder ``<out>_<kind>`` for each kind that is wanted; they become the folders in the end.

    A kind that is not wanted has no folder in the end: what an earlier prediction wrote there would belong to none.

    Args:
        out: CSV beside which they lie.
        wanted: kinds of pictures, e.g. ``masks=True``.

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
    """Return whether the path is an ordinary file that begins as :func:`confrere.pictures.png` marks what it makes."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with intake.open_file(path) as file:
            return MADE_HERE in file.read(100)
    except OSError:
        return False
