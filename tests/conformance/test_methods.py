"""Every registered method passes the same suite; a new method is picked up from the registry."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from method_variants import PRIVATE, VARIANTS
from tiny_federation import SITES, backbone_of, initial_params, tiny_plan, tiny_run, tiny_sites

from confrere import config
from confrere.adapters.names import side_of, slot_of
from confrere.federation.gate import Gate
from confrere.federation.loop import federate
from confrere.federation.site import Site
from confrere.federation.transport import Failure, InProcess
from confrere.learner import predict
from confrere.method import METHODS, Method, Reply, Request
from confrere.record.files import read_state, write_state
from confrere.record.run import Run
from confrere.record.store import MemoryStore
from confrere.seeds import torch_generator
from confrere.tensors import State, Tensors, digest, flatten, n_bytes, weighted_mean

PLAIN = {name: method for name, method in VARIANTS.items() if name in METHODS}
OTHERS = [pytest.param(m, id=name, marks=pytest.mark.slow) for name, m in VARIANTS.items() if name not in METHODS]
every = pytest.mark.parametrize("method", [*(pytest.param(m, id=name) for name, m in PLAIN.items()), *OTHERS])
# What options hardly touch, and costs most.
by_method = pytest.mark.parametrize("method", PLAIN.values(), ids=PLAIN)


def trainers(method: Method) -> tuple[str, ...]:
    return ("pooled",) if method.pools else SITES


def site_states(sites: Mapping[str, object], rounds: int) -> dict[str, str]:
    return {name: digest(site.store.before(rounds + 1) or {}) for name, site in sites.items()}  # type: ignore[attr-defined]


@cache
def plain(method: Method) -> tuple[str, dict[str, str]]:
    """Return the digests of server and sites after an ordinary run, made once for all tests of a method."""
    with TemporaryDirectory() as folder:
        final, sites = tiny_run(method, Path(folder))
        return digest(final), site_states(sites, 3)


@every
def test_same_seed_same_bytes_and_another_seed_differs(method: Method, tmp_path: Path) -> None:
    same, same_sites = tiny_run(method, tmp_path / "same")
    other, other_sites = tiny_run(method, tmp_path / "other", seed=1)
    assert (digest(same), site_states(same_sites, 3)) == plain(method)
    assert (digest(other), site_states(other_sites, 3)) != plain(method)


class Shuffled(InProcess):
    """Returns replies in reverse order."""

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        return super().exchange(requests)[::-1]


class Disk(InProcess):
    """Sends every request and reply through bytes, as a wire would."""

    def __init__(self, sites: Mapping[str, object], folder: Path) -> None:
        super().__init__(sites)  # type: ignore[arg-type]
        self.folder = folder

    def carry(self, state: State) -> State:
        write_state(self.folder / "message.safetensors", state, {})
        return read_state(self.folder / "message.safetensors")[0]

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        carried = {
            name: Request(kind=r.kind, round=r.round, state=self.carry(r.state), split=r.split, model=r.model)
            for name, r in requests.items()
        }
        replies = []
        for r in super().exchange(carried):
            assert isinstance(r, Reply)
            replies.append(
                Reply(site=r.site, round=r.round, state=self.carry(r.state), weight=r.weight, metrics=r.metrics)
            )
        return replies


@by_method
def test_order_of_replies_and_the_wire_do_not_matter(method: Method, tmp_path: Path) -> None:
    for kind, transport in (("order", Shuffled), ("wire", lambda s: Disk(s, tmp_path))):
        sites = tiny_sites(method)
        server = method.init_server(initial_params(backbone_of(method), method, ""))
        final = federate(method, server, transport(sites), tiny_plan(method), Run(tmp_path / kind))
        assert (digest(final), site_states(sites, 3)) == plain(method), kind


@by_method
def test_the_number_of_workers_changes_no_byte(method: Method, tmp_path: Path) -> None:
    sites = tiny_sites(method)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    final = federate(method, server, InProcess(sites, 2), tiny_plan(method), Run(tmp_path / "many"))
    assert (digest(final), site_states(sites, 3)) == plain(method)


@every
def test_redelivery_gives_the_same_reply_and_state(method: Method) -> None:
    sites = tiny_sites(method)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    site = sites[trainers(method)[0]]
    request = Request(kind="train", round=1, state=method.broadcast(server, site.name))
    first = site.handle(request)
    before = digest(site.store.before(2) or {})
    second = site.handle(request)
    assert digest(first.state) == digest(second.state)
    assert digest(site.store.before(2) or {}) == before


@every
def test_only_declared_groups_leave_and_no_private_tensor_among_them(method: Method) -> None:
    sites = tiny_sites(method)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    for name in trainers(method):
        reply = sites[name].handle(Request(kind="train", round=1, state=method.broadcast(server, name)))
        assert set(reply.state) <= set(method.sends)
        # A group of a sent name is no secret: SCAFFOLD keeps there what the server can sum up from what was sent.
        kept_state = sites[name].store.before(2) or {}
        private = flatten({group: t for group, t in kept_state.items() if group not in method.sends}).items()
        for sent_name, sent in flatten(reply.state).items():
            for kept_name, kept in private:
                same = sent.shape == kept.shape and torch.equal(sent, kept)
                assert not same or float(sent.abs().max()) == 0, f"{sent_name} equals private {kept_name}"


@every
def test_inputs_are_not_changed(method: Method) -> None:
    sites = tiny_sites(method)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    replies = []
    for name in trainers(method):
        received = method.broadcast(server, name)
        marks = digest(received), digest({"i": sites[name].initial()})
        replies.append(sites[name].handle(Request(kind="train", round=1, state=received)))
        assert (digest(received), digest({"i": sites[name].initial()})) == marks
    marks = digest(server), [digest(r.state) for r in replies]
    method.aggregate(server, replies)
    assert (digest(server), [digest(r.state) for r in replies]) == marks


@every
def test_resume_equals_the_uninterrupted_run(method: Method, tmp_path: Path) -> None:
    # Interrupted after the sites of round 3 answered, before the server committed it.
    _, sites = tiny_run(method, tmp_path / "cut", rounds=3, disk=True)
    run = Run(tmp_path / "cut")
    kept = [line for line in run.events_file.read_text().splitlines() if '"round": 3' not in line]
    run.events_file.write_text("\n".join(kept) + "\n" + '{"event": "rou')
    run.server_file(3).unlink()
    resumed, sites = tiny_run(method, tmp_path / "cut", rounds=3, disk=True)
    assert (digest(resumed), site_states(sites, 3)) == plain(method)


def stirred(method: Method, site: str) -> Tensors:
    """Return tensors in which nothing is zero, so that every one of them shows in a prediction."""
    params = dict(initial_params(backbone_of(method), method, site))
    for name in sorted(params):
        slot = slot_of(name)
        if side_of(name) == "B" or name.startswith("head."):
            address = ("stirred", name, site) if slot in method.own else ("stirred", name)
            params[name] = 0.3 * torch.randn(params[name].shape, generator=torch_generator(0, *address))
    return params


# With these an exchange alone changes the model, unless all that is exchanged is zero.
BY_EXCHANGE = {
    "fedalt": "the rest of the world is empty before the first round",
    "feddpa-f": "the local adapter counts once the site has features to compare an image with",
    "feddpa-t": "the local adapter counts once the site has features to compare an image with",
    "data-vectors": "what counts is the sum of all changes since zero",
}


@by_method
def test_zero_learning_rate_is_a_fixed_point(method: Method, tmp_path: Path) -> None:
    if method.closed_form:
        pytest.skip("solves instead of taking steps: no learning rate reaches it")
    sites, backbone = tiny_sites(method, lr=0.0, weight_decay=0.0), backbone_of(method)
    first = partial(initial_params, backbone) if method.name in BY_EXCHANGE else stirred
    for name, site in sites.items():
        site.initial = partial(first, method, name)
    start = method.init_server(first(method, ""))
    final = federate(method, start, InProcess(sites), tiny_plan(method), Run(tmp_path))
    for name in SITES:
        untrained = method.personal(method.broadcast(start, name), method.init_site(sites[name].initial()))
        trained = sites[name].params(Request(kind="evaluate", round=3, state=method.broadcast(final, name)))
        rows = sites[name].data.rows("test")
        left, right = (
            predict(backbone, p, sites[name].data, rows, scores=method.scores).softmax(1) for p in (untrained, trained)
        )
        torch.testing.assert_close(left, right, rtol=0, atol=1e-4)


@every
def test_equal_sites_stay_equal(method: Method) -> None:
    if method.pools:
        pytest.skip("the pooled control has one training site")
    if method.release():
        pytest.skip("adds changes up and divides by a fixed number: a twin counts once more")
    sites = tiny_sites(method)
    twin = tiny_sites(method)["a"]
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    received = method.broadcast(server, "a")
    replies = [s.handle(Request(kind="train", round=1, state=received)) for s in (sites["a"], twin)]
    merged = method.aggregate(server, replies)
    alone = method.aggregate(server, replies[:1])
    # What sites receive: the server itself may keep sums (of weights, say) rather than means.
    for name in SITES:
        right = flatten(method.broadcast(alone, name))
        for tensor, value in flatten(method.broadcast(merged, name)).items():
            torch.testing.assert_close(value, right[tensor], rtol=1e-4, atol=1e-6)


@every
def test_options_survive_toml_and_print(method: Method) -> None:
    options = {f.name: getattr(method, f.name) for f in fields(method)}
    needed = PRIVATE if method.release() else {}
    experiment = config.validate({"path": "x", "controls": (), "method": {"name": method.name, **options}, **needed})
    import tomllib

    assert config.validate(tomllib.loads(experiment.toml())) == experiment
    assert experiment.build_method() == method
    assert type(method).__name__ in repr(method)
    assert pickle.loads(pickle.dumps(method)) == method  # for other people's tools; nothing of ours unpickles


@by_method
def test_a_site_that_never_trained_can_predict(method: Method, tmp_path: Path) -> None:
    final, _ = tiny_run(method, tmp_path)
    newcomer = tiny_sites(method)["b"]
    newcomer.store = MemoryStore()
    reply = newcomer.handle(Request(kind="evaluate", round=3, state=method.broadcast(final, "b")))
    assert 0.0 <= reply.metrics["score"] <= 1.0


@every
def test_a_method_that_needs_a_sum_gets_by_with_one(method: Method) -> None:
    if method.needs != "sum" or not method.sends or method.pools:
        pytest.skip("needs each update, sends nothing, or has one site")
    sites = tiny_sites(method)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    replies = [s.handle(Request(kind="train", round=1, state=method.broadcast(server, n))) for n, s in sites.items()]
    pooled = {g: weighted_mean([(r.weight, r.state[g]) for r in replies]) for g in replies[0].state}
    one = Reply(site="sum", round=1, state=pooled, weight=sum(r.weight for r in replies))
    left, right = flatten(method.aggregate(server, replies)), flatten(method.aggregate(server, [one]))
    for name in left:
        torch.testing.assert_close(left[name], right[name])


class Patchy(InProcess):
    """Site ``a`` gives no answer in round 3; notes what every other idle site holds before and after each exchange."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        super().__init__(sites)
        self.answered: list[set[str]] = []

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        here = {n: r for n, r in requests.items() if (r.kind, r.round, n) != ("train", 3, "a")}
        before = site_states(self._sites, 99)
        replies = super().exchange(here)
        busy = {n for n, r in here.items() if r.kind == "train"}
        after = site_states(self._sites, 99)
        assert {n: after[n] for n in SITES if n not in busy} == {n: before[n] for n in SITES if n not in busy}
        self.answered += [{r.site for r in replies if isinstance(r, Reply)}] if busy else []
        return [*replies, *(Failure(n, "no answer") for n in requests.keys() - here.keys())]


