"""E7: the kept key blocks."""

import math

import pytest
import torch

from baatt.stages.selection import log_distribution, select_blocks
from baatt.types import Sight
from tests.naive import naive_head_selection, naive_selection
from tests.naive_causal import naive_causal_selection

SPARSITIES = [0.0, 0.1, 0.3, 0.5, 0.7, 0.875, 0.9, 0.99]


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("key_blocks", [1, 2, 3, 10, 30])
def test_selection_equals_the_naive_one(key_blocks, sparsity):
    generator = torch.Generator().manual_seed(key_blocks)
    scores = torch.randint(0, 6, (3, 2, 4, key_blocks), generator=generator).float()  # many ties
    available = [key_blocks, (key_blocks + 1) // 2, 0]
    size = torch.tensor([[16] * n + [0] * (key_blocks - n) for n in available])
    scores = scores.masked_fill((size == 0)[:, None, None], -math.inf)
    selection = select_blocks(scores, size, sparsity)
    assert selection.index.dtype == selection.count.dtype == torch.int32
    assert selection.index.shape == (3, 2, 4, max(1, math.ceil((1 - sparsity) * key_blocks)))
    for b in range(3):
        for h in range(2):
            for i in range(4):
                kept = naive_selection(scores[b, h, i, : available[b]].tolist(), sparsity)
                count, row = int(selection.count[b, h, i]), selection.index[b, h, i].tolist()
                assert row[:count] == kept
                assert set(row[count:]) <= {kept[-1] if kept else 0}


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_count_of_a_shorter_entry_is_that_of_the_entry_alone(sparsity):
    for key_blocks in range(1, 200):
        size = torch.zeros(1, 200, dtype=torch.int64)
        size[0, :key_blocks] = 1
        count = select_blocks(torch.zeros(1, 1, 1, 200), size, sparsity).count.item()
        assert count == max(1, math.ceil((1 - sparsity) * key_blocks))


def test_of_equal_scores_the_lower_id_wins():
    selection = select_blocks(torch.zeros(1, 1, 1, 8), torch.ones(1, 8, dtype=torch.int64), 0.5)
    assert selection.index.flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("keep_first", [1, 2, 9])
def test_own_blocks_are_kept_before_the_first(keep_first):
    """Whatever a row sees and wherever its own blocks are, if need be without the first blocks."""
    rows = [
        (first, last, first, seen) for seen in range(9) for last in range(max(1, seen)) for first in range(last + 1)
    ]
    scores, size = torch.randn(1, 1, len(rows), 8), torch.full((1, 8), 16)
    sight = Sight(torch.zeros(1, len(rows), 16).int(), torch.tensor([rows]).int())
    for sparsity in (0.0, 0.5, 0.9):
        selection = select_blocks(scores, size, sparsity, keep_first, sight=sight)
        for i, (first, last, _, seen) in enumerate(rows):
            kept = selection.index[0, 0, i, : selection.count[0, 0, i]].tolist()
            assert kept == naive_causal_selection(scores[0, 0, i, :seen].tolist(), {first, last}, sparsity, keep_first)


@pytest.mark.parametrize("keep_first", [1, 2, 9])
def test_the_first_blocks_are_kept_inside_the_budget(keep_first):
    scores, size = torch.arange(8.0).view(1, 1, 1, 8), torch.ones(1, 8, dtype=torch.int64)
    first = min(keep_first, 4)
    expected = [*range(first), *range(4 + first, 8)]
    assert select_blocks(scores, size, 0.5, keep_first).index.flatten().tolist() == expected
    size[0, 2:] = 0  # two blocks with tokens, of which one is kept
    scores[..., 2:] = -math.inf
    selection = select_blocks(scores, size, 0.5, keep_first)
    assert selection.count.item() == 1
    assert selection.index[0, 0, 0, 0].item() == 0


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize(("key_blocks", "keep_first"), [(1, 0), (2, 3), (7, 0), (10, 1), (10, 4), (21, 2)])
def test_the_budget_of_a_head_equals_the_naive_one(key_blocks, keep_first, sparsity):
    generator = torch.Generator().manual_seed(key_blocks)
    scores = torch.randint(0, 9, (3, 2, 6, key_blocks), generator=generator).float()  # many ties
    scores[torch.rand(scores.shape, generator=generator) < 0.05] = math.nan  # which loses to any number
    available = [key_blocks, (key_blocks + 1) // 2, 0]
    size = torch.tensor([[16] * n + [0] * (key_blocks - n) for n in available])
    rows = torch.tensor([[16] * 6, [16] * 3 + [1] + [0] * 2, [0] * 6])
    scores = scores.masked_fill((size == 0)[:, None, None], -math.inf)
    selection = select_blocks(scores, size, sparsity, keep_first, budget="head", query_block_size=rows)
    assert selection.index.shape == scores.shape
    assert selection.uneven
    for b in range(3):
        for h in range(2):
            table = scores[b, h, :, : available[b]].nan_to_num(nan=-math.inf, neginf=-math.inf).tolist()
            kept = naive_head_selection(table, (rows[b] > 0).tolist(), sparsity, keep_first)
            counts = selection.count[b, h].tolist()
            index = selection.index[b, h].tolist()
            assert [row[:count] for row, count in zip(index, counts, strict=True)] == kept
            for row, count, one in zip(index, counts, kept, strict=True):
                assert set(row[count:]) <= {one[-1] if one else 0}
            budget = max(1, math.ceil((1 - sparsity) * available[b])) if available[b] else 0
            assert sum(counts) == 6 * budget


def test_a_head_gives_its_blocks_to_the_rows_that_want_most():
    scores, size = torch.tensor([[5.0, 4.0, 3.0, 2.0], [0.0, 1.0, 0.0, 0.0]])[None, None], torch.ones(1, 4).long()
    selection = select_blocks(scores, size, 0.5, budget="head")
    assert selection.count.tolist() == [[[3, 1]]]
    assert selection.index[0, 0].tolist() == [[0, 1, 2, 2], [1, 1, 1, 1]]
    tied = select_blocks(torch.zeros(1, 1, 2, 4), size, 0.5, budget="head")
    assert tied.count.tolist() == [[[3, 1]]]  # each its best, then the lower row


def test_rows_of_logits_share_a_budget_by_their_distributions():
    logits = torch.tensor([[9.0, 8.0, 8.0, 8.0], [4.0, 1.0, 1.0, 0.0]], dtype=torch.float64)[None, None]
    shares, size = logits.softmax(-1), torch.ones(1, 4).long()
    torch.testing.assert_close(log_distribution(logits).exp(), shares)
    ours, by_shares, raw = (
        select_blocks(scores, size, 0.5, budget="head").count.tolist()
        for scores in (log_distribution(logits), shares, logits)
    )
    assert ours == by_shares == raw == [[[3, 1]]]
    even = log_distribution(logits + torch.tensor([[0.0], [100.0]]))
    assert select_blocks(even, size, 0.5, budget="head").count.tolist() == ours
    assert select_blocks(logits + torch.tensor([[0.0], [100.0]]), size, 0.5, budget="head").count.tolist() == [[[1, 3]]]


@pytest.mark.parametrize("budget", ["row", "head"])
def test_a_score_that_is_not_a_number_loses_to_any(budget):
    scores = torch.tensor([0.0, math.nan, 3.0, -5.0, math.nan, 1.0, math.inf, -math.inf]).view(1, 1, 1, 8)
    size = torch.ones(1, 8, dtype=torch.int64)
    chosen = select_blocks(scores, size, 0.5, 1, budget=budget)
    assert chosen.index[..., :4].flatten().tolist() == [0, 2, 5, 6]
