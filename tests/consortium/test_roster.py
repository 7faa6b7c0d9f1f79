"""A roster says who takes part, or which key is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from consortium_kits import ROSTER, roster

from confrere.consortium.roster import read
from confrere.errors import ConfrereError


def test_a_roster_is_read(tmp_path: Path) -> None:
    found = read(roster(tmp_path, port=443))
    assert [site.name for site in found.sites] == ["north", "south"]
    assert (found.name, found.address, found.port) == ("Skin", "localhost", 443)
    assert (found.classes, found.valid_days) == (("benign", "malignant"), 90)


@pytest.mark.parametrize("address", ["coordinator.example.org", "10.0.0.7", "2001:db8::7", "localhost", "a-b"])
def test_names_and_addresses_are_taken(tmp_path: Path, address: str) -> None:
    assert read(roster(tmp_path, ROSTER.replace('"localhost"', f'"{address}"'))).address == address


@pytest.mark.parametrize(
    ("old", "new", "code", "named"),
    [
        ('"localhost"', '"https://host"', "value", "address"),
        ('"localhost"', '"host:443"', "value", "address"),
        ('"localhost"', '"0.0.0.0"', "value", "address"),
        ('"localhost"', '"10.0.0.300"', "value", "address"),
        ('"localhost"', '"under_score"', "value", "address"),
        ('"localhost"', '"-a.org"', "value", "address"),
        ("{port}", "0", "value", "port"),
        ("{port}", "65536", "value", "port"),
        ("{port}", "true", "value", "port"),
        ("90", "826", "value", "valid_days"),
        ("90", "0", "value", "valid_days"),
        ("90", "90.5", "value", "valid_days"),
        ('name = "Skin"', 'name = ""', "value", "name"),
        ('name = "Skin"', 'name = "a\\nb"', "value", "control characters"),
        ('name = "Skin"', "", "missing-key", "name"),
        ("valid_days", "valid_dais", "unknown-key", "valid_days"),
        ("organisation", "organization", "unknown-key", "organisation"),
        ('"north"', '"North"', "site-name", "sites.name"),
        ('"north"', '"../north"', "site-name", "sites.name"),
        ('"north"', '"pooled"', "site-name", "sites.name"),
        ('"north"', '"south"', "named-twice", "sites"),
        ('["benign", "malignant"]', '["benign"]', "value", "classes"),
        ('["benign", "malignant"]', '["benign", "benign"]', "named-twice", "classes"),
        ('["benign", "malignant"]', '["benign", "a/b"]', "class-name", "classes"),
        ('organisation = "North General"', 'public_key = "node.pub"', "value", "identity_key"),
        ("[[sites]]", "[sites]", "not-toml", "consortium.toml"),
        ('[[sites]]\nname = "south"', "", "value", "sites"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, old: str, new: str, code: str, named: str) -> None:
    assert old in ROSTER
    path = roster(tmp_path, ROSTER.replace(old, new))
    with pytest.raises(ConfrereError) as caught:
        read(path)
    error = caught.value
    assert error.code == code
    assert named in str(error)
    assert str(path) in error.where
    assert error.fix


def test_a_roster_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfrereError) as caught:
        read(tmp_path / "none.toml")
    assert caught.value.code == "unreadable-file"
