"""What is said of anonymised tables: what was checked, what not, and what it cost. Never that they are anonymous."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from confrere.anonymise.plan import Plan

NOT_CHECKED = (
    "whether the columns named as quasi-identifiers are all that an attacker knows: columns that are kept, and the "
    "target, are written and hidden by nothing",
    "what a class tells about the target of those in it: l and t below are counted, and not enforced",
    "whether a model that is trained on the table tells who was in it",
    "other releases: of the same patients at another site, of the same site at another time, or with another plan; "
    "each can be intersected with this one",
    "what knowing two records of one patient, or how records were classed, adds to what an attacker knows",
    "whether the cut points and trees of the plan were made without looking at patients",
    "free text, images, dates and names: only the columns of the plan were read",
    "what any law asks for",
)


def verified(plan: Plan, several: bool) -> list[str]:
    """Return what was checked by counting the cells that were written."""
    unit = plan.unit
    told = [f"every combination of quasi-identifiers in a table is shared by at least {plan.k} {unit}"]
    if plan.items:
        held = (
            f"every set of up to {plan.m} published items within such a combination is had by at least {plan.k} {unit}"
        )
        told.append(held)
    told.append("quasi-identifiers are written as public cut points and names of public trees only")
    if several:
        told.append("the same of all tables put together, each site's classes apart or not")
    return told


def as_statement(
    plan: Plan, sites: Mapping[str, Any], union: Mapping[str, Any], attacks: Mapping[str, Any], at: str
) -> dict[str, Any]:
    """Return the statement as JSON.

    Args:
        plan: what was asked.
        sites: site -> what was counted and lost there.
        union: what was counted of all tables together.
        attacks: name -> what an attack found, with its controls.
        at: when it was made.
    """
    asked = {
        "k": plan.k,
        "m": plan.m if plan.items else None,
        "unit": plan.unit,
        "identifiers": list(plan.identifiers),
        "items": plan.items or None,
        "kept": list(plan.keep),
        "target": plan.target,
    }
    return {
        "made": at,
        "plan": asked,
        "verified": verified(plan, len(sites) > 1),
        "not_verified": list(NOT_CHECKED),
        "sites": dict(sites),
        "union": dict(union),
        "attacks": dict(attacks),
    }


def as_markdown(statement: Mapping[str, Any]) -> str:
    """Return the statement for people to read."""
    plan = statement["plan"]
    items = f", and up to {plan['m']} items of `{plan['items']}`" if plan["items"] else ""
    lines = [
        "# What was checked of these tables, and what was not",
        "",
        f"Made {statement['made']}. Asked for: k = {plan['k']} {plan['unit']} for what an attacker may know: "
        f"{', '.join(f'`{name}`' for name in plan['identifiers'])}{items}. Target `{plan['target']}`; kept as they "
        f"are: {', '.join(f'`{name}`' for name in plan['kept']) or 'no other columns'}.",
        "",
        "Checked, by counting the rows that were written:",
        "",
        *(f"- {one}" for one in statement["verified"]),
        "",
        "**Not checked:**",
        "",
        *(f"- {one}" for one in statement["not_verified"]),
        "",
        "| table | rows | units | classes | smallest class | smallest item set | l | t | GCP | loss of items | moved |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in statement["sites"].items():
        lost = one["losses"]
        numbers = [one["rows"], one["units"], one["classes"], one["smallest_class"], one["smallest_support"]]
        numbers += [one["l"], f"{one['t']:.2f}", f"{lost['identifiers']:.2f}"]
        numbers += [f"{lost['items']:.2f}" if "items" in lost else None, one["outside"]]
        lines.append(f"| {name} | " + " | ".join("-" if number is None else str(number) for number in numbers) + " |")
    lines += [
        "",
        "l: least number of different targets in a class (1: the target of everybody in some class is told). t: "
        "largest distance between targets of a class and of the table, 0 to 1. GCP and loss of items: 0 nothing is "
        "lost, 1 all. moved: numbers beyond the public range, written as its end. These counts are the site's: share "
        "this page as you share the tables.",
    ]
    return "\n".join([*lines, *_attacks(statement["attacks"]), ""])


def _attacks(attacks: Mapping[str, Any]) -> list[str]:
    if not attacks:
        return ["", "No attack was tried: that needs two tables with some of the same patients, or `--strangers`."]
    lines = ["", "Attacks that were tried, beside their controls:", ""]
    for name, found in attacks.items():
        if "persons" in found:
            shown = "; ".join(
                f"{label}: points at the right row {found[key]['pointed']:.1%}, among fewer than k "
                f"{found[key]['below_k']:.1%}, target told {found[key]['told']:.1%}"
                for key, label in (("both", "both tables"), ("alone", "one alone"), ("stranger", "a stranger's rows"))
            )
            lines.append(f"- {name}, {found['persons']} of {found['shared']} persons in both: {shown}")
        else:
            shown = (
                f"{found['anonymised']:.2f}; the table before {found['raw']:.2f}, strangers {found['strangers']:.2f}"
            )
            lines.append(f"- {name}, area under the curve (0.5 is chance): {shown}")
    return lines
