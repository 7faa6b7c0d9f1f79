from __future__ import annotations

import shutil

import numpy as np
import pytest
from data_files import load, make_folder, write
from hypothesis import given, settings
from hypothesis import strategies as st

from confrere.data.manifest import read_manifest
from confrere.errors import ConfrereError, DataError

HEAD = '[federation]\nname = "Trial"\n'
SITES = '[[site]]\nname = "north"\npath = "a"\n[[site]]\nname = "south"\npath = "b/table.csv"\n'


@pytest.fixture
def root(tmp_path):
    make_folder(tmp_path / "h", sites=("a",))
    lines = ["path,label"]
    for i in range(12):
        write(tmp_path / f"h/b/{i}.png", 100 + i)
        lines.append(f"{i}.png,{'bad' if i < 6 else 'gut'}")
    (tmp_path / "h/b/table.csv").write_text("\n".join(lines))
    return tmp_path / "h"


def put(root, text):
    (root / "federation.toml").write_text(text)
    return root / "federation.toml"


def test_sites_from_folders_and_tables_with_a_class_map(root, tmp_path):
    text = HEAD + 'classes = ["good", "bad"]\nsynthetic = true\n[class_map]\ngut = "good"\n' + SITES
    federation = load(put(root, text), tmp_path / "cache")
    assert (federation.name, federation.classes, federation.synthetic) == ("Trial", ("good", "bad"), True)
    assert [site.name for site in federation.sites] == ["north", "south"]
    assert load(root, tmp_path / "cache").digest == federation.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = ", "not valid TOML"),
        (SITES, "federation: Field required"),
        (HEAD.replace("name", "nmae") + SITES, "did you mean 'name'"),
        (HEAD + SITES.replace("path", "pth", 1), "did you mean 'path'"),
        (HEAD + SITES + "[partition]\nby = 'dirichlet'\n", "either"),
        (HEAD, "either"),
        (HEAD + 'task = "regression"\n' + SITES, "task"),
        (HEAD + SITES.replace("south", "north"), "same name"),
        (HEAD + SITES.replace("north", "North Site"), "cannot name a site"),
        (HEAD + SITES.replace('"a"', '"../a"'), "path leaves"),
        (HEAD + SITES.replace('"a"', '"/etc"'), "absolute"),
        (HEAD + SITES.replace('"a"', '"c"'), "neither a folder"),
        (HEAD + 'classes = ["bad", "bad"]\n' + SITES, "listed twice"),
        (HEAD + 'classes = ["bad", "good"]\n' + SITES, "(?s)has the class 'gut'|have the class 'gut'"),
        (HEAD + '[pool]\npath = "a"\n[partition]\nby = "attribute"\ncolumn = "x"\n', "no columns"),
        (HEAD + '[pool]\npath = "a"\n[partition]\nby = "attribute"\n', "column"),
        (HEAD + '[pool]\npath = "a"\n[partition]\nby = "dirichlet"\nalpha = -1\n', "alpha"),
    ],
)
def test_faults(root, tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        load(put(root, text), tmp_path / "cache")


@given(st.text(max_size=120))
@settings(max_examples=40, deadline=None)
def test_any_text_is_parsed_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "federation.toml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(ConfrereError):
        read_manifest(path)


@pytest.mark.parametrize("by", ["dirichlet", "quantity"])
def test_a_pooled_folder_is_dealt_out_by_patient_and_seed(root, tmp_path, by):
    text = HEAD + f'[pool]\npath = "a"\n[partition]\nby = "{by}"\nsites = 3\nalpha = 0.3\n'
    federation = load(put(root, text), tmp_path / "cache")
    assert [site.name for site in federation.sites] == ["site_01", "site_02", "site_03"]
    assert sum(len(site.images) for site in federation.sites) == 24
    groups = [set(site.groups.tolist()) for site in federation.sites]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 12
    shutil.rmtree(tmp_path / "cache")
    assert load(root, tmp_path / "cache").digest == federation.digest


def test_a_pooled_table_by_attribute(tmp_path):
    lines = ["path,label,Scanner"]
    for i in range(16):
        write(tmp_path / f"{i}.png", i)
        lines.append(f"{i}.png,{'xy'[i % 2]},{'Model A' if i < 8 else 'B-2'}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    federation = load(tmp_path / "t.csv", tmp_path / "cache", partition={"by": "attribute", "column": "Scanner"})
    assert [site.name for site in federation.sites] == ["b-2", "model_a"]
    assert np.array_equal(federation.sites[0].labels.sum(), 4)
