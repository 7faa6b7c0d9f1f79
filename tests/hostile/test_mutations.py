"""G10 and G12: a registered picture that changed is noticed, and a bomb is refused by its header."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile_case import Base, encoded, picture, write
from hostile_images import bomb
from test_corpus import peak, reset

from confrere.data.check import check
from confrere.data.decode import LARGE, BadImageError, decode
from confrere.data.federation import load_federation
from confrere.data.options import DataOptions
from confrere.data.register import hash_rows
from confrere.data.sources import read_listing
from confrere.errors import DataError
from confrere.seeds import numpy_generator

KINDS = {"png": "PNG", "jpg": "JPEG", "tif": "TIFF"}
EACH = 20  # pictures of a kind at each of two sites
Bytes = bytes


def truncate(data: Bytes, rng: np.random.Generator) -> Bytes:
    return data[: int(rng.integers(1, len(data)))]


def flip(data: Bytes, rng: np.random.Generator) -> Bytes:
    """Flip eight bits, all different."""
    array = np.frombuffer(data, np.uint8).copy()
    for bit in rng.choice(8 * len(data), 8, replace=False):
        array[bit // 8] ^= 1 << (bit % 8)
    return array.tobytes()


def zero(data: Bytes, rng: np.random.Generator) -> Bytes:
    """Overwrite 4 KB, a page of the disk, with zeros."""
    start = int(rng.integers(0, max(1, len(data) - 4096)))
    return data[:start] + bytes(min(4096, len(data) - start)) + data[start + 4096 :]


def splice(data: Bytes, rng: np.random.Generator) -> Bytes:
    """Put a piece of the file somewhere else in it."""
    start, end = sorted(int(x) for x in rng.choice(len(data), 2, replace=False))
    place = int(rng.integers(0, len(data)))
    return data[:place] + data[start:end] + data[place + end - start :]


MUTATIONS: tuple[Callable[[Bytes, np.random.Generator], Bytes], ...] = (truncate, flip, zero, splice)


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("registered") / "data"
    seed = 0
    for site in "ab":
        for number in range(EACH):
            for suffix, kind in KINDS.items():
                seed += 1
                label = "xy"[number % 2]
                write(root / site / label / f"p{seed}__1.{suffix}", encoded(picture(seed, 64), kind))
    return root


def readable(data: bytes) -> bool:
    """Return whether a decoder alone would have let it pass."""
    try:
        decode(data, (32, 32), max_pixels=10_000_000)
    except BadImageError:
        return False
    return True


def count(registered: Path, cache: Path, splits: Path, wanted: int) -> tuple[int, int, int]:
    """Mutate all pictures again and again; return how many changed, were noticed, and (of each fourth) still decode."""
    rows = read_listing(registered, DataOptions()).rows
    whole = {row.path: row.path.read_bytes() for row in rows}
    options = {"options": DataOptions(), "image_size": (16, 16), "seed": 0, "cache": cache, "splits": splits}
    load_federation(registered, **options)
    before, _ = hash_rows(rows, max_pixels=50_000_000)
    changed = noticed = passable = turn = 0
    try:
        while changed < wanted:
            rng = numpy_generator(0, "mutations", turn)
            bad = {}
            for index, path in enumerate(sorted(whole)):
                mutant = MUTATIONS[(turn + index) % len(MUTATIONS)](whole[path], rng)
                if mutant != whole[path]:
                    bad[path] = mutant
                    path.write_bytes(mutant)
                    passable += (turn + index // 4) % 4 == 0 and readable(mutant)
            after, _ = hash_rows(rows, max_pixels=50_000_000)
            noticed += sum(after.get(row) != before[row] for row in rows if row.path in bad)
            assert all(after[row] == before[row] for row in rows if row.path not in bad)
            changed, turn = changed + len(bad), turn + 1
            if turn % 4 == 1:
                with pytest.raises(DataError, match="images changed since they were split"):
                    load_federation(registered, **options)
            for path in bad:
                path.write_bytes(whole[path])
    finally:
        for path, data in whole.items():
            path.write_bytes(data)
    load_federation(registered, **options)
    return changed, noticed, passable


@pytest.mark.parametrize("wanted", [240, *(pytest.param(n, marks=pytest.mark.slow) for n in (2_000, 10_000))])
def test_every_changed_picture_is_noticed(
    registered: Path, tmp_path: Path, wanted: int, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, noticed, passable = count(registered, tmp_path / "cache", tmp_path / "splits.csv", wanted)
    with capsys.disabled():
        print(f"\nG10: {noticed} of {changed} changed pictures noticed ({4 * passable} would have decoded)")
    assert noticed == changed >= wanted
    assert 4 * passable > changed / 4, "the mutations are too gross to show anything"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_one_changed_picture_of_many_stops_a_run_that_goes_on(
    registered: Path, tmp_path: Path, mutation: Callable[[Bytes, np.random.Generator], Bytes]
) -> None:
    options = {"options": DataOptions(), "image_size": (16, 16), "seed": 0, "cache": tmp_path / "cache"}
    load_federation(registered, **options, splits=tmp_path / "splits.csv")
    victim = sorted(registered.rglob("*.png"))[3]
    data = victim.read_bytes()
    victim.write_bytes(mutation(data, numpy_generator(1, "one")))
    try:
        with pytest.raises(DataError, match=r"[01] new, 1 gone"):
            load_federation(registered, **options, splits=tmp_path / "splits.csv")
        federation = load_federation(registered, **options)  # a new run registers what is there now
        assert sum(len(site.digests) for site in federation.sites) in (2 * 3 * EACH, 2 * 3 * EACH - 1)
    finally:
        victim.write_bytes(data)


def test_a_bomb_is_refused_by_its_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bomb(13_000)
    assert len(data) < 25_000
    before = reset()
    started = time.perf_counter()
    with pytest.raises(BadImageError, match=LARGE):
        decode(data, (224, 224), max_pixels=DataOptions().max_pixels)
    seconds, megabytes = time.perf_counter() - started, (peak() - before) / 1e6
    with capsys.disabled():
        print(f"\nG12: 169 Mpx in {len(data)} bytes refused in {1000 * seconds:.1f} ms and {megabytes:.1f} MB")
    assert seconds < 0.05
    assert megabytes < 50


def test_bombs_in_a_folder_cost_no_more_than_their_bytes(tmp_path: Path) -> None:
    root = Base(tmp_path).data
    for number, side in enumerate((13_000, 14_000, 15_000)):
        write(root / "a" / "x" / f"bomb{number}.png", bomb(side))
    before, started = reset(), time.process_time()
    found = check(root, DataOptions())
    assert {p["reason"] for p in found["problems"]} == {LARGE}
    assert time.process_time() - started < 2
    assert (peak() - before) / 1e6 < 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes")
def test_a_bomb_does_not_even_ask_for_memory(tmp_path: Path) -> None:
    """In a process that may take only 50 MB more address space, a bomb is still refused for its size."""
    data = bomb(13_000)
    child = os.fork()
    if child == 0:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + 50_000_000, size + 50_000_000))
        try:
            decode(data, (224, 224), max_pixels=50_000_000)
        except BadImageError as error:
            os._exit(0 if str(error) == LARGE else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
