"""Methods that keep a part at the site: Med-DualLoRA, SDFLoRA, FedPer, FedRep, FedBN and FedSA-LoRA."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_federation import SITES, backbone_of, initial_params, tiny_learner, tiny_plan, tiny_run, tiny_sites

from confrere import initial
from confrere.adapters.algebra import cut, pairs, product
from confrere.adapters.names import side_of, slot_of, tensor_name
from confrere.config import read, validate
from confrere.errors import ConfigError
from confrere.federation.loop import federate
from confrere.federation.site import Site
from confrere.federation.transport import InProcess
from confrere.job import make_site, open_data, prepare, run_experiment
from confrere.learner import Learner
from confrere.method import Method, Reply, Request, make
from confrere.methods.sdflora import alive
from confrere.predict import Predictor
from confrere.record.files import read_json, read_state
from confrere.record.run import Run
from confrere.seeds import torch_generator
from confrere.tensors import State, Tensors, digest, flatten

RANKS = {"a": 2, "b": 4, "c": 8}


def run_with(method: Method, sites: dict[str, Site], folder: Path, server: State, rounds: int = 3) -> State:
    return federate(method, server, InProcess(sites), tiny_plan(method, rounds=rounds), Run(folder))


def kept(site: Site, round_: int) -> Tensors:
    """What ``site`` has of its own after ``round_``."""
    return (site.store.before(round_ + 1) or {})["private"]


# All: what stays, stays apart


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("fedper", {"head"}),
        ("fedrep", {"head"}),
        ("fedbn", {"norm"}),
        ("fedsa-lora", {"B", "head"}),
        ("med-duallora", {"personal A", "personal B", "head"}),
        ("sdflora", {"personal A", "personal B"}),
    ],
)
def test_what_stays_never_reaches_the_server_nor_another_site(name: str, stays: set[str]) -> None:
    """The bug of public FedSA code: one model for all sites, of which only A is restored, so B goes from site to site.

    Here a site's own tensors come from its own disk: they are what they were after its last round, whoever else
    trained since, and no site has another's.
    """

    def kind(tensor: str) -> str:
        if slot_of(tensor) is None:
            return "head" if tensor.startswith("head.") else "norm"
        return " ".join(w for w in (slot_of(tensor), side_of(tensor)) if w and w != "general")

    method = make(name)
    sites = tiny_sites(method)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    turns = ("a", "b", "c", "a")
    for round_, who in enumerate(turns, 1):
        request = Request(kind="train", round=round_, state=method.broadcast(server, who))
        server = method.aggregate(server, [sites[who].handle(request)])
    last = {site: round_ for round_, site in enumerate(turns, 1)}
    own = {n: kept(sites[n], 4) for n in SITES}
    for site in SITES:
        assert {kind(n) for n in own[site]} == stays
        assert not own[site].keys() & server["shared"].keys()
        assert digest({"": own[site]}) == digest({"": kept(sites[site], last[site])})
        params = sites[site].params(Request(kind="evaluate", round=4, state=method.broadcast(server, site)))
        assert all(torch.equal(params[n], value) for n, value in own[site].items())
    for tensor, value in own["a"].items():
        assert not any(torch.equal(value, own[other][tensor]) for other in ("b", "c")), tensor


def shifted(method: Method) -> dict[str, Site]:
    """Sites that call the same class by different names."""
    sites = tiny_sites(method, rounds=4, steps=8, lr=1e-2)
    for k, site in enumerate(sites.values()):
        site.data = replace(site.data, labels=(site.data.labels + k) % 3)
    return sites


@pytest.mark.slow
def test_with_labels_that_differ_between_sites_methods_with_a_local_part_win(tmp_path: Path) -> None:
    """The ordering of the specification's trial: all personalised methods far above one shared adapter."""
    scores = {}
    for name in ("fedit", "fedbn", "fedper", "fedrep", "fedsa-lora", "med-duallora"):
        method = make(name)
        server = method.init_server(initial_params(backbone_of(method), method, ""))
        run_with(method, shifted(method), tmp_path / name, server, rounds=4)
        judged = [e for e in Run(tmp_path / name).events() if e["event"] == "evaluation"]
        scores[name] = judged[-1]["criterion"]
    for name in ("fedper", "fedrep", "fedsa-lora", "med-duallora"):
        assert scores[name] > scores["fedit"] + 0.2, scores


