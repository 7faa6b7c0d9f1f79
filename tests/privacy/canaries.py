"""Strings like patients' names and numbers, planted wherever images and tables can carry them, and their search."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np
from nursery import Forked, Nursery
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from confrere.data.paths import slug

_FIRST = ("Zaphod", "Trillian", "Slarti", "Agrajag", "Fenchurch", "Lunkwill", "Eddie", "Gargravarr", "Fook", "Vroom")
_LAST = ("Beeblebrox", "McMillan", "Öztürk", "Prefect", "Dent", "Prosser", "Garkbit", "Hotblack", "Desiato", "Jeltz")


def _made(kind: str, count: int) -> tuple[str, ...]:
    """Return distinct names with numbers, e.g. ``Zaphod-Dent-file-1907``."""
    shift = sum(map(ord, kind))
    people = (f"{_FIRST[i % 10]}-{_LAST[(i + shift) % 10]}" for i in range(count))
    return tuple(f"{person}-{kind}-{1900 + (7 * i + shift) % 100}" for i, person in enumerate(people))


FILES, FOLDERS, CELLS = _made("file", 12), _made("folder", 6), _made("cell", 14)
META, CONTENT, ENVIRONMENT = _made("meta", 12), _made("content", 8), _made("env", 4)
PEOPLE = (*FILES, *FOLDERS, *CELLS, *META, *CONTENT, *ENVIRONMENT)
HOME = _made("home", 1)[0]
"""A part of every path on this machine: whoever works here sees it, but it may not travel."""


def forms(text: str) -> set[bytes]:
    """Return what ``text`` looks like in files: escaped, encoded, hashed, as a site's name; ASCII in lower case."""
    cased = {text, text.upper(), text.lower()}
    plain = {f(one) for one in cased for f in (str, lambda s: json.dumps(s)[1:-1], quote)}
    plain |= {slug(text), *(one.replace("-", other) for one in cased for other in "_ ")}
    found = {form.encode().lower() for form in plain} | {one.encode("utf-16-le").lower() for one in cased}
    return found | {hashlib.new(kind, text.encode()).hexdigest().encode() for kind in ("sha256", "sha1", "md5")}


def _base64(text: str) -> set[bytes]:
    """Return the middle of the base64 of ``text`` at each of the three places it may have in a group of bytes."""
    return {base64.b64encode(bytes(pad) + text.encode())[4 if pad else 0 : -4] for pad in range(3)}


FORMS = {canary: (forms(canary), _base64(canary)) for canary in (*PEOPLE, HOME)}


def hits(content: bytes, canaries: Iterable[str]) -> list[str]:
    """Return the canaries that ``content`` holds in any form."""
    lower = content.lower()
    return [c for c in canaries if any(f in lower for f in FORMS[c][0]) or any(f in content for f in FORMS[c][1])]


def picture(label: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 120, (34, 36, 3), dtype=np.uint8)
    pixels[..., label] += 90
    return Image.fromarray(pixels)


