"""XAttention's score by Triton's second launch of the mass, against the eager score in fp64, in the interpreter."""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU; see tests/gpu", allow_module_level=True)

from baatt import BAAttConfig, make_plan
from baatt.backend import gpu_comparison
from baatt.kernels import triton_antidiagonal
from baatt.scores import SCORES, antidiagonal
from tests.budget import assert_within_budget


def scores(q, k, plan, compare, stride):
    summarise = SCORES[f"antidiagonal-{stride}"].summarise
    tokens = [summarise(x, order, plan.config) for x, order in ((q, plan.query_order), (k, plan.key_order))]
    return compare(*tokens, plan.config, plan.scale, plan.sight, stride=stride)


@pytest.mark.parametrize(
    ("block_size", "stride", "causal", "slab"), [(128, 8, None, 1), (64, 16, 12, 2**24), (16, 16, 1, 2**24)]
)
def test_within_the_error_budget(block_size, stride, causal, slab, poisoned_memory, monkeypatch):
    monkeypatch.setattr(triton_antidiagonal, "SLAB_LOGITS", slab)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, 140, 24, generator=generator)
    k = torch.randn(2, 1, 140 if causal else 281, 24, generator=generator)
    mask = torch.ones(2, k.shape[2], dtype=torch.bool)
    mask[0, 101:] = False
    k[0, :, 101:] = float("nan")
    config = BAAttConfig(block_size, score=f"antidiagonal-{stride}")
    plan = make_plan(q, k, config, key_mask=mask, causal=causal, impl="reference")
    actual = scores(q, k, plan, triton_antidiagonal.compare, stride)
    eager = scores(q, k, plan, antidiagonal.compare, stride)
    assert actual.dtype == torch.float32
    exact = scores(q.double(), k.double(), plan, antidiagonal.compare, stride)
    assert_within_budget(actual, eager, exact)


def test_it_is_the_twin_of_both_strides():
    for name, stride in (("antidiagonal", 8), ("antidiagonal-16", 16)):
        twin = gpu_comparison(SCORES[name].compare, torch.bfloat16)
        assert (twin.func, twin.keywords) == (triton_antidiagonal.compare, {"stride": stride})
        assert gpu_comparison(SCORES[name].compare, torch.float32) is SCORES[name].compare
