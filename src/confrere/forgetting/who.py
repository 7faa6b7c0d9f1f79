"""Whom to forget: one site, or patients as the user's table names them. Their names go into no file of a run."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from confrere.data.paths import slug
from confrere.data.table import read_rows
from confrere.errors import ConfigError, DataError

SALT = "certificate.salt"


@dataclass(frozen=True, kw_only=True)
class Whom:
    """A ``site`` (its slug), or ``patients`` by name; never both, never neither."""

    site: str = ""
    patients: frozenset[str] = field(default=frozenset(), repr=False)

    def title(self) -> str:
        """Return what a user reads; of patients only how many."""
        return f"site {self.site}" if self.site else f"{len(self.patients)} patients"


def whom(site: str | None, patients: Path | None) -> Whom:
    """Return what two options of the command line mean.

    Raises:
        ConfigError: both or neither was given.
        DataError: the list cannot be read, or names nobody.
    """
    if (site is None) == (patients is None):
        fix = "give --site NAME, or --patients LIST.csv"
        raise ConfigError("one site or one list of patients is forgotten", where="forget", fix=fix, code="forgetting")
    return Whom(site=slug(site)) if site is not None else Whom(patients=read_list(patients or Path()))


def read_list(path: Path) -> frozenset[str]:
    """Return the names in the column ``patient`` (or ``lesion``) of a CSV, as the table of the data has them.

    Raises:
        DataError: no such column, or no name in it; lines are named, names are not.
    """
    found: set[str] = set()
    for line, cells in read_rows(path, ()):
        column = next((name for name in ("patient", "lesion") if name in cells), None)
        if column is None:
            fix = "name the column 'patient' (or 'lesion'), as in the table of the data"
            raise DataError("the list has no column of patients", where=path.name, fix=fix, code="table-header")
        if not cells[column]:
            raise DataError(f"line {line}: {column} is empty", where=path.name, fix="mend the line", code="table-rows")
        found.add(cells[column])
    if not found:
        fix = "write 'patient' in the first line and one name in each other"
        raise DataError("the list names no patient", where=path.name, fix=fix, code="table-rows")
    return frozenset(found)


def told(who: Whom, pictures: int, salt: str) -> dict[str, Any]:
    """Return what a certificate says of who was forgotten: a site's name; of patients how many, and a keyed digest.

    The digest is HMAC-SHA-256 over the sorted names with the salt as its key. Without the salt, which stays in a file
    of its own, nobody can try names against it; who has the salt and the list can show that they belong together.
    """
    if who.site:
        return {"kind": "site", "site": who.site, "pictures": pictures}
    return {
        "kind": "patients",
        "patients": len(who.patients),
        "pictures": pictures,
        "digest": digest(who.patients, salt),
    }


def digest(patients: frozenset[str], salt: str) -> str:
    """Return HMAC-SHA-256 over the sorted names, hexadecimal."""
    text = "\x1f".join(sorted(patients)).encode()
    return hmac.new(bytes.fromhex(salt), text, hashlib.sha256).hexdigest()


def new_salt() -> str:
    """Return 32 bytes from the operating system, hexadecimal: one that a seed gives could be guessed."""
    return secrets.token_hex(32)


def is_of(certificate: Mapping[str, Any], patients: frozenset[str], salt: str) -> bool:
    """Return whether a certificate is about exactly these patients."""
    said = str(certificate["forgotten"].get("digest", ""))
    return hmac.compare_digest(said, digest(patients, salt))
