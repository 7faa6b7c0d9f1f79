"""``policy.toml``: what a site lets happen with its data, whatever the coordinator asks. The site has the last word."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from confrere.backbones import REGISTRY
from confrere.choices import Part, PrivacyChoice
from confrere.config import Experiment
from confrere.consortium import forms
from confrere.errors import ConfigError, PolicyError, nearest
from confrere.method import METHODS, Method, Request, make

ROUNDING = 1e-9
"""Of a limit: so far a sum of floats may exceed it."""

TEMPLATE = """\
# What this site lets happen with its data. The site reads this file before anything is trained and refuses what it
# does not allow; the coordinator is told the reason. Changing it needs no new kit.

# Methods this site takes part in (`confrere methods` lists them). Without this line: every one.
# Refusal: policy-method. A method that would need the images themselves is always refused.
# methods = ["fedopal", "fedit", "local"]

# Groups of numbers that may leave this site; a method's page in docs/methods says which it sends. "shared" and "tier"
# are adapter weights, "control" sums of gradients, "choice" the number of a model; "statistics", "probe" and "scores"
# are computed from features of images and are nearer to the data.
# Refusal: policy-group.
groups = ["shared"]

# Most rounds of one experiment: each round tells a little more about the data. Refusal: policy-rounds.
most_rounds = 200

# Fewest training images with which this site takes part: a model that is trained on few may give away single
# patients. Refusal: policy-examples.
least_examples = 20

# Only take part where secure aggregation hides each site's update in the sum. Refusal: policy-secure.
secure_aggregation = false

# Only take part where this site hides its images or patients by noise of its own (privacy.unit, docs/privacy.md), with
# a budget of at most so much epsilon (0: any; above 0 asks for noise by itself) and delta. Refusal: policy-privacy.
differential_privacy = false
most_epsilon = 0.0
most_delta = 1e-4

# Most epsilon over all experiments together that this site ever takes part in with one state folder; deltas add up,
# too. Then every experiment needs a budget, and one whose budget is not left is refused before its data are read.
# 0: no limit. Refusals: policy-privacy, policy-spent.
most_epsilon_ever = 0.0
most_delta_ever = 1e-4

# Whether test scores of this site (numbers, no predictions) may be sent. Refusal: policy-test.
test_scores = true

