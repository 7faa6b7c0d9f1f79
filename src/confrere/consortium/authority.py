"""The certificate authority of one consortium: it certifies the coordinator's server and signs kits."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from confrere.consortium.keys import pem

YEARS = 10
"""Life of an authority; what it signs ends before."""
CLOCKS = timedelta(hours=1)
"""What is made now is valid since then, for those whose clock is slow."""
_SIGN = ec.ECDSA(hashes.SHA384())


@dataclass(frozen=True)
class Authority:
    """A private key and the certificate that goes with it."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def consortium(self) -> str:
        """The name it was made for."""
        return str(self.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)

    def sign(self, content: bytes) -> bytes:
        """Return the signature (ECDSA with SHA-384, DER) that ``openssl dgst -sha384 -verify`` checks."""
        return self.key.sign(content, _SIGN)


def now() -> datetime:
    """Return the time in UTC, whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def new_authority(consortium: str) -> Authority:
    """Return a new authority: P-384, self-signed, for certificates of servers and signatures only."""
    key, start = ec.generate_private_key(ec.SECP384R1()), now()
    name = _name(consortium, "Confrere authority")
    builder = _builder(name, name, key, start, start + timedelta(days=365 * YEARS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True, digital_signature=True), critical=True)
    return Authority(key, builder.sign(key, hashes.SHA384()))


def new_server(authority: Authority, address: str, until: datetime) -> tuple[bytes, bytes]:
    """Return key and certificate (PEM) of a server that is reached by ``address``, a DNS name or IP address."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(authority.consortium, "Confrere coordinator")
    builder = _builder(subject, authority.certificate.subject, key, now(), until)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(_names(address)), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    certificate = builder.add_extension(issuer, critical=False).sign(authority.key, hashes.SHA384())
    return pem(key), certificate_pem(certificate)


def load_authority(key: bytes, certificate: bytes) -> Authority:
    """Return the authority of two PEM files.

    Raises:
        ValueError: they are damaged or do not belong together.
    """
    private, public = load_private(key), load_certificate(certificate)
    if public.public_key() != private.public_key():
        raise ValueError("key and certificate do not belong together")
    return Authority(private, public)


def load_private(content: bytes) -> ec.EllipticCurvePrivateKey:
    """Return the private key of a PEM file; ValueError where it holds no such key on an elliptic curve."""
    try:
        key = serialization.load_pem_private_key(content, None)
    except TypeError:
        raise ValueError("a private key with a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("no private key on an elliptic curve")
    return key


def load_certificate(content: bytes) -> x509.Certificate:
    """Return the certificate of a PEM file; ValueError where it holds none."""
    try:
        return x509.load_pem_x509_certificate(content)
    except x509.InvalidVersion:
        raise ValueError("a certificate of an unknown version") from None


def holds(certificate: x509.Certificate, content: bytes, signature: bytes) -> bool:
    """Return whether ``signature`` was made of ``content`` by the authority with this certificate."""
    try:
        key = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(signature, content, _SIGN)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True


def issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Return whether the authority signed the certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def covers(certificate: x509.Certificate, address: str) -> bool:
    """Return whether a server with this certificate may be reached by ``address``."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    return _names(address)[0] in names


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate in PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def certificate_fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate in hexadecimal digits, without the colons that openssl writes."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def colons(fingerprint: str) -> str:
    """Return a fingerprint as ``openssl x509 -noout -fingerprint -sha256`` writes it."""
    return ":".join(fingerprint[i : i + 2] for i in range(0, len(fingerprint), 2)).upper()


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, start: datetime, until: datetime
) -> x509.CertificateBuilder:
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(start - CLOCKS).not_valid_after(until)
    return made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _name(consortium: str, what: str) -> x509.Name:
    parts = {NameOID.ORGANIZATION_NAME: consortium, NameOID.COMMON_NAME: what}
    return x509.Name([x509.NameAttribute(kind, text) for kind, text in parts.items()])


def _usage(**allowed: bool) -> x509.KeyUsage:
    kinds = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    every = (*kinds, "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{kind: allowed.get(kind, False) for kind in every})


def _names(address: str) -> list[x509.GeneralName]:
    """Return ``address`` first; both names of this machine where it is one of them."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        ip = None
    names: list[x509.GeneralName] = [x509.DNSName(address.lower()) if ip is None else x509.IPAddress(ip)]
    if address.lower() == "localhost" or (ip is not None and ip.is_loopback):
        both = (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        names += [name for name in both if name not in names]
    return names
