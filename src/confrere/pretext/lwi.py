"""Learnable weight initialisation for volumetric segmentation (arXiv:2306.09320): a pretext task on the site's volumes.

Step 1: cut a volume into N slabs along its depth, shuffle them, set a random share of cubes to zero, and let the
network (with one output channel) reconstruct the shuffled, unmasked volume, while small heads on the stages of its
encoder say of each slab where it came from: L = a1 MSE + a2 sum over stages of CE. Step 2: load all weights strictly,
put an output layer for the classes in place of the other one, make the optimiser, train with labels. Step 1 is extra
training: whatever it is compared with must get the same number of steps.

Where this departs from the released code, whose order heads average the wrong tokens:

- ``grouping="intended"``: a group holds the tokens of one slab. ``"released"`` is what the code does, and the published
  gain was measured with: slabs are shuffled along one axis and tokens grouped along another, so that every group holds
  all slabs. It exists for comparison.
- ``per_sample``: a permutation and a mask for each volume. The released code has one of each for a batch.

Shapes: B volumes of one channel and X x Y x Z voxels, N slabs; a stage is (B, D, x, y, z), its tokens in that order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  as in PyTorch's own documentation
from torch.nn.utils import skip_init

from confrere.errors import BackboneError, ConfigError
from confrere.networks import capture, initialise, output_name

_HEADS = "order_heads."


@dataclass(frozen=True, kw_only=True)
class Lwi:
    """The pretext task.

    Attributes:
        slabs: N, at least 2.
        cube: edge in voxels of what is masked at once.
        masked: share of cubes that are set to zero, 0 to below 1; the nearest whole number of cubes is.
        axis: depth: 0, 1 or 2 for X, Y or Z.
        grouping: which tokens make a slab, see above.
        per_sample: draw for each volume, not for each batch.
        reconstruction: a1, not negative.
        order: a2, not negative.
    """

    where: ClassVar[str] = "lwi"
    """What errors name as the place of an option."""

    slabs: int = 4
    cube: int = 8
    masked: float = 0.4
    axis: int = 2
    grouping: Literal["intended", "released"] = "intended"
    per_sample: bool = False
    reconstruction: float = 1.0
    order: float = 1.0

    def __post_init__(self) -> None:
        ranges = {
            "slabs": self.slabs >= 2,
            "cube": self.cube >= 1,
            "masked": 0 <= self.masked < 1,
            "axis": self.axis in (0, 1, 2),
            "grouping": self.grouping in ("intended", "released"),
            "reconstruction": 0 <= self.reconstruction < math.inf,
            "order": 0 <= self.order < math.inf,
        }
        for name, good in ranges.items():
            if not good:
                raise ConfigError(f"{name} = {getattr(self, name)!r:.80} is out of range", where=self.where)
        if self.grouping == "released" and self.axis == 1:
            raise ConfigError("the released grouping is known for axis 0 and 2 alone", where=f"{self.where}.grouping")


class Puzzle(NamedTuple):
    """What the network sees, what it is to reconstruct (B, 1, X, Y, Z), and ``order`` (B, N) int64.

    ``order[b, n]`` is where the slab that now is in place n came from.
    """

    masked: Tensor
    target: Tensor
    order: Tensor


class Losses(NamedTuple):
    """Scalars: the loss with its gradient; mean squared error; cross-entropy summed over heads; accuracy, their mean.

    ``accuracy`` is the share of slabs whose place is told, 1 / N by chance.
    """

    total: Tensor
    reconstruction: Tensor
    order: Tensor
    accuracy: Tensor


def puzzle(volumes: Tensor, task: Lwi, generator: torch.Generator) -> Puzzle:
    """Shuffle slabs and mask cubes.

    Args:
        volumes: (B, 1, X, Y, Z).
        task: says how.
        generator: draws the permutations first, then the masks.

    Raises:
        ConfigError: the slabs do not divide the depth, or the cubes an edge.
    """
    size = tuple(volumes.shape[2:])
    if size[task.axis] % task.slabs or any(side % task.cube for side in size):
        raise ConfigError(
            f"volumes of {' x '.join(map(str, size))} voxels cannot be cut so",
            where=task.where,
            fix=f"{task.slabs} slabs must divide the depth, cubes of {task.cube} every edge",
        )
    batch, along = len(volumes), task.axis + 2
    draws = batch if task.per_sample else 1
    order = torch.stack([torch.randperm(task.slabs, generator=generator) for _ in range(draws)]).expand(batch, -1)
    slabs = torch.stack(volumes.chunk(task.slabs, along), 1)
    shuffled = torch.cat(slabs[torch.arange(batch)[:, None], order].unbind(1), along)
    cubes = [side // task.cube for side in size]
    count = math.prod(cubes)
    hidden = round(task.masked * count)
    keep = torch.ones(draws, count, dtype=volumes.dtype)
    for row in keep:
        row[torch.randperm(count, generator=generator)[:hidden]] = 0
    keep = keep.view(draws, 1, *cubes)
    for axis in (2, 3, 4):
        keep = keep.repeat_interleave(task.cube, axis)
    return Puzzle(shuffled * keep.to(volumes.device), shuffled, order.to(volumes.device))


def groups(grid: Sequence[int], task: Lwi) -> Tensor:
    """Return, of each token of a stage with ``grid`` = (x, y, z) tokens, the place 0 .. N - 1 of its group.

    Returns:
        (x y z,) int64, in the order of the flattened grid. Intended: the place of the slab that holds the token.
        Released: of UNETR (slabs along Z) equal parts of the flattened grid, hence of X; of UNETR++ (slabs along X)
        the index modulo N, hence along Z.

    Raises:
        ConfigError: the groups would not be of one size.
    """
    if not divides(grid, task):
        raise ConfigError(
            f"{task.slabs} slabs do not divide a grid of {tuple(grid)} tokens", where=f"{task.where}.slabs"
        )
    tokens = torch.arange(math.prod(grid))
    if task.grouping == "intended":
        place = torch.arange(grid[task.axis]) // (grid[task.axis] // task.slabs)
        shape = [1, 1, 1]
        shape[task.axis] = -1
        return place.view(shape).expand(tuple(grid)).flatten()
    return tokens // (len(tokens) // task.slabs) if task.axis == 2 else tokens % task.slabs


def divides(grid: Sequence[int], task: Lwi) -> bool:
    """Return whether the groups of a stage's tokens are of one size."""
    return not (grid[task.axis] if task.grouping == "intended" else math.prod(grid)) % task.slabs


