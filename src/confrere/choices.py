"""The tables of an experiment: what may be chosen, within which bounds, and by default."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Rule = Literal[
    "mean", "median", "trimmed-mean", "geometric-median", "krum", "multi-krum", "clipping", "nearest-neighbours"
]


class Part(BaseModel):
    """A table of the experiment: frozen, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _lists(cls, value: object, info: ValidationInfo) -> object:
        """Take TOML's lists where a tuple is meant."""
        meant = cls.model_fields[info.field_name or ""].annotation
        tuples = tuple in (get_origin(kind) for kind in (meant, *get_args(meant)))
        return tuple(value) if tuples and isinstance(value, list) else value


class BackboneChoice(Part):
    """Which frozen model. ``depth`` keeps the first blocks (default: the registry's); ``sha256`` pins the weights.

    ``depths``: sites that keep another number of blocks, for methods that can average across them. ``patch``: voxels
    along each axis of the part of a volume that a network for volumes sees at once (default: all of it).
    """

    name: str = "dinov2-small-imgfocus"
    depth: int | None = Field(default=None, ge=1)
    depths: dict[str, Annotated[int, Field(ge=1)]] = {}
    image_size: int | None = Field(default=None, ge=8, le=2048)
    patch: (
        tuple[
            Annotated[int, Field(ge=8, le=512)],
            Annotated[int, Field(ge=8, le=512)],
            Annotated[int, Field(ge=8, le=512)],
        ]
        | None
    ) = None
    sha256: str | None = None


class AdapterChoice(Part):
    """LoRA. ``rank`` is a site's total, divided among the adapters its method trains; ``ranks``: sites with another."""

    rank: int = Field(default=16, ge=1, le=1024)
    ranks: dict[str, Annotated[int, Field(ge=1, le=1024)]] = {}
    blocks: int = Field(default=4, ge=1)
    targets: str = "qv"
    scale: float = Field(default=2.0, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)

    def rank_of(self, site: str) -> int:
        """Return the rank of a site; the server's (site "") is the largest."""
        return self.ranks.get(site, self.rank) if site else max(self.rank, *self.ranks.values(), 1)

    @field_validator("targets")
    @classmethod
    def _regular_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value


class TrainChoice(Part):
    """Local training in one round; see :class:`confrere.learner.TrainSettings`."""

    lr: float = Field(default=1e-3, gt=0, le=1)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    batch_size: int = Field(default=16, ge=1, le=4096)
    steps: int = Field(default=10, ge=1)
    balance: Literal["sampling", "weights", "none"] = "sampling"
    class_weights: dict[str, Annotated[float, Field(gt=0, le=1000)]] = {}
    loss: str = ""
    clip: float = Field(default=1.0, gt=0)
    views: Literal[1, 2, 4, 8] = 1
    foreground: float = Field(default=0.0, ge=0, le=1)


class FederationChoice(Part):
    """Who takes part, and how what they send is combined.

    ``sampling``: ``fixed`` draws a ``fraction`` of all sites a round, ``poisson`` every site by itself with that
    chance, so that a round may have nobody; ``groups`` one of fixed groups, so that sums tell nobody from the rest of
    its group. See :func:`confrere.federation.sampling.sample`.
    ``weights``: a site counts by its training ``images`` or every site ``equal``. ``rule``: see
    :data:`confrere.federation.robust.RULES`; one other than ``mean`` gives all sites the same weight and is defined
    for up to ``byzantine`` sites that send anything. ``canonical``: express every site's factors in the gauge of what
    was broadcast before they are combined, so that a rescaled pair (c A, B / c) changes nothing.
    """

    sampling: Literal["fixed", "poisson", "groups"] = "fixed"
    fraction: float = Field(default=1.0, gt=0, le=1)
    min_replies: int = Field(default=1, ge=1)
    weights: Literal["images", "equal"] = "images"
    rule: Rule = "mean"
    byzantine: int = Field(default=0, ge=0)
    canonical: bool = False


