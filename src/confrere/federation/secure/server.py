"""The server's half of one session, as functions of plain values: check what came, and open the sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from confrere.errors import UpdateRefusedError
from confrere.federation.secure.client import commitment, digest_of
from confrere.federation.secure.keys import public_of
from confrere.federation.secure.masks import Words, pair_mask, self_mask
from confrere.federation.secure.messages import Advert, Envelopes, Opening, Session, Upload, refused
from confrere.federation.secure.quantise import MOST
from confrere.federation.secure.shamir import combine


def check_envelopes(box: Envelopes, site: str, adverts: Mapping[str, Advert]) -> None:
    """Refuse envelopes that are not for all other sites of the session, and for nobody else."""
    if set(box.sealed) != adverts.keys() - {site}:
        raise refused("the envelopes are not for all other sites", f"site {site}")


def check_vector(upload: Upload, exponents: tuple[int, ...], count: int, vector: Words | None) -> Words:
    """Return the masked vector of a site; refuse one that is not the signed one, or cannot be added to the others."""
    if vector is None or len(vector) != count or digest_of(vector) != upload.vector:
        raise refused("the masked vector is not the one that was signed")
    if upload.exponents != exponents:
        raise refused("the exponents are not those of the other sites")
    return vector


def check_opening(opening: Opening, survivors: Sequence[str], present: Sequence[str]) -> None:
    """Refuse shares for other survivors than were asked about, missing ones, and more."""
    dropped = set(present) - set(survivors)
    asked = (tuple(sorted(survivors)), set(survivors), dropped)
    if (opening.survivors, set(opening.seeds), set(opening.keys)) != asked:
        raise refused("the shares that came are not those that were asked for")


def common(uploads: Mapping[str, Upload], tensors: int) -> tuple[int, ...]:
    """Return the exponents, one for each of the ``tensors``, that most sites used: who used others cannot be added."""
    fit = [upload.exponents for _, upload in sorted(uploads.items()) if len(upload.exponents) == tensors]
    return Counter(fit).most_common(1)[0][0] if fit else (MOST,) * tensors


def open_sum(
    session: Session,
    adverts: Mapping[str, Advert],
    present: Sequence[str],
    vectors: Mapping[str, Words],
    openings: Mapping[str, Opening],
) -> Words:
    """Return the sum (d,) in the ring of what the survivors masked.

    Args:
        session: which.
        adverts: what every site said at first.
        present: the sites whose shares were handed out.
        vectors: of the survivors, all of one length.
        openings: of at least as many sites as the threshold says, each checked by :func:`check_opening`.

    Raises:
        UpdateRefusedError: too few shares came, or they are wrong.
    """
    if len(openings) < session.threshold:
        what = f"{len(openings)} sites gave their shares where {session.threshold} are needed: nothing can be opened"
        raise UpdateRefusedError(what, fix="see secure.threshold", code="secure-threshold")
    numbers = {site: number for number, site in enumerate(session.cohort, 1)}
    helpers = sorted(openings)[: session.threshold]
    token, count = session.token, len(next(iter(vectors.values())))
    summed = np.zeros(count, dtype=np.uint32)
    for site in sorted(vectors):
        seed = _together(site, {numbers[h]: openings[h].seeds[site] for h in helpers})
        if commitment(seed, token) != adverts[site].commitment:
            raise _wrong(site)
        summed += vectors[site] - self_mask(seed, token, count)
    for site in sorted(set(present) - vectors.keys()):
        private = _together(site, {numbers[h]: openings[h].keys[site] for h in helpers})
        if public_of(private).hex() != adverts[site].mask:
            raise _wrong(site)
        for other in sorted(vectors):  # what others added for this site is left over: its own vector would cancel it
            public = bytes.fromhex(adverts[other].mask)
            summed += pair_mask(private, public, token, site, other, count)
    return summed


def _together(site: str, shares: Mapping[int, str]) -> bytes:
    try:
        return combine({number: bytes.fromhex(share) for number, share in shares.items()})
    except ValueError:
        raise _wrong(site) from None


def _wrong(site: str) -> UpdateRefusedError:
    what, fix = "shares give another secret than the site had", "nothing to do if it happens once; else leave sites out"
    return UpdateRefusedError(what, where=f"secrets of site {site}", fix=fix, code="secure-shares")
