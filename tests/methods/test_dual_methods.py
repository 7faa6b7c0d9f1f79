"""FedDPA, FedALT and PF2LoRA: two adapters a site, and how they count, by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_federation import SITES, backbone_of, initial_params, tiny_data, tiny_run, tiny_sites
from torch import Tensor

from confrere.adapters.algebra import pairs, product
from confrere.adapters.names import gate_name, side_of, slot_of, tensor_name
from confrere.config import read, validate
from confrere.errors import ConfigError, RunError
from confrere.job import open_data, run_experiment
from confrere.learner import Learner, TrainSettings
from confrere.method import METHODS, Method, Reply, Request, make
from confrere.methods.mixing import ANCHORS, likeness
from confrere.predict import Predictor, predict_folder
from confrere.record.files import read_state
from confrere.record.run import Run
from confrere.seeds import torch_generator
from confrere.tensors import State, Tensors, digest
from confrere.tokenset import Batch

A_PERSONAL = tensor_name("x", "A", "personal")


@dataclass
class Watched(Learner):
    """Records of each batch of each fit the names that had a gradient, the images, and the tensors."""

    seen: list[tuple[frozenset[str], bytes]] = field(default_factory=list)
    given: list[Tensors] = field(default_factory=list)

    def loss(self, params: Tensors, batch: Batch, *, capture: bool = False) -> Tensor:
        moving = frozenset(name for name, value in params.items() if value.requires_grad)
        self.seen.append((moving, batch.tokens.numpy().tobytes()))
        self.given.append({name: value.detach().clone() for name, value in params.items()})
        return super().loss(params, batch, capture=capture)


def watched(method: Method, site: str = "a", steps: int = 6, round_: int = 1, rounds: int = 3) -> Watched:
    backbone = backbone_of(method)
    settings = TrainSettings(steps=steps, batch_size=6, lr=5e-3)
    data = tiny_data(backbone, site)
    return Watched(backbone=backbone, data=data, settings=settings, seed=0, site=site, round=round_, rounds=rounds)


def noisy(params: Tensors, size: float = 0.2) -> dict[str, Tensor]:
    """Return tensors as after training: nothing is zero."""
    generator = torch.Generator().manual_seed(11)
    return {n: t + size * torch.randn(t.shape, generator=generator) for n, t in sorted(params.items())}


def start(method: Method, site: str = "a") -> dict[str, Tensor]:
    return noisy(initial_params(backbone_of(method), method, site))


def changed(before: Tensors, after: Tensors) -> set[str]:
    """Return which of general, personal, rest and head differ."""
    return {str(slot_of(n) or n.split(".")[0]) for n in before if not torch.equal(before[n], after[n])}


# FedDPA


def test_likeness_by_hand() -> None:
    """cos to (1,0) and (0,2): (1,0) and (3,0) have 1 and 0, (1,1) twice 1/sqrt 2, (-1,0) has -1 and 0: zero."""
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    anchors = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(likeness(features, anchors), torch.tensor([0.5, 0.5, 0.5**0.5, 0.0]))


@pytest.mark.parametrize("name", ["feddpa-t", "feddpa-f"])
@pytest.mark.parametrize("w_max", [0.5, 0.9])
def test_each_image_mixes_the_adapters_by_its_own_weight(name: str, w_max: float) -> None:
    """Against one image at a time, B scaled by weights from cosines in NumPy."""
    method = make(name, {"w_max": w_max})
    backbone, params = backbone_of(method), start(method)
    tokens = tiny_data(backbone, "a").batch(np.arange(5)).tokens
    bare = {n: torch.zeros_like(t) if side_of(n) == "B" else t for n, t in params.items()}
    f = backbone.features(bare, tokens).double().numpy()
    anchors = f[[3, 4]] - 0.8 * f[[0, 1]]  # not all images are alike to them
    params[ANCHORS] = torch.from_numpy(anchors).float()
    found = method.scores(backbone, params, tokens)
    norms = np.linalg.norm(f, axis=1)[:, None] * np.linalg.norm(anchors, axis=1)
    w = w_max * np.maximum(0, (f @ anchors.T / norms).mean(1))
    assert w.max() - w.min() > 0.05
    for image, weight in enumerate(w):
        by = {"general": 1 - weight, "personal": weight}
        scaled = {n: t * by[str(slot_of(n))] if side_of(n) == "B" else t for n, t in params.items()}
        torch.testing.assert_close(
            found[image], backbone.logits(scaled, tokens[[image]])[0].float(), rtol=1e-4, atol=1e-5
        )


def test_a_newcomer_has_the_global_adapter_alone() -> None:
    method = make("feddpa-t")
    backbone, params = backbone_of(method), start(method)
    tokens = tiny_data(backbone, "a").batch(np.arange(5)).tokens
    alone = {n: torch.zeros_like(t) if ".lora_B.personal." in n else t for n, t in params.items()}
    torch.testing.assert_close(method.scores(backbone, params, tokens), backbone.logits(alone, tokens))


def test_anchors_are_features_of_training_images_drawn_once_and_never_sent(tmp_path: Path) -> None:
    method = make("feddpa-t")
    _, sites = tiny_run(method, tmp_path)
    first, last = (sites["a"].store.before(r)["private"][ANCHORS] for r in (2, 4))
    assert first.shape == (5, backbone_of(method).feature_dim)
    assert torch.equal(first, last)
    site = sites["a"]
    bare = {n: torch.zeros_like(t) if side_of(n) == "B" else t for n, t in site.initial().items()}
    known = site.backbone.features(bare, site.data.batch(site.data.rows("train")).tokens)
    distances = torch.cdist(first, known)
    assert float(distances.min(1).values.max()) < 1e-3
    assert len(set(distances.argmin(1).tolist())) == 5
    for r in (1, 2, 3):
        reply = site.store.reply(r)
        assert reply is not None
        assert set(reply.state) == {"shared"}
        assert all(slot_of(n) == "general" or n.startswith("head.") for n in reply.state["shared"])
    few = make("feddpa-t", {"anchors": 99})
    assert len(few.draw_anchors(watched(few), start(few))) == len(site.data.rows("train"))


@pytest.mark.parametrize(("head", "local_moves"), [("shared", {"personal"}), ("local", {"personal", "head"})])
def test_in_turn_one_adapter_is_trained_and_the_other_rests(head: str, local_moves: set[str]) -> None:
    method = make("feddpa-t", {"head": head})
    params = start(method)
    assert changed(params, method.fit_local(watched(method), params, 3)) == local_moves
    assert changed(params, method.fit_global(watched(method), params, 3)) == {"general", "head"}


def test_the_global_adapter_is_trained_as_if_alone() -> None:
    """A joint or half-weighted pass would let the site's adapter shape the global one."""
    method = make("feddpa-t")
    params = start(method)
    none = {n: torch.zeros_like(t) if ".lora_B.personal." in n else t for n, t in params.items()}
    with_, without = (method.fit_global(watched(method), p, 3) for p in (params, none))
    for name in with_:
        if slot_of(name) != "personal":
            torch.testing.assert_close(with_[name], without[name])
    joint = watched(method).fit(params, train=lambda n: slot_of(n) != "personal", steps=3)
    assert any(not torch.allclose(joint[n], with_[n], atol=1e-3) for n in with_)


