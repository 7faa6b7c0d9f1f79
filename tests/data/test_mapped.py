"""Arrays that are mapped only while they are read, and a cache that one process fills at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from confrere.data.mapped import Mapped, is_sealed, one_maker, seal
from confrere.errors import DataError


def test_it_reads_as_the_array_does_and_holds_no_file_open(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    np.save(tmp_path / "x.npy", array)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    many = [Mapped(tmp_path / "x.npy") for _ in range(50)]
    rows = np.array([4, 0, 4])
    found = [one[rows] for one in many]
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
    assert all(np.array_equal(each, array[rows]) for each in found)
    assert found[0].flags.writeable
    assert (len(many[0]), many[0].shape, many[0].dtype) == (5, (5, 4, 3), np.float32)


def test_a_file_that_goes_away_is_named_with_a_way_out(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(3))
    kept = Mapped(tmp_path / "x.npy")
    (tmp_path / "x.npy").unlink()
    with pytest.raises(DataError, match="resume"):
        kept[np.array([0])]


def test_a_seal_holds_for_these_bytes_only(tmp_path: Path) -> None:
    file = tmp_path / "x.npy"
    np.save(file, np.arange(100))
    assert not is_sealed(file)
    seal(file)
    content = file.read_bytes()
    assert is_sealed(file)
    assert np.array_equal(Mapped(file)[:], np.arange(100))
    for at in range(0, len(content), 29):
        file.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        assert not is_sealed(file)
    for cut in (0, 3, 4, len(content) - 1):
        file.write_bytes(content[:cut])
        assert not is_sealed(file)


def test_one_at_a_time_adds_to_the_cache(tmp_path: Path) -> None:
    order: list[str] = []

    def work(name: str) -> None:
        with one_maker(tmp_path):
            order.append(f"{name} in")
            order.append(f"{name} out")

    workers = [threading.Thread(target=work, args=(str(n),)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(order[i].split()[0] == order[i + 1].split()[0] for i in range(0, 16, 2))


def test_a_killed_maker_leaves_the_way_free(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from confrere.data.mapped import one_maker\n"
        "with one_maker(Path(sys.argv[1])): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    with one_maker(tmp_path):
        pass
