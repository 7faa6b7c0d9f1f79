"""How good a model is at each hospital, how sure that is, and whether one model beats another."""

from confrere.metrics.across_sites import summary
from confrere.metrics.calibration import calibration_note, ece, fit_temperature, reliability
from confrere.metrics.classification import evaluate, score
from confrere.metrics.paired import holm, paired_gain, verdict

__all__ = [
    "calibration_note",
    "ece",
    "evaluate",
    "fit_temperature",
    "holm",
    "paired_gain",
    "reliability",
    "score",
    "summary",
    "verdict",
]