def test_the_local_adapter_is_trained_with_both_counting_by_half() -> None:
    """The loss of the fit's only step, with its batch and its dropout, is that of adapters with B halved."""
    method = make("feddpa-t")
    params, learner = start(method), watched(method)
    method.fit_local(learner, params, 1)
    half = {n: t * 0.5 if side_of(n) == "B" else t for n, t in params.items()}
    batch = next(learner.batches(1, "personal"))
    with learner.backbone.dropout(torch_generator(0, "dropout", "personal", 1, "a")):
        expected = float(learner.loss(half, batch))
    with learner.backbone.dropout(torch_generator(0, "dropout", "personal", 1, "a")):
        full = float(learner.loss(params, batch))
    assert learner.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert learner.metrics["loss"] != pytest.approx(full, rel=1e-3)


@pytest.mark.parametrize("name", ["feddpa-t", "feddpa-f", "fedalt", "pf2lora"])
@pytest.mark.parametrize("steps", [4, 7])
def test_a_round_takes_its_steps_and_no_more(name: str, steps: int) -> None:
    method = make(name)
    for round_ in (1, 3):
        learner, params = watched(method, steps=steps, round_=round_), initial_params(backbone_of(method), method, "a")
        received = method.broadcast(method.init_server(params), "a")
        method.update(learner, received, method.init_site(params))
        assert len(learner.seen) == steps


