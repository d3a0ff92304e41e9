"""One budget for a head on the GPU against the stage that it is a twin of, in Triton's interpreter."""

import functools

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU; see tests/gpu", allow_module_level=True)

from baatt.backend import _choose_on_gpu, choose_backend
from baatt.config import BAAttConfig
from baatt.kernels import triton_budget
from baatt.scores import SCORES
from baatt.stages import sorting
from baatt.stages.selection import select_blocks
from baatt.types import BlockStats
from tests.kernels.test_triton_selection import case


@pytest.fixture(params=[0, triton_budget.ALONE], ids=["in passes", "alone"], autouse=True)
def pairs_of_a_program(request, monkeypatch):
    """A head in several passes, and in one program."""
    monkeypatch.setattr(triton_budget, "ALONE", request.param)


def sides(query_size, key_size, heads=2, groups=2):
    empty = [(torch.zeros(*size.shape, 1), side, size) for size, side in ((query_size, heads), (key_size, groups))]
    return [BlockStats(*2 * [x[:, None].expand(-1, side, -1, -1)], size) for x, side, size in empty]


def drawn(number, key_blocks=19):
    """Scores with ties, NaN and infinities of 3 entries: full, padded on both sides, without a key."""
    generator = torch.Generator().manual_seed(number)
    scores = torch.randint(-9, 9, (3, 1, 5, key_blocks), generator=generator) * 0.37
    for value in (float("nan"), float("-inf"), -0.0):
        scores[torch.rand(scores.shape, generator=generator) < 0.05] = value
    key_size = torch.tensor([[16] * blocks + [0] * (key_blocks - blocks) for blocks in (key_blocks, 12, 0)])
    query_size = torch.tensor([[16] * 5, [16] * 2 + [3] + [0] * 2, [16] * 5])
    return scores.masked_fill((key_size == 0)[:, None, None], float("-inf")), query_size, key_size


@pytest.mark.parametrize(("sparsity", "keep_first"), [(0.0, 0), (0.4, 1), (0.7, 0), (0.8, 2), (0.9, 3)])
def test_it_is_the_stage(sparsity, keep_first, poisoned_memory):
    scores, query_size, key_size = drawn(keep_first)
    options = {"budget": "head", "query_block_size": query_size}
    expected = select_blocks(scores, key_size, sparsity, keep_first, **options)
    compare = lambda *_: scores.clone()  # noqa: E731
    actual = triton_budget.choose_blocks(*sides(query_size, key_size, 1, 1), compare, sparsity, keep_first)
    assert torch.equal(actual.count, expected.count)
    assert torch.equal(actual.index, expected.index)
    assert actual.uneven == expected.uneven


@pytest.mark.parametrize("key_blocks", [triton_budget.ONE_BY_ONE.value, 4 * triton_budget.ONE_BY_ONE.value])
def test_values_that_differ_in_their_last_bits(key_blocks):
    """All values of a row agree in their first digits, so those of the longer rows are never counted one by one."""
    bits = torch.tensor(1.0).view(torch.int32) + torch.randperm(4 * key_blocks).int()
    scores = bits.view(torch.float32).view(1, 1, 4, key_blocks)
    key_size, query_size = torch.full((1, key_blocks), 16), torch.full((1, 4), 16)
    expected = select_blocks(scores, key_size, 0.6, budget="head")
    compare = lambda *_: scores.clone()  # noqa: E731
    actual = triton_budget.choose_blocks(*sides(query_size, key_size, 1, 1), compare, 0.6)
    assert torch.equal(actual.index, expected.index)


@pytest.mark.parametrize(
    ("score", "masked", "heads"),
    [("covariance", True, 1), ("covariance", False, 3), ("window", False, 2), ("random", True, 1)],
)
def test_slabs_of_heads(score, masked, heads, poisoned_memory, monkeypatch):
    """From the summaries on: logits get their softmax, and how many heads are taken at once changes nothing."""
    config = BAAttConfig(16, 0.8, "k", 32, score=score, keep_first=1, budget="head")
    q, query_mask = case(2, 4, 40, 24, masked)
    k, key_mask = case(2, 2, 333, 24, masked)
    orders = sorting.by_position(q, None, query_mask), sorting.by_norm(k, 32, key_mask)
    summaries = [SCORES[score].summarise(x, order, config) for x, order in zip((q, k), orders, strict=True)]
    choose_in_stages = choose_backend("reference", q.device).choose_blocks
    expected = choose_in_stages(*summaries, config, 0.2)
    pairs = heads * 3 * 21
    monkeypatch.setattr(triton_budget, "SLAB_SCORES", 2 * pairs)
    monkeypatch.setattr("baatt.backend.SLAB_SCORES", pairs)
    for choose in (choose_in_stages, functools.partial(_choose_on_gpu, {})):
        actual = choose(*summaries, config, 0.2)
        assert torch.equal(actual.count, expected.count)
        assert torch.equal(actual.index, expected.index)


@pytest.mark.parametrize(("shape", "together"), [((2, 3, 40), 1), ((1, 5, 70), 2), ((3, 2, 7), 16), ((1, 1, 1), 256)])
def test_the_longest_rows_come_first(shape, together, poisoned_memory):
    count = torch.randint(0, 9, shape).int()
    order = triton_budget.longest_first(count, together)
    windows = count.flatten().split(together * shape[-1])
    places = [window.argsort(descending=True, stable=True) + i * len(windows[0]) for i, window in enumerate(windows)]
    assert order.tolist() == [0, *torch.cat(places).tolist()]


def test_logits_get_their_softmax():
    """Of two rows with the same shares the one with larger logits gets no more blocks."""
    scores = torch.randn(1, 1, 1, 32).expand(1, 1, 2, 32) + torch.tensor([0.0, 100.0])[:, None]
    key_size, query_size = torch.full((1, 32), 16), torch.full((1, 2), 16)
    choose = functools.partial(triton_budget.choose_blocks, *sides(query_size, key_size, 1, 1))
    compare = lambda *_: scores.clone()  # noqa: E731
    assert choose(compare, 0.75, logits=False).count.tolist() == [[[1, 15]]]
    even = choose(compare, 0.75, logits=True).count.flatten()
    assert (even - 8).abs().max() <= 1  # up to a rounding
