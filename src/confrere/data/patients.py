"""Whose an image is, where neither a table nor a file's name says so: DICOM files name their patient."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from confrere import intake
from confrere.data.decode import BYTES_BESIDE, BadImageError
from confrere.data.dicom import is_dicom, patient_key
from confrere.data.sources import Row


def with_patients(hashes: Mapping[Row, str]) -> dict[Row, str]:
    """Return the rows, those without a patient with a key made of the number in their DICOM file, if it holds one.

    Keys are salted anew in every process, so that they say nothing but which files are of one patient. Of a series the
    first slice speaks.

    Raises:
        MissingExtraError: pydicom is not installed.
    """
    salt = secrets.token_bytes(16)
    return {
        row if row.patient else replace(row, patient=_key(row.path, salt)): digest for row, digest in hashes.items()
    }


def _key(path: Path, salt: bytes) -> str | None:
    try:
        if path.is_dir():
            path = min(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        with intake.open_file(path) as file:
            head = file.read(132)
            return patient_key(head + file.read(BYTES_BESIDE - len(head)), salt) if is_dicom(head) else None
    except (OSError, ValueError, BadImageError):
        return None  # it cannot be decoded either, and is then left out by name
