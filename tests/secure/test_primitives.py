"""The parts alone: known answers of the standards, sharing against linear algebra, integers that never wrap."""

from __future__ import annotations

import ast
import hashlib
import hmac
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import nextprime

import confrere.federation.secure as package
from confrere.errors import ConfigError, MissingExtraError, UpdateRefusedError
from confrere.federation.secure import keys, masks, quantise, shamir
from confrere.federation.secure.keys import Identity

SOURCE = sorted(Path(package.__file__).parent.glob("*.py"))


def test_masks_are_the_key_stream_of_rfc_8439() -> None:
    """Appendix A.1, vectors 1 and 2: block counters 0 and 1 of the zero key."""
    blocks = (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    found = masks.words(bytes(32), 32)
    assert found.dtype == np.uint32
    assert int(found[0]) == 0xADE0B876  # little end first
    assert found.astype("<u4").tobytes().hex() == blocks


def test_agreement_gives_the_answers_of_rfc_7748() -> None:
    """Section 5.2, first vector; section 6.1."""
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    assert keys.agree(scalar, point).hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert keys.public_of(bob).hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    assert keys.agree(bob, alice).hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    with pytest.raises(UpdateRefusedError) as caught:
        keys.agree(bob, bytes(32), where="site a")  # a point of small order: the secret would be known to all
    assert caught.value.code == "secure-message"


def test_keys_are_derived_as_rfc_5869_says() -> None:
    """Appendix A.3, without salt and info; then our own purposes against HMAC alone."""
    known = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    assert HKDF(SHA256(), 42, salt=None, info=b"").derive(b"\x0b" * 22).hex() == known
    secret, parts = b"s" * 32, [b"confrere secure 1", b"pair mask", b"token"]
    info = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    extracted = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    assert keys.derive(secret, "pair mask", "token") == hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()
    assert keys.derive(secret, "a", "bc") != keys.derive(secret, "ab", "c")


def test_envelopes_are_those_of_rfc_8439_and_open_only_unchanged() -> None:
    """Section 2.8.2; then every byte of one of ours changed."""
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
        b"sunscreen would be it."
    )
    key, nonce = bytes(range(0x80, 0xA0)), bytes.fromhex("070000004041424344454647")
    sealed = ChaCha20Poly1305(key).encrypt(nonce, text, bytes.fromhex("50515253c0c1c2c3c4c5c6c7"))
    assert sealed[-16:].hex() == "1ae10b594f09e26a7e902ecbd0600691"
    ours = keys.seal(key, b"two shares")
    assert ours == ChaCha20Poly1305(key).encrypt(bytes(12), b"two shares", None)
    assert keys.unseal(key, ours, where="") == b"two shares"
    for place in range(len(ours)):
        changed = bytearray(ours)
        changed[place] ^= 1
        with pytest.raises(UpdateRefusedError) as caught:
            keys.unseal(key, bytes(changed), where="site a")
        assert caught.value.code == "secure-sealed"


