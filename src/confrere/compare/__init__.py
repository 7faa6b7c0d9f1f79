"""Compare methods fairly: same data, split, backbone, total rank, steps and tuning; several seeds, paired tests."""

from confrere.compare.run import compare

__all__ = ["compare"]
