"""Clusters and their scores for the GPU against `scores.clusters`, in Triton's interpreter."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU; see tests/gpu", allow_module_level=True)

from baatt import BAAttConfig
from baatt.kernels import triton_clusters
from baatt.scores import clusters
from baatt.stages import sorting
from tests.budget import assert_within_budget

CONFIG = BAAttConfig(16, sort="none", score="clusters", representatives=4)
SHAPES = [  # B, H, G, N, M, D, P, R
    (2, 2, 1, 75, 101, 16, 16, 4),
    (2, 2, 1, 33, 150, 40, 32, 1),
    (1, 2, 2, 130, 201, 96, 64, 5),
    (1, 1, 1, 257, 390, 64, 128, 16),
    (1, 1, 1, 1, 1, 3, 128, 16),
    (1, 1, 1, 70, 40, 8, 64, 64),
]


def case(shape, masked):
    batch, heads, groups, queries, keys, channels, block_size, representatives = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, queries, heads, channels, generator=generator).transpose(1, 2).half()
    k = torch.randn(batch, groups, keys, channels, generator=generator).half()
    masks = [None, None]
    if masked:
        masks = [torch.rand(batch, x.shape[2], generator=generator) > 0.3 for x in (q, k)]
        for x, mask in zip((q, k), masks, strict=True):
            mask[0, x.shape[2] // 2 :] = False  # ends inside a block, with blocks behind it
            mask[0, 0] = True
            x[~mask[:, None].expand(x.shape[:3])] = float("nan")
    orders = [sorting.by_position(x, None, mask) for x, mask in zip((q, k), masks, strict=True)]
    return q, k, orders, dataclasses.replace(CONFIG, block_size=block_size, representatives=representatives)


def check(shape, masked, **options):
    q, k, orders, config = case(shape, masked)
    config = dataclasses.replace(config, **options)
    summaries = []
    for x, order in zip((q, k), orders, strict=True):
        actual = triton_clusters.summarise(x, order, config)
        eager, exact = (clusters.summarise(one, order, config) for one in (x, x.double()))
        assert torch.equal(actual.tokens, exact.tokens)
        assert torch.equal(actual.size, exact.size)
        assert_within_budget(actual.mean, eager.mean.to(x.dtype), exact.mean)
        summaries.append(actual)
    actual = triton_clusters.compare(*summaries, config, 0.3)
    wide = [one._replace(mean=one.mean.float()) for one in summaries]
    exact = [one._replace(mean=one.mean.double()) for one in summaries]
    filled = (summaries[1].size > 0)[:, None, None].expand(actual.shape)
    eager, exact = (clusters.compare(*pair, config, 0.3).where(filled, 0) for pair in (wide, exact))
    assert_within_budget(actual, eager, exact)
    return actual


@pytest.mark.parametrize(("shape", "masked"), [*zip(SHAPES, [True, False, True] * 2, strict=True)])
def test_clusters_and_scores(shape, masked, poisoned_memory):
    check(shape, masked)


@pytest.mark.parametrize("options", [{"peak": False}, {"refinements": 0}, {"representatives": 3, "peak": False}])
def test_options(options, poisoned_memory):
    check(SHAPES[0], True, **options)


def test_more_programs_than_tiles_and_fewer(monkeypatch, poisoned_memory):
    q, k, orders, config = case((1, 2, 1, 550, 40, 8, 16, 4), False)  # two tiles of rows a head
    summaries = [clusters.summarise(x, order, config) for x, order in zip((q, k), orders, strict=True)]
    summaries = [one._replace(mean=one.mean.half()) for one in summaries]
    alone = triton_clusters.compare(*summaries, config, 0.3)
    for name, value in (("SCRATCH", 1), ("_programs", lambda device: 64)):
        monkeypatch.setattr(triton_clusters, name, value)
        assert torch.equal(triton_clusters.compare(*summaries, config, 0.3), alone)
        monkeypatch.undo()


def test_the_way_for_blackwell(monkeypatch, poisoned_memory):
    monkeypatch.setattr(triton_clusters, "_is_blackwell", lambda device: True)
    check(SHAPES[2], True)


def test_duplicates_leave_clusters_empty(poisoned_memory):
    x = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0)).half().repeat(1, 1, 4, 1)[:, :, :11]
    order = sorting.by_position(x, None, None)
    actual, expected = (room.summarise(x, order, CONFIG) for room in (triton_clusters, clusters))
    assert torch.equal(actual.tokens, expected.tokens)
    torch.testing.assert_close(actual.mean, expected.mean.half())
