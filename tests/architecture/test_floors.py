"""Floors of our dependencies: each has one, what is installed keeps it, and Flower's upper bounds leave room for it."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
UPPER = ("<", "<=", "==", "~=")
PINNED = {"rich": "<15.0.0", "typer": "<0.21.0", "packaging": "<26.0", "protobuf": "<7.0.0", "click": "<9.0.0"}
"""Some of what Flower 1.42 asks for, with which the rule below is itself tested."""


def floor(requirement: Requirement) -> str:
    """Return the least version that a requirement allows; an empty string when it has no floor."""
    return next((part.version for part in requirement.specifier if part.operator == ">="), "")


def too_high(ours: list[Requirement], theirs: list[Requirement]) -> list[str]:
    """Return each of our floors that an upper bound of theirs does not allow."""
    bounds: dict[str, SpecifierSet] = {}
    for one in theirs:
        upper = SpecifierSet(",".join(str(part) for part in one.specifier if part.operator in UPPER))
        bounds[canonicalize_name(one.name)] = bounds.get(canonicalize_name(one.name), SpecifierSet()) & upper
    asked = [(one, bounds.get(canonicalize_name(one.name), SpecifierSet())) for one in ours if floor(one)]
    return [f"{one}, but theirs is {upper}" for one, upper in asked if not upper.contains(floor(one), prereleases=True)]


@pytest.mark.parametrize("requirement", OURS, ids=lambda requirement: requirement.name)
def test_every_dependency_has_a_floor_that_is_kept(requirement: Requirement) -> None:
    assert floor(requirement)
    assert requirement.specifier.contains(version(requirement.name), prereleases=True)


def test_flower_leaves_room_for_our_floors() -> None:
    try:
        theirs = [Requirement(line) for line in requires("flwr") or ()]
    except PackageNotFoundError:
        pytest.skip("flwr is not installed")
    used = [one for one in theirs if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert {canonicalize_name(one.name) for one in used} >= {"rich", "typer", "packaging", "cryptography"}
    assert too_high([*OURS, *EXTRAS], used) == []


@pytest.mark.parametrize("name", sorted(PINNED))
def test_a_floor_above_an_upper_bound_is_found(name: str) -> None:
    bound = PINNED[name]
    theirs = [Requirement(f"{name}{bound}")]
    assert too_high([Requirement(f"{name}>={bound[1:]}")], theirs)
    assert not too_high([Requirement(f"{name}>=0.1")], theirs)
