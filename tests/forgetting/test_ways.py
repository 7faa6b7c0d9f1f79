"""Each approximate way does what it says, checked by slow and independent computations on a small run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forgetting_runs import SITE, patients_of

from confrere.forgetting.certificate import check
from confrere.forgetting.data import open_both
from confrere.forgetting.forget import forget
from confrere.forgetting.frame import Frame, teach
from confrere.forgetting.judging import framed, prepared
from confrere.forgetting.way import WAYS, Cost
from confrere.forgetting.who import Whom
from confrere.learner import predict
from confrere.record.files import read_json
from confrere.record.run import Run
from confrere.tensors import Tensors, sq_dist, sub


def opened(original: Path, who: Whom, out: Path) -> Frame:
    both = open_both(original, who, out)
    return framed(Run(original), both, prepared(both))


@pytest.fixture(scope="module")
def of_site(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Frame:
    return opened(original, Whom(site=SITE), tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def of_patients(original: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Frame:
    names = patients_of(data, SITE, original)[:3]
    return opened(original, Whom(patients=frozenset(names)), tmp_path_factory.mktemp("patients"))


def fresh(frame: Frame) -> Frame:
    return replace(frame, cost=Cost())


def loss_of_gone(frame: Frame, shared: Tensors) -> float:
    losses = []
    for site, data in frame.gone.items():
        rows = data.rows("train")
        logits = predict(frame.task.backbone_of(site), frame.params(site, shared), data, rows)
        losses.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(data.labels[rows])))
    return float(torch.stack(losses).mean())


def test_a_frame_has_what_goes_and_what_stays(of_site: Frame, of_patients: Frame) -> None:
    assert of_site.leaving == [SITE]
    assert SITE not in of_site.sites
    assert of_patients.leaving == []
    assert SITE in of_patients.sites
    kept, gone = of_patients.task.data[SITE], of_patients.gone[SITE]
    whole = of_site.gone[SITE]
    assert len(gone.labels) + len(kept.rows("train")) == len(whole.labels)
    assert not set(gone.groups) & set(kept.groups) or len(gone.groups) < len(kept.groups)


@pytest.mark.parametrize("name", sorted(WAYS))
@pytest.mark.parametrize("whom", ["site", pytest.param("patients", marks=pytest.mark.slow)])
def test_a_way_gives_the_same_form_and_the_same_bytes_again(
    of_site: Frame, of_patients: Frame, name: str, whom: str
) -> None:
    frame = fresh(of_site if whom == "site" else of_patients)
    before = {n: t.clone() for n, t in frame.start.items()}
    options = WAYS[name].options | ({"rounds": 1} if "rounds" in WAYS[name].options else {})
    made = WAYS[name](frame, options)
    assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in before.items()}
    assert all(torch.isfinite(t).all() for t in made.values())
    assert all(torch.equal(t, before[n]) for n, t in frame.start.items())
    assert frame.cost.rounds
    assert frame.cost.steps or frame.cost.passes
    if name in ("neggrad", "federaser"):
        again = WAYS[name](fresh(frame), options)
        assert all(torch.equal(t, again[n]) for n, t in made.items())


@pytest.mark.parametrize("whom", ["site", pytest.param("patients", marks=pytest.mark.slow)])
def test_negative_gradients_raise_the_loss_of_the_forgotten(of_site: Frame, of_patients: Frame, whom: str) -> None:
    frame = fresh(of_site if whom == "site" else of_patients)
    experiment = frame.task.experiment
    gentle = experiment.train.model_copy(update={"lr": 2e-3, "steps": 8})
    frame = replace(frame, task=replace(frame.task, experiment=experiment.model_copy(update={"train": gentle})))
    away = WAYS["neggrad"](frame, {"rounds": 1, "beta": 0.0})
    assert loss_of_gone(frame, away) > loss_of_gone(frame, frame.start) + 0.01


def test_scrub_moves_away_from_the_teacher_and_back(of_site: Frame) -> None:
    frame = fresh(of_site)
    learner = frame.learner(SITE, 1, forgotten=True)
    batch = next(learner.sweep("train"))
    teacher = frame.params(SITE, frame.start)
    distance = teach(learner, teacher, 2.0)
    assert float(distance(teacher, batch)) == pytest.approx(0, abs=1e-6)
    far = WAYS["scrub"](frame, {"rounds": 1, "msteps": 1, "alpha": 0.0, "gamma": 0.0, "temperature": 2.0})
    near = WAYS["scrub"](frame, {"rounds": 2, "msteps": 1, "alpha": 1.0, "gamma": 0.0, "temperature": 2.0})
    left = float(distance(frame.params(SITE, far), batch))
    assert left > 1e-4
    assert float(distance(frame.params(SITE, near), batch)) < left


def test_a_teachers_distance_is_that_of_the_definition(of_site: Frame) -> None:
    learner = of_site.learner(SITE, 1, forgotten=True)
    batch = next(learner.sweep("train"))
    one, other = of_site.params(SITE, of_site.start), of_site.params(SITE, of_site.old.server(1)["shared"])
    with torch.no_grad():
        t, s = (learner.backbone.logits(p, batch.tokens).double() / 3 for p in (one, other))
    p, q = t.softmax(1), s.softmax(1)
    expected = 9 * float((p * (p / q).log()).sum(1).mean())
    assert float(teach(learner, one, 3.0)(other, batch)) == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.slow
def test_dampening_follows_the_fisher_information(of_patients: Frame) -> None:
    frame = fresh(of_patients)
    same = WAYS["ssd"](frame, {"alpha": 1e30, "lam": 1.0})
    assert all(torch.equal(t, frame.start[n]) for n, t in same.items())
    made = WAYS["ssd"](frame, {"alpha": 1.5, "lam": 0.5})
    name = "head.weight"
    sums, counts = [], []
    for site, data in [*((s, frame.gone[s]) for s in frame.gone), *((s, frame.task.data[s]) for s in frame.sites)]:
        backbone, total = frame.task.backbone_of(site), torch.zeros_like(frame.start[name])
        for row in data.rows("train"):
            params = dict(frame.params(site, frame.start))
            params[name] = params[name].clone().requires_grad_()
            batch = data.batch(data.rows("train")[data.rows("train") == row])
            (-backbone.logits(params, batch.tokens).log_softmax(1)[0, int(batch.labels[0])]).backward()
            total += params[name].grad.square()
        sums.append(total)
        counts.append(len(data.rows("train")))
    gone, everything = sums[0] / counts[0], sum(sums) / sum(counts)
    factor = torch.where(gone > 1.5 * everything, (0.5 * everything / gone).clamp_max(1), torch.ones(()))
    assert (factor < 1).any()
    assert torch.allclose(made[name], frame.start[name] * factor, atol=1e-6)


def test_the_eraser_keeps_lengths_and_what_needs_no_calibration(of_site: Frame) -> None:
    frame = fresh(replace(of_site, round=1))
    made = WAYS["federaser"](frame, {"every": 1, "ratio": 0.5})
    replies = {s: frame.old.store(s).read(1)[1] for s in frame.sites}
    total = sum(r.weight for r in replies.values())
    for name, value in made.items():
        mean = sum((r.weight / total) * r.state["shared"][name].double() for r in replies.values())
        assert torch.allclose(value.double(), mean, atol=1e-6)
    assert frame.cost.steps == 0
    from confrere.forgetting.eraser import _as_long

    turned, update = sub(made, frame.start), sub(frame.old.server(1)["shared"], frame.old.server(0)["shared"])
    long = _as_long(turned, update)
    zero = {n: 0 * t for n, t in long.items()}
    assert float(sq_dist(long, zero)) == pytest.approx(float(sq_dist(update, zero)), rel=1e-4)


@pytest.mark.slow
def test_a_student_without_a_teacher_is_trained_anew(of_site: Frame) -> None:
    frame = fresh(of_site)
    made = WAYS["distillation"](frame, {"rounds": 1, "temperature": 4.0, "lam": 0.0})
    from confrere.job import initial

    start = initial(frame.task, "")
    fitted = [
        (float(len(frame.task.data[s].rows("train"))), frame.learner(s, 1).fit(start, tag="distil"))
        for s in frame.sites
    ]
    total = sum(weight for weight, _ in fitted)
    for name, value in made.items():
        assert torch.allclose(value.double(), sum(w / total * p[name].double() for w, p in fitted), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rebuild", "neggrad"])
def test_a_judgement_is_complete_and_trains_its_models_once(
    tmp_path: Path, original: Path, data: Path, name: str
) -> None:
    who = Whom(patients=frozenset(patients_of(data, SITE, original)))
    if len(who.patients) > 3:
        who = Whom(patients=frozenset(sorted(who.patients)[:3]))
    models = tmp_path / "models"
    found = forget(original, who, tmp_path / "new", by=name, retrain=3, models=models)
    times = {p: p.stat().st_mtime_ns for p in models.glob("*/results.json")}
    assert len(times) == 3
    again = forget(original, who, tmp_path / "again", by=name, retrain=3, models=models)
    assert times == {p: p.stat().st_mtime_ns for p in models.glob("*/results.json")}
    assert found["judgement"] == again["judgement"]
    assert check(tmp_path / "new" / "certificate.json")["judgement"]["retrained"] == 3
    assert check(tmp_path / "new" / "certificate.json")["judgement"]["attack"]["after"]["value"] >= 0
    told = (tmp_path / "new" / "forgetting.md").read_text()
    assert "3 retrained" in told
    assert "| membership by LiRA, AUC | 0." in told
    assert read_json(tmp_path / "new" / "forgetting.json")["judgement"]["distances"]["test"]["after"]["mean"] > 0
