from __future__ import annotations

import pytest
from data_files import load, write
from hypothesis import given, settings
from hypothesis import strategies as st

from confrere.data.sources import Listing
from confrere.data.table import read_patients, read_table
from confrere.errors import ConfrereError, DataError

GOOD = "path,label,site,patient\nx.png,nv,a,p1\ny.png,mel,b,p2\n"


@pytest.fixture
def read(tmp_path):
    def read(text: str | bytes, **options: object) -> Listing:
        path = tmp_path / "t.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_table(path, **options)

    return read


def shape(listing: Listing) -> list[tuple[str, str, str, str | None]]:
    return [(row.name, row.label, row.site, row.patient) for row in listing.rows]


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", "\r\n").replace(",", ";"),
        GOOD.replace(",", "\t"),
        GOOD.encode("utf-8-sig"),
        GOOD.rstrip("\n"),
        GOOD.replace("y.png", '"y.png"').replace("\ny", "\n\n  \ny"),
        GOOD.replace("path,label", " Path , LABEL"),
        GOOD.replace("patient", "lesion"),
    ],
)
def test_the_usual_dialects_mean_the_same(read, text):
    assert shape(read(text)) == [("x.png", "nv", "a", "p1"), ("y.png", "mel", "b", "p2")]


def test_quotes_and_umlauts(read):
    rows = read('path,label,site\n"a, ü.png","benign, other",a\nb.png,"say ""x""",a\n').rows
    assert [(row.name, row.label) for row in rows] == [("a, ü.png", "benign, other"), ("b.png", 'say "x"')]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 'path' is missing"),
        ("path,label,site\n", "no rows"),
        ("paths,label,site\nx,y,a\n", "(?s)'path' is missing.*rename column 1 to 'path'"),
        ("path,diagnosis,site\nx,y,a\n", "(?s)'label' is missing.*add a column 'label'"),
        ("path,label,site,Label\nx,y,a,z\n", "'label' twice"),
        ("path,label,site\nx.png,,a\n", "line 2: label is empty"),
        ("path,label,site\nx.png,nv,a\n\n ,nv,a\n", "line 4: path is empty"),
        ("path,label,site\nx.png,nv\n", "line 2 has 2 cells, the header 3"),
        ("path,label,site\nx.png,nv,a,b\n", "line 2 has 4 cells"),
        ('path,label,site\n"x.png,nv,a\n', "not valid CSV"),
        ("path,label,site\n../x.png,nv,a\n", "line 2: path leaves"),
        ("path,label,site\nx.png,nv,Site A\ny.png,nv,site-a\nz.png,nv,site_a\n", "line 4: .* would both be site"),
        ("path,label,site\nx.png,=1+1,a\n", "line 2: a class name"),
        ("path,label,site,split\nx.png,nv,a,holdout\n", "line 2: split is not"),
        ("path,label,site,split\nx.png,nv,a,train\ny.png,nv,a,\n", "only some rows"),
        (GOOD.encode("utf-16"), "UTF-16 or binary"),
        (GOOD.encode("utf-16-le"), "UTF-16 or binary"),
        (GOOD.encode() + b"\xff,nv,a,p\n", "line 4 is not UTF-8"),
        (b"PK\x03\x04\x00\x00", "UTF-16 or binary"),
    ],
)
def test_faults_name_the_line_and_the_way_out(read, text, message):
    with pytest.raises(DataError, match=message):
        read(text)


def test_several_faults_are_reported_together(read):
    with pytest.raises(DataError, match=r"line 2: .*line 3: .*line 6"):
        read("path,label,site\n" + "x.png,,a\n" * 9)


def test_messages_do_not_quote_paths_or_patients(read):
    with pytest.raises(DataError) as caught:
        read("path,label,site,patient\n/secret/Jane Doe.png,nv,a,Jane Doe\n")
    assert "Jane" not in str(caught.value)


def test_columns_of_a_pooled_table(read):
    rows = read("path,label,Scanner\nx.png,nv,A1\n", pooled=True, column="scanner").rows
    assert (rows[0].site, rows[0].attribute) == ("", "A1")


def test_patients(tmp_path):
    (tmp_path / "patients.csv").write_text("file,patient\na/b/x.png,p1\n")
    assert read_patients(tmp_path / "patients.csv") == {"a/b/x.png": "p1"}


@given(st.binary(max_size=300) | st.text(max_size=200).map(lambda t: ("path,label,site\n" + t).encode()))
@settings(max_examples=80, deadline=None)
def test_any_bytes_are_parsed_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.csv"
    path.write_bytes(data)
    try:
        outcome: object = read_table(path).rows
    except ConfrereError as error:
        outcome = error.what
    assert outcome


def test_split_column_is_used(tmp_path):
    lines = ["path,label,site,split"]
    for i, (label, split) in enumerate((k, s) for k in ("x", "y") for s in ("train", "validation", "test")):
        write(tmp_path / f"{i}.png", i)
        lines.append(f"{i}.png,{label},a,{split}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    sheet = load(tmp_path / "t.csv", tmp_path / "cache").sheet["sites"]["a"]
    assert sheet["classes"]["x"] == {"train": 1, "val": 1, "test": 1, "total": 3}


def test_split_column_with_a_leak_is_refused(tmp_path):
    write(tmp_path / "1.png", 1)
    write(tmp_path / "2.png", 2)
    (tmp_path / "t.csv").write_text("path,label,site,patient,split\n1.png,x,a,p,train\n2.png,y,a,p,test\n")
    with pytest.raises(DataError, match="1 patients are in more than one"):
        load(tmp_path / "t.csv", tmp_path / "cache")
