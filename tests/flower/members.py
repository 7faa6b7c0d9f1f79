"""A consortium without a network: real kits, real workers, and frames that are packed and unpacked between them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
from confrere.job import run_experiment
from confrere.method import METHODS
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
    groups = {group for method in METHODS.values() for group in method.sends}
    allowed = Policy(**{"least_examples": 5, "groups": sorted(groups), **policy})
    workers = {}
    for site in SITES:
        kit: Kit = load(kits / "sites" / site, "site")
        workers[site] = Worker(kit=kit, policy=allowed, data=images / site, state=state / site)
    return Members(workers)


def run_members(experiment: Experiment, out: Path, members: Members, late: Collection[str] = ()) -> None:
    """Run an experiment over members as the coordinator does."""
    out.mkdir(exist_ok=True)
    status = Status(out / "status.json", "members", SITES)
    roster = next(iter(members.workers.values())).kit.identities
    Lead(out=out, roster=roster, sites=members, status=status, late=late).conduct(experiment)


def in_one_process(experiment: Experiment, images: Path, out: Path) -> None:
    """Run the same experiment in this process."""
    run_experiment(validate({**experiment.model_dump(), "path": str(images / "all")}), out)


def assert_same(one: Path, out: Path, state: Path) -> None:
    """Compare server states, every site's states and the exported adapters, byte by byte."""
    job = json.loads((out / "job.json").read_text())["job"]
    compared = 0
    for file in sorted(one.rglob("*")):
        place = file.relative_to(one)
        if file.is_dir() or file.name.startswith(
            ("test-", "opened-")
        ):  # numbers of patients, and names of jobs, differ
            continue
        if place.parts[0] == "server":
            other = out / place
        elif place.parts[0] in ("sites", "adapters"):
            other = state / place.parts[1] / job / place
        else:
            continue
        assert other.read_bytes() == file.read_bytes(), place
        compared += 1
    assert compared > 9


def says(worker: Worker, patch: pytest.MonkeyPatch, key: str, changes: Mapping[str, Any] | None) -> None:
    """Let a site say something else of itself under ``key``, or nothing, when it is asked to describe itself."""
    describe = worker._describe

    def changed(*args: object) -> dict[str, object]:
        told = describe(*args)  # type: ignore[arg-type]
        return {**told, key: {**told[key], **changes} if changes else None}

    patch.setattr(worker, "_describe", changed)