@by_method
def test_absent_and_unsampled_sites_do_no_harm(method: Method, tmp_path: Path) -> None:
    """Two of three sites a round, of unequal weights; a is absent in round 3, c returns after two rounds."""
    if method.pools:
        pytest.skip("the pooled control has one training site")
    sites = tiny_sites(method, rounds=4)
    for site, weight in zip(sites.values(), (1.0, 5.0, 2.5), strict=True):
        site.weight = 1.0 if method.release() else weight
    transport = Patchy(sites)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    plan = tiny_plan(method, rounds=4, fraction=0.67, every=4)
    final = federate(method, server, transport, plan, Run(tmp_path))
    assert transport.answered == [{"a", "c"}, {"a", "b"}, {"b"}, {"b", "c"}]
    assert all(bool(torch.isfinite(value).all()) for value in flatten(final).values())
    for name, site in sites.items():
        received = method.broadcast(final, name)
        for model in ("personalised", "general") if method.has_general() else ("personalised",):
            reply = site.handle(Request(kind="evaluate", round=4, state=received, model=model))  # type: ignore[arg-type]
            assert 0.0 <= reply.metrics["score"] <= 1.0
            assert 0.0 <= reply.metrics["confidence"] <= 1.0  # false for NaN


@by_method
def test_reported_bytes_are_the_bytes_that_moved(method: Method, tmp_path: Path) -> None:
    tiny_run(method, tmp_path, disk=True)
    sites = tiny_sites(method)
    server = Run(tmp_path).server(0)
    record = next(e for e in Run(tmp_path).events() if e["event"] == "round" and e["round"] == 1)["sites"]
    for name in trainers(method):
        request = Request(kind="train", round=1, state=method.broadcast(server, name))
        reply = sites[name].handle(request)
        assert record[name]["sent_bytes"] == n_bytes(reply.state)
        assert record[name]["received_bytes"] == n_bytes(request.state)


