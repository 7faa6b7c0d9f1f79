"""What secure aggregation excludes, said before anything is trained."""

from __future__ import annotations

from confrere.choices import AttackChoice, FederationChoice, GateChoice
from confrere.errors import ConfigError, UpdateRefusedError
from confrere.federation.secure.client import threshold_of
from confrere.method import METHODS, Method


def hides(method: Method) -> bool:
    """Return whether a method sends anything that can be hidden; one that pools all images hides nothing."""
    return bool(method.sends) and not method.pools


def check_method(method: Method, *, unequal: bool) -> None:
    """Refuse a method that needs more than one weighted sum; what :func:`hides` nothing is let through.

    ``unequal``: sites have adapters of different ranks or depths, whose tensors cannot be added up.

    Raises:
        ConfigError: naming the key, with the fix.
    """
    if hides(method) and method.needs == "each":
        able = ", ".join(sorted(name for name, cls in METHODS.items() if hides(cls()) and cls().needs == "sum"))
        what = f"the server has to see each site's update for {method.name} with these options"
        raise ConfigError(what, where="secure.aggregation", fix=f"leave it out, or use one of: {able}", code="secure")
    if hides(method) and unequal:
        what, fix = "tensors of different ranks or depths cannot be added up", "give all sites one rank and one depth"
        raise ConfigError(what, where="secure.aggregation", fix=fix, code="secure")


def check_alone(federation: FederationChoice, gate: GateChoice, attack: AttackChoice) -> None:
    """Refuse all that looks at single updates.

    Raises:
        ConfigError: naming the key, with the fix.
    """
    size = "0 (secure.clip shortens changes at the site)"
    looks = {
        "federation.rule": (federation.rule != "mean", "mean"),
        "federation.canonical": (federation.canonical, "false"),
        "gate.norm": (gate.norm > 0, size),
        "gate.factor": (gate.factor > 0, size),
        "attack.sites": (bool(attack.sites), "[]"),
    }
    for key, (wanted, instead) in looks.items():
        if wanted:
            what = f"{key} has to see each site's update, which secure.aggregation hides"
            raise ConfigError(
                what, where=key, fix=f"leave secure.aggregation out, or use {key}={instead}", code="secure"
            )


def check_cohort(asked: int, threshold: int) -> None:
    """Refuse a threshold that ``asked`` sites a round cannot keep.

    Raises:
        ConfigError: naming ``secure.threshold``, with the fix.
    """
    try:
        threshold_of(asked, threshold)
    except UpdateRefusedError as error:
        fix = (
            f"use 0, or more than {asked / 2:g} and at most {asked}" if asked > 1 else "ask at least two sites a round"
        )
        raise ConfigError(error.what, where="secure.threshold", fix=fix, code="secure") from None
