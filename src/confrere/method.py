"""A federated method is a value: hyperparameters and six functions, with no state inside.

Three functions run on the server (``init_server``, ``broadcast``, ``aggregate``), three on the site
(``init_site``, ``update``, ``personal``). State comes in and goes out as named tensors, so the same method
object serves one process and many hospitals. The duality check for every ``update``: could it run on a machine
that holds only the request and its own disk?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from confrere.errors import ConfigError, nearest
from confrere.tensors import State, Tensors, pick, weighted_mean

if TYPE_CHECKING:
    from torch import Tensor

    from confrere.backbones import Backbone
    from confrere.learner import Learner


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the server asks of one site in one round of the run with the stamp ``run``.

    The last four kinds are phases of secure aggregation, of which ``keys`` includes training.
    ``split`` and ``model`` matter to ``evaluate`` only: ``general`` asks for the model of a site that never
    trained, i.e. what an unseen hospital would get.
    """

    kind: Literal["train", "evaluate", "keys", "shares", "masked", "unmask"]
    round: int
    state: State
    run: str = ""
    split: Literal["val", "test"] = "val"
    model: Literal["personalised", "general"] = "personalised"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a site answers: the payload (only groups the method ``sends``), its weight, and plain numbers.

    ``site``, ``round`` and ``run`` stamp it: an answer to another request is refused.
    """

    site: str
    round: int
    run: str = ""
    state: State = field(default_factory=dict)
    weight: float = 1.0
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base class: everything is shared and averaged (FedAvg over adapters)."""

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    sends: ClassVar[tuple[str, ...]] = ("shared",)
    slots: ClassVar[tuple[str, ...]] = ("general",)
    """Adapters that are trained. The rank budget of an experiment is divided equally among them."""
    own: ClassVar[tuple[str, ...]] = ("personal",)
    """Slots that every site draws for itself; the others start equal everywhere."""
    fixed: ClassVar[tuple[str, ...]] = ()
    """Further slots that only hold what was merged: never trained, of any rank, always given by :meth:`personal`."""
    gated: ClassVar[bool] = False
    """Whether every adapted layer weighs its slots token by token."""
    shifted: ClassVar[bool] = False
    """Whether slots add a vector between their factors."""
    norms: ClassVar[bool] = False
    """Whether the layer norms of the adapted blocks are trained, too."""
    unequal: ClassVar[bool] = False
    """Whether sites may have adapters of different ranks."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Groups of the payload that a site may leave out."""
    depths: ClassVar[bool] = False
    """Whether sites may keep different numbers of the backbone's blocks."""
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """What tuning tries beside the learning rate: ``("log", low, high)``, ``("linear", low, high)`` or choices."""
    also_sends: ClassVar[tuple[str, ...]] = ()
    """What leaves a site besides what :meth:`shared` says, in words for reports."""
    also_keeps: ClassVar[tuple[str, ...]] = ()
    """What stays at a site besides the slots that are not shared, in words for reports."""
    keeps: ClassVar[tuple[str, ...] | None] = None
    """All that stays at a site, in words, where :meth:`shared` cannot tell: instead of what it says stays."""
    targets: ClassVar[tuple[str, ...]] = ("label", "labels", "mask", "boxes", "time", "image")
    """What it can learn; those that look at labels, features or heads of one form themselves name less."""
    whole: ClassVar[bool] = False
    """Whether it can train a whole network, which has no adapters."""
    stacked: ClassVar[bool] = False
    """Whether an adapter that is sent holds several models side by side, which have no common gauge."""
    closed_form: ClassVar[bool] = False
    """True for a method that solves instead of taking steps: no learning rate reaches it."""
    pools: ClassVar[bool] = False
    """True for the control that trains on all sites' images in one place."""

    @property
    def all_slots(self) -> tuple[str, ...]:
        """Every adapter a backbone needs room for, in the order in which gates weigh them."""
        return (*self.slots, *self.fixed)

    @property
    def extensions(self) -> dict[str, bool]:
        """What a backbone needs besides slots: arguments of :class:`confrere.adapters.lora.LoraSpec`."""
        return {"gated": self.gated, "shifted": self.shifted, "norms": self.norms}

    @property
    def needs(self) -> Literal["sum", "each"]:
        """Whether the server needs only a weighted sum of the payloads, or each of them."""
        return "sum"

    def shared(self, name: str) -> bool:
        """Return whether the tensor ``name`` is sent to the server."""
        return True

    def init_server(self, params: Tensors) -> State:
        """Return the server's state before round 1."""
        return {"shared": pick(params, self.shared)}

    def broadcast(self, server: State, site: str) -> State:
        """Return what ``site`` receives."""
        return {"shared": server["shared"]}

    def init_site(self, params: Tensors) -> State:
        """Return a site's own state before it first trains."""
        return {"private": pick(params, lambda name: not self.shared(name))}

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train on one site; return the payload for the server and the site's new state."""
        return self.split(learner.fit(self.personal(received, state)))

    def payload(self, params: Tensors, received: State, round_: int, rounds: int) -> State:
        """Return the form of what :meth:`update` sends, by which the gate refuses everything else; values say nothing.

        Groups that are ``optional`` may be missing. Where sites may be ``unequal`` a lower rank will do, too.

        Args:
            params: what the site starts from: names, shapes and dtypes count (see :mod:`confrere.initial`).
            received: what the server sent it in this round.
            round_: counts from 1.
            rounds: of the run.
        """
        return {"shared": pick(params, self.shared)} if "shared" in self.sends else {}

    def plausible(self, payload: State) -> bool:
        """Return whether numbers that are no weights, such as an index, can be meant; their form is right already."""
        return True

    def admissible(self, payload: State, received: State) -> bool:
        """Return whether a site that ``received`` this may send that: a bound that looks at no other site's answer."""
        return True

    def release(self) -> dict[str, Any]:
        """Return what the journal debits a round, if aggregates hide that a site took part; nothing if they do not.

        An aggregate of such a method is made of any number of replies, also of none.
        """
        return {}

    def expecting(self, server: State, sites: float) -> State:
        """Return the server's state before round 1, told how many sites are expected a round."""
        return server

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Return the server's new state from replies sorted by site: the weighted mean of what was sent."""
        came = sent_by(replies)
        return {**server, "shared": weighted_mean(came)} if came else server

    def personal(self, received: State, state: State) -> Tensors:
        """Return the tensors this site predicts with: shared and private together."""
        return {**received.get("shared", {}), **state.get("private", {})}

    def check(self, steps: int, rounds: int) -> None:
        """Raise ConfigError where so many local steps or rounds do not do; called before anything is read."""

    def noised(self, steps: int, round_: int, rounds: int) -> int | None:
        """Return how many of a round's local ``steps`` have to be noisy to hide an image in all that is sent.

        None where noise on gradients would not do: what is sent also depends on images in another way, such as through
        tensors that were trained without noise. See :meth:`confrere.learner.Learner.fit`, ``released``.
        """
        return None

    def scores(self, backbone: Backbone, params: Tensors, tokens: Tensor) -> Tensor:
        """Return class scores (B, K) of images, given what :meth:`personal` returned."""
        return backbone.logits(params, tokens)

    def additive(self) -> bool:
        """Return whether prediction is that of one merged adapter, which any program can load."""
        plain = type(self).scores is Method.scores
        return plain and not any(self.extensions.values())

    def split(self, params: Tensors) -> tuple[State, State]:
        """Return ``params`` as payload and private state, by :meth:`shared`."""
        return {"shared": pick(params, self.shared)}, self.init_site(params)

    def may_stop(self, round_: int, rounds: int) -> bool:
        """Return whether the judgement of ``round_`` counts: for early stopping, and for which round is kept.

        Methods with phases say no before the last one: their model is not there yet.
        """
        return True

    def has_general(self) -> bool:
        """Return whether the shared tensors alone predict: something is sent and the head is part of it."""
        return bool(self.sends) and self.shared("head.weight")


