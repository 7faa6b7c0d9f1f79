"""Shamir's secret sharing: any ``threshold`` of n shares give the secret, fewer say nothing about it.

A. Shamir, How to share a secret, Communications of the ACM 22, 1979. Secrets are 32 bytes, so the field is that of the
integers modulo the smallest prime above 2^256.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**256 + 297
SHARE = 33
"""Bytes of a share."""


def split(secret: bytes, holders: Sequence[int], threshold: int) -> dict[int, bytes]:
    """Return a share (33 bytes) for each of ``holders``, distinct numbers from 1: a random polynomial's values there.

    Raises:
        ValueError: the secret is not of 32 bytes, or threshold or holders are not possible.
    """
    if len(secret) != 32 or not 1 <= threshold <= len(set(holders)) or min(holders) < 1:
        raise ValueError("a secret of 32 bytes is split among at least as many holders as are needed, from number 1")
    polynomial = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {x: _value(polynomial, x).to_bytes(SHARE, "big") for x in holders}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of exactly as many shares as are needed, each under its holder's number.

    With wrong shares, or too few, it is a wrong one.

    Raises:
        ValueError: a share is no number of the field, or what comes out is longer than 32 bytes.
    """
    total = 0
    for x, share in shares.items():
        value = int.from_bytes(share, "big")
        if len(share) != SHARE or value >= PRIME:
            raise ValueError("a share is no number of the field")
        above = below = 1
        for other in shares:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        total += value * above * pow(below, -1, PRIME)
    secret = total % PRIME
    if secret >> 256:
        raise ValueError("the shares are those of no secret")
    return secret.to_bytes(32, "big")


def _value(polynomial: Sequence[int], x: int) -> int:
    """Return the polynomial, constant first, at ``x``."""
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value
