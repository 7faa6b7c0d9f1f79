"""What a user may choose about the data: plain, frozen, checked values."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from confrere.data.shift import Shift

Side = Annotated[int, Field(ge=8, le=2048, strict=True)]  # pixels
# A number is a number: neither "0.2" nor true.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Target = Literal["label", "labels", "mask", "boxes", "time", "image"]
Whole = Annotated[int, Field(strict=True)]
Voxels = Annotated[int, Field(ge=8, le=1024, strict=True)]
Millimetres = Annotated[float, Field(ge=0.05, le=50)]


class Partition(BaseModel):
    """How one pooled set is dealt out to simulated sites, always by patient.

    ``attribute`` makes one site of each value of the table's ``column``; ``dirichlet`` skews the classes
    (smaller ``alpha``: stronger skew); ``quantity`` skews the number of patients.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: Literal["attribute", "dirichlet", "quantity"]
    column: str | None = None
    alpha: Number = Field(default=0.5, gt=0, le=1e6)
    sites: Whole = Field(default=4, ge=2, le=1000)

    @model_validator(mode="after")
    def _column_when_needed(self) -> Partition:
        if (self.by == "attribute") != (self.column is not None):
            raise ValueError('give column exactly when by = "attribute"')
        return self


class Grid(BaseModel):
    """Where volumes are laid: voxels along X (right), Y (front) and Z (head), and millimetres between them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: tuple[Voxels, Voxels, Voxels]
    spacing: tuple[Millimetres, Millimetres, Millimetres] = (1.0, 1.0, 1.0)


class DataOptions(BaseModel):
    """Options of reading, checking and splitting.

    Attributes:
        val: share of each site's images kept for validation, 0 to 0.5.
        test: share kept for the final test, 0 to 0.6.
        image_size: (height, width) in pixels; None takes what the backbone wants.
        volume: set where images are volumes (NIfTI, or a folder with a DICOM series): the grid they are laid on.
        max_pixels: an image with more is refused before it is decoded.
        min_per_class: classes with fewer images over all sites are kept but reported.
        on_bad: leave unusable files out, or stop at them.
        classes: the classes of all sites, in order, where no data name them all; empty takes those that are found.
        class_map: other name of a class -> its name, the same for all sites.
        partition: set for one pooled set; None when the data name their sites.
        shift: simulated differences between sites, see :class:`confrere.data.shift.Shift`.
        target: what a model learns: the ``label``, several ``labels`` an image, the ``mask`` of an image, the ``boxes``
            in it, the ``time`` to an event, or nothing but the ``image``; tasks set it.
        constants: tables of numbers: column -> (mean, sd) to standardise with; other columns use each site's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    val: Number = Field(default=0.15, ge=0, le=0.5)
    test: Number = Field(default=0.2, ge=0, le=0.6)
    image_size: tuple[Side, Side] | None = None
    volume: Grid | None = None
    max_pixels: Whole = Field(default=50_000_000, ge=1)
    min_per_class: Whole = Field(default=3, ge=1)
    on_bad: Literal["skip", "stop"] = "skip"
    classes: tuple[str, ...] = ()
    class_map: dict[str, str] = {}
    partition: Partition | None = None
    shift: tuple[Shift, ...] = ()
    target: Target = "label"
    constants: dict[str, tuple[float, float]] = {}

    @model_validator(mode="after")
    def _flat_only(self) -> DataOptions:
        if self.volume is not None and (self.shift or self.image_size or self.target not in ("mask", "image")):
            raise ValueError("volumes have masks, no image_size and no simulated shift")
        return self

    @model_validator(mode="after")
    def _some_training(self) -> DataOptions:
        if len(self.classes) == 1 or len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must be at least two different names")
        if self.val + self.test > 0.8:
            raise ValueError("val + test must leave at least 0.2 for training")
        return self
