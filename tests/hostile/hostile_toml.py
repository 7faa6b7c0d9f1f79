"""TOML: a federation's manifest, an experiment, and assignments on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from hostile_case import Base, Case, accepted, federation, link, pipe, refused, sparse, write

SITES = '[[site]]\nname = "a"\npath = "a"\n[[site]]\nname = "b"\npath = "b"\n'
GOOD = '[federation]\nname = "f"\n' + SITES
POOL = '[federation]\nname = "f"\n[pool]\npath = "all"\n[partition]\nby = "dirichlet"\n'

SYNTAX: dict[str, tuple[str, bytes]] = {
    "key-twice": ("not valid TOML", b"rounds = 3\nrounds = 4\n"),
    "table-twice": ("not valid TOML", b"[train]\nlr = 1.0\n[train]\nlr = 2.0\n"),
    "inline-extended": ("not valid TOML", b"train = {}\n[train]\nlr = 1.0\n"),
    "no-value": ("not valid TOML", b"rounds =\n"),
    "yaml": ("not valid TOML", b"rounds: 3\n"),
    "yaml-tag": ("not valid TOML", b"!!python/object/apply:os.system ['id']\n"),
    "json": ("not valid TOML", b'{"rounds": 3}'),
    "deep-list": ("nested too deeply", b"x = " + b"[" * 20_000),
    "deep-table": ("nested too deeply", b"x = " + b"{a=" * 20_000),
    "deep-key": ("more than 8 parts", b".".join([b"a"] * 200_000) + b" = 1\n"),
    "deep-header": ("more than 8 parts", b"[" + b".".join([b'"a"'] * 100_000) + b"]\n"),
    "long-number": ("a whole number has more than 64 bits", b"x = " + b"1" * 5000),
    "long-hex": ("a whole number has more than 64 bits", b"x = 0x" + b"f" * 400_000),
    "65-bit": ("a whole number has more than 64 bits", b"x = 18446744073709551616\n"),
    "long-key": ("a key more than 256 characters", b"a" * 5000 + b" = 1\n"),
    "million-tables": ("more than 500,000 bytes", b"[[x]]\n" * 100_000),
    "utf-16": ("", "rounds = 3\n".encode("utf-16")),
    "latin-1": ("", b"x = '\xe4'\n"),
    "zero-byte": ("not valid TOML", b"rounds = \x003\n"),
    "open-string": ("not valid TOML", b'x = """' + b"a" * 400_000),
    "control-in-string": ("not valid TOML", b"x = '\x1b[2J'\n"),
}

