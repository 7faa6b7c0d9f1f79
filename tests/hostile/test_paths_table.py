"""G13: one table of strings that lead out, refused on every way in that takes a path or the name of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from hostile_case import Base, copied, federation, write
from traversal import OUTSIDE

from confrere.adapters import lora
from confrere.backbones import load
from confrere.config import validate
from confrere.data.manifest import read_manifest
from confrere.data.table import read_patients, read_table
from confrere.errors import ConfrereError
from confrere.predict import Predictor

SPEC = lora.LoraSpec(slots=("general",), blocks=1)


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def table(text: str, place: Path, base: Base) -> None:
    read_table(write(place / "t.csv", f"path,label,site\n{quoted(text)},x,a\n"))


def patients(text: str, place: Path, base: Base) -> None:
    read_patients(write(place / "patients.csv", f"file,patient\n{quoted(text)},p\n"))


def site_path(text: str, place: Path, base: Base) -> None:
    values = {"federation": {"name": "f"}, "site": [{"name": "a", "path": text}]}
    read_manifest(write(place / "federation.toml", tomli_w.dumps(values)))


def site_name(text: str, place: Path, base: Base) -> None:
    values = {"federation": {"name": "f"}, "site": [{"name": text, "path": "a"}]}
    read_manifest(write(place / "federation.toml", tomli_w.dumps(values)))


def pool(text: str, place: Path, base: Base) -> None:
    values = {"federation": {"name": "f"}, "pool": {"path": text}, "partition": {"by": "dirichlet"}}
    read_manifest(write(place / "federation.toml", tomli_w.dumps(values)))


def control(text: str, place: Path, base: Base) -> None:
    validate({"path": str(base.data), "controls": [text]})


def site_of_predictor(text: str, place: Path, base: Base) -> None:
    Predictor(base.run, text)


def slot(text: str, place: Path, base: Base) -> None:
    if not (place / "run").exists():
        copied(base.run, place / "run")
    head = place / "run" / "adapters" / "a" / "head.json"
    head.write_text(json.dumps({**json.loads(head.read_text()), "slots": [text]}))
    Predictor(place / "run", "a")


def shard(text: str, place: Path, base: Base) -> None:
    if not (place / "backbone").exists():
        copied(base.backbone, place / "backbone")
    write(place / "backbone" / "model.safetensors.index.json", json.dumps({"weight_map": {"x": text}}))
    load(place / "backbone", lora=SPEC)


WAYS: tuple[Callable[[str, Path, Base], None], ...] = (
    table, patients, site_path, site_name, pool, control, site_of_predictor, slot, shard,
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_no_string_of_the_table_leads_out(
    way: Callable[[str, Path, Base], None], base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation(tmp_path / "in")
    write(tmp_path / "x", "outside")
    refusals = 0
    for text in OUTSIDE:
        with pytest.raises(ConfrereError) as caught:
            way(text, tmp_path / "in", base)
        assert caught.value.fix
        refusals += 1
    with capsys.disabled():
        print(f"\nG13: {refusals} of {len(OUTSIDE)} refused as {way.__name__}")
    assert refusals == len(OUTSIDE) >= 60


@pytest.mark.parametrize("revision", ["..", "../x", "/etc/passwd", "a/../../b", "a\x00b", "\\", "~", "x" * 2000])
def test_no_revision_of_a_hub_model_leads_out(revision: str) -> None:
    with pytest.raises(ConfrereError, match=r"no revision|not printable"):
        load(f"hf:org/name@{revision}", lora=SPEC)


def test_links_in_the_data_lead_nowhere(tmp_path: Path) -> None:
    """A link that leads out is refused for a folder, a table's row, a site's path and the two special files."""
    root = federation(tmp_path / "in")
    write(tmp_path / "out" / "t.csv", "path,label\n")
    (root / "away").symlink_to(tmp_path / "out")
    (root / "loop").symlink_to(root / "loop")
    for text in ("away/t.csv", "away"):
        for way in (table, patients, site_path, pool):
            with pytest.raises(ConfrereError, match="link leads out"):
                way(text, root, Base(tmp_path))
