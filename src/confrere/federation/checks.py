"""What one answer of a site must be, whoever else answers: a function for each part, which refuses or says nothing.

Reasons name group and tensor, never values. Names that come from a site are shown cut, as plain ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeGuard

import torch
from torch import Tensor

from confrere.adapters.algebra import cut
from confrere.adapters.names import side_of
from confrere.errors import UpdateRefusedError
from confrere.method import Method, Request
from confrere.tensors import State, Tensors

LARGEST = 1e9
"""No honest weight or moment is larger; products of three such numbers and sums of squares stay finite in float32."""
DEPTH, LEAVES = 4, 10_000
"""How deep metrics may be nested, and how many values they may hold."""
SAME = "run the same version, method and options at the site and at the server"


def check_weight(weight: object, registered: Mapping[str, float] | None, site: str) -> None:
    """Refuse a weight that is no number in (0, LARGEST], or not the site's registered one."""
    if not is_number(weight, LARGEST) or not weight > 0:
        fix = "send the number of training images, or 1"
        raise UpdateRefusedError("the weight is no positive number", fix=fix, code="update-weight")
    if registered is not None and weight != registered.get(site):
        fix = "register the site anew"
        raise UpdateRefusedError("the weight is not the registered one", fix=fix, code="update-weight")


def check_metrics(metrics: object, request: Request) -> None:
    """Refuse metrics that are not plain, finite and of bounded size, or lack a number that the record needs."""
    if not isinstance(metrics, Mapping):
        raise UpdateRefusedError("the metrics are no mapping", fix=SAME, code="update-metrics")
    level: list[object] = [metrics]
    for _ in range(DEPTH + 1):
        if len(level) > LEAVES:
            what = f"the metrics hold more than {LEAVES} values"
            raise UpdateRefusedError(what, fix=SAME, code="update-metrics")
        level = [inner for value in level for inner in parts(value)]
    if level:
        raise UpdateRefusedError(f"the metrics are nested deeper than {DEPTH}", fix=SAME, code="update-metrics")
    if (request.kind, request.split) == ("evaluate", "test"):
        return
    fine = {"examples": is_count(metrics.get("examples")), "overlap": is_table(metrics.get("overlap"))}
    if request.kind == "train":
        fine["loss"] = metrics.get("loss") is None or is_number(metrics["loss"])
        fine["seconds"] = is_number(metrics.get("seconds", 0.0))
    else:
        fine |= {key: is_share(metrics.get(key, "")) for key in ("score", "confidence")}
    wrong = [key for key in sorted(fine) if not fine[key]]
    if wrong:
        what = f"the metric {wrong[0]} is missing, or not what it should be"
        raise UpdateRefusedError(what, fix=SAME, code="update-metrics")


def parts(value: object) -> Iterable[object]:
    """Return what a mapping or a list holds; refuse what is neither, nor a finite number or a short text."""
    if isinstance(value, Mapping) and all(map(is_text, value)):
        return value.values()
    if isinstance(value, list | tuple):
        return value
    if value is None or isinstance(value, bool) or is_text(value, 500) or is_number(value):
        return ()
    what = "the metrics hold something else than finite numbers and short texts"
    raise UpdateRefusedError(what, fix=SAME, code="update-metrics")


def check_groups(state: object, method: Method, form: State | None) -> None:
    """Refuse groups that the method does not send and, unless ``form`` is None, others than are expected."""
    if not isinstance(state, Mapping):
        raise UpdateRefusedError("the payload is no mapping", fix=SAME, code="update-form")
    for group in state:
        if not isinstance(group, str) or group not in method.sends or group == "private":
            raise UpdateRefusedError(f"group {shown(group)} may not leave a site", fix=SAME, code="group-not-declared")
    if form is not None:
        check_names("groups", form.keys() - set(method.optional), state.keys(), form.keys())


