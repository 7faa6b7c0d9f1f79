"""Ed25519 signatures of a journal: made when a key is given, checked by ``confrere verify``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from confrere.errors import ConfigError, MissingExtraError

VARIABLE = "CONFRERE_SIGNING_KEY"
"""Environment variable that names the PEM file of a private key (``openssl genpkey -algorithm ed25519``)."""


def sign(head: str) -> dict[str, Any] | None:
    """Return the event that signs the hash ``head``, None when no key is given.

    Raises:
        ConfigError: the key cannot be read, is no Ed25519 key, or others may read its file.
        MissingExtraError: the package cryptography is not installed.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    where, fix = f"${VARIABLE}", "make one with: openssl genpkey -algorithm ed25519 -out key.pem; chmod 600 key.pem"
    try:
        path = Path(name)
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise ConfigError(
                "others may read the signing key", where=where, fix=f"chmod 600 {name}", code="signing-key"
            )
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the signing key cannot be read: {error.strerror}", where=where, fix=fix, code="signing-key"
        ) from None
    key = load_key(content, private=True, where=where, fix=fix)
    return {"event": "signature", "of": head, "signature": key.sign(head.encode()).hex(), "key": _public(key)}


def is_signed(event: dict[str, Any], public: bytes | None = None) -> bool:
    """Return whether a signature event is valid, made with the key of the PEM file ``public`` where one is given.

    Raises:
        ConfigError: ``public`` is no public Ed25519 key.
        MissingExtraError: the package cryptography is not installed.
    """
    _crypto()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(event["key"]))
        key.verify(bytes.fromhex(event["signature"]), str(event["of"]).encode())
    except (InvalidSignature, KeyError, TypeError, ValueError):
        return False
    if public is None:
        return True
    fix = "openssl pkey -in key.pem -pubout -out public.pem"
    return bool(
        load_key(public, private=False, where="--public-key", fix=fix).public_bytes_raw() == key.public_bytes_raw()
    )


def load_key(content: bytes, *, private: bool, where: str, fix: str) -> Any:
    """Return the Ed25519 key of a PEM file's content.

    Raises:
        ConfigError: it is none, or has a password.
        MissingExtraError: the package cryptography is not installed.
    """
    _crypto()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    try:
        key: Any = (
            serialization.load_pem_private_key(content, None) if private else serialization.load_pem_public_key(content)
        )
    except (ValueError, TypeError):  # no PEM; or one with a password
        key = None
    if not isinstance(key, Ed25519PrivateKey if private else Ed25519PublicKey):
        kind = "a private" if private else "a public"
        raise ConfigError(
            f"the file is not {kind} Ed25519 key without a password, in PEM", where=where, fix=fix, code="signing-key"
        )
    return key


def _public(key: Any) -> str:
    return str(key.public_key().public_bytes_raw().hex())


def _crypto() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise MissingExtraError("cryptography", "sign", needed_for="a signed journal") from None
