from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from data_files import encoded, load, picture

from confrere.data import download
from confrere.errors import DataError, MissingExtraError


class Handler(BaseHTTPRequestHandler):
    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        data = self.files.get(self.path.partition("?")[0])
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.send_header("ETag", f'"{hashlib.sha256(data or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if body and data:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, bytes]]]:
    files: dict[str, bytes] = {}
    handler = type("Files", (Handler,), {"files": files})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", files
        http.shutdown()
        thread.join()


def archive(**changes: object) -> bytes:
    generator = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 30), ("val", 6), ("test", 12)):
        arrays[f"{part}_images"] = generator.integers(0, 256, size=(n, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(n) % 2)[:, None].astype(np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return buffer.getvalue()


def publish(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], data: bytes) -> None:
    files["/breastmnist.npz"] = data
    digest = hashlib.md5(data).hexdigest()
    monkeypatch.setitem(download._FLAGS, "breastmnist", (digest, ("malignant", "normal or benign")))


def test_an_archive_becomes_a_federation(server, tmp_path, monkeypatch):
    url, files = server
    publish(monkeypatch, files, archive())
    path = download.get("medmnist:breastmnist", tmp_path / "out", endpoint=url)
    federation = load(path, tmp_path / "cache")
    assert federation.name == "breastmnist"
    assert federation.classes == ("malignant", "normal or benign")
    assert sum(len(site.images) for site in federation.sites) == 48
    assert len(federation.sites) == 4
    assert "CC BY" in (tmp_path / "out" / "README.txt").read_text()
    assert load(tmp_path / "out", tmp_path / "cache").digest == federation.digest


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not a zip", "does not hold"),
        (archive(val_labels=None), "does not hold"),
        (archive(test_labels=np.array([{}], dtype=object)), "does not hold"),
        (archive(test_labels=np.full((12, 1), 7)), "does not hold"),
    ],
)
def test_other_contents_are_refused_and_leave_nothing(server, tmp_path, monkeypatch, data, message):
    url, files = server
    publish(monkeypatch, files, data)
    with pytest.raises(DataError, match=message):
        download.get("medmnist:breastmnist", tmp_path / "out", endpoint=url)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_archive_is_refused(server, tmp_path):
    url, files = server
    files["/breastmnist.npz"] = archive()
    with pytest.raises(DataError, match="not the published file"):
        download.get("medmnist:breastmnist", tmp_path / "out", endpoint=url)


@pytest.mark.parametrize(
    ("name", "endpoint"),
    [
        ("ham10000", None),
        ("medmnist:bloodmnist", None),
        ("medmnist:bloodmnist", "http://127.0.0.1:9"),
        pytest.param("ham10000", "http://127.0.0.1:9", marks=pytest.mark.slow),  # the hub's client tries for long
    ],
)
def test_absent_files_and_no_network_are_said(server, tmp_path, name, endpoint):
    with pytest.raises(DataError, match=r"(?s)cannot download.*mirror"):
        download.get(name, tmp_path / "out", endpoint=endpoint or server[0])
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_list_the_known(tmp_path):
    with pytest.raises(DataError, match=r"(?s)'imagenet'.*ham10000, medmnist:bloodmnist"):
        download.get("imagenet", tmp_path / "out")


def hub_file(records: list[dict[str, object]]) -> bytes:
    pa = pytest.importorskip("pyarrow", reason="needs the hub-data extra")
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), buffer)
    return buffer.getvalue()


def test_the_hub_set_becomes_a_federation(server, tmp_path):
    url, files = server
    records = [
        {
            "image": {"bytes": encoded(picture(i), "JPEG"), "path": f"{i}.jpg"},
            "center": i % 6,
            "label": i // 6 % 3,
        }
        for i in range(72)
    ]
    prefix = f"/datasets/{download._HUB_SET}/resolve/main/"
    for name, part in zip(download._HUB_FILES, (records[:60], records[60:]), strict=True):
        files[prefix + name] = hub_file(part)
    federation = load(download.get("ham10000", tmp_path / "out", endpoint=url), tmp_path / "cache")
    assert federation.name == "HAM10000"
    assert federation.classes == ("bcc", "mel", "nv")
    assert {site.name: len(site.images) for site in federation.sites} == {
        "rosendahl": 12,
        "vidir_modern": 12,
        "vidir_molemax": 12,
        "vienna_dias": 12,
    }
    assert "lesion" in (tmp_path / "out" / "README.txt").read_text()


def test_a_damaged_hub_file_is_said(server, tmp_path):
    pytest.importorskip("pyarrow", reason="needs the hub-data extra")
    url, files = server
    for name in download._HUB_FILES:
        files[f"/datasets/{download._HUB_SET}/resolve/main/{name}"] = b"no parquet"
    with pytest.raises(DataError, match="not the expected Parquet"):
        download.get("ham10000", tmp_path / "out", endpoint=url)


def test_without_pyarrow_the_extra_is_named(server, tmp_path, monkeypatch):
    url, files = server
    for name in download._HUB_FILES:
        files[f"/datasets/{download._HUB_SET}/resolve/main/{name}"] = b"x"
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"confrere\[hub-data\]"):
        download.get("ham10000", tmp_path / "out", endpoint=url)
