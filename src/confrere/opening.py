"""What an experiment names, opened: its data with their split, and its frozen models."""

from __future__ import annotations

import math
from pathlib import Path

from confrere.adapters import lora
from confrere.backbones import REGISTRY, Backbone, default_size, load
from confrere.backbones.volume_folder import reads_volumes
from confrere.config import Experiment
from confrere.data.federation import Federation, load_federation
from confrere.data.numbers import holds_numbers
from confrere.errors import ConfigError, nearest
from confrere.federation.attacks import check_attack
from confrere.federation.budget import budget_of
from confrere.federation.robust import check_rule
from confrere.federation.sampling import check_groups, cohort_size
from confrere.federation.secure.settings import check_cohort
from confrere.prefix import cache_dir


def open_data(experiment: Experiment, out: Path) -> Federation:
    """Return the federation of an experiment with the split of ``out`` (written there the first time)."""
    spec = experiment.backbone
    _check_kind(experiment)
    size = experiment.data.image_size or default_size(spec.name, spec.image_size)
    federation = load_federation(
        Path(experiment.path),
        options=experiment.data,
        image_size=size,
        seed=experiment.split_seed,
        cache=cache_dir(),
        splits=out / "splits.csv",
    )
    check_sites(experiment, federation)
    return federation


def check_sites(experiment: Experiment, federation: Federation) -> None:
    """Raise ConfigError or DataError where the choices do not go with the sites that there are."""
    spec, names = experiment.backbone, [site.name for site in federation.sites]
    for key, given in (("adapter.ranks", experiment.adapter.ranks), ("backbone.depths", spec.depths)):
        for name in sorted(given.keys() - set(names)):
            raise ConfigError(
                f"there is no site {name!r}", where=f"{key}.{name}", fix=nearest(name, names), code="unknown-site"
            )
    weighed = experiment.train.class_weights
    if weighed and set(weighed) != set(federation.classes):
        fix = f"give one for each of: {', '.join(federation.classes)}"
        raise ConfigError("not the classes of the data", where="train.class_weights", fix=fix, code="classes")
    if experiment.hold_out is not None:
        federation.site(experiment.hold_out)  # DataError names the sites when there is none of this name
        if len(federation.sites) < 2:
            raise ConfigError("the only site cannot be held out", where="hold_out", fix="leave it out", code="hold-out")
    trainers = len(federation.sites) - (experiment.hold_out is not None)
    asked = cohort_size(experiment.federation.fraction, trainers)
    if experiment.federation.min_replies > asked:
        raise ConfigError(
            f"{experiment.federation.min_replies} replies are needed, but only {asked} sites are asked a round",
            where="federation.min_replies",
            fix=f"use at most {asked}",
            code="quorum",
        )
    check_groups(experiment.federation, trainers, threshold=experiment.secure.threshold if experiment.masked else None)
    chosen, unequal = experiment.federation, bool(experiment.adapter.ranks or spec.depths)
    budget_of(experiment.build_method(), chosen, experiment.privacy, trainers)
    check_rule(experiment.build_method(), chosen.rule, chosen.byzantine, asked, unequal=unequal)
    if experiment.masked:
        check_cohort(asked, experiment.secure.threshold)
    attack, training = experiment.attack, [name for name in names if name != experiment.hold_out]
    check_attack(attack.name, attack.sites, attack.strength, training)


def _check_kind(experiment: Experiment) -> None:
    """Refuse a backbone for images on a table of numbers, and the other way round."""
    name = experiment.backbone.name
    reads = name in REGISTRY and REGISTRY[name].kind == "numbers"
    given = holds_numbers(Path(experiment.path), experiment.data)
    volumes = reads_volumes(name)
    if volumes != (experiment.data.volume is not None):
        what = f"{name} reads {'volumes' if volumes else 'no volumes'}"
        fix = (
            "set data.volume.size" if volumes else "use backbone.name=unet, unetr, swinunetr or one that was pretrained"
        )
        raise ConfigError(what, where="backbone.name", fix=fix, code="backbone-kind")
    if volumes and experiment.train.views > 1:
        fix = "use train.views=1"
        raise ConfigError("volumes have one orientation", where="train.views", fix=fix, code="backbone-kind")
    if reads != given:
        raise ConfigError(
            f"{name} reads {'rows of numbers' if reads else 'images'}, the data are "
            f"{'rows of numbers' if given else 'images'}",
            where="backbone.name",
            fix="use backbone.name=mlp" if given else "use a backbone for images, see `confrere backbones`",
            code="backbone-kind",
        )
    if given and experiment.train.views > 1:
        raise ConfigError(
            "rows of numbers have one orientation", where="train.views", fix="use train.views=1", code="backbone-kind"
        )


def depth_of(experiment: Experiment, federation: Federation, site: str = "") -> int | None:
    """Return how many blocks a site keeps, None for all; pooled data, the server and who is held out have the most."""
    spec = experiment.backbone
    usual = spec.depth or (REGISTRY[spec.name].keep if spec.name in REGISTRY else None)
    own = {one.name: spec.depths.get(one.name, usual) for one in federation.sites if one.name != experiment.hold_out}
    most = max(own.values(), key=lambda depth: math.inf if depth is None else depth, default=usual)
    return most if experiment.build_method().pools else own.get(site, most)


def load_backbone(experiment: Experiment, federation: Federation, depth: int | None) -> Backbone:
    """Return the frozen model with ``depth`` blocks and room for what the method trains."""
    method, spec, adapter = experiment.build_method(), experiment.backbone, experiment.adapter
    backbone = load(
        spec.name,
        lora=lora.LoraSpec(
            slots=method.all_slots,
            blocks=adapter.blocks,
            targets=adapter.targets,
            scale=adapter.scale,
            dropout=adapter.dropout,
            **method.extensions,
        ),
        depth=depth,
        image_size=federation.image_size,
        patch=spec.patch,
        sha256=spec.sha256,
        device=experiment.engine.device,
        precision=experiment.engine.precision,
        task=experiment.build_task(),
    )
    if experiment.train.foreground and getattr(backbone.anatomy.root, "window", None) == backbone.image_size:
        what = "a window as large as the volumes cannot be moved to the foreground"
        fix = "give a smaller backbone.patch, or leave it out"
        raise ConfigError(what, where="train.foreground", fix=fix, code="value")
    return backbone
