"""Keys of one session: X25519 agreement, HKDF-SHA256, ChaCha20Poly1305 envelopes, Ed25519 signatures.

Everything comes from the package ``cryptography`` (extra ``sign``), imported when first used. Private keys are 32 raw
bytes from the operating system's generator; they live in memory only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from confrere.errors import MissingExtraError, UpdateRefusedError
from confrere.record.signing import load_key

SIZE = 32
"""Bytes of every key, seed and shared secret."""
_ONCE = bytes(12)
"""The nonce of an envelope: its key is derived for one session, one direction and one message."""


@dataclass(frozen=True)
class Identity:
    """The long-lived Ed25519 key by which a site is known; ``public`` (32 bytes) stands in everybody's roster."""

    public: bytes
    _private: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> Identity:
        """Return a new identity, e.g. for a run in one process.

        Raises:
            MissingExtraError: the package cryptography is not installed.
        """
        require()
        return cls._of(os.urandom(SIZE))

    @classmethod
    def load(cls, pem: bytes, *, where: str = "") -> Identity:
        """Return the identity of a PEM file's content (PKCS8, without a password).

        Raises:
            ConfigError: it is no private Ed25519 key.
            MissingExtraError: the package cryptography is not installed.
        """
        require()
        fix = "openssl genpkey -algorithm ed25519 -out identity.key"
        key = load_key(pem, private=True, where=where, fix=fix)
        return cls._of(key.private_bytes_raw())

    @classmethod
    def _of(cls, private: bytes) -> Identity:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return cls(Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw(), private)

    def sign(self, body: bytes) -> bytes:
        """Return the signature (64 bytes) of ``body``."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self._private).sign(body)


def require() -> None:
    """Raise MissingExtraError unless the package ``cryptography`` is installed."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise MissingExtraError("cryptography", "sign", needed_for="secure aggregation") from None


def verify(public: bytes, signature: bytes, body: bytes, *, where: str) -> None:
    """Refuse a signature that does not hold for ``body`` under the identity ``public``."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, body)
    except (InvalidSignature, ValueError):
        what, fix = "a signature does not hold", "compare the roster's public identity with the site's own"
        raise UpdateRefusedError(what, where=where, fix=fix, code="secure-signature") from None


def public_of(private: bytes) -> bytes:
    """Return the X25519 public key (32 bytes) of ``private``."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, *, where: str = "") -> bytes:
    """Return the shared secret (32 bytes) of two sites; a public key of small order is refused. RFC 7748."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        what, fix = "a public key agrees on no secret", "find out who sent it"
        raise UpdateRefusedError(what, where=where, fix=fix, code="secure-message") from None


def derive(secret: bytes, *purpose: str) -> bytes:
    """Return a key (32 bytes) for one purpose; equal parts in equal order give equal keys. HKDF-SHA256, RFC 5869."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    parts = [part.encode() for part in ("confrere secure 1", *purpose)]
    info = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return HKDF(SHA256(), SIZE, salt=None, info=info).derive(secret)


def seal(key: bytes, plain: bytes) -> bytes:
    """Return ``plain`` encrypted and authenticated under a key that seals nothing else. ChaCha20Poly1305, RFC 8439."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).encrypt(_ONCE, plain, None)


def unseal(key: bytes, sealed: bytes, *, where: str) -> bytes:
    """Return what was sealed; a changed byte is refused."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(_ONCE, sealed, None)
    except InvalidTag:
        what, fix = "a sealed message was changed, or is for somebody else", "find out what changed it on its way"
        raise UpdateRefusedError(what, where=where, fix=fix, code="secure-sealed") from None
