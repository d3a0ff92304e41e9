"""The order of video tokens: a permutation into whole tiles, for any grid, that keeps more than raster order."""

import itertools
import math

import pytest
import torch
from einops import einsum

from baatt import Policy, ba_attention, make_plan
from baatt.integrations.handle import Handle
from baatt.integrations.video import REMEMBERED, VideoTiles, _permutation
from tests.settings import sorted_config

CPU = torch.device("cpu")
TILE = (2, 4, 2)  # 16 tokens
GRIDS = [(4, 8, 4), (5, 9, 7), (3, 5, 7), (1, 6, 11), (1, 1, 1), (7, 1, 3), (2, 3, 40)]


def places(grid):
    """(frame, row, column) of every token in raster order."""
    return list(itertools.product(*map(range, grid)))


@pytest.mark.parametrize("text", ["after", "before"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("words", [0, 5])
def test_a_permutation_with_whole_tiles_first_and_text_last(grid, words, text):
    tiles = VideoTiles(TILE, grid, text=text)
    video = math.prod(grid)
    order = tiles(video + words, CPU)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(video + words))
    first = words if text == "before" else 0
    texts = range(words) if text == "before" else range(video, video + words)
    assert order[video:].tolist() == list(texts)
    found = [places(grid)[token - first] for token in order[:video].tolist()]
    tile = [min(pair) for pair in zip(TILE, grid, strict=True)]
    whole = math.prod(extent // size for extent, size in zip(grid, tile, strict=True))
    volume = math.prod(tile)
    blocks = [found[start : start + volume] for start in range(0, whole * volume, volume)]
    corners = set()
    for block in blocks:
        corner = min(block)
        assert all(at % size == 0 for at, size in zip(corner, tile, strict=True))
        assert block == [tuple(map(sum, zip(corner, offset, strict=True))) for offset in places(tile)]
        corners.add(corner)
    assert len(corners) == whole
    assert not any(
        all(at < extent - extent % size for at, extent, size in zip(place, grid, tile, strict=True))
        for place in found[whole * volume :]
    )


def test_the_default_tile_is_a_block_of_128():
    order = VideoTiles(grid=(8, 16, 8))(1024, CPU)
    for block in order.view(8, 128).tolist():
        found = torch.tensor([places((8, 16, 8))[token] for token in block])
        assert (found.amax(dim=0) - found.amin(dim=0)).tolist() == [3, 7, 3]


def test_a_grid_that_comes_later_or_does_not_fit():
    tiles = VideoTiles(TILE)
    assert tiles(105, CPU) is None
    tiles.grid = [3, 5, 7]
    assert tiles.grid == (3, 5, 7)
    assert tiles(104, CPU) is None
    assert len(tiles(105, CPU)) == 105
    assert tiles(105, CPU) is tiles(105, CPU)
    first = tiles(105, CPU)
    tiles.grid = (5, 3, 7)
    assert not torch.equal(tiles(105, CPU), first)
    for length in range(105, 105 + 2 * REMEMBERED):
        assert len(tiles(length, CPU)) == length
    assert _permutation.cache_info().currsize == REMEMBERED
    tiles.grid = None
    assert tiles(105, CPU) is None


def test_arguments():
    for sizes in ((4, 8), (4, 8, 4.0), (4, 8, True), 128, "484", None):
        with pytest.raises(TypeError, match=r"tile must be three ints \(frames, rows, columns\), got"):
            VideoTiles(sizes)
    with pytest.raises(ValueError, match=r"tile must be at least 1 on every axis, got \(4, 0, 4\)"):
        VideoTiles((4, 0, 4))
    with pytest.raises(TypeError, match="grid must be three ints"):
        VideoTiles(grid=(4, 8))
    with pytest.raises(ValueError, match="grid must be at least 1"):
        VideoTiles().grid = (4, -8, 4)
    with pytest.raises(ValueError, match=r"text must be one of \['after', 'before'\], got 'left'"):
        VideoTiles(text="left")


@pytest.fixture(scope="module")
def video():
    """q, k, v of a video in which tokens attend to their neighbours in time and space, and the grid."""
    grid = (6, 8, 26)
    generator = torch.Generator().manual_seed(0)
    # Random Fourier features: q.k falls with the distance.
    waves = torch.randn(3, 32, generator=generator) * 0.5
    angles = torch.tensor(places(grid), dtype=torch.float32) @ waves
    features = torch.cat([angles.cos(), angles.sin()], dim=1)[None, None] * 32**-0.5
    noise = 0.05 * torch.randn(2, 1, 1, *features.shape[2:], generator=generator)
    q, k = 11 * (features + noise[0]), 11 * (features + noise[1])
    return q, k, torch.randn(q.shape, generator=generator), grid


@pytest.mark.parametrize("sort", ["none", "qk"])
@pytest.mark.parametrize("words", [0, 9])
def test_composes_with_sorting(video, sort, words):
    q, k, v, grid = video
    if words:
        q, k, v = (torch.cat([x, x[:, :, :words]], dim=2) for x in (q, k, v))
    mask = torch.ones(1, q.shape[2], dtype=torch.bool)
    mask[:, q.shape[2] - words // 2 :] = False
    tiles = VideoTiles(TILE, grid)
    order = tiles(q.shape[2], CPU)
    results = {}
    for sparsity in (0.0, 0.5):
        config = sorted_config(16, sparsity, sort, 64)
        handle = Handle(config, Policy(), order=tiles)
        results[sparsity] = handle.attention(q, k, v, layer=0, key_mask=mask)
        real = mask[:, order]
        expected = ba_attention(*(x[:, :, order] for x in (q, k, v)), config, key_mask=real, query_mask=real)
        assert torch.equal(results[sparsity][:, :, order], expected)
        assert handle.sparse_calls == 1
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None])
    torch.testing.assert_close(results[0.0], dense)
    assert not torch.allclose(results[0.5], dense, atol=1e-4)


def kept_attention(q, k, config):
    """Share of the attention weights that the selected blocks have."""
    plan = make_plan(q, k, config)
    chosen = torch.zeros(*plan.selection.index.shape[:3], math.ceil(k.shape[2] / config.block_size), dtype=torch.bool)
    chosen.scatter_(3, plan.selection.index.long(), True)
    q = q.gather(2, plan.query_order.index.long()[..., None].expand_as(q))
    k = k.gather(2, plan.key_order.index.long()[..., None].expand_as(k))
    weights = (einsum(q, k, "b h n d, b h m d -> b h n m") * q.shape[3] ** -0.5).softmax(dim=3)
    wide = chosen.repeat_interleave(config.block_size, 2).repeat_interleave(config.block_size, 3)
    return float((weights * wide[:, :, : q.shape[2], : k.shape[2]]).sum(dim=3).mean())


@pytest.mark.parametrize(
    ("sort", "sparsity", "lost"),
    # Sorting mixes the tiles of a segment: with it raster order is no worse where half of the blocks is kept.
    [("none", 0.5, 0.2), ("none", 0.75, 0.2), ("none", 0.9, 0.2), ("qk", 0.75, 0.95), ("qk", 0.9, 0.6)],
)
def test_tiles_keep_more_attention_than_raster_order(video, sort, sparsity, lost):
    q, k, _, grid = video
    config = sorted_config(16, sparsity, sort, 64)
    order = VideoTiles(TILE, grid)(q.shape[2], CPU)
    raster, tiled = kept_attention(q, k, config), kept_attention(q[:, :, order], k[:, :, order], config)
    assert 1 - sparsity < raster < tiled
    assert 1 - tiled < lost * (1 - raster)
