"""Every error Confrere raises, on one screen.

ConfrereError            exit code 1   anything below
├── ConfigError          2   an experiment, option or combination of options is wrong
├── DataError            3   images, labels, tables or splits are wrong
├── BackboneError        4   weights are unknown, unreachable or not the expected ones
├── RunError             5   a run directory is locked, damaged, foreign or does not match
├── UpdateRefusedError   6   a message between site and server breaks the rules
├── TrainingError        7   local training diverged
├── MissingExtraError    8   an optional package is not installed
├── NetworkError         9   a certificate, key, port or clock is wrong, or the other side cannot be reached
├── PolicyError         10   a site's own policy forbids what is asked
└── GuaranteeError      11   an attack is stronger than the run's differential privacy allows

Each says what is wrong, where, and how to mend it; none quotes a file's contents or a patient identifier.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection


class ConfrereError(Exception):
    """Base class: ``what`` is wrong, ``where`` (file, site, round, key), how to ``fix`` it, and a stable ``code``.

    Codes are listed in ``docs/errors.md``; one that is not given is the class's own.
    """

    exit_code = 1
    code = "internal"

    def __init__(self, what: str, *, where: str = "", fix: str = "", code: str = "") -> None:
        self.what, self.where, self.fix, self.code = what, where, fix, code or type(self).code
        super().__init__(self.reason + (f"\n  Fix: {fix}" if fix else ""))

    @property
    def reason(self) -> str:
        """What is wrong and where, on one line."""
        return self.what + (f" [{self.where}]" if self.where else "")


class ConfigError(ConfrereError):
    """An experiment, option or combination of options is wrong."""

    exit_code = 2
    code = "value"


class DataError(ConfrereError):
    """Images, labels, tables or splits are wrong."""

    exit_code = 3


class BackboneError(ConfrereError):
    """Backbone weights are unknown, unreachable or not the expected ones."""

    exit_code = 4


class RunError(ConfrereError):
    """A run directory is locked, damaged, foreign or does not match what is asked."""

    exit_code = 5


class UpdateRefusedError(ConfrereError):
    """A message between a site and the server breaks the rules."""

    exit_code = 6


class TrainingError(ConfrereError):
    """Local training diverged."""

    exit_code = 7
    code = "diverged"


class MissingExtraError(ConfrereError):
    """An optional package is not installed."""

    exit_code = 8
    code = "missing-extra"

    def __init__(self, package: str, extra: str, *, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed",
            fix=f"pip install 'confrere[{extra}]'",
        )


class NetworkError(ConfrereError):
    """A certificate, key, kit, port or clock is wrong, or the other side cannot be reached or refuses."""

    exit_code = 9


class PolicyError(ConfrereError):
    """A site's own policy forbids what is asked; nothing leaves the site."""

    exit_code = 10


class GuaranteeError(ConfrereError):
    """An attack is stronger than the run's differential privacy allows: it, or its implementation, is wrong."""

    exit_code = 11
    code = "above-bound"


def printable(text: str, keep: str = "") -> str:
    """Return ``text`` without control characters but those in ``keep``: a file's name must not steer the terminal."""
    return "".join(char if char.isprintable() or char in keep else "\ufffd" for char in text)


def nearest(word: str, choices: Collection[str]) -> str:
    """Return a hint naming the valid choice nearest to ``word``, or all of them."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(sorted(choices)) or 'none'}"
