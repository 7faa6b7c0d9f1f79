"""FedMosaic: exact means, what the factors span, who is relevant to whom, and networks of different size together.

Every trap that the method's specification names has a test that the faulty form fails.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from method_variants import VARIANTS
from tiny_federation import backbone_of, initial_params, tiny_data, tiny_learner, tiny_run, tiny_sites
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from confrere.adapters import alignment, colora
from confrere.adapters.algebra import pairs
from confrere.adapters.layer import LoraLinear
from confrere.adapters.lora import LoraSpec
from confrere.adapters.names import gate_name, shift_name, slot_of, tensor_name
from confrere.backbones import REGISTRY, Backbone, anatomy
from confrere.backbones.loading import Loaded, _build
from confrere.errors import ConfigError
from confrere.federation.loop import Plan, federate
from confrere.federation.site import Site
from confrere.federation.transport import InProcess
from confrere.learner import Learner, TrainSettings
from confrere.listing import describe_method
from confrere.method import Method, Reply, Request, make
from confrere.record.run import Run
from confrere.record.store import MemoryStore
from confrere.seeds import torch_generator
from confrere.tasks import CLASSIFICATION
from confrere.tokenset import TokenSet


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch_generator(seed, "test", str(shape)))


def fixed(r: int = 4, i: int = 20, o: int = 24) -> tuple[Tensor, Tensor]:
    return colora.fixed_factors(normal(r, i), torch.zeros(o, r), "0.q")


def test_the_mean_of_p_is_the_mean_of_the_products_and_that_of_lora_factors_is_not() -> None:
    a, b = fixed()
    ps = [normal(4, 4, seed=s) for s in range(3)]
    mean = torch.stack([b @ p @ a for p in ps]).mean(0)
    mixed = colora.mix({str(s): {"0.q.lora_P.weight": p} for s, p in enumerate(ps)}, {"0": 1.0, "1": 1.0, "2": 1.0})
    assert (b @ mixed["0.q.lora_P.weight"] @ a - mean).abs().max() < 1e-6
    factors = [(normal(4, 20, seed=s), normal(24, 4, seed=s)) for s in range(3)]
    naive = torch.stack([f[1] for f in factors]).mean(0) @ torch.stack([f[0] for f in factors]).mean(0)
    assert (naive - torch.stack([f[1] @ f[0] for f in factors]).mean(0)).abs().max() > 0.1


def test_the_factors_are_orthonormal_and_common() -> None:
    a, b = fixed()
    torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(b.T @ b, torch.eye(4), atol=1e-5, rtol=0)
    again = colora.fixed_factors(a, b, "another place")  # aligned factors are kept as they are
    torch.testing.assert_close(again, (a, b), atol=1e-5, rtol=0)


def span(a: Tensor, b: Tensor) -> int:
    """Return the dimension of what B P A can reach."""
    changes = torch.stack([(b @ normal(4, 4, seed=s) @ a).flatten() for s in range(24)]).double()
    return int(torch.linalg.matrix_rank(changes, rtol=1e-5))


def test_the_change_of_weights_spans_r_squared_dimensions() -> None:
    """vec(B P A) = (A^T kron B) vec(P), of rank rank(A) rank(B): 16 for r = 4, 8 when A has rank 2."""
    a, b = fixed()
    assert span(a, b) == 16
    assert span(torch.cat([a[:2], a[:2]]), b) == 8


def test_orthogonality_is_of_rows_and_not_of_columns() -> None:
    """The released code has (i, i) cosines of columns, which 20 columns in 4 dimensions cannot bring to zero."""
    a, _ = fixed()
    assert float(alignment.row_cosines(a)) < 1e-10
    columns = nn.functional.normalize(a, dim=0)
    gram = columns.T @ columns
    assert float((gram - torch.diag(torch.diag(gram))).square().mean()) > 0.05
    skew = torch.tensor([[1.0, 0.0], [3.0, 3.0]])  # cosine sqrt(1/2): the two off-diagonal squares are 1/2 each
    assert float(alignment.row_cosines(skew)) == pytest.approx(0.5)


def test_the_layer_is_the_gated_sum_of_both_copies() -> None:
    """By hand, y = W x + s [beta B (P' A x + q') + (1 - beta) B (P A x + q)], beta = sigmoid((g1 - g0) . x).

    The gate's first row is that of what is trained, the second that of the fixed copy.
    """
    layer, method = "h.0.q", make("fedmosaic")
    a, b = fixed(2, 5, 6)
    others = {colora.p_name("0.q"): normal(2, 2, seed=1), colora.q_name("0.q"): normal(2, seed=2)}
    own = {colora.p_name("0.q"): normal(2, 2, seed=3), colora.q_name("0.q"): normal(2, seed=4)}
    gate = normal(2, 5, seed=5)
    kept = {tensor_name(layer, "A", "personal"): a, tensor_name(layer, "B", "personal"): b, gate_name(layer): gate}
    made = colora.assemble(others, own, kept)
    module = LoraLinear(nn.Linear(5, 6), (*method.slots, *method.fixed), 2.0, 0.0, gated=True, shifted=True)
    given = {name.removeprefix(f"{layer}."): value for name, value in made.items()}
    x = normal(3, 5)
    found = torch.func.functional_call(module, given, (x,)).detach().numpy()
    beta = 1 / (1 + np.exp(-(x @ (gate[1] - gate[0])).numpy()))[:, None]
    copies = [(m[colora.p_name("0.q")] @ a @ x.T).T + m[colora.q_name("0.q")] for m in (others, own)]
    g, k = ((copy @ b.T).numpy() for copy in copies)
    np.testing.assert_allclose(
        found, module.base_layer(x).detach().numpy() + 2 * (beta * g + (1 - beta) * k), atol=1e-5
    )


def test_places_are_the_last_blocks_of_four_parts() -> None:
    for blocks, expected in ((4, [0, 1, 2, 3]), (6, [0, 1, 2, 5]), (8, [1, 3, 5, 7]), (12, [2, 5, 8, 11])):
        found = colora.places(f"layers.{i}.attention.q" for i in range(blocks))
        assert [int(layer.split(".")[1]) for layer in found] == expected
        assert list(found.values()) == [f"{k}.attention.q" for k in range(4)]
    assert list(colora.places(["encoder.layer.10.q", "encoder.layer.11.q"]).values()) == ["0.q", "1.q"]


def test_the_probes_gradient_by_hand_and_its_first_rows() -> None:
    """dL/dV1 = mean over images of ((p - y) V2 * gelu'(V1 z)) z^T, the first 40 % of 32 rows, rounded up."""
    z, labels = normal(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    v1 = normal_of("V1", 32, 5) * 5**-0.5
    v2 = normal_of("V2", 3, 32) * 32**-0.5
    x = (z @ v1.T).double().numpy()
    cdf = np.vectorize(lambda t: 0.5 * (1 + math.erf(t / 2**0.5)))(x)
    slope = cdf + x * np.exp(-(x**2) / 2) / (2 * np.pi) ** 0.5
    scores = (x * cdf) @ v2.numpy().T
    chances = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    delta = ((chances - np.eye(3)[labels.numpy()]) @ v2.numpy()) * slope / 6
    np.testing.assert_allclose(colora.probe_gradient(z, labels, 3).numpy(), (delta.T @ z.numpy())[:13], atol=1e-6)


def normal_of(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch_generator(0, "probe", name))


def gradients(noise: float, keep: float = 0.4) -> dict[str, Tensor]:
    """Return gradients of 8 sites with the same pictures; from the fifth on labels are permuted."""
    centres, found = 2 * normal(6, 24), {}
    for site in range(8):
        labels = torch.randint(6, (120,), generator=torch_generator(site, "labels"))
        z = centres[labels] + normal(120, 24, seed=100 + site)
        given = labels if site < 4 else (labels + 2) % 6
        g = colora.probe_gradient(z, given, 6, keep)
        found[f"s{site}"] = g + noise * normal(*g.shape, seed=200 + site)
    return found


def similarities(found: dict[str, Tensor], how: str) -> tuple[float, float]:
    sites = sorted(found)
    of = {(i, j): colora.similarity(found[i], found[j], how) for i in sites for j in sites if i < j}
    same = [v for (i, j), v in of.items() if (i < "s4") == (j < "s4")]
    cross = [v for (i, j), v in of.items() if (i < "s4") != (j < "s4")]
    return sum(same) / len(same), sum(cross) / len(cross)


@pytest.mark.parametrize("how", colora.SIMILARITIES)
def test_like_tasks_have_like_gradients_and_large_noise_hides_it(how: str) -> None:
    same, cross = similarities(gradients(0.0), how)
    assert same > cross + 0.2
    few, _ = similarities(gradients(1e-4), how)
    all_rows, _ = similarities(gradients(0.0, keep=1.0), how)
    assert abs(few - same) < 0.02
    assert all_rows > cross + 0.2  # to keep the first rows only costs little
    noisy, _ = similarities(gradients(1.0), how)
    assert noisy < same / 2
    own = {noise: own_group(colora.relevance(gradients(noise), "s0", how, 0.5)) for noise in (0.0, 1.0)}
    assert own[0.0] > own[1.0] > 0
    assert own[0.0] > 3 / 7


def own_group(weights: dict[str, float]) -> float:
    return sum(weight for name, weight in weights.items() if name < "s4")


def test_both_similarities_by_hand() -> None:
    """Columns (1, 0) | (0, 1) against (1, 0) | (0, -3): cosines 1 and -1, mean 0; flattened (1 - 3) / sqrt(2 x 10)."""
    left, right = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, -3.0]])
    assert colora.similarity(left, right, "columns") == pytest.approx(0.0)
    assert colora.similarity(left, right, "flattened") == pytest.approx(-2 / 20**0.5)
    assert colora.similarity(left, torch.ones(2, 3), "columns") == 0.0


