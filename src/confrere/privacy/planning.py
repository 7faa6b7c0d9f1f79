"""What a plan costs: epsilon with and without amplification, and whether its noise leaves anything to learn."""

from __future__ import annotations

from typing import Any

from confrere.errors import ConfigError
from confrere.privacy.accounting import (
    calibrate_sigma,
    check_delta,
    epsilon,
    finite,
    noise_ratio,
    noise_verdict,
    refuse_hopeless,
    statement,
)

CONDITION = "only against those who cannot know who was drawn; whoever holds the seed of a run can derive it"


def plan(
    *, sigma: float, fraction: float, rounds: int, delta: float, sites: int, parameters: int, target: float = 0.0
) -> dict[str, Any]:
    """Return epsilon, noise and verdict of rounds that hide a whole hospital; an epsilon of None means no privacy.

    Args:
        sigma: noise in units of the clip, >= 0.
        fraction: chance of a hospital to be drawn in a round, in (0, 1].
        rounds: >= 1.
        delta: in (0, 1/sites).
        sites: hospitals, >= 1.
        parameters: numbers that a hospital sends a round, >= 0.
        target: epsilon whose sigma is wanted, 0 for none.

    Raises:
        ConfigError: a value out of range.
        MissingExtraError: dp-accounting is not installed.
    """
    check_delta(delta, sites)
    always: dict[str, Any] = {"rounds": rounds, "delta": delta, "sampling": "all"}
    drawn: dict[str, Any] = {"rounds": rounds, "delta": delta, "sampling": "poisson", "rate": fraction}
    plain, cohort = epsilon(sigma, **always), fraction * sites
    amplified = min(plain, epsilon(sigma, **drawn))
    found: dict[str, Any] = {
        "unit": "hospital",
        "neighbours": "add-remove",
        "sigma": sigma,
        "fraction": fraction,
        "rounds": rounds,
        "delta": delta,
        "sites": sites,
        "parameters": parameters,
        "epsilon": finite(plain),
        "conditional_epsilon": finite(amplified),
        "condition": CONDITION,
        "statement": statement(plain, **always),
        "conditional_statement": statement(amplified, **drawn),
        "noise_to_clip": noise_ratio(sigma, parameters, cohort),
        "verdict": noise_verdict(sigma, parameters, cohort),
        "warning": "",
    }
    try:
        refuse_hopeless(sigma, parameters, cohort)
    except ConfigError as error:
        found["warning"] = f"{error.code}: {error.fix}"
    if target:
        needed = calibrate_sigma(target, tolerance=0.01, **always)
        least = calibrate_sigma(target, tolerance=0.01, **drawn)
        found |= {"target": target, "sigma_for_target": needed, "conditional_sigma_for_target": min(least, needed)}
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """Return what :func:`plan` found, in sentences."""
    said = [
        f"Without amplification: {found['statement']}",
        f"With amplification, {found['condition']}: {found['conditional_statement']}",
        f"Noise to clip: {found['noise_to_clip']:.3g}. {found['verdict']}",
    ]
    if found["warning"]:
        said.append(f"Warning, {found['warning']}")
    if "target" in found:
        needed, least = found["sigma_for_target"], found["conditional_sigma_for_target"]
        said.append(
            f"For epsilon {found['target']:g}: sigma {needed:.2f} without amplification, {least:.2f} on that condition"
        )
    return said