# Med-DualLoRA


def test_med_duallora_is_dual_with_the_head_local(tmp_path: Path) -> None:
    for head in ("local", "shared"):
        left, left_sites = tiny_run(make("med-duallora", {"head": head}), tmp_path / f"m{head}")
        right, right_sites = tiny_run(make("dual", {"head": head}), tmp_path / f"d{head}")
        assert digest(left) == digest(right)
        for name in SITES:
            assert digest(left_sites[name].store.before(4) or {}) == digest(right_sites[name].store.before(4) or {})
    assert make("med-duallora").head == "local"  # type: ignore[attr-defined]


# SDFLoRA


def stack(ranks: tuple[int, ...], seed: int = 0) -> tuple[State, list[Reply]]:
    """A server of rank 4 and replies of given ranks; one layer of 6 inputs and 5 outputs."""
    g = torch.Generator().manual_seed(seed)
    a, b = (tensor_name("layer", side, "general") for side in ("A", "B"))  # type: ignore[arg-type]
    head = {"head.weight": torch.randn(3, 2, generator=g)}
    server = {"shared": {a: torch.randn(4, 6, generator=g), b: torch.zeros(5, 4), **head}}
    replies = [
        Reply(
            site=f"s{k}",
            round=1,
            weight=k + 1.0,
            state={
                "shared": {
                    a: torch.randn(rank, 6, generator=g),
                    b: torch.randn(5, rank, generator=g),
                    "head.weight": torch.full((3, 2), float(k)),
                }
            },
        )
        for k, rank in enumerate(ranks)
    ]
    return server, replies


def test_the_stack_is_the_mean_product_and_each_site_gets_its_best_fit() -> None:
    """Against NumPy's SVD of sum p_k B_k A_k. A root lost on the way (B = U sqrt(S), A = V^T) would be far off."""
    server, replies = stack((2, 3, 4))
    merged = make("sdflora").aggregate(server, replies)["shared"]
    mean = sum(r.weight / 6 * product(pairs(r.state["shared"], "general")["layer"]).double().numpy() for r in replies)
    u, s, vt = np.linalg.svd(mean)
    for rank in (1, 2, 4):
        best = u[:, :rank] * s[:rank] @ vt[:rank]
        found = product(pairs(cut(merged, rank), "general")["layer"])
        np.testing.assert_allclose(found.numpy(), best, rtol=1e-4, atol=1e-5)
        lost = u[:, :rank] * np.sqrt(s[:rank]) @ vt[:rank]
        assert np.linalg.norm(lost - best) > 0.1 * np.linalg.norm(best)
    assert torch.equal(merged["head.weight"], torch.full((3, 2), (0 * 1 + 1 * 2 + 2 * 3) / 6))


def test_directions_that_a_small_stack_leaves_empty_can_still_learn() -> None:
    """One site of rank 2 answers a server of rank 4: two rows would be zero in A and B, for ever."""
    server, replies = stack((2,))
    pair = pairs(make("sdflora").aggregate(server, replies)["shared"], "general")["layer"]
    sent = pairs(replies[0].state["shared"], "general")["layer"]
    torch.testing.assert_close(product(pair), product(sent), rtol=1e-4, atol=1e-5)
    a, b = pair
    assert torch.equal(a[2:], pairs(server["shared"], "general")["layer"][0][2:])
    assert not b[:, 2:].any()
    # Two sites that sent the same give a stack of rank 4 whose last singular values are rounding errors: as above.
    twins = [replies[0], replace(replies[0], site="twin")]
    doubled = pairs(make("sdflora").aggregate(server, twins)["shared"], "general")["layer"]
    assert torch.equal(doubled[0][2:], a[2:])
    untouched = (torch.zeros(4, 6), torch.zeros(5, 4))
    assert torch.equal(alive(untouched, (a, b))[0], a)