MANIFESTS: dict[str, tuple[str, str]] = {
    "empty": ("federation: Field required", ""),
    "unknown-key": ("federation.naem", GOOD.replace('"f"\n', '"f"\nnaem = "f"\n')),
    "unknown-table": ("sites", GOOD.replace("[[site]]", "[[sites]]")),
    "name-of-number": ("federation.name", GOOD.replace('"f"', "3")),
    "name-long": ("federation.name", GOOD.replace('"f"', f'"{"f" * 200}"')),
    "name-of-date": ("federation.name", GOOD.replace('"f"', "2026-01-01")),
    "synthetic-yes": ("federation.synthetic", GOOD.replace('"f"\n', '"f"\nsynthetic = "yes"\n')),
    "synthetic-one": ("federation.synthetic", GOOD.replace('"f"\n', '"f"\nsynthetic = 1\n')),
    "task-unknown": ("federation.task", GOOD.replace('"f"\n', '"f"\ntask = "regression"\n')),
    "class-twice": ("a class is listed twice", GOOD.replace('"f"\n', '"f"\nclasses = ["x", "x"]\n')),
    "class-formula": ("a class name is empty", GOOD.replace('"f"\n', '"f"\nclasses = ["x", "=y"]\n')),
    "class-alone": ("federation.classes", GOOD.replace('"f"\n', '"f"\nclasses = ["x"]\n')),
    "class-lacking": ("the list of classes lacks", GOOD.replace('"f"\n', '"f"\nclasses = ["x", "z"]\n')),
    "class-map-unknown": ("which no image has", GOOD + '[class_map]\nq = "x"\n'),
    "class-map-number": ("class_map.x", GOOD + "[class_map]\nx = 3\n"),
    "site-twice": ("same name", GOOD.replace('name = "b"', 'name = "a"')),
    "site-pooled": ("name of the pooled control", GOOD.replace('name = "b"', 'name = "pooled"')),
    "site-spaced": ("cannot name a site", GOOD.replace('name = "b"', 'name = "St B"')),
    "site-traversal": ("path leaves its folder", GOOD.replace('path = "b"', 'path = "../../etc"')),
    "site-absolute": ("path is absolute", GOOD.replace('path = "b"', 'path = "/etc"')),
    "site-url": ("path is absolute", GOOD.replace('path = "b"', 'path = "https://x/y"')),
    "site-zero": ("control characters", GOOD.replace('path = "b"', 'path = "b\\u0000"')),
    "site-of-other-kind": ("neither a folder nor a .csv", GOOD.replace('path = "b"', 'path = "b/x/p3__1.png"')),
    "site-missing": ("neither a folder nor a .csv", GOOD.replace('path = "b"', 'path = "c"')),
    "site-link-out": ("link leads out", GOOD.replace('path = "b"', 'path = "away"')),
    "no-site": ("give either [[site]]", '[federation]\nname = "f"\n'),
    "site-and-pool": ("give either [[site]]", POOL + SITES),
    "pool-alone": ("give either [[site]]", '[federation]\nname = "f"\n[pool]\npath = "a"\n'),
    "pool-traversal": ("path leaves its folder", POOL.replace('"all"', '"../x"')),
    "alpha-nan": ("partition.alpha", POOL.replace('"a"', '"all"') + "alpha = nan\n"),
    "alpha-infinite": ("partition.alpha", POOL + "alpha = 1e400\n"),
    "alpha-text": ("partition.alpha", POOL + 'alpha = "0.5"\n'),
    "sites-huge": ("partition.sites", POOL + "sites = 1000000000\n"),
    "sites-true": ("partition.sites", POOL + "sites = true\n"),
    "sites-fraction": ("partition.sites", POOL + "sites = 2.5\n"),
    "by-unknown": ("partition.by", POOL.replace('"dirichlet"', '"chance"')),
    "column-without-use": ("partition", POOL + 'column = "x"\n'),
}

EXPERIMENTS: dict[str, tuple[str, str]] = {
    "unknown-key": ("unknown key", "roundz = 3\n"),
    "unknown-inner-key": ("unknown key", "[train]\nlrr = 0.1\n"),
    "rounds-text": ("rounds", 'rounds = "3"\n'),
    "rounds-true": ("rounds", "rounds = true\n"),
    "rounds-fraction": ("rounds", "rounds = 2.5\n"),
    "rounds-zero": ("rounds", "rounds = 0\n"),
    "rounds-huge": ("rounds", "rounds = 9000000000000000000\n"),
    "seed-negative": ("seed", "seed = -1\n"),
    "seed-date": ("seed", "seed = 2026-01-01\n"),
    "lr-nan": ("train.lr", "[train]\nlr = nan\n"),
    "lr-infinite": ("train.lr", "[train]\nlr = 1e400\n"),
    "lr-negative": ("train.lr", "[train]\nlr = -0.1\n"),
    "lr-text": ("train.lr", '[train]\nlr = "1e-3"\n'),
    "views-three": ("train.views", "[train]\nviews = 3\n"),
    "val-nan": ("data.val", "[data]\nval = nan\n"),
    "val-text": ("data.val", '[data]\nval = "0.2"\n'),
    "val-true": ("data.val", "[data]\nval = true\n"),
    "max-pixels-true": ("data.max_pixels", "[data]\nmax_pixels = true\n"),
    "image-size-huge": ("data.image_size", "[data]\nimage_size = [100000, 8]\n"),
    "shift-unknown": ("unknown kind of shift", "[data]\nshift = [{kind = 'virus'}]\n"),
    "shift-nan": ("data.shift", "[data]\nshift = [{kind = 'stain', strength = nan}]\n"),
    "on-bad-unknown": ("data.on_bad", "[data]\non_bad = 'execute'\n"),
    "backbone-number": ("backbone", "backbone = 3\n"),
    "backbone-list": ("backbone", "[[backbone]]\nname = 'x'\n"),
    "targets-broken": ("adapter.targets", "[adapter]\ntargets = '('\n"),
    "rank-huge": ("adapter.rank", "[adapter]\nrank = 1000000\n"),
    "device-unknown": ("engine.device", "[engine]\ndevice = 'cpu; rm -rf'\n"),
    "method-unknown": ("unknown method", "method = 'fedopall'\n"),
    "method-list": ("method", "method = [1]\n"),
    "method-traversal": ("unknown method", "method = '../../etc'\n"),
    "method-option-nan": ("no finite number", "method = {name = 'fedprox', mu = nan}\n"),
    "method-option-text": ("expected float", "method = {name = 'fedprox', mu = 'big'}\n"),
    "controls-twice": ("a control is named twice", "controls = ['local', 'local']\n"),
    "controls-traversal": ("unknown method", "controls = ['../x']\n"),
    "controls-text": ("controls", "controls = 'local'\n"),
    "track-unknown": ("track", "track = ['http://x']\n"),
}

