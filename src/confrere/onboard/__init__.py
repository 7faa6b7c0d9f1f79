"""A hospital that arrives after training: which of the federation's adapters serves it, by a few labelled images.

Candidates are the general model, the best single site's, and convex mixtures of all sites', each as it is and with its
head refitted; against them stands training alone on the same images with as many steps. The choice is made by
cross-validation on the few images; all others are the test set and are looked at once.
"""

from confrere.onboard.job import onboard
from confrere.onboard.table import table

__all__ = ["onboard", "table"]