def test_weights_leave_the_site_itself_out_and_are_a_softmax() -> None:
    probes = {"a": torch.tensor([[1.0]]), "b": torch.tensor([[2.0]]), "c": torch.tensor([[-1.0]])}
    found = colora.relevance(probes, "a", "columns", 0.5)
    assert set(found) == {"b", "c"}
    assert found["b"] == pytest.approx(math.exp(2) / (math.exp(2) + math.exp(-2)))
    assert colora.relevance(probes, "new", "columns", 0.5) == pytest.approx(dict.fromkeys("abc", 1 / 3))


def test_relevance_comes_nearer_to_the_own_group_than_the_plain_mean() -> None:
    """Two groups that pull in opposite directions cancel in the plain mean; a lower temperature helps more."""
    probes = gradients(1e-4)
    models = {name: {"0.q.lora_P.weight": torch.eye(3) * (1 if name < "s4" else -1)} for name in probes}
    away = {}
    for temperature in (0.05, 0.5, 1e6):
        mixed = colora.mix(models, colora.relevance(probes, "s0", "columns", temperature))
        away[temperature] = float((mixed["0.q.lora_P.weight"] - torch.eye(3)).norm())
    assert away[0.05] < away[0.5] < away[1e6]


def test_the_average_of_gradients_is_not_corrected_and_the_own_copy_is_not_mixed() -> None:
    """G = g1 after round 1, (g1 + g2) / 2 after round 2."""
    method, p = make("fedmosaic"), "0.q.lora_P.weight"
    server = {"shared": {p: torch.zeros(1, 1)}}
    for round_, size in ((1, 1.0), (2, 3.0)):
        replies = [
            Reply(
                site=site,
                round=round_,
                state={"shared": {p: torch.full((1, 1), size + k)}, "probe": {"gradient": torch.full((1, 1), size)}},
            )
            for k, site in enumerate("abc")
        ]
        server = method.aggregate(server, replies)
    assert float(server["probe:a"]["gradient"]) == 2.0
    sent = method.broadcast(server, "a")
    assert float(sent["own"][p]) == 3.0
    assert float(sent["others"][p]) == pytest.approx((4 + 5) / 2)  # not 3, 4 and 5
    assert set(method.broadcast(server, "new")) == {"others"}


