"""A consortium without a network: real kits, real workers, and frames that are packed and unpacked between them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from confrere.config import Experiment, override, validate
from confrere.consortium import frame
from confrere.consortium.census import Answers, Header
from confrere.consortium.frame import Arrays
from confrere.consortium.kit import Kit, load
from confrere.consortium.lead import Lead, across
from confrere.consortium.policy import Policy
from confrere.consortium.provision import provision
from confrere.consortium.states import failed
from confrere.consortium.status import Status
from confrere.consortium.worker import Worker
from confrere.federation.transport import Failure
from confrere.seeds import numpy_generator

SITES = ("north", "south", "west")
CLASSES = ("benign", "malignant")
SMALL = {
    "rounds": 2,
    "threads": 1,
    "workers": 1,
    "controls": [],
    "backbone": {"name": "test-vit"},
    "adapter": {"blocks": 2, "rank": 4},
    "train": {"steps": 2, "batch_size": 4},
}


def make_images(root: Path, patients: int = 8) -> Path:
    """Write three hospitals' folders, each alone under ``root/<site>/<site>`` and all together under ``root/all``."""
    for k, site in enumerate(SITES):
        rng = numpy_generator(3, "members", site)
        for channel, label in enumerate(CLASSES):
            folder = root / site / site / label
            folder.mkdir(parents=True)
            for i in range(2 * patients):
                image = rng.integers(0, 120, (32, 32, 3)).astype(np.uint8)
                image[..., channel] += 60
                image[..., 2] += 20 * k
                Image.fromarray(image).save(folder / f"p{site}{i // 2}__{i}.png")
        shutil.copytree(root / site / site, root / "all" / site)
    return root


def make_kits(folder: Path, port: int = 18443) -> Path:
    """Provision the three hospitals; return the folder of the kits."""
    roster = folder / "consortium.toml"
    sites = "".join(f'[[sites]]\nname = "{site}"\n' for site in SITES)
    classes = ", ".join(f'"{name}"' for name in CLASSES)
    roster.write_text(f'name = "members"\naddress = "127.0.0.1"\nport = {port}\nclasses = [{classes}]\n{sites}')
    provision(roster, folder / "kits")
    return folder / "kits"


def experiment_for(kits: Path, *overrides: str) -> Experiment:
    """Return a small experiment as a coordinator would run it."""
    given = validate(override({**SMALL, "path": "members"}, overrides))
    return across(given, load(kits / "coordinator", "coordinator").classes)[0]


class Members:
    """Sites that answer in this process; ``touch`` may change a frame, lose it (None) or send it twice."""

    def __init__(self, workers: Mapping[str, Worker]) -> None:
        self.workers = dict(workers)
        self.seen: list[tuple[str, str, Any]] = []
        self.touch: Callable[[str, str, bytes], bytes | None] = lambda site, kind, content: content

    def online(self) -> tuple[str, ...]:
        return tuple(sorted(self.workers))

    def wait(self, names: Collection[str]) -> list[str]:
        return sorted(set(names) - set(self.workers))

    def ask(self, kind: str, frames: Mapping[str, tuple[Header, Arrays]]) -> Answers:
        answers: Answers = {}
        for site, (header, arrays) in sorted(frames.items()):
            self.seen.append((site, kind, header.get("round")))
            content = self.touch(site, kind, frame.pack({**header, "kind": kind}, arrays))
            if content is None:
                answers[site] = Failure(site, "no answer within 1 s", code="no-answer")
                continue
            came = frame.unpack(frame.pack(*self.workers[site].answer(*frame.unpack(content))))
            answers[site] = failed(site, came[0]) or came
        return answers


def make_members(kits: Path, images: Path, state: Path, **policy: Any) -> Members:
    """Return the three hospitals, each with its own data and state."""
    allowed = Policy(**{"least_examples": 5, "groups": ("shared", "control", "choice", "tier"), **policy})
    workers = {}
    for site in SITES:
        kit: Kit = load(kits / "sites" / site, "site")
        workers[site] = Worker(kit=kit, policy=allowed, data=images / site, state=state / site)
    return Members(workers)


def run_members(experiment: Experiment, out: Path, members: Members) -> None:
    """Run an experiment over members as the coordinator does."""
    out.mkdir(exist_ok=True)
    status = Status(out / "status.json", "members", SITES)
    roster = members.workers[SITES[0]].kit.identities
    Lead(out=out, roster=roster, sites=members, status=status).conduct(experiment)
