"""What travels: JSON of a fixed form in a tensor of bytes; what comes from a site is signed with its identity.

A signature covers the phase, run, round and session, so that no message passes for another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from confrere.errors import UpdateRefusedError
from confrere.federation.secure.keys import Identity, verify
from confrere.federation.secure.quantise import LEAST, MOST
from confrere.tensors import State

Phase = Literal["keys", "shares", "masked", "unmask"]
PHASES: tuple[Phase, ...] = ("keys", "shares", "masked", "unmask")
LONGEST = 50_000_000
"""Most bytes of a message: keys and shares for a thousand sites have a hundredth of it."""
Name = Annotated[str, Field(min_length=1, max_length=80)]
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Token = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=100_000)]
Share = Annotated[str, Field(pattern=r"^[0-9a-f]{66}$")]
Weight = Annotated[float, Field(gt=0, le=1e9)]
Exponent = Annotated[int, Field(ge=LEAST, le=MOST)]


class Message(BaseModel):
    """Of a fixed form: no unknown keys, no other types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Session(Message):
    """One attempt at one round: ``cohort`` (sorted) may take part, ``threshold`` of them have to stay to the end."""

    run: str
    round: int
    token: Token
    cohort: tuple[Name, ...]
    threshold: Annotated[int, Field(ge=2)]


class Signed(Message):
    """The JSON of a message of ``site``, with the signature of its identity over just these characters."""

    site: Name
    body: str
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class Advert(Message):
    """Phase ``keys``: two public keys, a commitment to the seed of the own mask, and what a site will add up.

    ``model`` is the digest of what the server sent: sites that were sent different models notice. ``form`` is that of
    names, shapes and types of the change.
    """

    phase: Literal["keys"] = "keys"
    session: Session
    channel: Key
    mask: Key
    commitment: Key
    weight: Weight
    model: Key
    form: Key


class Envelopes(Message):
    """Phase ``shares``: for every other site what only it can open."""

    phase: Literal["shares"] = "shares"
    session: Token
    sealed: dict[Name, Hex]


class Upload(Message):
    """Phase ``masked``: the exponents in use, and the SHA-256 of the vector that comes beside it."""

    phase: Literal["masked"] = "masked"
    session: Token
    exponents: tuple[Exponent, ...]
    vector: Key


class Opening(Message):
    """Phase ``unmask``: shares of the seeds of ``survivors``, and of the private mask keys of all others."""

    phase: Literal["unmask"] = "unmask"
    session: Token
    survivors: tuple[Name, ...]
    seeds: dict[Name, Share]
    keys: dict[Name, Share]


class Adverts(Message):
    """To a site, phase ``shares``: what every site that answered said."""

    session: Token
    adverts: tuple[Signed, ...]


class Delivery(Message):
    """To a site, phase ``masked``: what every other site sealed for it."""

    session: Token
    sealed: dict[Name, Hex]


class Survivors(Message):
    """To a site, phase ``unmask``: whose masked vectors came."""

    session: Token
    survivors: tuple[Name, ...]


M = TypeVar("M", bound=Message)
SIGNED = Advert | Envelopes | Upload | Opening


def refused(what: str, where: str = "") -> UpdateRefusedError:
    """Return the refusal of a message that is not what it should be."""
    fix = "run the same version and experiment at all sites and at the server"
    return UpdateRefusedError(what, where=where, fix=fix, code="secure-message")


def pack(message: Message, **tensors: Tensor) -> State:
    """Return a message as the payload of a request or reply, with tensors beside it."""
    body = bytearray(message.model_dump_json().encode())
    return {"secure": {"message": torch.frombuffer(body, dtype=torch.uint8), **tensors}}


def unpack(kind: type[M], state: State, *, where: str) -> M:
    """Return the message of a payload; refuse what is none of this kind."""
    found = state.get("secure", {}).get("message")
    if not isinstance(found, Tensor) or found.dtype != torch.uint8 or found.ndim != 1 or len(found) > LONGEST:
        raise refused("there is no message of secure aggregation", where)
    return parse(kind, found.numpy().tobytes(), where=where)


def parse(kind: type[M], body: bytes | str, *, where: str) -> M:
    """Return the message of a JSON text; refuse what is none of this kind."""
    try:
        return kind.model_validate_json(body)
    except ValidationError:
        raise refused(f"this is no message of the kind {kind.__name__}", where) from None


def signed(site: str, identity: Identity, message: SIGNED) -> Signed:
    """Return a message of ``site`` with its signature."""
    body = message.model_dump_json()
    return Signed(site=site, body=body, signature=identity.sign(_covered(site, body)).hex())


def opened(kind: type[M], envelope: Signed, site: str, roster: Mapping[str, bytes], *, where: str) -> M:
    """Return the message in an envelope of ``site``; refuse another site's, and one whose signature does not hold."""
    if envelope.site != site or site not in roster:
        raise UpdateRefusedError(
            "a message is not of a site that is known", where=where, fix="add it to the roster", code="secure-signature"
        )
    verify(roster[site], bytes.fromhex(envelope.signature), _covered(site, envelope.body), where=where)
    return parse(kind, envelope.body, where=where)


def _covered(site: str, body: str) -> bytes:
    return f"confrere secure 1\n{site}\n{body}".encode()
