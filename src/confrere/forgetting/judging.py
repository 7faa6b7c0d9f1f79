"""What a judgement needs: models trained again without the forgotten, and the images on which all are asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from confrere.config import Experiment, validate
from confrere.errors import ConfigError
from confrere.fingerprint import digest_of
from confrere.forgetting.data import Opened
from confrere.forgetting.frame import Frame, as_training
from confrere.forgetting.judge import Answer, Asked, answer, judge
from confrere.job import Notify, Prepared, prepare, threads, train
from confrere.prefix import cache_dir, tokens
from confrere.record.files import read_json
from confrere.record.run import Run
from confrere.tensors import Tensors

Model = Callable[[str], Tensors]


def prepared(opened: Opened, notify: Notify = lambda event: None) -> Prepared:
    """Return what is left with its tokens."""
    task = prepare(opened.experiment, opened.after, notify)
    torch.set_num_threads(threads(opened.experiment, opened.after))
    return task


def framed(run: Run, opened: Opened, task: Prepared) -> Frame:
    """Return what an approximate way works with."""
    chosen = int(read_json(run.path / "results.json")["round"])
    private = {}
    for site in task.training_sites:
        kept = run.store(site).before(chosen + 1)
        if kept is not None:
            private[site] = kept.get("private", {})
    gone = {name: site for name, site in _gone(opened, task).items() if len(site.rows("train"))}
    return Frame(
        task=task,
        old=run,
        round=chosen,
        start=run.server(chosen)["shared"],
        private=private,
        gone={name: as_training(data) for name, data in gone.items()},
    )


def _gone(opened: Opened, task: Prepared) -> dict[str, Any]:
    """Return the tokens of the forgotten images, by site."""
    classes, cache = opened.after.classes, cache_dir()
    return {name: tokens(task.backbone_of(name), site, classes, cache) for name, site in opened.gone.items()}


def judged_by(
    run: Path, out: Path, opened: Opened, frame: Frame, folder: Path, count: int, notify: Notify = lambda event: None
) -> dict[str, Any]:
    """Return how the models of ``out`` and of ``run`` compare with ``count`` models trained again."""
    asked = asked_of(opened, frame)
    after, before = answer(asked, model_after(out, frame)), answer(asked, model_of(run, frame))
    return judge(after, before, retrained(asked, frame, folder, count, notify), frame.method.slots)


def retrained(
    asked: Asked, frame: Frame, folder: Path, count: int, notify: Notify = lambda event: None
) -> list[Answer]:
    """Return the answers of ``count`` models trained without the forgotten, each with a seed of its own.

    They are kept in ``folder`` under a hash of experiment and data; what is there is not trained again.
    """
    answers = []
    for number in range(1, count + 1):
        notify({"event": "retrain", "number": number, "of": count})
        values: dict[str, Any] = {**frame.task.experiment.model_dump(), "seed": 1000 + number, "record": {"keep": 1}}
        other: Experiment = validate(values)
        told = json.dumps([digest_of(other), frame.task.federation.digest])
        place = folder / hashlib.sha256(told.encode()).hexdigest()[:16]
        task = replace(frame.task, experiment=other)
        if not (place / "results.json").exists():
            train(task, place)
        answers.append(answer(asked, model_of(place, replace(frame, task=task, private={}))))
    return answers


def asked_of(opened: Opened, frame: Frame) -> Asked:
    """Return the images on which models are judged: the tests of those who stay, what to forget, what nobody saw.

    The last are test images of the sites whose images are forgotten: members and strangers of one hospital.

    Raises:
        ConfigError: one of the kinds is empty.
    """
    task, unseen = frame.task, {}
    leaving = _gone(opened, task) if frame.leaving else {}
    for site in frame.gone:
        data = leaving[site] if site in frame.leaving else task.data[site]
        unseen[site] = (data, data.rows("test"))
    if not frame.gone or not all(len(rows) for _, rows in unseen.values()):
        what = "no training image is forgotten, or its site has no test image to compare it with"
        raise ConfigError(what, where="--judge", fix="leave --judge out", code="forgetting")
    kept = {site: task.data[site] for site in task.training_sites}
    return Asked(kept=kept, gone=frame.gone, unseen=unseen, backbone_of=task.backbone_of, seed=task.experiment.seed)


def model_of(path: Path, frame: Frame) -> Model:
    """Return the model of a run; a site that leaves gets the general one."""
    run, method = Run(path), frame.method
    chosen = int(read_json(path / "results.json")["round"])
    server = run.server(chosen)

    def model(site: str) -> Tensors:
        kept = run.store(site).before(chosen + 1) if site in frame.sites else None
        if kept is None:
            return replace(frame, private={}).params(site, server["shared"])
        return method.personal(method.broadcast(server, site), kept)

    return model


def model_after(out: Path, frame: Frame) -> Model:
    """Return the model after forgetting: of a rebuilt run, or what an approximate way made of the shared tensors."""
    if (out / "results.json").exists():
        return model_of(out, frame)
    shared = Run(out).server(0)["shared"]
    return lambda site: frame.params(site, shared)
