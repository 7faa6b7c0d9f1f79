"""What an approximate way works with: the trained tensors, the sites that stay, and the images to forget.

Every way runs as rounds of a federation: a site trains on its own images only, and the shared tensors are averaged by
training images. The forgotten images are read where they were: at the site that leaves, or at that of the patients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from confrere.errors import ConfigError
from confrere.forgetting.way import Cost
from confrere.job import Prepared, initial
from confrere.learner import UNSCHEDULED, Learner, TrainSettings
from confrere.method import Method
from confrere.record.run import Run
from confrere.tensors import Tensors, pick, weighted_mean
from confrere.tokenset import Batch, TokenSet, feed

Loss = Callable[[Tensors, Batch], Tensor]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One request to forget, ready to be carried out.

    Attributes:
        task: what is left, with its tokens.
        old: the run. round: the one whose adapters it took.
        start: its shared tensors. private: site -> tensors that stayed there, unchanged by forgetting.
        gone: site -> its forgotten training images (all of split "train").
        cost: counts.
    """

    task: Prepared
    old: Run
    round: int
    start: Tensors
    private: Mapping[str, Tensors]
    gone: Mapping[str, TokenSet]
    cost: Cost = field(default_factory=Cost)

    @property
    def method(self) -> Method:
        """Return what was trained."""
        return self.task.method

    @property
    def sites(self) -> list[str]:
        """Return the sites that stay and train, sorted."""
        return self.task.training_sites

    @property
    def leaving(self) -> list[str]:
        """Return the sites that have images to forget and none to keep."""
        return sorted(self.gone.keys() - set(self.sites))

    def params(self, site: str, shared: Tensors) -> Tensors:
        """Return what a site predicts with; one that leaves, or never trained, has the start as its private part."""
        known = self.private.get(site)
        own = self.method.init_site(initial(self.task, site))["private"] if known is None else known
        return self.method.personal({"shared": shared}, {"private": own})

    def learner(self, site: str, number: int, *, forgotten: bool = False) -> Learner:
        """Return what trains at a site in round ``number`` of forgetting, on what it keeps or on what is ``forgotten``.

        Batches are drawn at addresses that no round of training has. The rate is constant: the run's is over.
        """
        chosen, experiment = self.task.experiment.train, self.task.experiment
        changed = UNSCHEDULED | ({"views": 1} if forgotten else {})
        settings = TrainSettings(**chosen.model_dump() | changed)
        return Learner(
            backbone=self.task.backbone_of(site),
            data=self.gone[site] if forgotten else self.task.data[site],
            settings=settings,
            seed=experiment.seed,
            site=site,
            round=experiment.rounds + number,
            rounds=experiment.rounds,
        )

    def fit(self, learner: Learner, shared: Tensors, tag: str, *, steps: int = 0, loss: Loss | None = None) -> Tensors:
        """Return the shared tensors after a site's steps on them (default: as many as a round has)."""
        steps = steps or learner.settings.steps
        self.cost.steps += steps
        params = self.params(learner.site, shared)
        made = learner.fit(params, train=self.method.shared, steps=steps, loss=loss, tag=tag)
        return pick(made, self.method.shared)

    def mean(self, made: Mapping[str, Tensors]) -> Tensors:
        """Return the mean of what sites made, by their training images (kept ones where there are any)."""
        weights = {s: len((self.task.data if s in self.sites else self.gone)[s].rows("train")) for s in made}
        equal = self.task.experiment.federation.weights == "equal"
        return weighted_mean([(1.0 if equal else float(weights[s]), made[s]) for s in sorted(made)])

    def forgotten(self, site: str, number: int, steps: int) -> Iterator[Batch]:
        """Yield ``steps`` batches of the images to forget at a site."""
        learner = self.learner(site, number, forgotten=True)
        yield from feed(learner.batches(steps, "forgotten"), learner.backbone.device)


def teach(learner: Learner, teacher: Tensors, temperature: float) -> Loss:
    """Return ``T^2 KL(softmax(t / T) || softmax(s / T))`` of a batch, averaged over images; the teacher is frozen."""

    def loss(leaves: Tensors, batch: Batch) -> Tensor:
        with torch.no_grad(), learner.backbone.dropout(None):
            target = (learner.backbone.logits(teacher, batch.tokens) / temperature).softmax(1)
        found = (learner.backbone.logits(leaves, batch.tokens) / temperature).log_softmax(1)
        return temperature**2 * torch.nn.functional.kl_div(found, target, reduction="batchmean")

    return loss


def as_training(data: TokenSet) -> TokenSet:
    """Return the training rows of forgotten images as a set of their own."""
    rows = data.rows("train")
    kept = {name: getattr(data, name)[rows] for name in ("tokens", "labels", "groups", "split")}
    return replace(data, **kept, keys=data.keys[rows] if len(data.keys) else data.keys)


def refuse(method: Method, *, masked: bool, noisy: bool, patients: bool, target: str) -> None:
    """Raise ConfigError where no approximate way applies: the message names what does."""
    why = ""
    if masked:
        why = "rounds of forgetting would show the server single updates, which secure aggregation hid"
    elif noisy:
        why = "the run promised an epsilon, which rounds without noise would break"
    elif target != "label":
        why = "approximate ways are for classes"
    elif method.pools or "shared" not in method.sends or not plain(method):
        why = f"{method.name} has no one shared adapter that all sites train"
    elif patients and method.keeps != () and _keeps(method):
        why = f"{method.name} keeps a personal part at the site, which the patients trained, too"
    elif not patients and not method.has_general():
        why = f"{method.name} makes no general model: what it knows of a site that leaves cannot be asked"
    if why:
        raise ConfigError(why, where="--by", fix="use --by rebuild, which is exact", code="forgetting")


def plain(method: Method) -> bool:
    """Return whether a site's model is what it received beside what stayed there, as one pass of one backbone."""
    own = (type(method).personal, type(method).broadcast, type(method).scores, type(method).init_site)
    return own == (Method.personal, Method.broadcast, Method.scores, Method.init_site)


def _keeps(method: Method) -> bool:
    """Return whether a site keeps something that it trained."""
    names = [f"x.lora_{side}.{slot}.weight" for side in "AB" for slot in method.slots] + ["head.weight", "head.bias"]
    return not all(map(method.shared, names)) or method.norms or method.gated
