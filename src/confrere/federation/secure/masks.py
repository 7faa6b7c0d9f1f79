"""Masks: ChaCha20 key streams (256-bit keys) read as unsigned 32-bit words, little end first.

Every key comes from :func:`confrere.federation.secure.keys.derive` for one session, so the nonce may be zero.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from confrere.federation.secure.keys import agree, derive

Words = NDArray[np.uint32]
"""Numbers modulo 2^32; sums wrap, which is what cancels masks exactly."""


def words(key: bytes, count: int) -> Words:
    """Return ``count`` words of the ChaCha20 key stream of ``key`` (32 bytes), counter and nonce zero. RFC 8439."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * count))
    return np.frombuffer(stream, dtype="<u4").astype(np.uint32, copy=False)


def self_mask(seed: bytes, session: str, count: int) -> Words:
    """Return a site's own mask (``count``,), which hides its vector from the server should it come after all."""
    return words(derive(seed, "self mask", session), count)


def pair_mask(private: bytes, public: bytes, session: str, site: str, other: str, count: int) -> Words:
    """Return what ``site`` adds for ``other`` (``count``,): what the other adds for it, negated."""
    first, second = sorted((site, other))
    stream = words(derive(agree(private, public, where=f"site {other}"), "pair mask", session, first, second), count)
    return stream if site == first else -stream
