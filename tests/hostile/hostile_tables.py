"""CSV tables of images and of numbers: encodings, headers, cells, sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from hostile_case import Base, Case, accepted, encoded, federation, link, picture, pipe, refused, sparse, write

HEAD = "path,label,site\n"
ROWS = "a/x/p1__1.png,x,a\na/y/p2__1.png,y,a\nb/x/p3__1.png,x,b\nb/y/p4__1.png,y,b\n"
GOOD = HEAD + ROWS
NUMBERS = "site,label,age\na,x,1\na,y,2\nb,x,3\nb,y,4\n"


def row(path: str = "a/x/p1__1.png", label: str = "x", site: str = "a") -> str:
    return HEAD + f"{path},{label},{site}\n" + ROWS


def with_column(name: str, of_a: str, of_b: str) -> str:
    return f"path,label,site,{name}\n" + ROWS.replace(",a\n", f",a,{of_a}\n").replace(",b\n", f",b,{of_b}\n")


def _fine() -> dict[str, bytes]:
    return {
        "byte-order-mark": b"\xef\xbb\xbf" + GOOD.encode(),
        "windows-line-ends": GOOD.replace("\n", "\r\n").encode(),
        "semicolons": GOOD.replace(",", ";").encode(),
        "tabs": GOOD.replace(",", "\t").encode(),
        "blank-lines": GOOD.replace("\n", "\n\n").encode(),
        "quoted": GOOD.replace("a/x/p1__1.png", '"a/x/p1__1.png"').encode(),
        "capital-header": GOOD.replace("path,label", " Path , LABEL ").encode(),
        "no-last-line-end": GOOD.rstrip().encode(),
        "site-of-formula": GOOD.replace(",b\n", ",=b\n").encode(),
        "patient-of-formula": with_column("patient", "=1", "@2").encode(),
        "numbers": NUMBERS.encode(),
        "numbers-gaps": NUMBERS.replace("3", "NA").encode(),
    }


def _encodings() -> dict[str, tuple[str, bytes]]:
    return {
        "utf-16-le": ("UTF-16 or binary", b"\xff\xfe" + GOOD.encode("utf-16-le")),
        "utf-16-be": ("UTF-16 or binary", b"\xfe\xff" + GOOD.encode("utf-16-be")),
        "utf-16-unmarked": ("UTF-16 or binary", GOOD.encode("utf-16-le")),
        "utf-32": ("UTF-16 or binary", GOOD.encode("utf-32")),
        "latin-1": ("line 2 is not UTF-8", row(label="naïf").encode("latin-1")),
        "zero-byte": ("UTF-16 or binary", row(label="x\0y").encode()),
        "late-zero-byte": ("line 402 holds a zero byte", (HEAD + "a/x/p1__1.png,x,a\n" * 400 + "\0").encode()),
        "binary": ("UTF-16 or binary", bytes(range(256))),
        "picture": ("UTF-16 or binary", encoded(picture())),
        "surrogate": ("line 2 is not UTF-8", row(label="\ud800").encode("utf-8", "surrogatepass")),
        "overlong": ("line 2 is not UTF-8", GOOD.encode().replace(b"a/x", b"a\xc0\xafx")),
    }


def _headers() -> dict[str, tuple[str, str]]:
    return {
        "empty": ("column 'path' is missing", ""),
        "header-only": ("no rows", HEAD),
        "no-header": ("column 'path' is missing", ROWS),
        "no-path": ("column 'path' is missing", GOOD.replace("path", "file", 1)),
        "no-label": ("column 'label' is missing", GOOD.replace("label", "diagnosis", 1)),
        "no-site": ("column 'site' is missing", GOOD.replace("site", "where", 1)),
        "misspelt": ("column 'label' is missing", GOOD.replace("label", "lable", 1)),
        "twice": ("'label' twice", GOOD.replace("path,label", "path,label,label", 1)),
        "twice-by-case": ("'label' twice", GOOD.replace("site", "LABEL", 1)),
        "million-columns": ("more than 10,000 columns", "path,label,site" + ",c" * 1_000_000 + "\n"),
        "formula-header": ("column 'path' is missing", GOOD.replace("path", "=path", 1)),
    }


def _cells() -> dict[str, tuple[str, str]]:
    return {
        "short-row": ("line 2 has 2 cells", HEAD + "a/x/p1__1.png,x\n"),
        "long-row": ("line 2 has 4 cells", HEAD + "a/x/p1__1.png,x,a,\n"),
        "open-quote": ("is not valid CSV", GOOD + '"a/x/p1__1.png,x,a\n' + ROWS * 50),
        "quote-amid": ("line 2 is not valid CSV", HEAD + '"a"b,x,a\n'),
        "huge-cell": ("line 2 is not valid CSV", row(label="x" * 200_000)),
        "label-empty": ("line 2: label is empty", row(label="")),
        "label-blank": ("line 2: label is empty", row(label="  ")),
        "label-formula": ("a formula", row(label="=cmd|' /C calc'!A0")),
        "label-plus": ("a formula", row(label="+1")),
        "label-at": ("a formula", row(label="@SUM(A1)")),
        "label-slash": ("a class name is empty, too long", row(label="../x")),
        "label-dots": ("a class name is empty, too long", row(label="..")),
        "label-bell": ("a class name is empty, too long", row(label="x\a")),
        "label-long": ("a class name is empty, too long", row(label="x" * 65)),
        "label-turned": ("a class name is empty, too long", row(label="x\u202ey")),
        "site-empty": ("line 2: site is empty", row(site="")),
        "site-pooled": ("name of the pooled control", row(site="Pooled")),
        "site-device": ("cannot name a site", row(site="CON")),
        "sites-collide": ("would both be site 'st_a'", HEAD + "a/x/p1__1.png,x,St A\na/y/p2__1.png,y,st.a\n"),
        "split-unknown": ("split is not train, val or test", "path,label,site,split\na/x/p1__1.png,x,a,tset\n"),
        "split-somewhere": ("only some rows have a split", with_column("split", "", "test")),
        "patient-in-two-splits": ("more than one of train, val", with_column("patient,split", "p,train", "p,test")),
        "no-such-file": ("no such file: 1", row("a/x/none.png")),
        "file-is-folder": ("not an ordinary file: 1", row("a/x")),
        "conflict": ("same picture has two labels: 2", row(label="y")),
        "one-class": ("only one class", HEAD + "a/x/p1__1.png,x,a\nb/x/p3__1.png,x,b\n"),
        "many-faults": ("line 2: path leaves", HEAD + "../x,x,a\n" * 1000),
        "traversal": ("line 2: path leaves", row("../../etc/passwd")),
        "absolute": ("line 2: path is absolute", row("/etc/passwd")),
        "url": ("line 2: path is absolute", row("file:///etc/passwd")),
        "home": ("line 2: path is absolute", row("~/x.png")),
        "backslash": ("line 2: path holds a backslash", row("a\\x\\p1__1.png")),
        "device": ("line 2: path leaves its folder or names a device", row("a/nul.png")),
        "control": ("line 2: path is empty or holds control", row("a/x/\x1b[2J.png")),
        "numbers-text": ("line 3: age is no number", NUMBERS.replace("a,y,2", "a,y,old")),
        "numbers-infinite": ("line 3: age is no number", NUMBERS.replace("a,y,2", "a,y,inf")),
        "numbers-huge": ("line 3: age is no number", NUMBERS.replace("a,y,2", "a,y,1e400")),
        "numbers-underscore": ("line 3: age is no number", NUMBERS.replace("a,y,2", "a,y,1_0")),
        "numbers-hex": ("line 3: age is no number", NUMBERS.replace("a,y,2", "a,y,0x10")),
        "numbers-formula": ("line 3: age is no number", NUMBERS.replace("a,y,2", "a,y,=2")),
    }


def _table(content: bytes | str, folder: Path, base: Base) -> Path:
    federation(folder)
    return write(folder / "t.csv", content)


def _patients(content: str, folder: Path, base: Base) -> Path:
    root = federation(folder / "data")
    write(root / "patients.csv", content)
    return root


def _other(kind: str, folder: Path, base: Base) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "t.csv"
    if kind == "pipe":
        return pipe(path)
    if kind == "folder":
        path.mkdir()
        return path
    if kind == "huge":
        return sparse(path, 200_000_000, GOOD.encode())
    if kind == "link-to-device":
        return link(path, "/dev/zero")
    if kind == "row-of-pipe":
        federation(folder)
        pipe(folder / "a" / "x" / "pipe.png")
        return write(path, row("a/x/pipe.png"))
    if kind == "row-of-link":
        federation(folder)
        link(folder / "a" / "x" / "away.png", "/etc/hostname")
        return write(path, row("a/x/away.png"))
    root = federation(folder / "data")
    link(root / "patients.csv", "/etc/passwd")
    return root


# What is said of a picture or of the whole set names that, not the table.
NAMES = {
    "one-class": "t",
    "patient-in-two-splits": "column split",
    "no-such-file": "none.png",
    "file-is-folder": "a/x",
    "conflict": "p1__1.png",
}
OTHERS = {
    "pipe": ("data", "no such folder or file", "t.csv"),
    "folder": ("data", "no image found", "t.csv"),
    "huge": ("data", "more than 100,000,000 bytes", "t.csv"),
    "link-to-device": ("data", "no such folder or file", "t.csv"),
    "row-of-pipe": ("picture", "not an ordinary file: 1", "pipe.png"),
    "row-of-link": ("data", "link leads out of the folder", "t.csv"),
    "patients-link-out": ("data", "patients.csv is a link", "data"),
}
PATIENTS = {
    "patients-traversal": ("line 2: path leaves", "file,patient\n../../etc/passwd,p\n"),
    "patients-no-column": ("column 'patient' is missing", "file,name\na/x/p1__1.png,p\n"),
    "patients-twice": ("'file' twice", "file,file,patient\na,b,c\n"),
    "patients-utf-16": ("UTF-16 or binary", "f\0i\0"),
}


def cases() -> Iterator[Case]:
    for name, data in _fine().items():
        yield accepted(f"table/{name}", "data", "images=", partial(_table, data))
    texts: dict[str, tuple[str, bytes | str]] = {**_encodings(), **_headers(), **_cells()}
    for name, (says, content) in texts.items():
        opened, names = "picture" if name in NAMES else "data", NAMES.get(name, "t.csv")
        yield refused(f"table/{name}", opened, "DataError", says, names, partial(_table, content))
    for name, (opened, says, names) in OTHERS.items():
        yield refused(f"table/{name}", opened, "DataError", says, names, partial(_other, name))
    for name, (says, text) in PATIENTS.items():
        yield refused(f"table/{name}", "data", "DataError", says, "patients.csv", partial(_patients, text))
