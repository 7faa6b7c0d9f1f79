"""Rebuilding images from updates: with the agreed frozen model, and with one that the server made for it."""

from __future__ import annotations

import os
import zipfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_federation import CLASSES, backbone_of, initial_params, tiny_data

from confrere import config
from confrere.adapters import head, lora
from confrere.audits import inversion, inversion_bench, inversion_planted
from confrere.audits.audit import Choice
from confrere.backbones import Backbone, load
from confrere.consortium.policy import Policy, check
from confrere.errors import BackboneError, ConfigError, PolicyError
from confrere.learner import Learner, TrainSettings
from confrere.method import Method, make
from confrere.tensors import sub
from confrere.tokenset import TokenSet

FEDIT, PATCH, SIDE = make("fedit"), 6, 8
HAM = Path(os.environ.get("CONFRERE_DATA", "data")) / "fed_ham10000" / "images_200x150.zip"


def learner(backbone: Backbone, data: TokenSet, **changes: object) -> Learner:
    settings = TrainSettings(**{"batch_size": 1, "steps": 1, "balance": "none", **changes})  # type: ignore[arg-type]
    return Learner(backbone=backbone, data=data, settings=settings, seed=0, site="a", round=1, rounds=1)


def one_gradient(row: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor, int]:
    """Return tensors, the plain gradient of one image, its tokens, its class."""
    backbone, data = backbone_of(FEDIT), tiny_data(backbone_of(FEDIT), "a")
    params = dict(initial_params(backbone, FEDIT, "a"))
    rng = torch.Generator().manual_seed(0)
    params = {n: v + 0.1 * torch.randn(v.shape, generator=rng) for n, v in params.items()}
    batch = data.batch(np.array([row]))
    leaves = {n: v.clone().requires_grad_() for n, v in params.items()}
    loss = torch.nn.functional.cross_entropy(backbone.logits(leaves, batch.tokens), batch.labels)
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return params, dict(zip(leaves, found, strict=True)), batch.tokens, int(batch.labels[0])


@pytest.mark.parametrize("row", range(4))
def test_a_plain_gradient_of_one_image_gives_label_and_feature(row: int) -> None:
    params, gradient, tokens, label = one_gradient(row)
    assert inversion.label_of(gradient[head.BIAS]) == label
    feature = backbone_of(FEDIT).features(params, tokens)[0]
    found = inversion.feature_of(gradient[head.WEIGHT], gradient[head.BIAS])
    torch.testing.assert_close(found, feature, rtol=1e-4, atol=1e-5)


def test_what_one_step_of_adamw_shows_is_the_sign_of_the_gradient() -> None:
    backbone, data = backbone_of(FEDIT), tiny_data(backbone_of(FEDIT), "a")
    before = {n: v + 0.1 for n, v in initial_params(backbone, FEDIT, "a").items()}
    one = learner(backbone, inversion_bench._only(data, np.array([0])))
    with backbone.dropout(None):
        change = sub(one.fit(before), before)
    shown = inversion_bench.gradient_of(change, before, one.rate(0, 1), one.settings.weight_decay)
    for name in (head.WEIGHT, head.BIAS):
        np.testing.assert_allclose(shown[name].abs(), 1.0, atol=0.02)