@by_method
def test_training_learns(method: Method, tmp_path: Path) -> None:
    tiny_run(method, tmp_path, rounds=4, steps=8, lr=1e-2)
    losses = [
        sum(s["loss"] for s in e["sites"].values()) / len(e["sites"])
        for e in Run(tmp_path).events()
        if e["event"] == "round"
    ]
    assert losses[-1] < 0.8 * losses[0]


def gate_of(method: Method, sites: Mapping[str, Site], rounds: int = 3) -> Gate:
    """Return the gate with its defaults, as a run has it; tensors without values are form enough."""
    starts = {name: {n: t.to("meta") for n, t in site.initial().items()} for name, site in sites.items()}

    def form(site: str, request: Request) -> State:
        return method.payload(starts[site], request.state, request.round, rounds)

    weights = {name: site.weight for name, site in sites.items()}
    return Gate(method=method, expected=form, weights=weights)


class Guarded(InProcess):
    """Asks the gate about every answer, and compares what is sent with what the method says beforehand."""

    def __init__(self, sites: Mapping[str, Site], gate: Gate) -> None:
        super().__init__(sites)
        self.gate, self.forms = gate, list[tuple[State, State]]()

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        answers = super().exchange(requests)
        replies, failures = self.gate.admit(requests, answers)
        assert failures == []
        assert replies == sorted(answers, key=lambda answer: answer.site)
        for reply in replies:
            if requests[reply.site].kind == "train":
                assert self.gate.expected is not None
                self.forms.append((self.gate.expected(reply.site, requests[reply.site]), reply.state))
        return answers