def test_three_ranks_in_one_federation(tmp_path: Path) -> None:
    """A site of rank 2, 4 or 8 in all has half of it in each adapter; the server has the largest."""
    method = make("sdflora")
    backbone, sites = backbone_of(method), tiny_sites(method, rounds=4, steps=8, lr=1e-2)
    for name, site in sites.items():
        site.initial = partial(drawn, method, name)
    server = method.init_server(drawn(method, "c"))
    final = run_with(method, sites, tmp_path, server, rounds=4)
    assert {len(a) for a, _ in pairs(final["shared"], "general").values()} == {4}
    for name, rank in RANKS.items():
        request = Request(kind="evaluate", round=4, state=method.broadcast(final, name))
        params = sites[name].params(request)
        for slot in ("general", "personal"):
            assert {len(a) for a, _ in pairs(params, slot).values()} == {rank // 2}
        assert backbone.logits(params, sites[name].data.batch(np.arange(4)).tokens).shape == (4, 3)
        newcomer = method.personal(request.state, method.init_site(drawn(method, name)))
        assert {len(a) for a, _ in pairs(newcomer, "general").values()} == {rank // 2}
    losses = [sum(s["loss"] for s in e["sites"].values()) for e in Run(tmp_path).events() if e["event"] == "round"]
    assert losses[-1] < 0.5 * losses[0]
    sent = next(e for e in Run(tmp_path).events() if e["event"] == "round")["sites"]
    assert sent["a"]["sent_bytes"] < sent["b"]["sent_bytes"] < sent["c"]["sent_bytes"]


def drawn(method: Method, site: str) -> Tensors:
    return initial.initial_params(backbone_of(method), method, site, classes=3, rank=RANKS[site], seed=0, full=8)


# FedRep


class Watched(Learner):
    """Notes each fit: how many steps, and which tensors moved."""

    fits: list[tuple[int | None, str, set[str]]]

    def fit(self, params: Tensors, **options: object) -> dict[str, torch.Tensor]:  # type: ignore[override]
        fitted = super().fit(params, **options)  # type: ignore[arg-type]
        moved = {name for name, value in fitted.items() if not torch.equal(value, params[name])}
        self.fits.append((options.get("steps"), str(options.get("tag", "fit")), moved))  # type: ignore[arg-type]
        return fitted


def test_fedrep_trains_the_head_then_the_body_in_the_steps_of_one_method() -> None:
    method = make("fedrep")
    plain = tiny_learner(method, "a")
    learner = Watched(**{**vars(plain), "settings": replace(plain.settings, steps=9)})
    learner.fits = []
    params = initial_params(backbone_of(method), method, "a")
    server = method.init_server(params)
    payload, state = method.update(learner, method.broadcast(server, "a"), method.init_site(params))
    (head_steps, head_tag, head), (body_steps, body_tag, body) = learner.fits
    assert (head_steps, body_steps) == (4, 5)
    assert head_tag != body_tag
    assert head == {"head.weight", "head.bias"}
    assert body
    assert all(slot_of(name) == "general" for name in body)
    assert state["private"].keys() == head
    assert payload["shared"].keys() == {n for n in params if slot_of(n)}


@pytest.mark.parametrize(
    ("share", "steps", "first"), [(0.5, 10, 5), (0.2, 10, 2), (0.01, 10, 1), (0.99, 10, 9), (0.9, 2, 1), (0.1, 2, 1)]
)
def test_each_part_has_a_step(share: float, steps: int, first: int) -> None:
    assert make("fedrep", {"head_share": share}).head_steps(steps) == first  # type: ignore[attr-defined]


def test_one_step_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps[\s\S]*train\.steps=2"):
        make("fedrep").head_steps(1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["fedrep", "ditto", "apfl"])
def test_one_step_a_round_is_refused_before_anything_is_read(name: str) -> None:
    experiment = {"path": "nowhere", "method": name, "controls": ()}
    with pytest.raises(ConfigError, match=r"train\.steps=2"):
        validate({**experiment, "train": {"steps": 1}})
    assert validate({**experiment, "train": {"steps": 2}}).train.steps == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("med-duallora", {"head": "mine"}, "local, shared"),
        ("sdflora", {"head": "mine"}, "shared, local"),
        ("fedrep", {"head_share": 0.0}, "0 < head_share < 1"),
        ("fedper", {"head_share": 0.5}, "no option"),
    ],
)
def test_wrong_options_name_the_key_and_the_way_out(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, options)