def sent_by(replies: Sequence[Reply]) -> list[tuple[float, Tensors]]:
    """Return weight and shared tensors of the replies that hold any."""
    return [(reply.weight, reply.state["shared"]) for reply in replies if reply.state.get("shared")]


def rounds_before(share: float, rounds: int) -> int:
    """Return the last round before a last phase that has ``share`` of the rounds; each has at least one if it can."""
    return max(1, rounds - max(1, round(share * rounds)))


METHODS: dict[str, type[Method]] = {}


def register(name: str, *, title: str, paper: str = "") -> Callable[[type[Method]], type[Method]]:
    """Register a method class under ``name``; the CLI list, docs matrix, report labels and tests read this."""

    def add(cls: type[Method]) -> type[Method]:
        cls.name, cls.title, cls.paper = name, title, paper
        METHODS[name] = cls
        return cls

    return add


def make(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Return the method ``name`` with ``options`` as its hyperparameters.

    Raises:
        ConfigError: unknown name or option (the nearest valid one is named), or a value out of range.
    """
    if name not in METHODS:
        raise ConfigError(
            f"unknown method {name!r}", where="method.name", fix=nearest(name, METHODS), code="unknown-name"
        )
    cls, options = METHODS[name], dict(options or {})
    known = {f.name: f for f in fields(cls)}
    for key, value in options.items():
        if key not in known:
            raise ConfigError(
                f"method {name!r} has no option {key!r}",
                where=f"method.{key}",
                fix=nearest(key, known),
                code="unknown-key",
            )
        default = known[key].default
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            options[key] = float(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{value} is no finite number", where=f"method.{key}", fix=f"the default is {default!r}")
        elif type(value) is not type(default):
            raise ConfigError(
                f"expected {type(default).__name__}, got {value!r}",
                where=f"method.{key}",
                fix=f"the default is {default!r}",
            )
    return cls(**options)


def defaults(name: str) -> dict[str, Any]:
    """Return the options of a method with their defaults; none for an unknown one, which :func:`make` refuses."""
    return {f.name: f.default for f in fields(METHODS[name])} if name in METHODS else {}


def one_of(where: str, value: str, choices: Sequence[str]) -> None:
    """Raise ConfigError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(
            f"{value!r} is not a choice", where=where, fix=f"use one of: {', '.join(choices)}", code="unknown-name"
        )
