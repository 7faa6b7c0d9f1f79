"""Choices of an experiment that exclude each other, each refused before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from confrere.backbones.registry import REGISTRY, WHOLE
from confrere.backbones.volume_folder import reads_volumes
from confrere.errors import ConfigError
from confrere.federation.secure.settings import check_alone, check_method
from confrere.method import METHODS, Method, make
from confrere.tasks.volume_segmentation import VolumeSegmentation

if TYPE_CHECKING:
    from confrere.config import Experiment

SINGLE = {"classification": "", "segmentation": "", "survival": "logistic-hazard"}
"""Tasks whose loss is one of each image alone, with the curve for which that holds."""


def check_choices(experiment: Experiment) -> None:
    """Raise ConfigError for the first two choices that do not go together."""
    controls = experiment.controls
    if len(set(controls)) != len(controls):
        raise ConfigError("a control is named twice", where="controls", fix="name each once", code="named-twice")
    main = experiment.build_method()
    # A comparison, which has no controls, may set such a method beside others.
    if experiment.hold_out and controls and not main.has_general():
        raise ConfigError(
            f"{main.name} makes no general model: a held-out site could not be scored",
            where="hold_out",
            fix="use a method that shares its head, or leave hold_out out",
            code="no-general-model",
        )
    _check_task(experiment)
    for method in (main, *map(make, controls)):
        method.check(experiment.train.steps, experiment.rounds)
        _check_ranks(experiment, method)
        _check_depths(experiment, method)
        _check_privacy(experiment, method)
    if main.stacked and experiment.federation.canonical:
        what, fix = f"{main.name} sends several models side by side, which have no common gauge", "leave it out"
        raise ConfigError(what, where="federation.canonical", fix=fix)
    # A comparison, which has no controls, may set a budget beside others.
    chosen, noisy = experiment.privacy, experiment.privacy.at_sites
    hiding = [m for m in (main, *map(make, controls)) if m.release() or (noisy and m.sends and not m.pools)]
    if controls and not hiding and (chosen.epsilon or chosen.delta):
        what, fix = f"{main.name} adds no noise: a budget would bound nothing", "leave it out, or use method.name=dpfed"
        fix += ", or privacy.unit=record with a method that docs/privacy.md names"
        raise ConfigError(what, where="privacy", fix=fix, code="privacy")
    if not noisy and (chosen.sigma or chosen.noise_seed):
        what, fix = (
            "sigma and noise_seed do nothing without a unit that is hidden",
            "set privacy.unit=record, or patient",
        )
        raise ConfigError(what, where="privacy.unit", fix=fix, code="privacy")
    if experiment.secure.aggregation:
        check_method(main, unequal=bool(experiment.adapter.ranks or experiment.backbone.depths))
        check_alone(experiment.federation, experiment.gate, experiment.attack)


def _check_task(experiment: Experiment) -> None:
    """Refuse an unknown task, losses it has not, and data or a method that it cannot use."""
    task, train = experiment.build_task(), experiment.train
    if train.loss and train.loss not in task.losses:
        what, fix = f"{task.name} has no loss {train.loss!r:.40}", f"use one of: {', '.join(task.losses)}"
        raise ConfigError(what, where="train.loss", fix=fix, code="unknown-name")
    if experiment.data.target != task.target:
        what, fix = f"{task.name} does not learn a {experiment.data.target}", f'use data.target="{task.target}"'
        raise ConfigError(what, where="data.target", fix=f"{fix}, or another task", code="task")
    if train.balance == "weights" and not task.weighted:
        fix = 'use "sampling" or "none"'
        raise ConfigError(f"{task.name} has no class weights", where="train.balance", fix=fix, code="task")
    if train.class_weights and (not task.weighted or task.target != "label" or train.balance != "none"):
        what, fix = "weights of classes need a task with one class an image", 'use train.balance="none"'
        raise ConfigError(what, where="train.class_weights", fix=f"{fix}, and classification", code="task")
    if train.foreground and not isinstance(task, VolumeSegmentation):
        what, fix = f"{task.name} has no windows around a foreground", 'leave it out, or use task="volume-segmentation"'
        raise ConfigError(what, where="train.foreground", fix=fix, code="task")
    name = experiment.backbone.name
    whole = (name in REGISTRY and REGISTRY[name].kind in WHOLE) or reads_volumes(name)
    for method in (experiment.build_method(), *map(make, experiment.controls)):
        if whole and not method.whole:
            able = ", ".join(sorted(name for name, cls in METHODS.items() if cls.whole))
            what = f"{method.name} trains adapters, {name} is trained whole"
            raise ConfigError(what, where="method.name", fix=f"use one of: {able}", code="task")
        if task.target not in method.targets:
            fix = (
                f"use one of: {', '.join(sorted(name for name, cls in METHODS.items() if task.target in cls.targets))}"
            )
            raise ConfigError(f"{method.name} cannot do {task.name}", where="method.name", fix=fix, code="task")


def _check_privacy(experiment: Experiment, method: Method) -> None:
    """Refuse what epsilon would not cover, for a method that hides who took part, or for sites that hide images."""
    if experiment.privacy.at_sites:
        _check_units(experiment, method)
        return
    if not method.release():
        return
    federation, gate, choice = experiment.federation, experiment.gate, experiment.selection
    poisson, size = federation.sampling == "poisson", "the clip is checked at every site alone"
    wanted = {
        "federation.weights": (federation.weights == "equal", "equal", "a site with more images would count for more"),
        "federation.rule": (federation.rule == "mean", "mean", "noise is made for a sum"),
        "federation.sampling": (federation.sampling != "groups", "fixed", "it is not accounted for fixed groups"),
        "federation.canonical": (not federation.canonical, "false", "a clip is that of the change as it was sent"),
        "gate.norm": (not gate.norm, "0", f"it compares sites with each other; {size}"),
        "gate.factor": (not gate.factor, "0", f"it compares sites with each other; {size}"),
        "selection.patience": (not choice.patience, "0", "to stop by validation images is one more release"),
        "privacy.delta": (experiment.privacy.delta > 0, "1e-3, at most 0.1/sites", "an epsilon needs one"),
        "secure.aggregation": (
            not (experiment.secure.aggregation and poisson),
            "false, or federation.sampling=fixed",
            "whether so few sites open a sum depends on each of them",
        ),
    }
    _refuse(wanted, method)


def _check_units(experiment: Experiment, method: Method) -> None:
    """Refuse what epsilon would not cover where sites make their local steps noisy; controls that send nothing may."""
    chosen, train, name = experiment.privacy, experiment.train, method.name
    if not method.sends or method.pools:
        return
    if method.release():
        what, fix = f"{name} hides whole sites by a noise of its own", "use privacy.unit=site, or another method"
        raise ConfigError(what, where="privacy.unit", fix=fix, code="privacy")
    if method.noised(train.steps, 1, experiment.rounds) is None:
        able = [other for other in sorted(METHODS) if make(other).noised(2, 1, 2) is not None]
        what = (
            f"one {chosen.unit} could move what {name} sends by more than a clip bounds: it also depends on images by "
            "other ways than noisy steps, such as an adapter trained beside it without noise"
        )
        fix = f"use one of: {', '.join(able)}, or fedopal with method.training=in-turn"
        raise ConfigError(what, where="method.name", fix=fix, code="privacy")
    task, own = experiment.build_task(), "a table is standardised by each site's own rows"
    single = task.name in SINGLE and task.choice().get("curve", SINGLE[task.name]) == SINGLE[task.name]
    wanted = {
        "train.balance": (train.balance == "none", "none", "one image changes how all of its class are weighed"),
        "task": (single, "classification, segmentation or survival with logistic-hazard", "its loss may join images"),
        "backbone.name": (experiment.backbone.name != "mlp", "dinov2-small-imgfocus, with images", own),
        "selection.patience": (not experiment.selection.patience, "0", "to stop by validation images is a release"),
        "privacy.delta": (chosen.delta > 0, "1e-5, at most 0.1 over the images of a site", "it needs one"),
        "privacy.epsilon": (bool(chosen.epsilon or chosen.sigma), "8, or set privacy.sigma", "there is no noise"),
    }
    _refuse(wanted, method)


def _refuse(wanted: Mapping[str, tuple[bool, str, str]], method: Method) -> None:
    """Raise ConfigError for the first key that is not fine: whether it is, what would be, and why it is not."""
    for key, (fine, instead, why) in wanted.items():
        if not fine:
            what = f"epsilon of {method.name} would not hold: {why}"
            raise ConfigError(what, where=key, fix=f"use {key}={instead}", code="privacy")


def _check_ranks(experiment: Experiment, method: Method) -> None:
    """Refuse ranks too small to be divided among the method's adapters, and unequal ones where it cannot carry them."""
    adapter = experiment.adapter
    if min([adapter.rank, *adapter.ranks.values()]) < len(method.slots):
        raise ConfigError(
            f"a rank of less than {len(method.slots)} cannot be divided among the adapters of {method.name}",
            where="adapter.rank",
            fix=f"use at least {len(method.slots)}",
            code="rank",
        )
    if adapter.ranks and not (method.unequal or method.pools):
        able = ", ".join(sorted(name for name, cls in METHODS.items() if cls.unequal))
        raise ConfigError(
            f"{method.name} cannot carry adapters of different ranks",
            where="adapter.ranks",
            fix=f"leave adapter.ranks out, or use one of: {able}",
            code="rank",
        )


def _check_depths(experiment: Experiment, method: Method) -> None:
    """Refuse other depths for methods that cannot carry them, for a site held out, and too few blocks."""
    depths, blocks = experiment.backbone.depths, experiment.adapter.blocks
    few = [site for site, depth in depths.items() if depth < blocks]
    if depths and not (method.depths or method.pools):
        able = ", ".join(sorted(name for name, cls in METHODS.items() if cls.depths))
        what, fix = f"{method.name} cannot carry different depths", f"leave it out, or use one of: {able}"
        raise ConfigError(what, where="backbone.depths", fix=fix)
    if experiment.hold_out in depths:
        what = "a held-out site only tests a model that all share, which has one depth"
        raise ConfigError(what, where=f"backbone.depths.{experiment.hold_out}", fix="leave it out")
    if few:
        what = f"{blocks} blocks cannot be adapted when {depths[few[0]]} are kept"
        raise ConfigError(what, where=f"backbone.depths.{few[0]}", fix="keep more, or use a smaller adapter.blocks")