class OrderHeads(nn.Module):
    """One linear layer a stage, from the mean of a group's tokens to N scores: where it came from.

    Stages whose grid is too coarse to hold N slabs have no head.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], task: Lwi, generator: torch.Generator) -> None:
        """Make heads for stages of ``shapes`` (B, D, x, y, z).

        Raises:
            ConfigError: no stage can tell the slabs apart.
        """
        super().__init__()
        self.task = task
        self.used = tuple(stage for stage, shape in enumerate(shapes) if divides(shape[2:], task))
        if not self.used:
            raise ConfigError(
                f"no stage of the encoder has a grid that {task.slabs} slabs divide",
                where=f"{task.where}.slabs",
                fix=f"the depth must be a multiple of {task.slabs} tokens: fewer slabs, smaller patches",
            )
        self.heads = nn.ModuleList(_undrawn(nn.Linear, shapes[stage][1], task.slabs) for stage in self.used)
        initialise(self.heads, generator)

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Return scores (B, N, N) of each head: of place n, for each place it may have come from."""
        scores = []
        for head, stage in zip(self.heads, self.used, strict=True):
            tokens = stages[stage].flatten(2)
            place = groups(stages[stage].shape[2:], self.task).to(tokens.device)
            share = F.one_hot(place, self.task.slabs).to(tokens.dtype) * (self.task.slabs / len(place))
            scores.append(head((tokens @ share).transpose(1, 2)))
        return scores


def order_heads(net: nn.Module, volumes: Tensor, task: Lwi, generator: torch.Generator) -> OrderHeads:
    """Return heads for the encoder of ``net`` as it sees ``volumes`` (B, C, X, Y, Z), of which the shape counts.

    Raises:
        BackboneError: the network has no known encoder.
        ConfigError: as :class:`OrderHeads`.
    """
    with torch.no_grad(), capture(net) as stages:
        net(torch.zeros_like(volumes[:1]))
    return OrderHeads([stage.shape for stage in stages], task, generator)


def loss(net: nn.Module, heads: OrderHeads, volumes: Tensor, generator: torch.Generator) -> Losses:
    """Return the loss of one batch of volumes (B, 1, X, Y, Z); the network has one output channel.

    Raises:
        ConfigError: as :func:`puzzle`.
    """
    given = puzzle(volumes, heads.task, generator)
    with capture(net) as stages:
        rebuilt = net(given.masked)
    return judge(rebuilt, heads(stages), given, heads.task)


def judge(rebuilt: Tensor, scores: Sequence[Tensor], given: Puzzle, task: Lwi) -> Losses:
    """Return the loss of a reconstruction (B, 1, X, Y, Z) and of the heads' scores (B, N, N).

    All voxels count, masked or not.
    """
    error = F.mse_loss(rebuilt, given.target)
    truth = given.order.flatten()
    order = torch.stack([F.cross_entropy(one.flatten(0, 1), truth) for one in scores]).sum()
    right = torch.stack([(one.argmax(2) == given.order).float().mean() for one in scores]).mean()
    return Losses(task.reconstruction * error + task.order * order, error.detach(), order.detach(), right)


def weights(net: nn.Module, heads: OrderHeads) -> dict[str, Tensor]:
    """Return what step 1 leaves: all tensors of the network, and the heads' after ``order_heads.``."""
    return {**net.state_dict(), **{_HEADS + name: value for name, value in heads.state_dict().items()}}


def restore(net: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load what :func:`weights` gave into a network that still has its one output channel; the heads are left out.

    Raises:
        BackboneError: a tensor is missing, is one too many or has another shape.
    """
    own = {name: value for name, value in tensors.items() if not name.startswith(_HEADS)}
    try:
        net.load_state_dict(own, strict=True)
    except RuntimeError as error:
        raise BackboneError(
            "the tensors are not those of this network after the pretext task",
            fix="build the network with the same options and classes=1; change its output after loading",
            code="weights-damaged",
        ) from error


def swap_output(net: nn.Module, classes: int, generator: torch.Generator) -> None:
    """Put a newly drawn output layer for ``classes`` in place of the old one: after loading, before the optimiser.

    Raises:
        BackboneError: the network has no known output.
    """
    name = output_name(net)
    new = _undrawn(nn.Conv3d, net.state_dict()[f"{name}.weight"].shape[1], classes, 1)
    initialise(new, generator)
    net.set_submodule(name, new)


def _undrawn(kind: type[nn.Module], *arguments: int) -> nn.Module:
    """Return a layer whose weights are yet to be drawn; PyTorch would draw them from the global generator."""
    layer: nn.Module = skip_init(kind, *arguments)  # type: ignore[no-untyped-call]
    return layer
