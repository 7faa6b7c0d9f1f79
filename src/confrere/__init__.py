"""Confrere: hospitals fine-tune one frozen vision foundation model together.

>>> import confrere
>>> experiment = confrere.validate({"path": "hospitals", "method": {"name": "fedopal"}})  # doctest: +SKIP
>>> verdicts = confrere.run_experiment(experiment, Path("run"))  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from confrere.config import Experiment, validate
    from confrere.errors import ConfrereError
    from confrere.job import run_experiment
    from confrere.method import METHODS, Method, make, register
    from confrere.predict import Predictor
    from confrere.report import write_report

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "ConfrereError",
    "Experiment",
    "Method",
    "Predictor",
    "make",
    "register",
    "run_experiment",
    "validate",
    "write_report",
]

_HOMES = {
    "METHODS": "method",
    "ConfrereError": "errors",
    "Experiment": "config",
    "Method": "method",
    "Predictor": "predict",
    "make": "method",
    "register": "method",
    "run_experiment": "job",
    "validate": "config",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that ``confrere --help`` need not wait for PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'confrere' has no attribute {name!r}")
    return getattr(import_module(f"confrere.{_HOMES[name]}"), name)