def form_of(state: State) -> dict[str, object]:
    return {group: {n: (t.shape, t.dtype) for n, t in tensors.items()} for group, tensors in state.items()}


@every
def test_the_method_says_beforehand_what_is_sent_and_the_gate_lets_it_in(method: Method, tmp_path: Path) -> None:
    sites = tiny_sites(method)
    transport = Guarded(sites, gate_of(method, sites))
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    federate(method, server, transport, tiny_plan(method, every=3), Run(tmp_path))
    assert len(transport.forms) == 3 * len(trainers(method))
    prunes = getattr(method, "gamma", 1.0) < 1
    assert any(sent for _, sent in transport.forms) == bool(method.sends)
    for expected, sent in transport.forms:
        assert form_of(sent) == form_of(expected) or prunes


@pytest.mark.parametrize("name", sorted(n for n, m in VARIANTS.items() if m.unequal and m.sends))
def test_the_gate_lets_in_sites_of_unequal_rank(name: str, tmp_path: Path) -> None:
    method, ranks = VARIANTS[name], {"a": 2, "b": 4, "c": 6}
    sites, backbone = tiny_sites(method), backbone_of(method)
    for site in sites.values():
        site.initial = partial(initial_params, backbone, method, site.name, rank=ranks[site.name])
    server = method.init_server(initial_params(backbone, method, "", rank=6))
    federate(method, server, Guarded(sites, gate_of(method, sites)), tiny_plan(method, every=3), Run(tmp_path))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_one_bad_number_keeps_its_site_out_of_every_aggregate(name: str) -> None:
    """In the first and the last tensor of each group, of each site, in a round in which something is sent."""
    method = VARIANTS[name]
    if not method.sends or method.pools:
        pytest.skip("nothing is sent, or one site trains")
    rounds = 1 if name in ("data-vectors", "ridge") else 3
    sites = tiny_sites(method, rounds=rounds)
    server = method.init_server(initial_params(backbone_of(method), method, ""))
    requests = {s: Request(kind="train", round=1, state=method.broadcast(server, s)) for s in SITES}
    replies = [sites[s].handle(r) for s, r in requests.items()]
    gate = gate_of(method, sites, rounds)
    for bad in replies:
        left = [r for r in replies if r is not bad]
        assert bad.state
        for group, tensors in bad.state.items():
            for tensor in {min(tensors), max(tensors)}:
                for value in (float("nan"), float("inf"), float("-inf"), 3e38):
                    harmed = tensors[tensor].clone()
                    harmed.view(-1)[-1] = value
                    state = {**bad.state, group: {**tensors, tensor: harmed}}
                    admitted, failures = gate.admit(requests, [replace(bad, state=state), *left])
                    assert [r.site for r in admitted] == [r.site for r in left]
                    assert [f.site for f in failures] == [bad.site]
                    assert tensor in failures[0].reason
        after = method.aggregate(server, left)
        assert all(bool(torch.isfinite(value).all()) for value in flatten(after).values())
