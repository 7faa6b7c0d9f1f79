"""Keys of a consortium: P-384 for nodes and the authority, Ed25519 for what sites sign; nothing here is printed."""

from __future__ import annotations

import base64
import hashlib

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

Private = ec.EllipticCurvePrivateKey | Ed25519PrivateKey
CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
"""Curves of node keys: those of NIST that Flower takes, but for the two that are too short."""


def new_node_key() -> bytes:
    """Return a new P-384 private key as an OpenSSH file, which Flower's node takes."""
    return _private(ec.generate_private_key(ec.SECP384R1()), serialization.PrivateFormat.OpenSSH)


def new_identity_key() -> bytes:
    """Return a new Ed25519 private key in PEM, which signs a site's messages."""
    return pem(Ed25519PrivateKey.generate())


def node_public(content: bytes) -> str:
    """Return the public half, as OpenSSH writes it without a comment, of a private node key.

    Raises:
        ValueError: not an OpenSSH private key on one of :data:`CURVES` without a password.
    """
    try:
        key = serialization.load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: one with a password
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, CURVES):
        raise ValueError("no OpenSSH private key on a NIST curve without a password")
    return _openssh(key.public_key())


def parse_node_public(content: bytes) -> str:
    """Return an OpenSSH public node key without its comment.

    Raises:
        ValueError: not an OpenSSH public key on one of :data:`CURVES`.
    """
    try:
        key = serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, CURVES):
        raise ValueError("no OpenSSH public key on a NIST curve")
    return _openssh(key)


def node_pem(public: str) -> bytes:
    """Return an OpenSSH public node key in PEM, as Flower's nodes send theirs."""
    key = serialization.load_ssh_public_key(public.encode())
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def identity_public(content: bytes) -> str:
    """Return the public half in base64 of a private identity key.

    Raises:
        ValueError: not an Ed25519 private key in PEM without a password.
    """
    try:
        key = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("no Ed25519 private key in PEM without a password")
    return _raw(key.public_key())


def parse_identity_public(content: bytes) -> str:
    """Return a public identity key in base64.

    Raises:
        ValueError: not an Ed25519 public key in PEM.
    """
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("no Ed25519 public key in PEM")
    return _raw(key)


def identity_pem(public: str) -> bytes:
    """Return a public identity key, given in base64, in PEM."""
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public))
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def fingerprint(public: str) -> str:
    """Return the fingerprint of an OpenSSH public key, as ``ssh-keygen -lf FILE`` shows it."""
    digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def pem(key: Private) -> bytes:
    """Return a private key in PEM (PKCS #8), without a password: the mode of its file protects it."""
    return _private(key, serialization.PrivateFormat.PKCS8)


def _private(key: Private, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _openssh(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _raw(key: Ed25519PublicKey) -> str:
    return base64.b64encode(key.public_bytes_raw()).decode()
