"""What a site that hides its images or patients does not tell the coordinator, or not twice."""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path

from confrere.errors import UpdateRefusedError
from confrere.federation.checks import check_tensor, shown
from confrere.method import Request
from confrere.record.files import write_bytes
from confrere.tensors import State, digest


def keyed(job: Path, told: str) -> str:
    """Return a digest of data under a key of this job, which stays here: no guess can be tried against it.

    Args:
        job: folder of the job, where the key is kept.
        told: the digest, the same in all of a job.
    """
    file = job / "digest.key"
    if not file.exists():
        write_bytes(file, secrets.token_bytes(32))
    return hmac.new(file.read_bytes(), told.encode(), "sha256").hexdigest()


def examine_once(training: Path, request: Request) -> None:
    """Remember which state test images were asked about; refuse another one.

    A model may hold what was learnt at this site without noise: metrics under states of the server's choice would tell.

    Args:
        training: folder of the training.
        request: for test metrics.

    Raises:
        UpdateRefusedError: ``privacy-tested``.
    """
    file, asked = training / f"tested-{request.model}", f"{request.round} {digest(request.state)}".encode()
    if not file.exists():
        write_bytes(file, asked)
    elif file.read_bytes() != asked:
        what = "test images were asked about with another state before; where images are hidden that is told once"
        raise UpdateRefusedError(what, fix="nothing: the first answer stands", code="privacy-tested")


def check_received(state: State) -> None:
    """Raise UpdateRefusedError for a value so large that what is computed with it could overflow for single images."""
    for group, tensors in state.items():
        for name, value in tensors.items():
            if value.is_floating_point():
                check_tensor(value, value, f"what came, group {shown(group)}, {shown(name)}")