@pytest.mark.parametrize("name", ["feddpa-t", "feddpa-f"])
def test_the_average_is_uniform(name: str) -> None:
    """(1 + 5) / 2 = 3 with weights 1 and 99; by images it would be 4.96."""
    method = make(name)
    replies = [
        Reply(site="a", round=1, state={"shared": {"head.bias": torch.tensor([1.0])}}, weight=1.0),
        Reply(site="b", round=1, state={"shared": {"head.bias": torch.tensor([5.0])}}, weight=99.0),
        Reply(site="c", round=1, state={}, weight=7.0),
    ]
    assert method.aggregate({"shared": {}}, replies)["shared"]["head.bias"].item() == 3.0
    assert method.needs == "each"


def test_f_trains_the_local_adapter_after_the_federation(tmp_path: Path) -> None:
    method = make("feddpa-f", {"last": 0.5})
    final, sites = tiny_run(method, tmp_path, rounds=4, steps=6, lr=2e-2)
    run = Run(tmp_path)
    assert digest(final) == digest(run.server(2)) != digest(run.server(1))
    sent = [{n: s["sent_bytes"] for n, s in e["sites"].items()} for e in run.events() if e["event"] == "round"]
    assert [min(r.values()) > 0 for r in sent] == [True, True, False, False]
    assert max(sent[2].values()) == max(sent[3].values()) == 0
    private = [sites["a"].store.before(r)["private"] for r in (2, 3, 4, 5)]
    assert changed(private[0], private[1]) == set()
    assert changed(private[1], private[2]) == changed(private[2], private[3]) - {"anchors"} == {"personal"}
    assert [ANCHORS in p for p in private] == [False, False, True, True]
    assert [method.may_stop(r, 4) for r in (1, 2, 3, 4)] == [False, False, True, True]
    assert all(make("feddpa-t").may_stop(r, 4) for r in (1, 2, 3, 4))


def test_rounds_and_steps_too_few_for_two_adapters_are_refused() -> None:
    with pytest.raises(ConfigError, match="rounds=2"):
        make("feddpa-f").check(10, 1)
    with pytest.raises(ConfigError, match=r"train\.steps=2"):
        make("feddpa-t").check(1, 10)
    for last in (0.01, 0.3, 0.99):
        method = make("feddpa-f", {"last": last})
        for rounds in (2, 3, 10):
            method.check(10, rounds)
            assert 1 <= method.shared_rounds(rounds) < rounds


# FedALT


def fedalt_server(method: Method, values: dict[str, float]) -> State:
    """Return the server after each site sent an adapter whose every entry is its value."""
    first = initial_params(backbone_of(method), method, "")
    replies = []
    for name, value in values.items():
        sent = {n: torch.full_like(t, value) for n, t in first.items() if method.shared(n)}
        replies.append(Reply(site=name, round=1, state={"shared": sent}, weight=value))
    return method.aggregate(method.init_server(first), replies)


def test_rest_of_the_world_is_the_plain_mean_of_all_others() -> None:
    """Sites send 1, 2 and 6: the others' means are 4, 3.5 and 1.5; a newcomer's is 3, not the weighted 41/9."""
    method = make("fedalt")
    server = fedalt_server(method, {"a": 1.0, "b": 2.0, "c": 6.0})
    for site, mean in {"a": 4.0, "b": 3.5, "c": 1.5, "new": 3.0}.items():
        rest = method.broadcast(server, site)["rest"]
        assert {str(slot_of(n)) for n in rest} == {"rest"}
        assert all(bool((t == mean).all()) for t in rest.values()), site
    # The head, which all share, is averaged as everywhere: (1 + 4 + 36) / 9.
    torch.testing.assert_close(server["shared"]["head.bias"], torch.full((3,), 41 / 9))


def test_the_first_round_has_no_rest_and_the_only_site_never_has_one() -> None:
    method = make("fedalt")
    params = initial_params(backbone_of(method), method, "a")
    state = method.init_site(params)
    for server in (method.init_server(params), fedalt_server(method, {"a": 2.0})):
        received = method.broadcast(server, "a")
        assert set(received) == {"shared"}
        rest = {n: t for n, t in method.personal(received, state).items() if slot_of(n) == "rest"}
        assert rest
        assert not any(bool(t.any()) for t in rest.values())