def bench_of(method: Method, steps: int, shared: dict[str, torch.Tensor] | None = None) -> inversion_bench.Bench:
    """Return site ``a`` of the tiny federation as an attacker meets it, all adapters moved already."""
    train = {"steps": steps, "batch_size": 4, "balance": "none"}
    experiment = config.validate({"path": "x", "method": "fedit", "controls": [], "rounds": 3, "train": train})
    backbone = backbone_of(method)
    task = SimpleNamespace(backbone_of=lambda site: backbone)
    data = {"a": tiny_data(backbone, "a")}
    run = SimpleNamespace(method=method, round=3, experiment=experiment, task=task, data=data)
    params = {n: v + 0.05 for n, v in initial_params(backbone, method, "a").items()}
    received, kept = method.broadcast(method.init_server(params), "a"), method.init_site(params)
    before = method.personal(received, kept)
    return inversion_bench.Bench(run, "a", received, kept, before, data["a"].batch(np.arange(4)).tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedit", {}),
        ("ffa-lora", {}),
        ("fedprox", {"mu": 1.0}),
        ("fedopal", {"training": "in-turn", "warmup": 0}),
        ("fedopal", {"aggregation": "ffa"}),
        ("ditto", {}),
        ("dpfed", {"clip": 1e-3}),
    ],
)
def test_what_is_inverted_is_what_the_method_sends(name: str, options: dict[str, object]) -> None:
    method, rows = make(name, options), np.arange(4)
    bench = bench_of(method, 4)
    found = bench.sent(rows, 4, 4, 0)
    own = learner(backbone_of(method), inversion_bench._only(bench.run.data["a"], rows), batch_size=4, steps=4, lr=1e-3)
    own.round = own.rounds = 3
    payload, _ = method.update(own, bench.received, bench.kept)
    change = sub(payload["shared"], bench.received["shared"])
    wanted = {n: v for n, v in change.items() if v.any()}
    shown = inversion_bench.gradient_of(wanted, bench.before, 1e-3, own.settings.weight_decay)
    assert found.gradient.keys() == shown.keys() >= set(head.NAMES)
    for key, value in shown.items():
        torch.testing.assert_close(found.gradient[key], value, rtol=0, atol=0)
    fitted = own.fit(bench.before)  # all tensors at once: what plain averaging sends
    same = all(torch.equal(fitted[n], payload["shared"][n]) for n in wanted)
    assert same == (name == "fedit")
    assert bench.plain(0, list(found.gradient)).gradient.keys() == found.gradient.keys()
    if name == "ffa-lora" or options.get("aggregation") == "ffa":
        assert not any(".lora_A." in n for n in found.gradient)


def test_the_shortest_round_is_the_methods_own() -> None:
    assert inversion_bench.fewest_steps(bench_of(FEDIT, 4).run) == 1
    assert inversion_bench.fewest_steps(bench_of(make("ditto"), 4).run) == 2
    assert inversion_bench.fewest_steps(bench_of(FEDIT, 1).run) == 1


@pytest.mark.parametrize("name", ["fedit-ft", "ifca"])
def test_rounds_that_send_no_head_of_a_known_beginning_are_refused(name: str) -> None:
    bench = bench_of(make(name), 4)  # the last round: each site for itself
    if name == "ifca":
        shared = bench.received["shared"]
        bench.received.update({"cluster.0": shared, "cluster.1": shared})
    with pytest.raises(ConfigError) as caught:
        bench.sent(np.arange(4), 1, 4, 0)
    assert caught.value.code == "audit"


def test_several_models_at_once_are_refused() -> None:
    run = SimpleNamespace(
        method=make("shards"), experiment=SimpleNamespace(privacy=config.PrivacyChoice(), masked=False)
    )
    with pytest.raises(ConfigError, match="predicts with several models at once") as caught:
        inversion.inversion(run, Choice())  # type: ignore[arg-type]
    assert caught.value.code == "audit"


def test_tokens_are_found_from_near_by_and_truth_is_not_looked_at() -> None:
    params, gradient, tokens, _ = one_gradient()
    victim = inversion_bench.Victim(before=params, gradient=gradient, images=torch.full_like(tokens, torch.nan))
    start = tokens + 0.05 * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))

    def distance(guess: torch.Tensor) -> float:
        leaves = {n: v.clone().requires_grad_() for n, v in params.items()}
        loss = torch.nn.functional.cross_entropy(
            backbone_of(FEDIT).logits(leaves, guess), torch.tensor([inversion.label_of(gradient[head.BIAS])])
        )
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        both = [torch.cat([g.flatten() for g in one]) for one in (found, [gradient[n] for n in leaves])]
        return 1 - float(torch.nn.functional.cosine_similarity(*both, dim=0))

    found = inversion.rebuild_tokens(backbone_of(FEDIT).logits, victim, start, tokens.std(), steps=40)
    assert distance(found) < 0.5 * distance(start)
    assert distance(tokens) < 1e-6


def test_skill_is_one_for_the_truth_and_nothing_for_the_mean() -> None:
    truths, mean = torch.tensor([[1.0, 2.0], [5.0, 5.0]]), torch.zeros(2)
    assert inversion.skill(truths[1], truths, mean) == 1.0
    assert inversion.skill(mean, truths, mean) == 0.0
    assert inversion.skill(-truths[0], truths[:1], mean) == pytest.approx(-3.0)