# Frozen models this site loads, each with the SHA-256 of its weights; the experiment must pin the same one. Without
# this table: every model that Confrere knows by name (`confrere backbones`), but no folder and no download by address.
# Refusal: policy-backbone.
# [backbones]
# dinov2-small-imgfocus = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
"""


class Policy(Part):
    """What a site allows; a file without a key means its default.

    Attributes:
        methods: names of allowed methods; None for every one.
        backbones: name -> SHA-256 (hex) of the weights; None for every registered one.
        groups: what may leave, see :attr:`confrere.method.Method.sends`.
        most_rounds: of one experiment. least_examples: training images of this site.
        secure_aggregation, differential_privacy: whether it is required.
        most_epsilon, most_delta: largest budget of one experiment then; 0 for any epsilon.
        most_epsilon_ever, most_delta_ever: over all experiments, see :mod:`confrere.consortium.spent`; 0 for any.
        test_scores: whether scores on this site's test split may be sent.
    """

    methods: tuple[str, ...] | None = None
    backbones: dict[str, str] | None = None
    groups: tuple[str, ...] = ("shared",)
    most_rounds: int = Field(default=200, ge=1)
    least_examples: int = Field(default=20, ge=1)
    secure_aggregation: bool = False
    differential_privacy: bool = False
    most_epsilon: float = Field(default=0.0, ge=0)
    most_delta: float = Field(default=1e-4, gt=0, lt=1)
    most_epsilon_ever: float = Field(default=0.0, ge=0)
    most_delta_ever: float = Field(default=1e-4, gt=0, lt=1)
    test_scores: bool = True

    @field_validator("backbones")
    @classmethod
    def _hashes(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for name, digest in (value or {}).items():
            if not re.fullmatch("[0-9a-fA-F]{64}", digest):
                raise ValueError(f"{name} needs the SHA-256 of its weights, 64 hexadecimal digits")
        return value

    @model_validator(mode="after")
    def _known(self) -> Policy:
        groups = {group for method in METHODS.values() for group in method.sends}
        for key, names, known in (("methods", self.methods or (), set(METHODS)), ("groups", self.groups, groups)):
            for name in names:
                if name not in known:
                    what = f"there is none called {name!r:.80}"
                    raise ConfigError(what, where=f"policy: {key}", fix=nearest(name, known), code="unknown-name")
        return self


def load(path: Path) -> Policy:
    """Return the policy of a TOML file.

    Raises:
        ConfigError: naming file, key and the nearest valid one.
    """
    return forms.read(path, Policy)


def check(policy: Policy, experiment: Experiment, *, examples: int | None) -> None:
    """Refuse an experiment that the site does not allow.

    Args:
        policy: of the site.
        experiment: as the coordinator sent it.
        examples: training images of the site; None before its data are read.

    Raises:
        PolicyError: with a code for each rule, see :data:`TEMPLATE`.
    """
    methods = [experiment.build_method(), *map(make, experiment.controls)]  # a site trains them all
    for method in methods:
        _check_method(policy, method)
    _check_backbone(policy, experiment)
    _check_rounds(policy, experiment.rounds)
    if examples is not None and examples < policy.least_examples:
        # How many there are is the site's own business.
        what = f"the site has fewer training images than the {policy.least_examples} it asks of itself"
        raise refusal(what, "least_examples", code="policy-examples")
    if policy.secure_aggregation and not experiment.secure.aggregation and any(method.sends for method in methods):
        what, fix = "the coordinator could read what the site sends", "set secure.aggregation=true, see docs/secure.md"
        raise refusal(what, "secure_aggregation", code="policy-secure", fix=fix)
    _check_privacy(policy, experiment.privacy, sum(1 for method in methods if method.sends))


def check_request(policy: Policy, request: Request) -> None:
    """Refuse a single request that goes beyond the experiment which was checked.

    Raises:
        PolicyError: a round too many (``policy-rounds``), or test scores (``policy-test``).
    """
    _check_rounds(policy, request.round)
    if request.kind == "evaluate" and request.split == "test" and not policy.test_scores:
        raise refusal("test scores do not leave the site", "test_scores", code="policy-test")


def _check_method(policy: Policy, method: Method) -> None:
    if method.pools:
        raise refusal(f"{method.name} needs the images in one place", "methods", code="policy-method")
    if policy.methods is not None and method.name not in policy.methods:
        raise refusal(f"the site does not allow the method {method.name}", "methods", code="policy-method")
    closed = sorted(set(method.sends) - set(policy.groups))
    if closed:
        what = f"{method.name} sends the group {closed[0]!r}, which may not leave the site"
        raise refusal(what, "groups", code="policy-group")


def _check_backbone(policy: Policy, experiment: Experiment) -> None:
    """Refuse other models; a pin of the site must be the experiment's too, so that loading the weights checks it."""
    name, allowed = experiment.backbone.name, REGISTRY if policy.backbones is None else policy.backbones
    if name not in allowed:
        raise refusal(f"the site does not allow the backbone {name!r:.80}", "backbones", code="policy-backbone")
    if policy.backbones is None:
        return
    known, pin = REGISTRY.get(name), policy.backbones[name].lower()
    asked = experiment.backbone.sha256 or (known.sha256 if known else None) or ""
    if asked.lower() != pin:
        has = f"with SHA-256 {asked:.64}" if asked else "without a SHA-256"
        what = f"the backbone {name} is asked for {has}; the site allows {pin}"
        raise refusal(what, "backbones", code="policy-backbone", fix=f"set backbone.sha256={pin}")


def _check_rounds(policy: Policy, rounds: int) -> None:
    if rounds > policy.most_rounds:
        what = f"{rounds} rounds; the site allows {policy.most_rounds}"
        raise refusal(what, "most_rounds", code="policy-rounds", fix=f"set rounds={policy.most_rounds} or less")


def _check_privacy(policy: Policy, chosen: PrivacyChoice, sending: int) -> None:
    """Refuse noise and budgets that are not enough; each of so many ``sending`` trainings spends all: they add up.

    A training that sends nothing needs no budget, but without a unit its losses and scores would leave.
    """
    rules = [key for key in ("differential_privacy", "most_epsilon", "most_epsilon_ever") if getattr(policy, key)]
    if not rules:
        return
    most = policy.most_epsilon or float("inf")
    each = f" for each of {sending} trainings" if sending > 1 else ""
    if not chosen.at_sites or (sending and not 0 < chosen.epsilon * sending <= most):
        what, fix = "the site takes part only where its own noise hides images", "set privacy.unit and privacy.epsilon"
        fix += f", at most {most / max(1, sending):g}{each}" if policy.most_epsilon else ""
        raise refusal(what, rules[0], code="policy-privacy", fix=fix)
    bounded = policy.differential_privacy or policy.most_epsilon  # else it is most_delta_ever that counts
    if bounded and chosen.delta * sending > policy.most_delta * (1 + ROUNDING):
        what = f"an epsilon means little at delta {chosen.delta * sending:g}; the site allows {policy.most_delta:g}"
        fix = f"set privacy.delta={policy.most_delta / sending:.3g} or less{each}"
        raise refusal(what, "most_delta", code="policy-privacy", fix=fix)


def refusal(what: str, key: str, *, code: str, fix: str = "") -> PolicyError:
    """Return the error that a rule of the policy refuses with."""
    fix = fix or "change the experiment, or talk to the site: it alone can change its policy.toml"
    return PolicyError(what, where=f"policy: {key}", fix=fix, code=code)
