"""The protocol itself: exact on every drop-out set, silent below the threshold, the same to see for other inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import chi2
from sessions import Drill, drill, names

from confrere.errors import UpdateRefusedError
from confrere.federation.secure import client, keys, masks, messages, server
from confrere.federation.secure.masks import Words, pair_mask, self_mask
from confrere.federation.secure.messages import Opening


@pytest.fixture
def _computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All these are functions of their arguments: what was computed once need not be again."""
    for module in (client, masks):
        monkeypatch.setattr(module, "agree", cache(keys.agree))
        monkeypatch.setattr(module, "derive", cache(keys.derive))
    monkeypatch.setattr(masks, "words", cache(masks.words))
    monkeypatch.setattr(messages, "verify", cache(keys.verify))
    monkeypatch.setattr(keys.Identity, "sign", cache(keys.Identity.sign))


@pytest.mark.usefixtures("_computed_once")
def test_every_dropout_set_in_every_phase_gives_the_plain_quantised_sum() -> None:
    """G29: n = 10, every set of at most 3 sites, gone before each of the four phases."""
    run, everybody = drill(10), set(names(10))
    shared, boxes = run.share(everybody)
    held, _, vectors = run.mask(shared, boxes, everybody)
    equal = dict.fromkeys(("keys", "shares", "masked", "unmask"), 0)
    gone_sets = [set(gone) for size in range(4) for gone in combinations(names(10), size)]
    assert len(gone_sets) == 176
    for gone in gone_sets:
        left = everybody - gone
        few, few_boxes = run.share(left)
        few_held, _, few_vectors = run.mask(few, few_boxes, left)
        equal["keys"] += np.array_equal(run.open(few_held, few_vectors, left, left), run.plain(left, left))
        some_held, _, some_vectors = run.mask(shared, boxes, left)
        equal["shares"] += np.array_equal(run.open(some_held, some_vectors, left, left), run.plain(left, left))
        equal["masked"] += np.array_equal(run.open(held, vectors, left, left), run.plain(everybody, left))
        equal["unmask"] += np.array_equal(run.open(held, vectors, everybody, left), run.plain(everybody, everybody))
    print(f"G29: bit-equal sums of {len(gone_sets)} drop-out sets x 4 phases: {equal}")
    assert set(equal.values()) == {176}


def test_below_the_threshold_neither_sites_nor_server_open_anything() -> None:
    """G30, first half: every set of sites smaller than the threshold, in every phase."""
    run, everybody = drill(6, threshold=4), sorted(names(6))
    shared, boxes = run.share(everybody)
    held, _, vectors = run.mask(shared, boxes, everybody)
    openings = {s: run.read(Opening, s, client.unmask(run.members[s], held[s], everybody)) for s in everybody}
    me, sealed = run.members["s00"], {s: boxes[s].sealed["s00"] for s in everybody[1:]}
    codes: list[str] = []

    def tried(attempt: Callable[[], object]) -> None:
        try:
            attempt()
        except UpdateRefusedError as error:
            codes.append(error.code)
        else:
            codes.append("nothing was refused")

    for few in (few for size in range(4) for few in combinations(everybody, size)):
        present = {s: sealed[s] for s in few[:2] if s in sealed}  # with the site itself at most three
        tried(lambda few=few: client.read_adverts(me, [run.said[s] for s in few]))  # type: ignore[misc]
        tried(lambda present=present: client.mask(me, shared["s00"], present, run.changes["s00"], run.sizes))  # type: ignore[misc]
        tried(lambda few=few: client.unmask(me, held["s00"], few))  # type: ignore[misc]
        given = {s: openings[s] for s in few}
        tried(lambda given=given: server.open_sum(run.session, run.adverts, everybody, vectors, given))  # type: ignore[misc]
    print(f"G30: {codes.count('secure-threshold')} of {len(codes)} attempts with too few sites aborted")
    assert codes == ["secure-threshold"] * 42 * 4


def p_of_uniform(vector: Words) -> float:
    """Return the p-value of the chi-square test that the bytes of words are uniform."""
    found = np.bincount(vector.astype("<u4").view(np.uint8), minlength=256)
    expected = found.sum() / 256
    return float(chi2.sf(((found - expected) ** 2 / expected).sum(), 255))


def server_sees(run: Drill, present: set[str], survivors: set[str]) -> Iterator[tuple[bool, Words]]:
    """Yield what a server can compute at best: of every set of sites the vectors' sum without any mask it knows.

    It knows the seeds of survivors and the mask keys of the others; the mark says whether all survivors are in it.
    """
    shared, boxes = run.share(present)
    _, _, vectors = run.mask(shared, boxes, present)
    token, count = run.session.token, len(next(iter(vectors.values())))
    cleared = {}
    for site, vector in vectors.items():
        if site in survivors:
            vector = vector - self_mask(run.secrets[site].seed, token, count)
            for gone in present - survivors:
                public = bytes.fromhex(run.adverts[site].mask)
                vector = vector + pair_mask(run.secrets[gone].mask, public, token, gone, site, count)
        cleared[site] = vector
    for size in range(1, len(present) + 1):
        for some in combinations(sorted(present), size):
            yield set(some) == survivors, np.sum([cleared[s] for s in some], axis=0, dtype=np.uint32)