def save(path: Path, label: int, seed: int) -> Path:
    """Write an image of the kind its name says, with canaries in every field for text that the kind has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture(label, seed)
    exif = Image.Exif()
    exif[0x010E], exif[0x013B], exif[0x9286], exif[0x8298] = (c.encode("ascii", "replace").decode() for c in META[:4])
    if path.suffix == ".png":
        chunks = PngInfo()
        chunks.add_text("PatientName", META[4])
        chunks.add_itxt("Comment", META[5])
        chunks.add_text(META[6].encode("latin-1", "replace").decode("latin-1")[:60], "x", zip=True)
        image.save(path, pnginfo=chunks, exif=exif)
    elif path.suffix == ".jpg":
        image.save(path, exif=exif, comment=META[7].encode(), quality=95)
    else:
        image.save(path, tiffinfo={270: META[8], 315: META[9], 305: META[10], 33432: META[11]})
    return path


def hospitals(root: Path, sites: Iterable[str] = ("north", "south"), first: int = 0) -> Path:
    """Write sites with two classes; patients, files and what no reader should follow are canaries."""
    for s, site in enumerate(sites, first):
        for label, name in enumerate(("benign", "malignant")):
            for k in range(6):
                person = FILES[(6 * label + k) % len(FILES)]
                suffix = (".png", ".jpg", ".tif")[k % 3]
                save(root / site / name / f"{person}{s}__{k}{suffix}", label, 100 * s + 10 * label + k)
        (root / site / "benign" / f"{FILES[0]}-broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + CONTENT[0].encode())
        (root / site / "benign" / f"{FILES[1]}.txt").write_text(f"seen on Monday: {CONTENT[1]}")
        (root / site / "malignant" / f"{FILES[2]}-empty.jpg").touch()
        hidden = root / site / f".{FOLDERS[0]}"
        hidden.mkdir()
        (hidden / "notes.txt").write_text(f"moved: {CONTENT[2]}")
    return root


def table(root: Path) -> Path:
    """Write a table of images with canaries in the columns that name patients and in columns nobody asked for."""
    lines = [f"path,label,site,patient,{CELLS[0]},remarks"]
    for s, site in enumerate(("north", "south")):
        for label, name in enumerate(("benign", "malignant")):
            for k in range(6):
                file = save(root / FOLDERS[1] / f"{FILES[k]}{s}{label}.png", label, 100 * s + 10 * label + k)
                cells = [file.relative_to(root).as_posix(), name, site, f"{CELLS[1 + k]}{s}{label}", CELLS[8], CELLS[9]]
                lines.append(",".join(cells))
    path = root / "images.csv"
    path.write_text("\n".join(lines))
    return path


_WATCH = """
import atexit, os, socket, sys
LOG = os.open(os.environ["WATCH_SOCKETS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
SEEN = {"socket." + call for call in ("bind", "connect", "sendto", "sendmsg", "getaddrinfo", "gethostbyname")}
def hook(event, arguments):
    if event in SEEN:
        os.write(LOG, f"{event} {arguments[1:]!r} {sys.argv[1:3]}\\n".encode())
def listen(self, *arguments):
    os.write(LOG, b"socket.listen\\n")
    return original(self, *arguments)
def at_end():
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:") and int(name) > 2:
                os.write(LOG, b"a socket is open at the end\\n")
        except OSError:
            pass
original, socket.socket.listen = socket.socket.listen, listen
sys.addaudithook(hook)
atexit.register(at_end)
"""


@dataclass
class Place:
    """A home of canaries: what is run here leaves its files below ``root``, and its words in ``said``.

    With a nursery commands are forks, which have their imports done.
    """

    root: Path
    nursery: Nursery | None = None
    inputs: list[Path] = field(default_factory=list)
    said: list[tuple[str, str, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home = self.root / f"home-{HOME}"
        for folder in ("tmp", "watch", "data"):
            (self.home / folder).mkdir(parents=True)
        (self.home / "watch" / "sitecustomize.py").write_text(_WATCH)
        self.sockets = self.root / "sockets.log"
        self.inputs += [self.home / "data", self.home / "watch"]

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CONFRERE", "HF_", "PYTEST", "PYTHON"))}
        planted = {"PATIENT": ENVIRONMENT[0], "USER": ENVIRONMENT[1], "LOGNAME": ENVIRONMENT[2], ENVIRONMENT[3]: "1"}
        return kept | planted | {
            "HOME": str(self.home), "TMPDIR": str(self.home / "tmp"), "CONFRERE_CACHE": str(self.home / "cache"),
            "PYTHONPATH": str(self.home / "watch"), "WATCH_SOCKETS": str(self.sockets), "OMP_NUM_THREADS": "1",
            "COLUMNS": "200", "MPLCONFIGDIR": str(Path(tempfile.gettempdir()) / "confrere-matplotlib"),
        }  # fmt: skip

    def start(self, *arguments: object) -> subprocess.Popen[bytes] | Forked:
        if self.nursery:
            return self.nursery.start([str(a) for a in arguments], self.environment(), cwd=self.home)
        command = [sys.executable, "-m", "confrere", *map(str, arguments)]
        return subprocess.Popen(
            command, env=self.environment(), cwd=self.home, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def finish(self, process: subprocess.Popen[bytes] | Forked, verb: str) -> int | None:
        """Wait; keep what was said under ``verb``."""
        try:
            out, err = process.communicate(timeout=600)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        self.said += [(verb, "stdout", out), (verb, "stderr", err)]
        return process.returncode

    def run(self, *arguments: object) -> int | None:
        """Run one command to its end; return its exit status."""
        words = [str(a) for a in arguments]
        return self.finish(self.start(*words), " ".join(words[:2]) if words[0] == "data" else words[0])

    def artefacts(self) -> Iterator[Path]:
        """Yield every file that commands left, wherever below home: runs, cache, temporary files."""
        for path in sorted(self.home.rglob("*")):
            if path.is_file() and not any(path.is_relative_to(folder) for folder in self.inputs):
                yield path