def test_a_site_trains_p_and_never_the_factors() -> None:
    method = make("fedmosaic")
    learner = tiny_learner(method, "a")
    before = method.init_site(initial_params(learner.backbone, method, "a"))
    received = method.broadcast(method.init_server(initial_params(learner.backbone, method, "")), "a")
    sent, after = method.update(learner, received, before)
    inner = [value for name, value in sent["shared"].items() if colora.inner(name)]
    assert inner
    assert all(bool(value.any()) for value in inner)
    for name, value in before["private"].items():
        assert torch.equal(after["private"][name], value) == (slot_of(name) == "personal"), name
    other = method.init_site(initial_params(learner.backbone, method, "b"))["private"]
    assert all(torch.equal(other[n], v) for n, v in before["private"].items() if slot_of(n))  # bit for bit


def test_what_is_trained_has_the_whole_rank_and_the_received_copy_is_always_given() -> None:
    """The trap: a rank divided among two copies, of which one is frozen, trains a quarter of P's entries."""
    method, backbone = make("fedmosaic"), backbone_of(make("fedmosaic"))
    params = initial_params(backbone, method, "a", rank=4)
    assert {slot_of(name) for name in params} == {None, "personal"}
    server, state = method.init_server(initial_params(backbone, method, "", rank=4)), method.init_site(params)
    assert {tuple(v.shape) for n, v in server["shared"].items() if n.endswith("lora_P.weight")} == {(4, 4)}
    gates = [value for name, value in state["private"].items() if name.endswith("lora_gate.weight")]
    assert gates
    assert {len(gate) for gate in gates} == {2}
    for received in ({}, {"others": {}}, method.broadcast(server, "a")):
        copy = pairs(method.personal(received, state), "general")
        assert set(copy) == set(backbone.layers)
        assert {len(a) for a, _ in copy.values()} == {4}


