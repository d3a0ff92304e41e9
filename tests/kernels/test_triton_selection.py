"""Scores and selection for the GPU against the stages they are twins of, in Triton's interpreter."""

import functools

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU; see tests/gpu", allow_module_level=True)

from baatt.kernels import triton_selection
from baatt.scores import covariance
from baatt.stages import pooling, selection, sorting
from baatt.types import BlockSelection, BlockStats


def case(batch, heads, tokens, channels, masked, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, heads, channels, generator=generator).transpose(1, 2).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, tokens, generator=generator) > 0.3
        mask[0] = False
        x[~mask[:, None].expand(batch, heads, tokens)] = float("nan")
    return x, mask


@pytest.mark.parametrize(
    ("sparsity", "masked", "beta", "keep_first"),
    [
        *((0.0, False, 0.5, 1), (0.0, True, 0.0, 0), (0.5, False, 0.0, 0), (0.5, True, 0.5, 3)),
        *((0.9, False, 0.5, 1), (0.9, True, 0.0, 0), (0.9, True, 0.0, 3)),
    ],
)
def test_selection_in_slabs(sparsity, masked, beta, keep_first, poisoned_memory, monkeypatch):
    q, _ = case(2, 2, 70, 24, False)
    k, mask = case(2, 1, 150, 24, masked)
    query_stats = pooling.pool_blocks(q, sorting.by_norm(q, 32, None), 16)
    key_stats = pooling.pool_blocks(k, sorting.by_norm(k, 32, mask), 16)
    ours, theirs = (
        functools.partial(room.covariance_score, scale=0.2, beta=beta) for room in (triton_selection, covariance)
    )
    scores = theirs(query_stats, key_stats)
    torch.testing.assert_close(ours(query_stats, key_stats), scores, atol=2e-6, rtol=2e-6)
    monkeypatch.setattr(triton_selection, "SLAB_SCORES", 2 * 2 * 10 * 3)  # three of the five query blocks at a time
    actual = triton_selection.choose_blocks(
        query_stats, key_stats, lambda queries, keys, sight: ours(queries, keys), sparsity, keep_first
    )
    expected = selection.select_blocks(scores, key_stats.size, sparsity, keep_first)
    assert torch.equal(actual.index, expected.index)
    assert torch.equal(actual.count, expected.count)


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 1 - 1 / 3, 0.7, 0.95, 0.999])
def test_counts_are_rounded_in_double_precision(sparsity):
    size = torch.tensor([[16] * blocks + [0] * (100 - blocks) for blocks in (100, 90, 30, 10, 7, 3, 1, 0)])
    scores = torch.randn(8, 1, 2, 100)
    actual = triton_selection.choose_blocks(
        *(BlockStats(torch.zeros(8, 1, blocks, 1), torch.zeros(8, 1, blocks, 1), size) for blocks in (2, 100)),
        lambda *_: scores,
        sparsity,
    )
    assert torch.equal(actual.count, selection.select_blocks(scores, size, sparsity).count)


def test_ties_go_to_the_lower_id_and_nan_loses():
    scores = torch.tensor([1.0, 2.0, 2.0, -0.0, 0.0, float("nan"), 2.0, float("-inf"), 5.0]).expand(1, 2, 3, 9)
    size = torch.full((1, 9), 16)
    for kept, expected in ((4, [1, 2, 6, 8]), (6, [0, 1, 2, 3, 6, 8])):
        index = torch.full((1, 2, 3, kept), -1, dtype=torch.int32)
        result = BlockSelection(index, torch.full((1, 2, 3), -1, dtype=torch.int32))
        triton_selection._select(scores.contiguous(), size, 1 - kept / 9, result, 0)
        assert index.flatten(0, 2).tolist() == [expected] * 6
        assert (result.count == kept).all()
