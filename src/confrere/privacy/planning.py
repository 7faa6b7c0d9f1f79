"""What a plan costs: epsilon with and without amplification, and whether its noise leaves anything to learn."""

from __future__ import annotations

import math
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

FINE, HOPELESS = 0.3, 2.0
"""Of a site's noise to the longest way of its gradients: below the first little is lost; above the second, nothing is
learnt by a site alone."""
CONDITION = "only against those who cannot know who was drawn; whoever holds the seed of a run can derive it"


def plan(
    *, sigma: float, fraction: float, rounds: int, delta: float, sites: int, parameters: int, target: float = 0.0
) -> dict[str, Any]:
    """Return epsilon, noise and verdict of rounds that hide a whole hospital; an epsilon of None means no privacy.

    Args:
        sigma: noise in units of the clip, >= 0.
        fraction: chance of a hospital to be drawn in a round, in (0, 1].
        rounds: >= 1.
        delta: in (0, 0.1/sites].
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


def plan_units(
    *, unit: str, sigma: float, records: int, batch: int, steps: int, delta: float, parameters: int, target: float = 0.0
) -> dict[str, Any]:
    """Return epsilon, noise and verdict of one site's noisy steps; an epsilon of None means no privacy.

    Args:
        unit: ``record`` or ``patient``.
        sigma: noise in units of the clip, >= 0; 0 with a target takes the least that meets it.
        records: training images (or patients) of the site, >= 1.
        batch: of which so many are expected in a step, >= 1.
        steps: of the whole run: rounds times local steps.
        delta: in (0, 0.1/records].
        parameters: numbers that are trained and sent, >= 0.
        target: epsilon whose sigma is wanted, 0 for none.

    Raises:
        ConfigError: a value out of range.
        MissingExtraError: dp-accounting is not installed.
    """
    one_of_units = {"record": "images", "patient": "patients"}
    if unit not in one_of_units or batch < 1:
        what = f"no plan for the unit {unit!r:.20} and a batch of {batch}"
        raise ConfigError(what, where="privacy.unit", fix="use record or patient, and batch >= 1")
    check_delta(delta, records, one_of_units[unit])
    rate = min(1.0, batch / records)
    options: dict[str, Any] = {"rounds": steps, "delta": delta, "rate": rate}
    needed = calibrate_sigma(target, tolerance=2e-3, **options) if target else 0.0
    used = sigma or needed
    value, ratio = epsilon(used, **options), noise_ratio(used, parameters, rate * records * math.sqrt(steps))
    found: dict[str, Any] = {"unit": unit, "neighbours": "add-remove", "sigma": used, "rate": rate, "steps": steps}
    found |= {"delta": delta, "records": records, "parameters": parameters, "epsilon": finite(value)}
    found["statement"] = statement(value, unit=f"one {unit} of a site", **options).replace("rounds", "steps")
    found |= {"noise_to_signal": ratio, "verdict": _verdict(ratio, records)}
    return found | ({"target": target, "sigma_for_target": needed} if target else {})


def _verdict(ratio: float, records: int) -> str:
    """Return in plain words whether a site's noise leaves anything to learn.

    The ratio sets the noise of all steps against the longest way that clipped gradients could go if all agreed; they
    never do. The bounds are rules of thumb, not measured.
    """
    said = f"Noise of all steps is {ratio:.2g} times as long as the longest way that clipped gradients could go."
    if ratio <= FINE:
        return f"{said} That can work."
    need = math.ceil(records * ratio / FINE)
    if ratio <= HOPELESS:
        return f"{said} Expect a loss of accuracy; about {need:,} at this site would bring it down to {FINE:g}."
    return (
        f"{said} This level is out of reach here: about {need:,} at this site would be needed for {FINE:g}. Send fewer "
        "numbers (a smaller rank, fewer blocks, A frozen), or take a larger epsilon; more steps do not help."
    )


def unit_lines(found: dict[str, Any]) -> list[str]:
    """Return what :func:`plan_units` found, in sentences."""
    said = [found["statement"], f"sigma {found['sigma']:.3f}. {found['verdict']}"]
    if "target" in found:
        said.append(f"For epsilon {found['target']:g}: sigma {found['sigma_for_target']:.3f}")
    return said


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