def check_tensors(group: str, tensors: object, form: Tensors | None, *, unequal: bool) -> None:
    """Refuse other names, shapes or dtypes than expected, and values that are not finite or beyond LARGEST.

    With ``unequal`` a rank lower than expected will do, the same in all layers.
    """
    if not isinstance(tensors, Mapping):
        raise UpdateRefusedError("the group is no mapping", where=f"group {group}", fix=SAME, code="update-form")
    if form is not None:
        check_names(f"tensors of group {group}", form.keys(), tensors.keys(), form.keys())
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            where = f"group {group}, {shown(name)}"
            raise UpdateRefusedError("no dense tensor came", where=where, fix=SAME, code="update-form")
    if form is not None and unequal:
        ranks = [len(value) for name, value in tensors.items() if side_of(name) == "A" and value.ndim]
        form = cut(form, max(1, min(ranks, default=1)))
    for name, value in tensors.items():
        check_tensor(value, None if form is None else form[name], f"group {group}, {shown(name)}")


def check_tensor(value: Tensor, form: Tensor | None, where: str) -> None:
    """Refuse another shape or dtype than that of ``form`` (None: no numbers at all), and a value out of range."""
    if form is None:
        wrong, due = not value.is_floating_point() or not value.numel(), "numbers"
    else:
        wrong, due = (value.dtype, value.shape) != (form.dtype, form.shape), described(form)
    if wrong:
        what = f"{described(value)} came instead of {due}"
        raise UpdateRefusedError(what, where=where, fix=SAME, code="update-form")
    if value.numel():
        low, high = (float(bound) for bound in torch.aminmax(value.detach()))
        if not (low >= -LARGEST and high <= LARGEST):  # false for NaN
            what = f"a value is not finite, or its size is above {LARGEST:g}"
            raise UpdateRefusedError(what, where=where, fix="lower train.lr at the site", code="update-values")


def check_names(what: str, due: Iterable[str], came: Iterable[object], allowed: Iterable[str]) -> None:
    """Refuse unless all that is ``due`` came, and nothing but what is ``allowed``."""
    came = set(came)
    missing, strange = set(due) - came, came - set(allowed)
    found = [
        f"{len(names)} {how}: {', '.join(sorted(map(shown, names))[:3])}"
        for how, names in (("missing", missing), ("not expected", strange))
        if names
    ]
    if found:
        raise UpdateRefusedError(f"{what} {'; '.join(found)}", fix=SAME, code="update-form")


def is_number(value: object, most: float = 1e30) -> TypeGuard[int | float]:
    """Return whether ``value`` is a finite number, no bool, of at most this size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -most <= value <= most


def is_count(value: object) -> bool:
    """Return whether ``value`` is a number of images."""
    return is_number(value, LARGEST) and isinstance(value, int) and value >= 0


def is_share(value: object) -> bool:
    """Return whether ``value`` is None or lies in [0, 1]."""
    return value is None or (is_number(value) and 0 <= value <= 1)


def is_text(value: object, most: int = 80) -> bool:
    """Return whether ``value`` is a text of at most so many characters, none of which is a control character."""
    return isinstance(value, str) and len(value) <= most and value.isprintable()


def is_table(value: object) -> bool:
    """Return whether ``value`` is None or a mapping to numbers, some of which may be None."""
    return value is None or (isinstance(value, Mapping) and all(v is None or is_number(v) for v in value.values()))


def described(tensor: Tensor) -> str:
    """Return dtype and shape, e.g. ``float32 (8, 384)``."""
    return shown(f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch."))


def shown(text: object, most: int = 80) -> str:
    """Return a text from elsewhere as it may stand in a log: plain ASCII on one line, cut."""
    return re.sub(r"[^ -~]", "?", str(text)[:most])


def check_payload(method: Method, site: str, round_: int, payload: State) -> None:
    """Refuse a payload that holds a group the method does not declare, or a value that is not finite.

    Raises:
        UpdateRefusedError: naming site, round, group and tensor.
    """
    for group, tensors in payload.items():
        where = f"site {site}, round {round_}, group {group}"
        if group not in method.sends or group == "private":
            raise UpdateRefusedError(
                "a group that may not leave the site was about to be sent",
                where=where,
                fix=f"{method.name} may send only {', '.join(method.sends) or 'nothing'}",
                code="group-not-declared",
            )
        if tensors and not torch.isfinite(torch.cat([value.flatten() for value in tensors.values()])).all():
            name = next(name for name, value in tensors.items() if not torch.isfinite(value).all())
            raise UpdateRefusedError(
                "a tensor holds a value that is not finite",
                where=f"{where}, {name}",
                fix="lower train.lr",
                code="update-values",
            )