def test_all_that_the_server_can_compute_but_the_sum_is_noise_whatever_the_inputs() -> None:
    """G30, second half: two worlds with other inputs and the same sum of the survivors."""
    rng, d = np.random.default_rng(3), 20_000
    survivors, sums, least, tests = set(names(4)) - {"s03"}, [], 1.0, 0
    first = {s: rng.normal(0, 1e-4, d) for s in names(4)}
    first = {s: np.round(v * 2**40) / 2**40 for s, v in first.items()}  # so that sums of equal weights are exact
    shift = np.round(rng.normal(0, 1e-3, d) * 2**40) / 2**40
    second = {**first, "s00": first["s00"] + shift, "s01": first["s01"] - shift, "s03": 5 * shift}
    for changes in (first, second):
        bound = np.zeros(d)
        bound[0] = 2.0**-6  # the same exponents in both worlds: they are part of what is said
        changes = {s: v + bound for s, v in changes.items()}
        run = Drill(changes=changes, weights=dict.fromkeys(names(4), 1.0), sizes=(d,))
        for whole, vector in server_sees(run, set(names(4)), survivors):
            if whole:
                sums.append(vector)
            else:
                least, tests = min(least, p_of_uniform(vector)), tests + 1
    print(f"G30: {tests} sums of vectors in two worlds, least p of uniform bytes {least:.3g}; the whole sums are equal")
    assert len(sums) == 2
    assert int(np.abs((sums[0] - sums[1]).view(np.int32)).max()) <= 3  # rounding, a unit a site
    assert tests == 2 * 14
    assert least > 1e-7
    assert p_of_uniform(sums[0]) < 1e-100  # what is no noise is told from it


def test_a_share_of_another_secret_is_noticed() -> None:
    run, everybody = drill(4), set(names(4))
    shared, boxes = run.share(everybody)
    held, _, vectors = run.mask(shared, boxes, everybody)
    for survivors in (everybody, everybody - {"s03"}):
        openings = {
            s: run.read(Opening, s, client.unmask(run.members[s], held[s], sorted(survivors)))
            for s in sorted(survivors)[:3]
        }
        kept = {s: vectors[s] for s in survivors}
        kind = "seeds" if survivors == everybody else "keys"
        one = dict(getattr(openings["s01"], kind))
        site = max(one)
        one[site] = one[site][:-1] + ("0" if one[site][-1] != "0" else "1")
        lied = {**openings, "s01": openings["s01"].model_copy(update={kind: one})}
        with pytest.raises(UpdateRefusedError) as caught:
            server.open_sum(run.session, run.adverts, sorted(held), kept, lied)
        assert caught.value.code == "secure-shares"
        lied["s01"] = lied["s01"].model_copy(update={kind: {**one, site: "f" * 66}})
        with pytest.raises(UpdateRefusedError, match="another secret"):
            server.open_sum(run.session, run.adverts, sorted(held), kept, lied)


def test_a_site_gives_one_kind_of_share_of_each_other_and_only_to_a_session_it_knows() -> None:
    run, everybody = drill(5), set(names(5))
    shared, boxes = run.share(everybody)
    held, _, _ = run.mask(shared, boxes, everybody)
    opening = run.read(Opening, "s00", client.unmask(run.members["s00"], held["s00"], names(4)))
    assert set(opening.seeds) == set(names(4))
    assert set(opening.keys) == {"s04"}
    for wrong in ((*names(4), "zz"), names(5)[1:], (*names(4), "s00")):
        with pytest.raises(UpdateRefusedError):
            client.unmask(run.members["s00"], held["s00"], wrong)
    for other in (opening.model_copy(update={"keys": opening.seeds}), opening.model_copy(update={"survivors": ()})):
        with pytest.raises(UpdateRefusedError, match="asked for"):
            server.check_opening(other, names(4), names(5))


def test_a_server_cannot_put_itself_between_two_sites() -> None:
    run = drill(4)
    adverts = [run.said[s] for s in names(4)]
    mine = keys.Identity.generate()
    forged = messages.signed("s01", mine, run.adverts["s01"].model_copy(update={"channel": "7" * 64}))
    moved = replace_body(run.said["s01"], run.said["s01"].body.replace(run.adverts["s01"].channel, "7" * 64))
    later = drill(4, token="1" * 32)
    for wrong in (forged, moved, run.said["s02"].model_copy(update={"site": "s01"}), later.said["s01"]):
        with pytest.raises(UpdateRefusedError) as caught:
            client.share(run.members["s00"], run.secrets["s00"], (0, 0), [adverts[0], wrong, *adverts[2:]])
        assert caught.value.code == "secure-signature"
    stale = replace(run.members["s00"], session=run.session.model_copy(update={"token": "2" * 32}))
    with pytest.raises(UpdateRefusedError, match="another session"):
        client.share(stale, run.secrets["s00"], (0, 0), adverts)
    with pytest.raises(UpdateRefusedError, match="own keys"):
        client.share(run.members["s00"], run.secrets["s01"], (0, 0), adverts)


def replace_body(signed: messages.Signed, body: str) -> messages.Signed:
    return signed.model_copy(update={"body": body})


@pytest.mark.parametrize(("cohort", "wanted", "found"), [(2, 0, 2), (3, 0, 2), (4, 0, 3), (10, 0, 7), (10, 6, 6)])
def test_the_threshold_is_two_thirds_or_what_is_wanted(cohort: int, wanted: int, found: int) -> None:
    assert client.threshold_of(cohort, wanted) == found


@pytest.mark.parametrize(("cohort", "wanted"), [(1, 0), (10, 5), (10, 11), (2, 1)])
def test_no_two_groups_of_survivors_can_both_be_opened(cohort: int, wanted: int) -> None:
    with pytest.raises(UpdateRefusedError) as caught:
        client.threshold_of(cohort, wanted)
    assert caught.value.code == "secure-threshold"