def test_products_side_by_side_are_the_mean_of_products_and_factors_are_not() -> None:
    found = {}
    for kind in ("products", "factors"):
        method = make("fedalt", {"rest": kind})
        first = initial_params(backbone_of(method), method, "")
        sent = {s: {n: t + i for n, t in noisy(first).items() if slot_of(n)} for i, s in enumerate(SITES)}
        server = method.aggregate(
            method.init_server(first), [Reply(site=s, round=1, state={"shared": {**first, **sent[s]}}) for s in SITES]
        )
        rest = pairs(method.broadcast(server, "c")["rest"], "rest")
        mean = {k: sum(product(pairs(sent[s], "personal")[k]) for s in "ab") / 2 for k in pairs(sent["a"], "personal")}
        found[kind] = max(float((product(rest[k]) - mean[k]).abs().max()) for k in rest)
    assert found["products"] < 1e-4 < found["factors"]


def test_no_sites_adapter_can_be_cut_out_of_the_rest() -> None:
    """Side by side, the first rows of the rest's A were those of one site and the last ones another's."""
    method = make("fedalt", {"rest": "products"})
    first = initial_params(backbone_of(method), method, "")
    sent = {s: {n: t + i for n, t in noisy(first).items() if slot_of(n)} for i, s in enumerate(SITES)}
    replies = [Reply(site=s, round=1, state={"shared": {**first, **sent[s]}}) for s in SITES]
    rest = pairs(method.broadcast(method.aggregate(method.init_server(first), replies), "c")["rest"], "rest")
    for site in "ab":
        for layer, (a, _) in pairs(sent[site], "personal").items():
            rows = rest[layer][0].unfold(0, len(a), 1).transpose(1, 2)
            assert not any(torch.allclose(part, a, atol=1e-3) for part in rows)


def test_a_site_goes_on_from_its_own_adapter_whatever_the_others_send(tmp_path: Path) -> None:
    """Never re-initialised from an average: round 2 continues the adapter of round 1, beside a frozen rest."""
    method = make("fedalt")
    tiny_run(method, tmp_path, rounds=1)
    server = Run(tmp_path).server(1)
    _, sites = tiny_run(method, tmp_path / "again", rounds=1)
    state, received = sites["a"].store.before(2), method.broadcast(server, "a")
    begun = method.personal(received, state)
    for name, value in server["site.a"].items():
        assert torch.equal(begun[name], value)
    assert any(not torch.equal(server["site.a"][n], server["site.b"][n]) for n in server["site.a"])
    learner = watched(method, round_=2)
    payload, after = method.update(learner, received, state)
    assert {n.split(".lora_")[1].split(".")[1] for n in learner.seen[0][0] if ".lora_A." in n} == {"personal"}
    assert not any(slot_of(n) == "rest" for n in {**payload["shared"], **after["private"], **after["shared"]})
    assert all(".lora_gate." in n for n in after["private"])


def test_an_absent_site_still_counts_for_the_others() -> None:
    method = make("fedalt")
    server = fedalt_server(method, {"a": 1.0, "b": 2.0})
    new = {n: torch.full_like(t, 8.0) for n, t in server["shared"].items()}
    later = method.aggregate(server, [Reply(site="b", round=2, state={"shared": new})])
    assert all(bool((t == 8.0).all()) for t in method.broadcast(later, "a")["rest"].values())
    assert all(bool((t == 1.0).all()) for t in method.broadcast(later, "b")["rest"].values())