@cache
def plain_weights() -> dict[str, torch.Tensor]:
    from transformers import ViTConfig, ViTModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTModel(ViTConfig(**SHAPE), add_pooling_layer=False)
    return {name: value.clone() for name, value in model.state_dict().items()}


SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": SIDE,
}


def folder_of(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Write a model as a server would hand it out."""
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(**SHAPE), add_pooling_layer=False)
    model.load_state_dict(weights)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def malicious(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    path = folder_of(tmp_path_factory.mktemp("planted") / "vit", inversion_planted.planted(plain_weights(), PATCH))
    return load(path, lora=lora.LoraSpec(slots=("general",), blocks=2), image_size=32)


def pictures(count: int) -> np.ndarray:
    """Return smooth pictures (count, 32, 32, 3), each its own."""
    rng = np.random.default_rng(3)
    coarse = rng.integers(20, 236, size=(count, 8, 8, 3)).astype(float)
    return np.kron(coarse, np.ones((1, 4, 4, 1))).astype(np.uint8)


def lesions(count: int) -> np.ndarray:
    """Return dermoscopies (count, 32, 32, 3), spread over HAM10000; skips where it is not at hand."""
    if not HAM.exists():
        pytest.skip("set CONFRERE_DATA to a folder holding fed_ham10000")
    with zipfile.ZipFile(HAM) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        files = [archive.open(name) for name in names[:: len(names) // count][:count]]
        return np.stack([np.asarray(Image.open(file).convert("RGB").resize((32, 32))) for file in files])


def site(backbone: Backbone, labels: list[int], images: np.ndarray | None = None) -> tuple[TokenSet, torch.Tensor]:
    """Return training images with these labels, and the chosen patch of each (B, 3, 8, 8), as the model sees it."""
    images = pictures(len(labels)) if images is None else images
    tokens = backbone.prefix(images).numpy()
    size = len(labels)
    data = TokenSet(
        tokens=tokens,
        labels=np.array(labels),
        groups=np.arange(size),
        split=np.zeros(size, dtype=np.int8),
        classes=CLASSES,
    )
    row, column = divmod(PATCH, 32 // SIDE)
    normal = backbone.normalise(images)
    return data, normal[:, :, row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]


def stolen(backbone: Backbone, data: TokenSet, which: int, absent: int, **changes: object) -> np.ndarray:
    """Return the patch that the server reads from the update of one round; the head starts at zero, as it says."""
    params = {n: torch.zeros(s) for n, s in backbone.adapter_shapes({"general": 4}).items()}
    params = {n: v + 0.1 if ".lora_A." in n else v for n, v in params.items()} | head.init(3, backbone.feature_dim)
    change = sub(learner(backbone, data, **changes).fit(params), params)
    return inversion_planted.patch_of(inversion_planted.feature_of_class(change[head.WEIGHT], which, absent), SIDE)


def test_a_planted_model_hands_one_patch_of_a_single_image_to_the_server(malicious: Backbone) -> None:
    data, patches = site(malicious, [0])
    found = stolen(malicious, data, 0, 2)
    base = inversion_planted.waves(SIDE, 62)
    seen = (patches[0].flatten() @ base.T @ base).view(3, SIDE, SIDE).numpy()
    np.testing.assert_allclose(found, seen, atol=2e-3)
    error = float(((found - patches[0].numpy()) ** 2).mean())
    assert error < 0.35 * float(((patches[0] - patches[0].mean((1, 2), keepdim=True)) ** 2).mean())  # 62 of 192 numbers


@pytest.mark.parametrize("kind", ["generated", "dermoscopy"])
def test_how_alike_what_a_planted_model_shows_is(kind: str, malicious: Backbone) -> None:
    """G27: a site that overrides the refusal shows its images' patches; the control is the next image's patch."""
    from monai.metrics.regression import SSIMMetric

    images = lesions(32) if kind == "dermoscopy" else pictures(32)
    alike = SSIMMetric(spatial_dims=2, data_range=1.0, kernel_type="uniform", win_size=7, reduction="none")
    normal = malicious.normalise(np.stack([np.zeros((32, 32, 3)), np.full((32, 32, 3), 255)]).astype(np.uint8))
    black, white = (normal[k, :, :1, :1].numpy() for k in (0, 1))
    guesses, truths = [], []
    for image in images:
        data, patches = site(malicious, [0], image[None])
        guesses.append((stolen(malicious, data, 0, 2) - black) / (white - black))
        truths.append((patches[0].numpy() - black) / (white - black))
    guess, truth = (torch.from_numpy(np.stack(each)).float() for each in (guesses, truths))
    found, control = (alike(guess, other).flatten().numpy() for other in (truth, truth.roll(1, 0)))
    print(f"\nG27: {kind}: SSIM {found.mean():.2f} ({found.min():.2f} to {found.max():.2f}) of 32 images' patches, ")
    print(f"{control.mean():.2f} with the next image's")
    assert found.mean() > 0.5
    assert found.mean() > control.mean() + 0.3


def test_the_only_image_of_a_rare_class_is_shown_after_many_steps_of_many_images(malicious: Backbone) -> None:
    data, patches = site(malicious, [0, *[1] * 11])
    found = stolen(malicious, data, 0, 2, steps=12, batch_size=4, lr=1e-3)
    base = inversion_planted.waves(SIDE, 62)
    seen = [(p.flatten() @ base.T @ base).view(3, SIDE, SIDE).numpy() for p in patches]
    missed = [float(((found - one) ** 2).mean()) for one in seen]
    assert int(np.argmin(missed)) == 0
    assert missed[0] < 0.01 * float(((seen[0] - np.mean(seen, 0)) ** 2).mean())


def test_the_same_reading_of_an_honest_model_shows_nothing(tmp_path: Path) -> None:
    honest = load(
        folder_of(tmp_path / "vit", plain_weights()), lora=lora.LoraSpec(slots=("general",), blocks=2), image_size=32
    )
    data, patches = site(honest, [0, *[1] * 11])
    found = stolen(honest, data, 0, 2, steps=12, batch_size=4, lr=1e-3)
    mean = patches.mean(0).numpy()
    assert ((found - patches[0].numpy()) ** 2).mean() > ((mean - patches[0].numpy()) ** 2).mean()


def test_twenty_of_twenty_tampered_models_are_refused(tmp_path: Path) -> None:
    """G27: the site pins the SHA-256 of the weights that were agreed."""
    spec = lora.LoraSpec(slots=("general",), blocks=2)
    agreed = load(folder_of(tmp_path / "agreed", plain_weights()), lora=spec, image_size=32).digest
    names, refused = sorted(n for n in plain_weights() if "weight" in n), 0
    for case in range(20):
        if case < 16:
            weights = inversion_planted.planted(plain_weights(), case)
        else:  # one number of one tensor
            weights = {n: v.clone() for n, v in plain_weights().items()}
            weights[names[case]].view(-1)[0] += 1e-3
        path = tmp_path / f"case-{case}"
        path.mkdir()
        (path / "config.json").write_bytes((tmp_path / "agreed" / "config.json").read_bytes())
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(BackboneError) as caught:
            load(path, lora=spec, image_size=32, sha256=agreed)
        refused += caught.value.code == "weights-hash"
    print(f"\nG27: {refused} of 20 tampered models refused by their hash")
    assert refused == 20


def test_a_sites_policy_refuses_a_model_that_is_not_the_pinned_one() -> None:
    pinned = Policy(backbones={"test-vit": "a" * 64})
    wrong = [{"name": "test-vit"}, {"name": "test-vit", "sha256": "b" * 64}, {"name": "./from-the-server"}]
    for backbone in wrong:
        experiment = config.validate({"path": "x", "method": "fedit", "controls": [], "backbone": backbone})
        with pytest.raises(PolicyError) as caught:
            check(pinned, experiment, examples=100)
        assert caught.value.code == "policy-backbone"
        if backbone["name"] != "test-vit":  # by default no folder and no address
            with pytest.raises(PolicyError):
                check(Policy(), experiment, examples=100)


def test_weights_of_another_kind_cannot_be_planted() -> None:
    with pytest.raises(ConfigError) as caught:
        inversion_planted.planted({"x": torch.zeros(3)}, 0)
    assert caught.value.code == "audit"
