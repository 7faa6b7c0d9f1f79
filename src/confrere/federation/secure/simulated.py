"""Secure aggregation in one process: every site gets an identity for as long as the process lives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from confrere.federation.secure.keys import Identity
from confrere.federation.secure.participant import Participant
from confrere.federation.site import Site


def equip(sites: Mapping[str, Site], folder: Path | None, *, threshold: int = 0, clip: float = 0.0) -> dict[str, bytes]:
    """Let each of ``sites`` mask its updates; return the roster, i.e. their public identities.

    Args:
        sites: by name.
        folder: of the sites' own folders; None keeps in memory which rounds were opened.
        threshold: see :class:`confrere.choices.SecureChoice`.
        clip: see there, too.
    """
    identities = {name: Identity.generate() for name in sites}
    roster = {name: identity.public for name, identity in identities.items()}
    for name, site in sites.items():
        own = None if folder is None else folder / name
        site.secure = Participant(name, identities[name], roster, threshold=threshold, clip=clip, folder=own)
    return roster