def test_a_site_whose_reply_was_lost_predicts_with_what_it_trained_and_goes_on_from_there() -> None:
    """Gates and head of round 2 belong to P and q of round 2, also when the server has those of round 1 only."""
    method = make("fedmosaic")
    site, server = tiny_sites(method)["a"], method.init_server(initial_params(backbone_of(method), method, ""))
    first = site.handle(Request(kind="train", round=1, state=method.broadcast(server, "a")))
    server = method.aggregate(server, [first])
    received = method.broadcast(server, "a")
    lost = site.handle(Request(kind="train", round=2, state=received)).state["shared"]
    assert any(not torch.equal(lost[name], received["own"][name]) for name in lost)
    kept = site.store.before(3)
    assert kept is not None
    params = site.params(Request(kind="evaluate", round=2, state=received))
    expected = colora.assemble(received["others"], lost, kept["private"])
    assert all(torch.equal(params[name], value) for name, value in expected.items())
    idle = replace(tiny_learner(method, "a"), settings=TrainSettings(steps=1, batch_size=6, lr=0.0))
    sent, _ = method.update(idle, received, kept)
    assert all(torch.equal(sent["shared"][name], value) for name, value in lost.items())
    # A site that lost its own copy gets that of the server.
    params = method.personal(received, {"private": kept["private"]})
    expected = colora.assemble(received["others"], received["own"], kept["private"])
    assert all(torch.equal(params[name], value) for name, value in expected.items())