OVERRIDES: dict[str, tuple[str, str]] = {
    "no-equals": ("is not an assignment", "rounds"),
    "no-key": ("is not an assignment", "=3"),
    "value-not-table": ("valid integer", "rounds.x=3"),
    "deep": ("too many parts", ".".join("a" * 60_000) + "=1"),
    "two-lines": ("rounds", "rounds=3\nseed=9"),
    "deep-value": ("rounds", "rounds=" + "[" * 60_000),
    "dunder": ("unknown key", "__class__.__init__=1"),
}


def _manifest(content: bytes | str, folder: Path, base: Base) -> Path:
    federation(folder)
    link(folder / "away", "/etc")
    return write(folder / "f.toml", content)


def _file(content: bytes | str, folder: Path, base: Base) -> Path:
    return write(folder / "e.toml", content)


def _other(kind: str, name: str, folder: Path, base: Base) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if kind == "pipe":
        return pipe(path)
    if kind == "folder":
        path.mkdir()
        return path
    if kind == "100-mb":
        return sparse(path, 100_000_000, b"rounds = 3\n")
    if kind == "link-to-device":
        return link(path, "/dev/zero")
    return folder / "none.toml"


def _linked(folder: Path, base: Base) -> Path:
    write(folder / "outside.toml", GOOD)
    root = federation(folder / "data")
    link(root / "federation.toml", "../outside.toml")
    return root


def cases() -> Iterator[Case]:
    for name, (says, data) in SYNTAX.items():
        yield refused(f"manifest/{name}", "data", "DataError", says, "f.toml", partial(_manifest, data))
        yield refused(f"experiment/{name}", "experiment", "ConfigError", says, "e.toml", partial(_file, data))
    for name, (says, text) in MANIFESTS.items():
        names = "f" if name.startswith("class-") else "f.toml"
        yield refused(f"manifest/{name}", "data", "DataError", says, names, partial(_manifest, text))
    for name, (says, text) in EXPERIMENTS.items():
        yield refused(f"experiment/{name}", "experiment", "ConfigError", says, "", partial(_file, text))
    for name, (says, text) in OVERRIDES.items():
        yield refused(f"override/{name}", "override", "ConfigError", says, "", partial(_file, text))
    fine = {"byte-order-mark": "\ufeff" + GOOD, "windows": GOOD.replace("\n", "\r\n"), "plain": GOOD}
    for name, text in fine.items():
        yield accepted(f"manifest/{name}", "data", "images=", partial(_manifest, text))
    for kind in ("pipe", "folder", "100-mb", "link-to-device", "missing"):
        says = "more than 500,000 bytes" if kind == "100-mb" else "cannot be read"
        made = partial(_other, kind, "e.toml")
        yield refused(f"experiment/{kind}", "experiment", "ConfigError", says, ".toml", made)
        says = {"100-mb": "more than 500,000 bytes", "folder": "no image found"}.get(kind, "no such folder or file")
        yield refused(f"manifest/{kind}", "data", "DataError", says, ".toml", partial(_other, kind, "f.toml"))
    yield refused("manifest/link-out", "data", "DataError", "federation.toml is a link", "data", _linked)
