"""A site: its data, its own state, and one entry through which every request comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from confrere.adapters.algebra import pairs
from confrere.backbones import Backbone
from confrere.choices import PrivacyChoice
from confrere.errors import UpdateRefusedError
from confrere.federation.checks import check_payload
from confrere.federation.diagnostics import adapter_overlap
from confrere.federation.ledger import Ledger, salted
from confrere.federation.secure.participant import Participant
from confrere.learner import Learner, TrainSettings, predict, refuse_infinite
from confrere.method import Method, Reply, Request
from confrere.noisy import BESIDE, NoisyLearner
from confrere.record.store import Store
from confrere.seeds import numpy_generator
from confrere.tasks.task import Answers
from confrere.tensors import State, Tensors, digest
from confrere.tokenset import TokenSet


@dataclass(kw_only=True)
class Site:
    """One hospital.

    Args:
        name: slug. data: images after the frozen prefix. weight: in the average, usually training images.
        initial: draws adapters and head before training (personal ones by this site's own address); called when
            needed, so that an idle site takes no memory.
        keep: called with the name of the model and its test predictions, which stay with the site.
        val_limit: at most so many validation images judge a round (a fixed subset); None for all.
        secure: masks every update; None sends it in the clear.
        ledger: makes local steps noisy and debits them, so that images or patients stay hidden; None for no noise.
        hides: what a run chose that hides images or patients at its sites: then nothing is told that is read off images
            without noise, by trainings without a ledger neither. None where nothing is hidden.
    """

    name: str
    method: Method
    backbone: Backbone
    data: TokenSet
    initial: Callable[[], Tensors]
    store: Store
    settings: TrainSettings
    seed: int
    rounds: int
    weight: float = 1.0
    keep: Callable[[str, Tensors], None] | None = None
    val_limit: int | None = None
    secure: Participant | None = None
    ledger: Ledger | None = None
    hides: PrivacyChoice | None = None
    _predicted: dict[bytes, tuple[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def handle(self, request: Request) -> Reply:
        """Answer one request; the only way in, for the simulator and for a deployed client alike."""
        if request.kind == "evaluate":
            return self._evaluate(request)
        if self.secure is not None:
            return self.secure.handle(request, self.method, self._train)
        if request.kind != "train":
            what, fix = "masked updates were asked for, this site knows no masks", "set secure.aggregation at the site"
            raise UpdateRefusedError(what, where=f"site {self.name}", fix=fix, code="secure-off")
        return self._train(request)

    def _train(self, request: Request) -> Reply:
        stored = self.store.reply(request.round)
        # One that was made from another state, before noise was drawn anew, is no answer to this request.
        if stored is not None and self.method.admissible(stored.state, request.state):
            return replace(stored, run=request.run)
        started = time.perf_counter()
        kept = self._state(request.round)
        learner = self._learner(request.round, kept)
        payload, state = self.method.update(learner, request.state, kept)
        check_payload(self.method, self.name, request.round, payload)
        metrics: dict[str, Any] = {"overlap": None, "examples": len(self.data.rows("train"))}
        if self.hides is None:
            params = self.method.personal({**request.state, **payload}, state)
            metrics |= {**learner.metrics, "overlap": self._look(params)}  # refuses what would break the average
        else:
            state = salted({**state, **learner.beside}, self.hides.noise_seed, self.name, request.round)
        if self.ledger is not None:
            after = request.round + 1
            metrics["spent"] = after <= self.rounds and self.ledger.exhausted(after, self._noisy_steps(after))
        metrics |= {"kept": digest(state), "stored": digest(payload)}
        reply = Reply(
            site=self.name, run=request.run, round=request.round, state=payload, weight=self.weight, metrics=metrics
        )
        self.store.write(request.round, state, reply)
        # Time is not stored: the same seed leaves the same bytes.
        return replace(reply, metrics={**metrics, "seconds": time.perf_counter() - started})

    def _evaluate(self, request: Request) -> Reply:
        params = self.params(request)
        if request.split == "test":
            fitted = np.concatenate([self.data.rows(split) for split in self.backbone.task.fitted_on])
            known, asked = (self._answers(params, rows) for rows in (fitted, self.data.rows("test")))
            rng = numpy_generator(self.seed, "bootstrap", self.name)
            metrics, predictions = self.backbone.task.examine(known, asked, classes=self.data.classes, generator=rng)
            if self.keep is not None:
                self.keep(request.model, predictions)
            metrics |= {} if self.ledger is None else {"privacy": self.ledger.said()}
        else:
            rows, hidden = self.validation_rows(), self.hides is not None  # no budget covers judgements
            judged = len(rows) and not hidden
            score, confidence = self.backbone.task.judge(self._answers(params, rows)) if judged else (None, None)
            overlap = None if hidden else self._look(params)
            metrics = {"score": score, "confidence": confidence, "examples": len(rows), "overlap": overlap}
        return Reply(site=self.name, run=request.run, round=request.round, metrics=metrics)

    def params(self, request: Request) -> Tensors:
        """Return the tensors the site predicts with after ``request.round``, given what it received."""
        general = request.model == "general"
        state = self.method.init_site(self.initial()) if general else self._state(request.round + 1)
        return self.method.personal(request.state, state)

    def validation_rows(self) -> np.ndarray:
        """Return the validation rows that judge a round."""
        rows = self.data.rows("val")
        if self.val_limit is None or len(rows) <= self.val_limit:
            return rows
        return np.sort(numpy_generator(self.seed, "validation", self.name).permutation(rows)[: self.val_limit])

    def _learner(self, round_: int, kept: State) -> Learner:
        """Return what trains in a round; where its steps are noisy, they are debited before."""
        learner = Learner(self.backbone, self.data, self.settings, self.seed, self.name, round_, self.rounds)
        if self.ledger is None:
            return learner
        steps = self._noisy_steps(round_)
        self.ledger.debit(round_, steps)
        learner.beside = {group: kept[group] for group in BESIDE & kept.keys()}
        return NoisyLearner(**vars(learner), mechanism=self.ledger.mechanism, steps_left=steps)

    def _noisy_steps(self, round_: int) -> int:
        return self.method.noised(self.settings.steps, round_, self.rounds) or 0

    def _state(self, round_: int) -> State:
        kept = self.store.before(round_)
        return kept if kept is not None else self.method.init_site(self.initial())

    def _answers(self, params: Tensors, rows: np.ndarray) -> Answers:
        targets, groups = self.data.targets(rows), self.data.groups[rows]
        return Answers(outputs=self._predict(params, rows), targets=targets, groups=groups)

    def _predict(self, params: Tensors, rows: np.ndarray) -> Tensor:
        """Return outputs; the last of each set of rows are kept, as one model is often asked for twice in a row."""
        asked = digest({"": params})
        model, logits = self._predicted.get(rows.tobytes(), ("", None))
        if logits is None or model != asked:
            logits = predict(self.backbone, params, self.data, rows, scores=self.method.scores)
            self._predicted[rows.tobytes()] = asked, logits
        return logits

    def _look(self, params: Tensors) -> Mapping[str, float | None] | None:
        """Pass a few images through a model: refuse what is not finite, return the overlap of two adapters."""
        rows = self.validation_rows()[:8]
        batch = self.data.batch(rows if len(rows) else self.data.rows("train")[:8])
        two = pairs(params, "general") and pairs(params, "personal")
        with torch.no_grad():
            if two:
                logits = self.backbone.logits(params, batch.tokens, capture=batch.inputs)
            else:
                logits = self.method.scores(self.backbone, params, batch.tokens)
        refuse_infinite(logits)
        return adapter_overlap(params, batch.inputs)