# FedBN


def test_norms_are_trained_and_a_new_hospital_has_the_pretrained_ones(tmp_path: Path) -> None:
    method = make("fedbn")
    final, sites = tiny_run(method, tmp_path)
    pretrained = backbone_of(method).start(torch_generator(0, "norms"))
    assert pretrained
    assert not pretrained.keys() & {name.partition("/")[2] for name in flatten(final)}
    for name in SITES:
        request = Request(kind="evaluate", round=3, state=method.broadcast(final, name))
        own, general = sites[name].params(request), sites[name].params(replace(request, model="general"))
        assert all(not torch.equal(own[n], value) for n, value in pretrained.items())
        assert all(torch.equal(general[n], value) for n, value in pretrained.items())
        assert all(torch.equal(own[n], general[n]) for n in own.keys() - pretrained.keys())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished FedBN run over two folders of images, the second site's dark."""
    root = tmp_path_factory.mktemp("fedbn")
    rng = np.random.default_rng(0)
    for site, top in (("north", 160), ("south", 40)):
        for label, name in enumerate(("alpha", "beta")):
            (root / "hospitals" / site / name).mkdir(parents=True)
            for k in range(8):
                pixels = rng.integers(0, top, (32, 32, 3), dtype=np.uint8)
                pixels[..., label] += 60
                Image.fromarray(pixels).save(root / "hospitals" / site / name / f"{site}{label}{k}__1.png")
    values = {"path": str(root / "hospitals"), "method": "fedbn", "controls": (), "rounds": 2, "threads": 1}
    values |= {"backbone": {"name": "test-vit"}, "adapter": {"blocks": 2, "rank": 4, "scale": 1.5}}
    values |= {"train": {"steps": 4, "batch_size": 6, "lr": 0.02}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(root / "cache"))
        run_experiment(validate(values), root / "run")
    return root / "run"


@pytest.mark.parametrize("name", ["north", "south"])
def test_an_exported_folder_predicts_what_the_site_predicts(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms go to head.safetensors and come back: the same tensors, the same logits by the bit, the stored chances."""
    monkeypatch.setenv("CONFRERE_CACHE", str(run.parent / "cache"))
    job = validate(read(run / "experiment.toml"))
    task = prepare(job, open_data(job, run), lambda event: None)
    chosen = read_json(run / "results.json")["round"]
    site = make_site(task, name, Run(run))
    server = Run(run).server(chosen)
    params = site.params(Request(kind="evaluate", round=chosen, state=task.method.broadcast(server, name)))
    norms = task.backbone.start(torch_generator(0, "norms"))
    rest = load_file(run / "adapters" / name / "head.safetensors")
    assert rest.keys() == norms.keys() | {"head.weight", "head.bias"}
    assert not (run / "adapters" / name / "merged").exists()  # no adapter alone is this model

    predictor = Predictor(run, name)
    assert predictor.params.keys() == params.keys()
    assert all(torch.equal(predictor.params[n], value) for n, value in params.items())
    tokens = site.data.batch(site.data.rows("test")).tokens
    expected = task.backbone.logits(params, tokens)
    assert torch.equal(predictor.backbone.logits(predictor.params, tokens), expected)
    pretrained = task.backbone.logits({**params, **norms}, tokens)
    assert float((pretrained - expected).abs().max()) > 1e-3  # or the norms would not be tested

    federation = open_data(job, run)
    held = next(s for s in federation.sites if s.name == name)
    stored = read_state(run / "sites" / name / "test-personalised.safetensors")[0]["test"]
    found = predictor.probabilities(np.asarray(held.images[np.flatnonzero(held.split == 2)]))
    np.testing.assert_allclose(found, stored["probabilities"].numpy(), rtol=1e-5, atol=1e-7)