def test_identities_sign_as_rfc_8032_says_and_load_from_pem(tmp_path: Path) -> None:
    """Section 7.1, test 1."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    raw = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    key = Ed25519PrivateKey.from_private_bytes(raw)
    identity = Identity.load(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    assert identity.public.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    signature = identity.sign(b"")
    assert signature.hex() == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )
    keys.verify(identity.public, signature, b"", where="")
    with pytest.raises(UpdateRefusedError) as caught:
        keys.verify(identity.public, signature, b"x", where="site a")
    assert caught.value.code == "secure-signature"
    assert raw.hex() not in repr(identity)
    assert "private" not in repr(identity)
    for wrong in (b"", b"-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"):
        with pytest.raises(ConfigError) as refused:
            Identity.load(wrong, where="identity.key")
        assert refused.value.code == "signing-key"


def test_without_the_package_the_message_holds_the_line_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MissingExtraError, match=r"confrere\[sign\]"):
        Identity.generate()


def test_no_module_draws_from_numpy_torch_or_random() -> None:
    """G32: secrets come from the operating system, masks from ChaCha20 with 256-bit keys."""
    drawn: set[str] = set()
    for path in SOURCE:
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            assert not name.startswith(("np.random", "numpy.random", "torch.rand", "torch.Generator")), path.name
            drawn |= {name} & {"os.urandom", "secrets.randbelow"}
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not {"random", "numpy.random", "confrere.seeds"} & named, path.name
    assert drawn == {"os.urandom", "secrets.randbelow"}
    print(f"G32: {len(SOURCE)} files, no generator of numpy, torch or random")


def test_pair_masks_cancel_and_differ_by_session() -> None:
    a, b = bytes(range(32)), bytes(range(1, 33))
    left = masks.pair_mask(a, keys.public_of(b), "t", "a", "b", 100)
    right = masks.pair_mask(b, keys.public_of(a), "t", "b", "a", 100)
    assert not (left + right).any()
    assert (left != masks.pair_mask(a, keys.public_of(b), "u", "a", "b", 100)).all()


def solved(shares: dict[int, bytes]) -> int:
    """Return the constant of the polynomial through the shares by Gaussian elimination modulo the prime."""
    p = shamir.PRIME
    rows = [[pow(x, k, p) for k in range(len(shares))] + [int.from_bytes(y, "big")] for x, y in shares.items()]
    for i in range(len(rows)):
        pivot = next(r for r in range(i, len(rows)) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        scale = pow(rows[i][i], -1, p)
        rows[i] = [value * scale % p for value in rows[i]]
        for j in range(len(rows)):
            if j != i:
                rows[j] = [(u - rows[j][i] * v) % p for u, v in zip(rows[j], rows[i], strict=True)]
    return rows[0][-1]


def test_the_field_is_that_of_the_smallest_prime_above_every_secret() -> None:
    assert nextprime(2**256) == shamir.PRIME


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 12), st.data())
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, n: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, n))
    holders = data.draw(st.lists(st.integers(1, 300), min_size=n, max_size=n, unique=True))
    shares = shamir.split(secret, holders, threshold)
    some = data.draw(st.permutations(holders))[:threshold]
    chosen = {x: shares[x] for x in some}
    assert shamir.combine(chosen) == secret
    assert solved(chosen) == int.from_bytes(secret, "big")


def test_fewer_shares_say_nothing() -> None:
    """Two of three that are needed fit every secret: some third share gives it."""
    shares = shamir.split(b"\x07" * 32, range(1, 6), 3)
    two = {1: shares[1], 4: shares[4]}
    for other in (bytes(32), b"\xff" * 32, b"\x07" * 32):
        x, p = 5, shamir.PRIME
        # Lagrange at 5 through (0, other) and both shares: a share that makes them those of `other`.
        points = {0: int.from_bytes(other, "big"), **{k: int.from_bytes(v, "big") for k, v in two.items()}}
        value = sum(
            y * np.prod([pow(k - j, -1, p) * (x - j) for j in points if j != k], dtype=object)
            for k, y in points.items()
        )
        assert shamir.combine({**two, x: int(value % p).to_bytes(33, "big")}) == other
    for few in combinations(range(1, 6), 2):
        with_two = {x: shares[x] for x in few}
        assert solved(with_two) != int.from_bytes(b"\x07" * 32, "big")


@pytest.mark.parametrize(
    ("secret", "holders", "threshold"), [(b"short", [1, 2], 2), (bytes(32), [1], 2), (bytes(32), [0, 1], 2)]
)
def test_what_cannot_be_split_is_an_error(secret: bytes, holders: list[int], threshold: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        shamir.split(secret, holders, threshold)


@pytest.mark.parametrize("share", [b"", b"\xff" * 33, bytes(32)])
def test_what_is_no_share_is_an_error(share: bytes) -> None:
    with pytest.raises(ValueError, match="no number"):
        shamir.combine({1: share})


numbers = st.floats(-1, 1, width=32)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(1e-3, 1e9), st.lists(numbers, min_size=3, max_size=3), st.integers(-140, 30)),
        min_size=1,
        max_size=30,
    )
)
def test_the_sum_never_wraps_and_is_off_by_no_more_than_rounding(sites: Any) -> None:
    weights = [weight for weight, _, _ in sites]
    changes = [np.ldexp(np.array(values), power) for _, values, power in sites]
    sizes, total, n = (1, 2), sum(weights), len(sites)
    limits = tuple(map(max, zip(*(quantise.exponents(change, sizes) for change in changes), strict=True)))
    each = [quantise.to_ring(c, sizes, limits, w, total) for c, w in zip(changes, weights, strict=True)]
    exact = np.sum([words.view(np.int32).astype(np.int64) for words in each], axis=0)
    ring = np.sum(each, axis=0, dtype=np.uint32)
    assert np.array_equal(ring.view(np.int32), exact)
    mean = quantise.from_ring(ring, sizes, limits, total, total, n)
    right = np.sum([w * c for c, w in zip(changes, weights, strict=True)], axis=0) / total
    bound = n * np.repeat(2.0 ** (np.array(limits, dtype=float) - 30), sizes) * (1 + 1e-6)
    assert (np.abs(mean - right) <= bound).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("weight", [1.0, 20.0, 1e9, 0.3])
def test_the_largest_changes_of_many_sites_just_fit(sign: int, weight: float) -> None:
    n, largest = 1000, np.full(2, sign * np.nextafter(8.0, 0))
    words = quantise.to_ring(largest, (2,), (3,), weight, n * weight)
    ring = np.zeros(2, dtype=np.uint32)
    for _ in range(n):
        ring += words
    mean = quantise.from_ring(ring, (2,), (3,), n * weight, n * weight, n)
    np.testing.assert_allclose(mean, sign * 8.0, rtol=1e-6)


def test_the_error_of_quantisation_is_far_below_half_a_percent() -> None:
    """G31: ten sites, standard deviation 1e-4, weights 20 to 1000."""
    rng, n, sizes = np.random.default_rng(0), 10, (50_000, 50_000)
    changes, weights = rng.normal(0, 1e-4, (n, 100_000)), rng.integers(20, 1001, n).astype(float)
    limits = tuple(map(max, zip(*(quantise.exponents(change, sizes) for change in changes), strict=True)))
    total = float(weights.sum())
    ring = np.sum(
        [quantise.to_ring(c, sizes, limits, w, total) for c, w in zip(changes, weights, strict=True)],
        axis=0,
        dtype=np.uint32,
    )
    mean = quantise.from_ring(ring, sizes, limits, total, total, n)
    right = weights @ changes / total
    error = float(np.linalg.norm(mean - right) / np.linalg.norm(right))
    print(f"G31: relative error of the mean {error:.2g} (goal 5e-3), {n} sites, weights {weights.astype(int).tolist()}")
    assert error < 1e-6


def test_a_sum_in_which_a_mask_is_left_is_refused() -> None:
    with pytest.raises(UpdateRefusedError) as caught:
        quantise.from_ring(masks.words(bytes(32), 64), (64,), (0,), 10.0, 10.0, 2)
    assert caught.value.code == "secure-range"


def test_what_is_not_finite_or_too_large_is_refused() -> None:
    for value in (np.nan, np.inf, 2.0**31):
        with pytest.raises(UpdateRefusedError) as caught:
            quantise.exponents(np.array([0.0, value]), (2,))
        assert caught.value.code == "update-values"


def test_a_long_change_is_shortened_and_a_short_one_left() -> None:
    change = np.array([3.0, 4.0])
    np.testing.assert_allclose(quantise.shortened(change, 1.0), [0.6, 0.8])
    assert quantise.shortened(change, 5.0) is change
    assert quantise.shortened(change, 0.0) is change
