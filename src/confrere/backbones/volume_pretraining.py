"""Networks for volumes without weights, trained whole on the pretext task of LWI.

What it learns is a task (:mod:`confrere.tasks.lwi`); :mod:`confrere.backbones.volume_folder` writes what comes out.

Shapes: B volumes of X x Y x Z voxels; windows (B, 1, *window).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import torch
from torch import Tensor, nn

from confrere.adapters.dropout import Chance
from confrere.backbones.anatomy import Anatomy
from confrere.backbones.loading import Loaded
from confrere.backbones.registry import Entry
from confrere.backbones.volume_nets import Size
from confrere.backbones.volumetric import build
from confrere.backbones.windows import somewhere
from confrere.networks import capture, initialise, output_name
from confrere.pretext.lwi import Puzzle, judge, order_heads, puzzle
from confrere.seeds import torch_generator
from confrere.tasks.lwi import LearnableInitialisation

_AT_ONCE = 4
"""Windows that are judged together: a site's volumes at once would fill the memory."""


class Puzzled(nn.Module):
    """A network that rebuilds volumes, with the order heads of LWI on its encoder; what comes out are losses.

    It trains on one random window of each volume. Where no step is trained it looks at the window in the middle, with
    the same permutation and mask for all volumes.
    """

    def __init__(self, net: nn.Module, window: Size, task: LearnableInitialisation, generator: torch.Generator) -> None:
        super().__init__()
        self.net, self.window, self.task, self.chance = net, window, task, Chance()
        self.order_heads = order_heads(net, torch.zeros(1, 1, *window), task, generator)

    def forward(self, volumes: Tensor) -> Tensor:
        """Return (B, 4), see :class:`LearnableInitialisation`, of volumes (B, X, Y, Z, 1)."""
        inputs = volumes.movedim(-1, 1)
        if self.chance.generator is not None:
            return self._judged(self._windows(inputs), self.task, self.chance.generator)
        room = [there - side for there, side in zip(inputs.shape[2:], self.window, strict=True)]
        place = tuple(slice(free // 2, free // 2 + side) for free, side in zip(room, self.window, strict=True))
        alike = replace(self.task, per_sample=False)
        windows = inputs[(slice(None), slice(None), *place)]
        parts = [windows[at : at + _AT_ONCE] for at in range(0, len(windows), _AT_ONCE)]
        return torch.cat([self._judged(part, alike, torch_generator(0, "evaluation")) for part in parts])

    def _windows(self, inputs: Tensor) -> Tensor:
        if tuple(inputs.shape[2:]) == self.window:
            return inputs
        places = somewhere(inputs, self.window, self.chance)
        return torch.stack([volume[(slice(None), *place)] for volume, place in zip(inputs, places, strict=True)])

    def _judged(self, windows: Tensor, task: LearnableInitialisation, generator: torch.Generator) -> Tensor:
        given = puzzle(windows, task, generator)
        with capture(self.net) as stages:
            rebuilt = self.net(given.masked)
        scores, rows = self.order_heads(stages), []
        for row in (slice(at, at + 1) for at in range(len(windows))):
            found = judge(rebuilt[row], [one[row] for one in scores], Puzzle(*(part[row] for part in given)), task)
            control = given.target[row].var(correction=0)
            rows.append(torch.stack([found.total, found.accuracy.to(control), found.reconstruction, control]))
        return torch.stack(rows)


def untrained(entry: Entry, window: Size, task: LearnableInitialisation) -> Loaded:
    """Return a network for the pretext task; its weights are nobody's until :meth:`Backbone.start` draws them.

    Raises:
        BackboneError: the network does not take this window.
        ConfigError: slabs or cubes do not divide it.
    """
    net = build(entry.name, classes=1, size=window, generator=torch_generator(0, "volumes"))
    puzzle(torch.zeros(1, 1, *window), task, torch_generator(0, "volumes"))  # refuses what cannot be cut
    root = Puzzled(net, window, task, torch_generator(0, "volumes", "heads"))
    anatomy = Anatomy(
        root=root,
        family=entry.name,
        width=net.state_dict()[f"{output_name(net)}.weight"].shape[1],
        patch=(1, 1, 1),
        whole=root,
        trained=tuple(name for name, _ in root.named_parameters()),
        draw=initialise,
    )
    said = json.dumps([entry.name, window, task.choice()], sort_keys=True)
    return Loaded(anatomy, entry, hashlib.sha256(said.encode()).hexdigest())
