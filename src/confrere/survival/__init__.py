"""Time to an event: losses for networks, and curves from what they put out.

Time is cut at public edges ``0 = e_0 < ... < e_K = horizon`` in the data's own unit. Edges are given, or equal steps:
nothing is fitted on several sites' patients.
"""

from confrere.survival.curves import (
    Baseline,
    breslow,
    check_edges,
    cox_curves,
    discretise,
    edge_survival,
    equal_edges,
    interpolate,
    restricted_mean,
)
from confrere.survival.losses import cox, deephit, deephit_likelihood, logistic_hazard, names, objective, outputs

__all__ = [
    "Baseline",
    "breslow",
    "check_edges",
    "cox",
    "cox_curves",
    "deephit",
    "deephit_likelihood",
    "discretise",
    "edge_survival",
    "equal_edges",
    "interpolate",
    "logistic_hazard",
    "names",
    "objective",
    "outputs",
    "restricted_mean",
]