def test_the_mixer_learns_and_its_first_row_is_the_own_adapters() -> None:
    method = make("fedalt")
    backbone = backbone_of(method)
    params = initial_params(backbone, method, "a")
    state = method.init_site(noisy({n: t for n, t in params.items() if slot_of(n) != "rest"}))
    server = fedalt_server(method, {"b": 0.1, "c": 0.3})
    received = method.broadcast(server, "a")
    gate = gate_name(backbone.layers[0])
    before, after = state["private"][gate], method.update(watched(method), received, state)[1]["private"][gate]
    assert bool((before != after).all())
    full = method.personal(received, state)
    # Row 0 of a site: softmax((g x, 0)) = 1 / (1 + exp(-g x)) is the weight of B_k A_k.
    layer, seen = backbone.layers[0], {}
    module = backbone.anatomy.root.get_submodule(layer)
    hook = module.register_forward_hook(lambda _, inputs, out: seen.update(x=inputs[0], out=out))
    zero = {n: torch.zeros_like(t) if slot_of(n) == "rest" else t for n, t in full.items()}
    zero[gate] = torch.stack([full[gate][0], torch.zeros_like(full[gate][1])])
    backbone.features(zero, tiny_data(backbone, "a").batch(np.arange(3)).tokens)
    hook.remove()
    a, b = (zero[tensor_name(layer, side, "personal")] for side in ("A", "B"))  # type: ignore[arg-type]
    weight = torch.sigmoid(seen["x"] @ zero[gate][0])[..., None]
    expected = module.base_layer(seen["x"]) + backbone.scale * weight * (seen["x"] @ a.T @ b.T)
    torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-4)


def test_what_a_site_trains_has_the_whole_rank() -> None:
    method = make("fedalt")
    one, other = (initial_params(backbone_of(method), method, site) for site in ("a", "b"))
    assert {a.shape[0] for a, _ in pairs(one, "personal").values()} == {4}
    assert all(torch.equal(one[n], other[n]) for n in one)


# PF2LoRA


@pytest.mark.parametrize(("head", "upper"), [("shared", {"general", "head"}), ("local", {"general"})])
def test_levels_take_turns_on_batches_of_their_own(head: str, upper: set[str]) -> None:
    method = make("pf2lora", {"lower": 2, "head": head})
    learner, params = watched(method), start(method)
    method.update(learner, {"shared": params}, {"private": params})
    moved = [{str(slot_of(n) or n.split(".")[0]) for n in names} for names, _ in learner.seen]
    lower = {"general", "personal", "head"} - upper
    assert moved == [lower, lower, upper] * 2
    assert len({batch for _, batch in learner.seen}) == 6


def test_a_lower_step_is_that_of_the_client_adapter_alone() -> None:
    """Of two steps the first is the lower: the client adapter ends where one step on it alone ends, exactly."""
    method = make("pf2lora")
    params = start(method)
    payload, state = method.update(watched(method, steps=2), {"shared": params}, {"private": params})
    alone = watched(method).fit(params, train=lambda n: slot_of(n) == "personal", steps=1)
    joint = watched(method).fit(params, steps=2)
    for name, value in state["private"].items():
        assert torch.equal(value, alone[name])
        assert not torch.equal(value, joint[name])
    assert changed(params, {**params, **payload["shared"]}) == {"general", "head"}


def test_the_upper_step_sees_the_client_adapter_as_the_lower_level_left_it() -> None:
    """The upper step is at (x, y'), not at (x, y): first-order, but after the lower level."""
    method = make("pf2lora")
    params, learner = start(method), watched(method, steps=2)
    method.update(learner, {"shared": params}, {"private": params})
    lower = watched(method).fit(params, train=lambda n: slot_of(n) == "personal", steps=1)
    assert all(torch.equal(value, lower[name]) for name, value in learner.given[1].items())
    assert changed(learner.given[0], learner.given[1]) == {"personal"}


def test_the_client_adapter_may_be_smaller() -> None:
    method = make("pf2lora", {"client": 0.5})
    sites = tiny_sites(method)
    private = method.init_site(sites["a"].initial())["private"]
    assert {a.shape[0] for a, _ in pairs(private, "personal").values()} == {1}  # half of its share of rank 4
    server = method.init_server(sites["a"].initial())
    reply = sites["a"].handle(Request(kind="train", round=1, state=method.broadcast(server, "a")))
    assert {a.shape[0] for a, _ in pairs(reply.state["shared"], "general").values()} == {2}


def test_a_round_too_short_for_the_upper_level_says_so() -> None:
    method = make("pf2lora", {"lower": 3})
    params = start(method)
    with pytest.raises(ConfigError, match=r"train.steps=4"):
        method.update(watched(method, steps=3), {"shared": params}, {"private": params})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("feddpa-t", {"w_max": 1.5}, "0 <= w_max <= 1"),
        ("feddpa-t", {"anchors": 0}, "anchors=5"),
        ("feddpa-t", {"share": 1.0}, "0 < share < 1"),
        ("feddpa-f", {"last": 0.0}, "0 < last < 1"),
        ("feddpa-f", {"head": "mine"}, "shared, local"),
        ("fedalt", {"rest": "all"}, "factors, products"),
        ("pf2lora", {"lower": 0}, "lower=1"),
        ("pf2lora", {"client": 0.0}, "0 < client <= 1"),
    ],
)
def test_wrong_options_name_the_way_out(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, options)


