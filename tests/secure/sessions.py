"""Whole sessions of secure aggregation over plain values, for tests: who drops out when, and what the server saw."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from confrere.federation.secure import client, server
from confrere.federation.secure.client import Member, Secrets, Shared
from confrere.federation.secure.keys import Identity
from confrere.federation.secure.masks import Words
from confrere.federation.secure.messages import Advert, Envelopes, Opening, Session, Signed, Upload, opened
from confrere.federation.secure.quantise import Vector, exponents, to_ring

FORM, MODEL = "f" * 64, "a" * 64


def names(n: int) -> tuple[str, ...]:
    return tuple(f"s{i:02d}" for i in range(n))


@dataclass(kw_only=True)
class Drill:
    """Sites with changes (n, d) and weights; phases are run once and may be continued in many ways."""

    changes: dict[str, Vector]
    weights: dict[str, float]
    sizes: tuple[int, ...]
    threshold: int = 0
    token: str = "0" * 32
    members: dict[str, Member] = field(init=False)
    secrets: dict[str, Secrets] = field(init=False)
    said: dict[str, Signed] = field(init=False)

    def __post_init__(self) -> None:
        cohort = tuple(sorted(self.changes))
        identities = {site: Identity.generate() for site in cohort}
        roster = {site: identity.public for site, identity in identities.items()}
        session = Session(
            run="r", round=1, token=self.token, cohort=cohort,
            threshold=client.threshold_of(len(cohort), self.threshold),
        )  # fmt: skip
        self.session = session
        self.members = {s: Member(site=s, identity=identities[s], roster=roster, session=session) for s in cohort}
        started = {s: client.announce(m, self.weights[s], MODEL, FORM) for s, m in self.members.items()}
        self.secrets, self.said = ({s: pair[i] for s, pair in started.items()} for i in (0, 1))
        self.adverts = {s: opened(Advert, said, s, roster, where="") for s, said in self.said.items()}

    def share(self, sites: Collection[str]) -> tuple[dict[str, Shared], dict[str, Envelopes]]:
        """Phase shares among ``sites``."""
        adverts = [self.said[s] for s in sorted(sites)]
        done = {
            s: client.share(self.members[s], self.secrets[s], exponents(self.changes[s], self.sizes), adverts)
            for s in sites
        }
        return {s: one[0] for s, one in done.items()}, {s: self.read(Envelopes, s, one[1]) for s, one in done.items()}

    def mask(
        self, shared: Mapping[str, Shared], boxes: Mapping[str, Envelopes], present: Collection[str]
    ) -> tuple[dict[str, client.Masked], dict[str, Upload], dict[str, Words]]:
        """Phase masked of the sites ``present``, whose envelopes are handed out."""
        held, uploads, vectors = {}, {}, {}
        for s in sorted(present):
            sealed = {o: boxes[o].sealed[s] for o in present if o != s}
            held[s], signed, vectors[s] = client.mask(self.members[s], shared[s], sealed, self.changes[s], self.sizes)
            uploads[s] = self.read(Upload, s, signed)
        return held, uploads, vectors

    def open(
        self,
        held: Mapping[str, client.Masked],
        vectors: Mapping[str, Words],
        survivors: Collection[str],
        helpers: Collection[str],
    ) -> Words:
        """Phase unmask: ask ``helpers`` among the ``survivors``, and open the sum."""
        openings = {
            s: self.read(Opening, s, client.unmask(self.members[s], held[s], sorted(survivors))) for s in helpers
        }
        for one in openings.values():
            server.check_opening(one, sorted(survivors), sorted(held))
        kept = {s: vectors[s] for s in survivors}
        return server.open_sum(self.session, self.adverts, sorted(held), kept, openings)

    def plain(self, present: Collection[str], survivors: Collection[str]) -> Words:
        """Return the plain quantised sum of ``survivors`` with the steps of those ``present``."""
        limits = tuple(map(max, zip(*(exponents(self.changes[s], self.sizes) for s in present), strict=True)))
        total = sum(self.weights[s] for s in present)
        parts = [to_ring(self.changes[s], self.sizes, limits, self.weights[s], total) for s in sorted(survivors)]
        return np.sum(parts, axis=0, dtype=np.uint32)

    def read(self, kind: type, site: str, signed: Signed):  # type: ignore[no-untyped-def]
        return opened(kind, signed, site, self.members[site].roster, where="")


def drill(n: int, sizes: tuple[int, ...] = (3, 5), seed: int = 0, **options: object) -> Drill:
    rng = np.random.default_rng(seed)
    changes = {s: rng.normal(0, 1e-4, sum(sizes)) for s in names(n)}
    weights = {s: float(rng.integers(20, 1001)) for s in names(n)}
    return Drill(changes=changes, weights=weights, sizes=sizes, **options)  # type: ignore[arg-type]
