"""What a check found: a level, what it is, where, and the fix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from confrere.errors import ConfrereError, RunError, printable

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One answer of one check.

    ``error``: a run would end with it, with this exit status and, where it raises one, with the error of this code.
    ``warning``: a run would go through, but not as one may think. No finding names a file with images or a patient.
    """

    level: Literal["ok", "warning", "error"]
    check: str
    what: str
    where: str = ""
    fix: str = ""
    exit_code: int = 0
    code: str = ""

    @classmethod
    def of(cls, check: str, error: ConfrereError) -> Finding:
        """Return the finding that a run would end with ``error``."""
        return cls("error", check, error.what, error.where, error.fix, error.exit_code, error.code)

    def line(self) -> str:
        """Return what a user reads: one line, and one for the fix."""
        place = f" [{self.where}]" if self.where else ""
        fix = f"\n{'':<20}Fix: {self.fix}" if self.fix else ""
        return printable(f"{self.level:<8}{self.check:<12}{self.what}{place}{fix}", keep="\n")


def attempt(check: str, action: Callable[[], T], found: list[Finding]) -> T | None:
    """Return what ``action`` returns; None, and one finding more, where a run would end with its error."""
    try:
        return action()
    except ConfrereError as error:
        found.append(Finding.of(check, error))
    except OSError as error:  # its text would name a file
        found.append(Finding("error", check, error.strerror or type(error).__name__, exit_code=RunError.exit_code))
    return None


def verdict(findings: Sequence[Finding]) -> int:
    """Return the exit status: 0 without errors, else that of the first."""
    return next((f.exit_code for f in findings if f.level == "error"), 0)


def summary(findings: Sequence[Finding]) -> str:
    """Return the last line."""
    errors, warnings = (sum(f.level == level for f in findings) for level in ("error", "warning"))
    return f"{errors} errors, {warnings} warnings: {'a run would not go through' if errors else 'a run can begin'}"