def test_the_pages_say_what_hospitals_get_of_each_other_and_why_a_server_needs_each() -> None:
    docs = Path(__file__).parents[2] / "docs"
    leaves = (docs / "what-leaves-a-hospital.md").read_text()
    sends_personal = {name for name in METHODS if "personal" in make(name).slots and make(name).shared(A_PERSONAL)}
    assert sends_personal == {"fedalt"}
    for name in (*sends_personal, "fedmosaic", "data-vectors", "ifca"):
        assert f"`{name}`" in leaves, name
    for name in ("feddpa-t", "feddpa-f"):
        assert "a limit of this implementation" in (docs / "methods" / f"{name}.md").read_text()


# What a site takes home


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("data") / "hospitals"
    for s, site in enumerate(("east", "west")):
        for label, name in enumerate(("alpha", "beta", "gamma")):
            for k in range(8):
                seed = 1000 * s + 100 * label + k
                pixels = np.random.default_rng(seed).integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., label] += 90
                path = root / site / name / f"p{s}{label}{k}__1.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield root


@pytest.mark.parametrize(
    ("name", "options", "slots", "beside"),
    [
        ("feddpa-t", {}, {"general", "personal"}, {ANCHORS}),
        ("feddpa-f", {"last": 0.5}, {"general", "personal"}, {ANCHORS}),
        ("fedalt", {}, {"personal", "rest"}, {"lora_gate"}),
        ("fedalt", {"rest": "products"}, {"personal", "rest"}, {"lora_gate"}),
        ("pf2lora", {"client": 0.5}, {"general", "personal", "merged"}, set()),
        ("data-vectors", {"predicts": "ensemble"}, {"general"}, {"members."}),
        ("data-vectors", {}, {"general", "merged"}, set()),
        ("ridge", {}, {"general", "merged"}, set()),
    ],
)
def test_exported_folders_predict_what_the_site_predicted(
    hospitals: Path, tmp_path: Path, name: str, options: dict[str, Any], slots: set[str], beside: set[str]
) -> None:
    values = {"path": str(hospitals), "method": {"name": name, **options}, "controls": (), "rounds": 2, "threads": 1}
    values |= {"train": {"steps": 6, "batch_size": 6, "lr": 0.02}, "backbone": {"name": "test-vit"}}
    run_experiment(validate({**values, "adapter": {"blocks": 2, "rank": 4, "scale": 1.5}}), tmp_path)
    for site in ("east", "west"):
        folder = tmp_path / "adapters" / site
        assert {p.name for p in folder.iterdir() if p.is_dir()} == slots
        predictor = Predictor(tmp_path, site)
        rest = [n for n in predictor.params if slot_of(n) is None and not n.startswith("head.")]
        assert all(any(part in n for n in rest) for part in beside)
        assert bool(rest) == bool(beside)
        stored = read_state(tmp_path / "sites" / site / "test-personalised.safetensors")[0]["test"]["probabilities"]
        images = images_of(hospitals, tmp_path, site)
        assert np.allclose(predictor.probabilities(images), stored.numpy(), rtol=1e-4, atol=1e-6)
        assert float(stored.std()) > 0.01
    # A map shows one pass of one model: where several decide, it would show another than the one that predicts.
    several = name.startswith("feddpa") or options.get("predicts") == "ensemble"
    source, out = hospitals / "east" / "alpha", tmp_path / "new" / "out.csv"
    with pytest.raises(RunError, match="without --overlay") if several else nullcontext():
        predict_folder(tmp_path, "east", source, out, overlays=1)
    assert len(list(out.parent.rglob("*.png"))) == (not several)
    assert predict_folder(tmp_path, "east", source, out) == (8, [])


def images_of(hospitals: Path, run: Path, site: str) -> np.ndarray:
    """Return the test images of a site in the order of its predictions."""
    found = open_data(validate(read(run / "experiment.toml")), run).site(site)
    return np.asarray(found.images[np.flatnonzero(found.split == 2)])
