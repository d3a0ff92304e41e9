"""Baselines compute what they say, or refuse with the reason."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from baatt import attend, make_plan
from baatt.lab.bench import baselines
from baatt.lab.bench.baselines import BASELINES, RefusedError, prepare_baseline
from baatt.lab.bench.case import Inputs
from tests.settings import sorted_config


@pytest.fixture
def example():
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(1, 4, 300, 16, generator=generator)
    k, v = (torch.randn(1, 2, 300, 16, generator=generator) for _ in range(2))
    return Inputs(q, k, v), make_plan(q, k, sorted_config(sparsity=0.6, block_size=64, segment=128))


def eager_flex(monkeypatch, factor=1.0):
    """FlexAttention without its compiler, which takes half a minute on the CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    def function(q, k, v, *, block_mask, scale, enable_gqa):
        # Run eagerly, it reads `mask_mod` instead of the lists.
        index, count = block_mask.full_kv_indices, block_mask.full_kv_num_blocks
        kept = torch.zeros(*count.shape, index.shape[-1] + 1, dtype=torch.bool)
        slots = torch.arange(index.shape[-1]) < count.unsqueeze(-1)
        kept.scatter_(-1, torch.where(slots, index, index.shape[-1]).long(), True)
        block_mask.mask_mod = lambda b, h, i, j: kept[b, h, i // 64, j // 64]
        with torch.no_grad():
            return factor * flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=enable_gqa)

    monkeypatch.setattr(baselines, "compile_flex", lambda: function)


def test_dense_is_dense(example):
    inputs, plan = example
    out = prepare_baseline("dense", inputs, plan)()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*inputs, enable_gqa=True))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attends_to_our_blocks(example, monkeypatch):
    eager_flex(monkeypatch)
    inputs, plan = example
    out = prepare_baseline("flex", inputs, plan)()
    expected = baselines.sort_tokens(attend(*inputs, plan), plan.query_order)
    torch.testing.assert_close(out, expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_that_computes_something_else_is_refused(example, monkeypatch):
    eager_flex(monkeypatch, factor=1.1)
    with pytest.raises(RefusedError, match=r"flex must be within a relative error of .* got 1.00e-01"):
        prepare_baseline("flex", *example)


def test_flex_that_does_not_compile_is_refused_with_the_first_line(example, monkeypatch):
    def fail():
        raise RuntimeError("\nno C++ compiler\nand much more")

    monkeypatch.setattr(baselines, "compile_flex", fail)
    with pytest.raises(RefusedError, match=r"^RuntimeError: no C\+\+ compiler$"):
        prepare_baseline("flex", *example)


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_gpu_baselines_are_refused_on_the_cpu(example, name):
    with pytest.raises(RefusedError, match="it needs a GPU, got device 'cpu'"):
        prepare_baseline(name, *example)
    assert BASELINES[name].refusal("cuda", torch.bfloat16) is None
    assert BASELINES[name].refusal("cuda", torch.float32) == "it needs bfloat16 or float16, got float32"


def test_budgets_of_rows_stand_beside_those_of_heads(example):
    inputs, plan = example
    with pytest.raises(RefusedError, match="the budget of the operator is that of a row here"):
        prepare_baseline("budget-row", inputs, plan)
    of_heads = dataclasses.replace(plan.config, budget="head")
    out = prepare_baseline("budget-row", inputs, make_plan(inputs.q, inputs.k, of_heads))()
    torch.testing.assert_close(out, attend(*inputs, plan))
    unsorted = dataclasses.replace(of_heads, sort="none")
    with pytest.raises(RefusedError, match="without a causal mask alone"):
        prepare_baseline("budget-row", inputs, make_plan(inputs.q, inputs.k, unsorted, causal=1))