def test_lists_say_that_plain_adapters_leave_and_only_gates_and_head_stay() -> None:
    """Six blocks, two of them without P and q, whose adapters the server gets; what is never sent is said to stay."""
    method, backbone = make("fedmosaic"), network(6, 16)
    said = describe_method(method)
    assert said["sends"] == ["P and q", "own adapters of other blocks", "gradient of a frozen probe"]
    assert said["keeps"] == ["gates", "head", "copy of what it last sent, to predict with"]
    settings = TrainSettings(steps=4, batch_size=6)
    data = tiny_data(backbone, "a")
    learner = Learner(backbone=backbone, data=data, settings=settings, seed=0, site="a", round=1, rounds=1)
    before = method.init_site(initial_params(backbone, method, "a"))
    received = method.broadcast(method.init_server(initial_params(backbone, method, "")), "a")
    sent, after = method.update(learner, received, before)
    assert {name.split(".")[1] for name in sent["shared"] if slot_of(name) == "personal"} == {"3", "4"}
    changed = {n for n, v in after["private"].items() if not torch.equal(v, before["private"][n])}
    assert {"head" if n.startswith("head.") else n.split(".")[-2] for n in changed} == {"head", "lora_gate"}
    assert set(after["shared"]) == set(sent["shared"])


@functools.cache
def network(blocks: int, width: int, adapted: int = 0) -> Backbone:
    """Return a random vision transformer whose last ``adapted`` blocks, by default all, are adapted."""
    method = make("fedmosaic")
    sizes = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": width, "num_hidden_layers": blocks}
    config = ViTConfig(image_size=32, patch_size=8, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(blocks)
        model = ViTModel(config, add_pooling_layer=False)
    spec = LoraSpec(slots=(*method.slots, *method.fixed), blocks=adapted or blocks, gated=True, shifted=True)
    loaded = Loaded(anatomy.of_transformers(model, (32, 32)), REGISTRY["test-vit"], f"{blocks}x{width}")
    return _build(loaded, spec, None, (32, 32), "cpu", "fp32", CLASSIFICATION)


NETWORKS = {"a": (6, 16), "b": (8, 24), "c": (12, 32), "d": (6, 16)}


def mosaic(method: Method) -> dict[str, Site]:
    return {
        name: Site(
            name=name,
            method=method,
            backbone=network(*size),
            data=tiny_data(network(*size), name),
            initial=functools.partial(initial_params, network(*size), method, name),
            store=MemoryStore(),
            settings=TrainSettings(steps=2, batch_size=6, lr=5e-3),
            seed=0,
            rounds=2,
        )
        for name, size in NETWORKS.items()
    }


def test_networks_of_different_depth_and_width_share_by_place(tmp_path: Path) -> None:
    """6, 8 and 12 blocks, widths 16 to 32: P and q of all, plain adapters of equal networks only."""
    method = make("fedmosaic")
    sites = mosaic(method)
    server = method.init_server(initial_params(network(6, 16), method, ""))
    final = federate(method, server, InProcess(sites), Plan(rounds=2), Run(tmp_path))
    own = {name: final[f"own:{name}"] for name in sites}
    shared = {name for name in own["a"] if colora.inner(name)}
    assert {name.split(".")[0] for name in shared} == {"0", "1", "2", "3"}
    weights = colora.relevance({n: final[f"probe:{n}"]["gradient"] for n in sites}, "a", "columns", 0.5)
    received = method.broadcast(final, "a")["others"]
    for name in shared:
        expected = sum(weights[s] * own[s][name].double() for s in "bcd")
        assert (received[name].double() - expected).abs().max() < 1e-6
    plain = {name: value for name, value in received.items() if not colora.inner(name)}
    assert plain
    assert all(torch.equal(value, own["d"][name]) for name, value in plain.items())
    assert {n for n in method.broadcast(final, "c")["others"] if not colora.inner(n)} == set()  # it has no equal
    for name, site in sites.items():
        reply = site.handle(Request(kind="evaluate", round=2, state=method.broadcast(final, name)))
        assert 0.0 <= reply.metrics["score"] <= 1.0


def test_factors_of_a_place_are_common_whatever_the_depth() -> None:
    """Names are drawn in the order of strings, where block 10 of twelve comes before block 8; a mean of P needs one A.

    Where nothing is fresh (aligned factors: B is not zero), each layer keeps its own A.
    """
    method, found = make("fedmosaic"), {}
    for blocks in (6, 8, 12):
        backbone = network(blocks, 16, 4)
        factors = pairs(colora.fix(initial_params(backbone, method, "a")), "personal")
        found[blocks] = {place: factors[layer] for layer, place in colora.places(factors).items()}
    assert len(found[6]) == 8  # query and value of four blocks
    for place, pair in found[6].items():
        for blocks in (8, 12):
            torch.testing.assert_close(found[blocks][place], pair, rtol=0, atol=0)
    params = dict(initial_params(network(12, 16, 4), method, "a"))
    params |= {name: normal(*value.shape) for name, value in params.items() if ".lora_B." in name}
    before, after = pairs(params, "personal"), pairs(colora.fix(params), "personal")
    for layer, (a, _) in before.items():
        torch.testing.assert_close(after[layer][0], colora.nearest_orthonormal(a))


def test_the_overlap_before_averaging_compares_the_two_copies(tmp_path: Path) -> None:
    """It was 1 in every round: what a site had just trained stood for the others' mixture, too."""
    method = make("fedmosaic")
    final, sites = tiny_run(method, tmp_path, rounds=2, lr=0.05)
    state, received = sites["a"].store.before(3), method.broadcast(final, "a")
    assert state is not None
    after = {**received, "shared": state["shared"], "probe": final["probe:a"]}  # as the site looks at it
    params = method.personal(after, state)
    expected = colora.assemble(received["others"], state["shared"], state["private"])
    assert all(torch.equal(params[name], value) for name, value in expected.items())
    rounds = [event for event in Run(tmp_path).events() if event["event"] == "round"]
    overlaps = rounds[-1]["diagnostics"]["overlap_before"]
    assert set(overlaps) == {"a", "b", "c"}
    assert all(entry["product"] < 0.999 for entry in overlaps.values())


@pytest.mark.parametrize("every", [1, 2])
def test_the_probe_sees_the_batches_of_the_fit_in_passing(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is read twice, and the gradient is that of every so manieth batch with adapters off."""
    method = make("fedmosaic", {"every": every, "noise": 0.0})
    learner = tiny_learner(method, "a")
    state = method.init_site(initial_params(learner.backbone, method, "a"))
    off = {n: torch.zeros_like(t) if ".lora_B." in n else t for n, t in method.personal({}, state).items()}
    batches = list(learner.batches(learner.settings.steps, "fit"))[::every]
    seen = [colora.probe_gradient(learner.features(off, b), b.labels, len(learner.data.classes)) for b in batches]
    reads, batch = [], TokenSet.batch
    monkeypatch.setattr(TokenSet, "batch", lambda self, *given: (reads.append(1), batch(self, *given))[1])
    sent, _ = method.update(learner, {}, state)
    assert len(reads) == learner.settings.steps
    assert torch.equal(sent["probe"]["gradient"], torch.stack(seen).mean(0))


def seen(backbone: Backbone, method: Method, images: np.ndarray) -> dict[str, Tensor]:
    """Return the inputs (n tokens, i) of the layers that share, by place, with adapters off."""
    params = initial_params(backbone, method, "")
    off = colora.assemble({}, {}, colora.fix(params))
    inputs: dict[str, Tensor] = {}
    backbone.features(
        {n: torch.zeros_like(t) if ".lora_B." in n else t for n, t in off.items()},
        backbone.prefix(images),
        capture=inputs,
    )
    return {place: inputs[layer].flatten(0, 1) for layer, place in colora.places(backbone.layers).items()}


def test_a_wide_network_is_aligned_with_a_narrow_one_on_public_images() -> None:
    """Aligned A does on a wide network's activations what the pivot's does on its own, better than a random one."""
    method, pivot, wide = make("fedmosaic"), network(6, 16), network(8, 24)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 1, 1, 3)) // 2 + rng.integers(0, 128, (24, 32, 32, 3))
    x1, x2 = (seen(backbone, method, images.astype(np.uint8)) for backbone in (pivot, wide))
    place = "1.attention.q_proj" if "1.attention.q_proj" in x1 else sorted(x1)[0]
    a, _ = fixed(2, 16, 16)
    aligned, drawn = alignment.align_a(a, x1[place], x2[place]), colora.nearest_orthonormal(normal(2, 24, seed=9))
    torch.testing.assert_close(aligned @ aligned.T, torch.eye(2), atol=1e-5, rtol=0)
    target = x1[place] @ a.T
    errors = [float((x2[place] @ each.T - target).square().mean()) for each in (aligned, drawn)]
    assert errors[0] < 0.8 * errors[1]


def test_alignment_by_canonical_correlations_finds_a_rotation() -> None:
    """Where the wide outputs are the pivot's, turned into more dimensions (X3 = X1 R), B is turned alike: R^T B."""
    x1, turn = normal(400, 8), colora.nearest_orthonormal(normal(8, 12))
    _, b = fixed(3, 5, 8)
    found = alignment.align_b(b, x1, x1 @ turn)
    torch.testing.assert_close(found, turn.T @ b, atol=2e-2, rtol=0)
    torch.testing.assert_close(found.T @ found, torch.eye(3), atol=1e-5, rtol=0)


def test_aligned_factors_that_a_site_starts_with_are_kept() -> None:
    """Alignment enters by a site's first tensors: what is orthonormal there stays as it is."""
    method, backbone = make("fedmosaic"), network(8, 24)
    params = dict(initial_params(backbone, method, "b"))
    layer = next(iter(colora.places(backbone.layers)))
    names = [tensor_name(layer, "A", "personal"), tensor_name(layer, "B", "personal")]
    rank, width = params[names[0]].shape
    a, b = fixed(rank, width, params[names[1]].shape[0])
    params |= {names[0]: a, names[1]: b}
    kept = pairs(method.init_site(params)["private"], "personal")[layer]
    torch.testing.assert_close(kept, (a, b), atol=1e-5, rtol=0)
    assert shift_name(layer, "personal") not in method.init_site(params)["private"]


def test_sites_of_another_rank_are_refused() -> None:
    models = {"a": {"0.q.lora_P.weight": torch.eye(2)}, "b": {"0.q.lora_P.weight": torch.eye(3)}}
    with pytest.raises(ValueError, match="same rank"):
        colora.mix(models, {"a": 0.5, "b": 0.5})


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"every": 0}, {"noise": -1.0}, {"similarity": "cosine"}])
def test_options_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        make("fedmosaic", wrong)


def test_a_lone_site_gets_nothing_from_itself(tmp_path: Path) -> None:
    method = make("fedmosaic")
    sites = {"a": tiny_sites(method)["a"]}
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    final = federate(method, server, InProcess(sites), Plan(rounds=2), Run(tmp_path))
    assert method.broadcast(final, "a")["others"] == {}


def test_the_released_variant_and_the_papers_differ(tmp_path: Path) -> None:
    one, _ = tiny_run(make("fedmosaic", {"temperature": 0.05}), tmp_path / "1")
    two, _ = tiny_run(VARIANTS["fedmosaic-flattened"], tmp_path / "2")
    assert any(not torch.equal(one["own:a"][n], two["own:a"][n]) for n in one["own:a"])
