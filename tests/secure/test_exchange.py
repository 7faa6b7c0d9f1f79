"""A round over a transport: drop-outs, changed and repeated messages, lies; and what the server saw of a site."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hospitals import METHOD, RUN, START, Net, altered, collect, equipped, hospitals, plain, requests_of, same
from sessions import Drill, drill, names

from confrere.errors import UpdateRefusedError
from confrere.federation.defence import combine
from confrere.federation.gate import Gate
from confrere.federation.robust import layout, update
from confrere.federation.secure import client, server
from confrere.federation.secure.exchange import Secure
from confrere.federation.secure.forms import as_json, empty, from_json, sizes
from confrere.federation.secure.keys import Identity
from confrere.federation.secure.messages import PHASES, Session, Survivors, Upload, pack
from confrere.federation.secure.quantise import exponents, shortened, to_ring
from confrere.method import Reply
from confrere.tensors import State, flatten, n_bytes


def test_the_server_gets_the_plain_quantised_mean_bit_for_bit() -> None:
    sites = hospitals(5)
    came = collect(equipped(sites), Net(sites))
    assert came.total is not None
    assert came.failures == []
    assert same(came.total.state, plain(sites, sites, sites))
    assert came.total.weight == sum(site.weight for site in sites.values())
    assert [reply.site for reply in came.replies] == sorted(sites)
    assert all(not {"kept", "stored"} & reply.metrics.keys() for reply in came.replies)


@pytest.mark.parametrize("phase", PHASES)
def test_a_site_that_goes_is_a_failure_and_the_rest_is_exact(phase: str) -> None:
    sites = hospitals(5)
    net = Net(sites)
    net.lose = {"s2": phase}
    came = collect(equipped(sites), net)
    left = sorted(set(sites) - {"s2"})
    present = left if phase in ("keys", "shares") else sites
    survivors = sites if phase == "unmask" else left
    assert [failed.site for failed in came.failures] == ["s2"]
    assert came.total is not None
    assert same(came.total.state, plain(sites, present, survivors))
    assert [reply.site for reply in came.replies] == sorted(survivors)


@pytest.mark.parametrize("phase", PHASES)
def test_below_the_threshold_nothing_comes(phase: str) -> None:
    sites = hospitals(5)
    net = Net(sites)
    net.lose = dict.fromkeys(("s1", "s3"), phase)  # three are left where four are needed
    came = collect(equipped(sites), net)
    assert came.total is None
    assert came.replies == []
    assert came.lost
    assert [failed.code for failed in came.failures if not failed.site] == ["secure-threshold"]


def seen(net: Net) -> bytes:
    """Return every byte that passed the server, masked vectors among them, and what hexadecimal text says."""
    raw = b""
    for state in [reply.state for reply in net.replies] + [request.state for _, request in net.requests]:
        for tensor in flatten({g: t for g, t in state.items() if g == "secure"}).values():
            raw += tensor.numpy().tobytes()
    raw += json.dumps([dict(reply.metrics) for reply in net.replies]).encode()
    return raw


def test_the_server_sees_no_update_of_a_site() -> None:
    sites = hospitals(4)
    net = Net(sites)
    came = collect(equipped(sites), net)
    assert came.total is not None
    form = layout(sites["s0"].payload)
    limits = tuple(map(max, zip(*(exponents(change(s.payload), sizes(form)) for s in sites.values()), strict=True)))
    total, raw, looked_for = sum(s.weight for s in sites.values()), seen(net), 0
    for site in sites.values():
        words = to_ring(change(site.payload), sizes(form), limits, site.weight, total)
        secrets = [tensor.numpy().tobytes() for tensor in flatten(site.payload).values()]
        secrets += [change(site.payload).tobytes(), change(site.payload).astype(np.float32).tobytes()]
        secrets += [words.tobytes(), words[:2].tobytes(), words[5:7].tobytes()]
        for secret in secrets:
            assert secret not in raw
            assert secret.hex().encode() not in raw
            looked_for += 2
    assert looked_for == 4 * 2 * 7
    vector = next(r.state["secure"]["vector"] for r in net.replies if "vector" in r.state["secure"])
    assert vector.numpy().tobytes() in raw  # what was sent would be found


def change(payload: State) -> Any:
    return update(payload, START).numpy()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", ["request", "reply"])
def test_a_changed_byte_is_refused_and_never_summed(way: str, phase: str) -> None:
    """In every tensor of every message, at its ends and at places between them."""
    rng, codes = np.random.default_rng(7), set()
    tensors = ["message"]
    if way == "reply":
        tensors += {"keys": ["form"], "masked": ["vector"]}.get(phase, [])
    for tensor in tensors:
        for place in [0, -1, *rng.integers(0, 10**6, 4 if phase != "keys" else 8)]:
            sites = hospitals(4)
            net = Net(sites)
            net.change = partial(flipped, net=net, hit=(way, "s1", phase), tensor=tensor, place=int(place))
            came = collect(equipped(sites), net)
            codes |= {failed.code for failed in came.failures}
            if came.total is None:
                assert came.lost
                continue
            counted = [reply.site for reply in came.replies]
            present = sites if phase in ("masked", "unmask") else counted
            assert came.failures
            assert same(came.total.state, plain(sites, present, counted))
    assert codes
    assert codes <= {"secure-message", "secure-signature", "secure-sealed", "secure-session", "secure-threshold"} | {
        "update-stamp", "update-form", "secure-models"
    }  # fmt: skip


def flipped(kind: str, site: str, message: Any, *, net: Net, hit: tuple[str, str, str], tensor: str, place: int) -> Any:
    phase = net.requests[-1][1].kind  # of the request that is under way
    return altered(message, tensor, place) if (kind, site, phase) == hit else message


def test_who_changes_a_sealed_share_is_noticed_by_its_receiver() -> None:
    sites = hospitals(4)
    net = Net(sites)

    def swap(kind: str, site: str, message: Any) -> Any:
        if (kind, site) != ("request", "s1") or message.kind != "masked":
            return message
        body = json.loads(message.state["secure"]["message"].numpy().tobytes())
        sealed = body["sealed"]["s0"]
        body["sealed"]["s0"] = f"{int(sealed[:2], 16) ^ 1:02x}" + sealed[2:]
        raw = bytearray(json.dumps(body).encode())
        return replace(message, state={"secure": {"message": torch.frombuffer(raw, dtype=torch.uint8)}})

    net.change = swap
    came = collect(equipped(sites), net)
    assert [(failed.site, failed.code) for failed in came.failures] == [("s1", "secure-sealed")]
    assert came.total is not None
    assert same(came.total.state, plain(sites, sites, ["s0", "s2", "s3"]))


def test_a_stranger_with_the_name_of_a_site_is_refused() -> None:
    sites = hospitals(4)
    secure = equipped(sites)
    forged = Secure(roster={**secure.roster, "s3": Identity.generate().public})
    came = collect(forged, Net(sites))
    assert [(failed.site, failed.code) for failed in came.failures] == [("s3", "secure-signature")]


def test_sites_that_were_sent_different_models_refuse() -> None:
    sites = hospitals(4)
    net = Net(sites)

    def other(kind: str, site: str, message: Any) -> Any:
        if (kind, site) != ("request", "s1") or message.kind != "keys":
            return message
        shared = {name: value + 1 for name, value in message.state["shared"].items()}
        return replace(message, state={**message.state, "shared": shared})

    net.change = other
    came = collect(equipped(sites), net)
    assert came.total is None
    assert {failed.code for failed in came.failures} == {"secure-models", "secure-threshold"}


def test_answers_that_come_twice_count_once_and_different_ones_never() -> None:
    sites = hospitals(4)

    class Twice(Net):
        def exchange(self, requests: Any) -> Any:
            answers = super().exchange(requests)
            return answers + [altered(a, "message", 9) if other and a.site == "s1" else a for a in answers]

    other = False
    came = collect(equipped(sites), Twice(sites))
    assert came.total is not None
    assert len(came.replies) == 4
    other = True
    came = collect(equipped(sites), Twice(sites))
    assert [(failed.site, failed.code) for failed in came.failures] == [("s1", "update-twice")]


class Unreadable(Net):
    def exchange(self, requests: Any) -> Any:
        return [replace(a, state=self.put) if a.site == "s1" else a for a in super().exchange(requests)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("put", [None, {"secure": None}, {}, {"secure": {}}, {"secure": {"message": "x"}}])
def test_what_is_no_message_is_refused(put: Any) -> None:
    sites = hospitals(4)
    net = Unreadable(sites)
    net.put = put  # type: ignore[attr-defined]
    came = collect(equipped(sites), net)
    assert [(failed.site, failed.code) for failed in came.failures] == [("s1", "secure-message")]


def test_other_tensors_than_the_method_sends_are_refused_before_they_are_masked() -> None:
    sites = hospitals(4)
    sites["s2"].payload = {"shared": {"v": torch.zeros(5)}}
    secure, net = equipped(sites), Net(sites)
    gate = Gate(method=METHOD, run=RUN, norm=0, factor=0, expected=lambda site, request: START)
    came = secure.collect(net, requests_of(sites), gate)
    assert [(failed.site, failed.code) for failed in came.failures] == [("s2", "update-form")]
    came = collect(equipped(sites), Net(sites))  # nobody says what is right: the first one counts
    assert [(failed.site, failed.code) for failed in came.failures] == [("s2", "secure-message")]


def test_what_is_not_finite_stays_at_the_site_and_metrics_and_weights_are_checked() -> None:
    sites = hospitals(6)
    sites["s0"].payload = {"shared": {**START["shared"], "v": torch.full((5,), float("nan"))}}
    sites["s1"].weight = 0.0
    came = collect(equipped(sites), Net(sites))
    assert [(f.site, f.code) for f in came.failures] == [("s0", "update-values"), ("s1", "update-weight")]
    sites = hospitals(4)
    gate = Gate(method=METHOD, run=RUN, norm=0, factor=0, weights=dict.fromkeys(sites, 1.0))
    came = equipped(sites).collect(Net(sites), requests_of(sites), gate)
    assert {failed.code for failed in came.failures} == {"update-weight", "secure-threshold"}
    assert not came.lost  # no sound answer at all


def test_a_site_shortens_a_change_that_is_too_long() -> None:
    sites = hospitals(4)
    sites["s0"].payload = {"shared": {name: 100 * value + 1 for name, value in START["shared"].items()}}
    came = collect(equipped(sites, clip=0.01), Net(sites))
    assert came.total is not None
    total = sum(s.weight for s in sites.values())
    right = sum(s.weight / total * shortened(change(s.payload), 0.01) for s in sites.values())
    np.testing.assert_allclose(change(came.total.state), right, atol=1e-7)
    assert float(np.linalg.norm(change(came.total.state))) <= 0.01


def test_each_session_has_new_masks_and_a_repeated_request_the_same_answer(tmp_path: Path) -> None:
    sites = hospitals(4)
    secure, first = equipped(sites, tmp_path), Net(sites)
    one = collect(secure, first)
    repeated = [(site, request) for site, request in first.requests if request.kind != "keys"]
    answers = {(r.site, tuple(r.state["secure"])): r for r in first.replies}
    for site, request in repeated[-4:]:
        again = sites[site].handle(request)
        assert same(again.state, answers[site, ("message",)].state) or request.kind == "unmask"
    second = Net(sites)
    two = collect(secure, second)
    assert one.total is not None
    assert two.total is not None
    assert same(one.total.state, two.total.state)  # the same updates, the same survivors
    vectors = [
        [r.state["secure"]["vector"] for r in net.replies if "vector" in r.state["secure"]] for net in (first, second)
    ]
    assert all(len(v) == 4 for v in vectors)
    for left, right in zip(*vectors, strict=True):
        assert int((left == right).sum()) == 0
        # the difference of two vectors of one site is that of two masks: as large as any number
        assert float((left.double() - right.double()).abs().mean()) > 1e8


def test_a_round_is_opened_for_one_set_of_survivors_even_after_a_kill(tmp_path: Path) -> None:
    sites = hospitals(5)
    first = collect(equipped(sites, tmp_path), Net(sites))
    assert first.total is not None
    everybody = dict(sites)
    net = Net(sites)
    net.lose = {"s4": "keys"}
    again = collect(equipped(everybody, tmp_path), net)  # new processes, new identities; s4 is gone
    assert again.total is None
    assert {failed.code for failed in again.failures if failed.site != "s4"} == {"secure-opened", "secure-threshold"}
    whole = collect(equipped(everybody, tmp_path), Net(everybody))
    assert whole.total is not None
    assert same(whole.total.state, first.total.state)
    later = Net(everybody)
    later.lose = {"s4": "keys"}
    assert collect(equipped(everybody, tmp_path), later, round_=2).total is not None
    everybody["s0"].payload = {"shared": {name: value + 0.5 for name, value in START["shared"].items()}}
    other = collect(equipped(everybody, tmp_path), Net(everybody))
    assert ("s0", "secure-opened") in [(failed.site, failed.code) for failed in other.failures]


def refusal(sites: Any, site: str, request: Any) -> str:
    with pytest.raises(UpdateRefusedError) as caught:
        sites[site].handle(request)
    return caught.value.code


def test_a_site_refuses_what_would_show_more_than_a_sum() -> None:
    sites = hospitals(4)
    secure, net = equipped(sites), Net(sites)
    train = requests_of(sites)["s0"]
    assert refusal(sites, "s0", train) == "secure-off"  # its update in the clear
    assert collect(secure, net).total is not None
    last = [request for site, request in net.requests if site == "s0"][-1]
    token = json.loads(last.state["secure"]["message"].numpy().tobytes())["session"]
    other = pack(Survivors(session=token, survivors=("s0", "s1", "s2")))
    assert refusal(sites, "s0", replace(last, state=other)) == "secure-twice"  # both kinds of share of s3
    strange = pack(Survivors(session="0" * 32, survivors=("s0", "s1", "s2")))
    assert refusal(sites, "s0", replace(last, state=strange)) == "secure-session"
    few = Session(run=RUN, round=2, token="0" * 32, cohort=("s0", "s1", "s2"), threshold=2)
    start = replace(train, kind="keys", round=2)
    assert isinstance(sites["s0"].handle(replace(start, state={**START, **pack(few)})), Reply)
    for wrong, code in (
        ({"threshold": 3, "cohort": ("s0", "s1", "s2", "s3"), "round": 3, "token": "5" * 32}, "secure-session"),
        ({"threshold": 2, "cohort": ("s0", "s1", "s2", "s3"), "token": "1" * 32}, "secure-threshold"),
        ({"cohort": ("s1", "s2", "s3"), "token": "2" * 32}, "secure-threshold"),
        ({"cohort": ("s0", "s1", "zz"), "token": "3" * 32}, "secure-session"),
        ({"cohort": ("s0",), "token": "4" * 32}, "secure-threshold"),
    ):
        session = few.model_copy(update=wrong)
        assert refusal(sites, "s0", replace(start, state={**START, **pack(session)})) == code


def test_masked_rounds_send_hardly_more_than_plain_ones() -> None:
    """G33 with 10 sites and 100,000 parameters; for a million see benchmarks/secure_aggregation.py."""
    large: State = {"shared": {"w": torch.zeros(100, 1000)}}
    sites = hospitals(10, start=large)
    net = Net(sites)
    came = collect(equipped(sites), net, start=large)
    assert came.total is not None
    masked = sum(n_bytes(reply.state) for reply in net.replies) + sum(n_bytes(r.state) for _, r in net.requests)
    ratio = masked / (2 * 10 * n_bytes(large))
    print(f"G33: {ratio:.3f} x the bytes of a plain round (goal 1.8), 10 sites, 100,000 parameters")
    assert ratio < 1.1


def test_fewer_sites_than_the_loop_asks_for_average_nothing_though_the_sum_was_opened() -> None:
    sites = hospitals(4)
    net = Net(sites)
    net.lose = {"s3": "keys"}
    secure = equipped(sites)
    came = collect(secure, net)
    server = METHOD.init_server(START["shared"])
    for needed, averaged in ((3, True), (4, False)):
        made, left_out = combine(METHOD, server, came.requests, came.replies, secure, needed, came.total)
        assert (made is not None, left_out) == (averaged, [])


@pytest.mark.parametrize(
    "text",
    ["", "[", "[" * 100_000, "{}x", "[1]", '[["shared/w", [1e9], "float32"]]', '[["w", [3], "int64"]]']
    + [f'[["w", [{size}], "float32"]]' for size in ("0", "-1", "1" * 30, '"x"')],
)
def test_what_is_no_form_is_refused(text: str) -> None:
    with pytest.raises(UpdateRefusedError) as caught:
        from_json(text, where="site a")
    assert caught.value.code == "secure-message"


def test_a_form_survives_its_text() -> None:
    form = layout(START)
    assert from_json(as_json(form)) == form
    assert layout(empty(form)) == form


def test_exponents_that_cannot_be_stop_only_their_site() -> None:
    run, everybody = drill(4), names(4)
    shared, _ = run.share(everybody)
    wild = replace(shared["s01"], limits=(127, 0))
    _, envelopes = client.share(run.members["s01"], wild.secrets, wild.limits, [run.said[s] for s in everybody])
    sealed = json.loads(envelopes.body)["sealed"]["s00"]
    with pytest.raises(UpdateRefusedError, match="exponent"):
        client.mask(run.members["s00"], shared["s00"], {"s01": sealed, **run_sealed(run)}, np.zeros(8), (3, 5))
    uploads = {s: Upload(session="0" * 32, exponents=e, vector="0" * 64) for s, e in (("a", (1,)), ("b", (1, 2)))}
    assert server.common(uploads, 2) == (1, 2)
    with pytest.raises(UpdateRefusedError, match="exponents"):
        server.check_vector(uploads["a"].model_copy(update={"vector": client.digest_of(NONE)}), (1, 2), 0, NONE)


NONE = np.zeros(0, dtype=np.uint32)


def run_sealed(run: Drill) -> dict[str, str]:
    """Return honest envelopes for s00 of the two other sites."""
    _, boxes = run.share(names(4))
    return {s: boxes[s].sealed["s00"] for s in ("s02", "s03")}