class GateChoice(Part):
    """Which updates are refused before they are combined, beside all that are malformed.

    ``norm``: the change a site sends may be so many times the median of all sites' changes. ``factor``: the same for
    either factor of an adapter alone (a rescaled pair). 0 turns a check off; both need three replies.
    """

    norm: float = Field(default=8.0, ge=0)
    factor: float = Field(default=8.0, ge=0)


class SecureChoice(Part):
    """Secure aggregation: the server learns the weighted mean, and no site's update; see docs/secure.md.

    ``threshold``: so many sites have to stay to the end of a round, or nothing of it is shown; more than half of those
    that are asked. 0: two thirds of them. ``clip``: a site shortens a change that is longer than this (L2, all tensors
    together), as nobody can compare sizes between sites; 0: never.
    """

    aggregation: bool = False
    threshold: int = Field(default=0, ge=0)
    clip: float = Field(default=0.0, ge=0)


class PrivacyChoice(Part):
    """What is hidden, and its budget; see docs/privacy.md.

    ``unit``: a whole ``site``, where the method makes the noise (without one this table says nothing); or, within every
    site, each training image (``record``) or all images of each ``patient``, by noisy local steps. ``epsilon``: no
    round begins that would exceed it; 0 never. A site's is counted without amplification. ``delta``: has to be given,
    at most a tenth over the number of units.

    The others are of noisy steps. ``sigma``: noise in units of ``clip``; 0 takes the least that ``epsilon`` allows for
    all rounds. ``clip``: largest norm of what a unit adds to a step's gradient, of all trained tensors together.
    ``images``: at most so many of a patient count in a step. ``noise_seed``: 0 takes noise and draws from the operating
    system; else from this seed, which takes the noise off again: simulations. ``centred``: where a head reads one
    feature vector of an image, a few steps are spent on their mean, so that a clip is spent on how images differ.
    """

    unit: Literal["", "site", "record", "patient"] = ""
    epsilon: float = Field(default=0.0, ge=0)
    delta: float = Field(default=0.0, ge=0, lt=1)
    sigma: float = Field(default=0.0, ge=0, le=1e6)
    clip: float = Field(default=1.0, gt=0, le=1e6)
    images: int = Field(default=2, ge=1, le=64)
    noise_seed: int = Field(default=0, ge=0, lt=2**31)
    centred: bool = True

    @property
    def at_sites(self) -> bool:
        """Return whether sites hide images or patients by noise of their own."""
        return self.unit in ("record", "patient")


class AttackChoice(Part):
    """A simulated adversary, for research: ``sites`` send what the attack ``name`` makes of their updates.

    Without ``sites`` nobody attacks. ``strength`` means what :data:`confrere.federation.attacks.ATTACKS` says.
    """

    name: str = "sign-flip"
    sites: tuple[str, ...] = ()
    strength: float = Field(default=1.0, ge=0)


class RecordChoice(Part):
    """What a run directory keeps: states of the last ``keep`` rounds and of the best one (0: of every round)."""

    keep: int = Field(default=0, ge=0)


class SelectionChoice(Part):
    """Which round is kept: the best on validation images, judged ``every`` so many rounds.

    The criterion is the mean probability of the true class, averaged over classes and then over sites: with few
    images of a class it is steadier than the balanced accuracy, which is shown beside it.

    ``patience`` judgements without a better one end the run (0: never); ``images`` bounds the validation
    images of a site that judge a round (0: all).
    """

    every: int = Field(default=1, ge=1)
    patience: int = Field(default=0, ge=0)
    images: int = Field(default=0, ge=0)


class EngineChoice(Part):
    """How the arithmetic is done.

    ``precision``: ``bf16`` keeps the frozen model and its activations in bfloat16; adapters, head, loss and optimiser
    stay float32. ``device``: ``cpu`` or ``cuda``.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:[0-9]+)?)$")
