"""What only the Hopper kernels have of causal attention: log-sums, both ways to deal tiles, slabs of query blocks.

Run with `pytest -m gpu tests/gpu` on a machine with compute capability 9.0.
"""

import pytest
import torch

from baatt import BAAttConfig, make_plan
from baatt.kernels import hopper, hopper_clusters
from baatt.stages import sparse
from baatt.types import take_blocks
from tests.budget import assert_within_budget
from tests.gpu.test_operator import inputs, require
from tests.test_causal import structures, wanted_rows

pytestmark = pytest.mark.gpu
CONFIG = BAAttConfig(sparsity=0.6)
KINDS = torch.float64, torch.float32
STRUCTURES = structures(1000, 1777) | {"blocks of 200": {"causal": 200}, "blocks of 700": {"causal": 700}}


@pytest.fixture(params=["plain", "one block", "left", "nothing", "blocks of 200", "blocks of 700"])
def case(request):
    structure = {name: x.cuda() if name.endswith("mask") else x for name, x in STRUCTURES[request.param].items()}
    q, k, v = inputs((2, 4, 2, 1000, 1777, 128), torch.bfloat16)
    require("hopper", q, CONFIG)
    return (q, k, v), structure, make_plan(q, k, CONFIG, **structure, impl="hopper")


def test_attention_and_its_sums(case):
    (q, k, v), structure, plan = case
    rows = wanted_rows(q.cpu(), structure.get("query_mask", torch.ones(2, 1000, dtype=torch.bool)).cpu()).cuda()
    decided = plan.query_order, plan.key_order, plan.selection
    options = {"block_size": 128, "scale": plan.scale, "sight": plan.sight}
    exact, eager = (sparse.sparse_attention(*(x.to(kind) for x in (q, k, v)), *decided, **options) for kind in KINDS)
    actual = hopper.sparse_attention(q, k, v, *decided, **options)
    assert_within_budget(actual.out[rows], eager.out.to(q.dtype)[rows], exact.out[rows])
    torch.testing.assert_close(actual.lse[rows], exact.lse.float()[rows], rtol=1e-5, atol=1e-4)  # -inf are the same
    dealt = hopper.sparse_attention(q, k, v, *decided[:2], plan.selection._replace(uneven=False), **options)
    assert torch.equal(dealt.out[rows], actual.out[rows])


def test_a_slab_scores_as_the_whole(case):
    """Which steps of a tile have a mask depends on the query blocks beside; what they give does not."""
    _, _, plan = case
    queries, keys, sight, slab = plan.query_summary, plan.key_summary, plan.sight, slice(3, 6)
    whole = hopper_clusters.compare(queries, keys, CONFIG, plan.scale, sight)[:, :, slab]
    part = hopper_clusters.compare(take_blocks(queries, slab), keys, CONFIG, plan.scale, sight.take(slab))
    seen = torch.arange(whole.shape[-1], device="cuda") < sight.spans[:, None, slab, 3:]
    assert torch.equal(part.where(seen, 0), whole.where(seen, 0))
