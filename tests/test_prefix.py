"""The cache of frozen activations: equal to computing them, keyed by all that matters, whole or absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_federation import CLASSES, tiny_backbone

from confrere.adapters.lora import LoraSpec
from confrere.backbones import load
from confrere.data.federation import SiteImages
from confrere.errors import ConfigError, DataError
from confrere.prefix import Stacked, join, oriented, tokens


def site(n: int = 5, first: int = 0) -> SiteImages:
    h, w = tiny_backbone().image_size
    return SiteImages(
        name="a",
        images=np.random.default_rng(first).integers(0, 255, (n, h, w, 3), dtype=np.uint8),
        labels=np.zeros(n, dtype=np.int64),
        groups=np.arange(n),
        digests=tuple(f"{first + k:064x}" for k in range(n)),
        split=np.zeros(n, dtype=np.int8),
    )


def test_cached_tokens_equal_computed_ones_and_are_reused(tmp_path: Path) -> None:
    backbone, images = tiny_backbone(), site()
    first = tokens(backbone, images, CLASSES, tmp_path)
    (file,) = tmp_path.glob("tokens-*")
    stamp = file.stat().st_mtime_ns
    second = tokens(backbone, images, CLASSES, tmp_path)
    assert file.stat().st_mtime_ns == stamp
    expected = backbone.prefix(images.images).numpy()
    assert np.array_equal(first.tokens[np.arange(5)], expected)
    assert np.array_equal(second.tokens[np.arange(5)], expected)


def test_a_cache_cut_short_is_written_anew(tmp_path: Path) -> None:
    whole = tokens(tiny_backbone(), site(), CLASSES, tmp_path).tokens[np.arange(5)]
    (file,) = tmp_path.glob("tokens-*")
    for length in (0, 40, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:length])
        assert np.array_equal(tokens(tiny_backbone(), site(), CLASSES, tmp_path).tokens[np.arange(5)], whole)


@pytest.mark.parametrize("place", ["header", "first", "middle", "last", "seal"])
def test_one_flipped_bit_of_the_cache_is_found_and_mended(tmp_path: Path, place: str) -> None:
    whole = tokens(tiny_backbone(), site(), CLASSES, tmp_path).tokens[np.arange(5)]
    (file,) = tmp_path.glob("tokens-*")
    content = file.read_bytes()
    at = {"header": 127, "first": 128, "middle": len(content) // 2, "last": -5, "seal": -1}[place]
    damaged = bytearray(content)
    damaged[at] ^= 1
    file.write_bytes(damaged)
    assert np.array_equal(tokens(tiny_backbone(), site(), CLASSES, tmp_path).tokens[np.arange(5)], whole)
    assert file.read_bytes() == content


def test_other_images_another_cut_or_size_have_another_key(tmp_path: Path) -> None:
    tokens(tiny_backbone(), site(), CLASSES, tmp_path)
    tokens(tiny_backbone(), site(first=9), CLASSES, tmp_path)
    tokens(load("test-vit", lora=LoraSpec(slots=("general",), blocks=1)), site(), CLASSES, tmp_path)
    assert len(list(tmp_path.glob("tokens-*"))) == 3


def test_a_cut_prefix_gives_the_features_of_the_whole_model() -> None:
    images = site().images
    backbones = [load("test-vit", lora=LoraSpec(slots=("general",), blocks=b, dropout=0.0)) for b in (1, 2)]
    found = []
    for backbone in backbones:
        params = {n: np.zeros(s, np.float32) for n, s in backbone.adapter_shapes({"general": 2}).items()}
        import torch

        found.append(backbone.features({n: torch.from_numpy(v) for n, v in params.items()}, backbone.prefix(images)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_a_cache_that_cannot_be_written_says_where_and_leaves_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match="CONFRERE_CACHE"):
        tokens(tiny_backbone(), site(), CLASSES, blocked)


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_stacked_reads_as_one_array(sizes: list[int], data: st.DataObject) -> None:
    parts = [np.arange(n * 2).reshape(n, 2) + 100 * k for k, n in enumerate(sizes)]
    whole = np.concatenate(parts)
    rows = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=8)), dtype=np.int64)
    stacked = Stacked(parts)
    assert len(stacked) == len(whole)
    assert np.array_equal(stacked[rows], whole[rows])


def test_views_are_the_eight_orientations_and_only_training_images_have_them(tmp_path: Path) -> None:
    images = site(n=6)
    images.split[:] = [1, 0, 0, 2, 0, 1]
    backbone = tiny_backbone()
    found = tokens(backbone, images, CLASSES, tmp_path, views=8)
    assert len({oriented(images.images, view).tobytes() for view in range(8)}) == 8
    assert len(list(tmp_path.glob("tokens-*"))) == 8
    assert all(len(view) == 3 for view in found.views)
    rows, views = np.array([4, 1, 2, 2]), np.array([3, 0, 7, 1])
    got = found.batch(rows, views).tokens
    for k, (row, view) in enumerate(zip(rows, views, strict=True)):
        # The same batch as the cache computed, as the last bit of a product depends on the batch.
        whole = images.images if view == 0 else images.images[[1, 2, 4]]
        at = row if view == 0 else [1, 2, 4].index(row)
        assert torch.equal(got[k], backbone.prefix(oriented(whole, int(view)))[at])


def test_a_site_without_training_images_has_none_in_other_views(tmp_path: Path) -> None:
    images = site()
    images.split[:] = 2
    for _ in range(2):
        found = tokens(tiny_backbone(), images, CLASSES, tmp_path, views=2)
        assert [len(found.tokens), len(found.views[0])] == [5, 0]


def test_the_pooled_set_finds_the_same_views(tmp_path: Path) -> None:
    parts = [site(n=4), site(n=3, first=9)]
    for part in parts:
        part.split[0] = 2
    sets = [tokens(tiny_backbone(), part, CLASSES, tmp_path, views=2) for part in parts]
    pooled = join(sets).batch(np.array([5, 2, 3]), np.array([1, 1, 0]))
    alone = [sets[1].batch(np.array([1]), np.array([1])), sets[0].batch(np.array([2, 3]), np.array([1, 0]))]
    assert torch.equal(pooled.tokens, torch.cat([batch.tokens for batch in alone]))


def test_eight_views_of_oblong_images_are_refused(tmp_path: Path) -> None:
    backbone = load("test-vit", lora=LoraSpec(slots=("general",), blocks=1), image_size=(16, 32))
    with pytest.raises(ConfigError, match="square"):
        tokens(backbone, site(), CLASSES, tmp_path, views=8)
