"""Causal attention on a GPU: the operator against the stages in fp64, and each kernel against its stage.

Run with `pytest -m gpu tests/gpu` on a machine with a CUDA device; `hopper` cases need compute capability 9.0.
"""

from dataclasses import replace

import pytest
import torch

from baatt import BAAttConfig, attend, ba_attention, make_plan
from baatt.kernels import hopper_clusters, triton_budget, triton_clusters, triton_selection, triton_structure
from baatt.lab.recall import block_mass
from baatt.scores import clusters
from baatt.stages import structure
from baatt.stages.selection import select_blocks
from baatt.types import BlockStats
from tests.budget import assert_within_budget, eager_dtype
from tests.gpu.test_operator import IMPLS, inputs, require
from tests.pairs import mostly_pairs
from tests.test_causal import dense, structures, visible_keys, wanted_rows

pytestmark = pytest.mark.gpu

CONFIG = BAAttConfig(sparsity=0.7)
CONFIGS = [
    CONFIG,
    replace(CONFIG, sparsity=0.0),
    replace(CONFIG, budget="head"),
    replace(CONFIG, score="covariance", sparsity=0.9, keep_first=3),
    replace(CONFIG, score="exact", sparsity=0.5, keep_first=0),
    replace(CONFIG, peak=False, representatives=5),
    replace(CONFIG, score="covariance", budget="head", sparsity=0.5),
]
SHAPES = [(2, 4, 2, 1000, 1777, 128), (2, 6, 2, 1536, 1536, 64), (2, 2, 1, 2500, 5000, 128)]
DTYPES = [torch.bfloat16, torch.float16]
LENGTHS = {"blocks": 32, "odd blocks": 37, "long blocks": 1024, "one block": 10**6, "in the middle": 64, "behind": 8}
NAMES = list(structures(1, 2))


def structure_of(name, shape):
    """Arguments of the operator, blocks of lengths that suit the shape."""
    found = structures(*shape[3:5])[name]
    found |= {"causal": LENGTHS.get(name, found["causal"])}
    return {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in found.items()}


def hide(x, mask):
    """x [B, H, N, D] with NaN where it is masked."""
    return x if mask is None else x.masked_fill(~mask[:, None, :, None], float("nan"))


def check(impl, q, k, v, config, asked):
    """Within the budget of exact attention by the plan that the implementation itself made."""
    require(impl, q, config)
    plan = make_plan(q, k, config, **asked, impl=impl)
    exact = attend(q.double(), k.double(), v.double(), plan, impl="reference")
    eager = attend(*(x.to(eager_dtype(x.dtype)) for x in (q, k, v)), plan, impl="reference").to(q.dtype)
    masks = asked.get("query_mask"), *2 * [asked.get("key_mask")]
    actual = ba_attention(*map(hide, (q, k, v), masks), config, **asked, impl=impl)
    rows = wanted_rows(q, asked.get("query_mask")).to(q.device)
    assert_within_budget(actual[rows], eager[rows], exact[rows])
    assert torch.equal(actual[rows], attend(q, k, v, plan, impl=impl)[rows])
    return plan


def kept_pairs(selection, key_blocks):
    slots = torch.arange(selection.index.shape[-1], device="cuda") < selection.count[..., None]
    kept = torch.zeros(*selection.index.shape[:-1], key_blocks, device="cuda")
    return kept.scatter_add_(-1, selection.index.long(), slots.float())


@pytest.mark.parametrize("impl", IMPLS)
@mostly_pairs("name, place, shape, config, dtype", NAMES, [0, 1], SHAPES, CONFIGS, DTYPES)
def test_within_the_error_budget(impl, name, place, shape, config, dtype):
    plan = check(impl, *inputs(shape, dtype), config, structure_of(name, shape))
    ours, spans = plan.selection, plan.sight.spans[:, None]
    kept, sees = kept_pairs(ours, plan.key_summary.size.shape[1]), spans[..., 3] > 0
    assert kept.max() <= 1
    assert (ours.count <= spans[..., 3]).all()
    for own in (0, 1):
        mine = kept.gather(-1, spans[..., own, None].long().expand(*kept.shape[:3], 1)).squeeze(-1)
        assert (mine == sees).all()
    stays = torch.arange(kept.shape[-1], device="cuda") < spans[..., 3, None]
    assert (kept[~stays.expand_as(kept)] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@mostly_pairs("name, place, config", ["plain", "blocks", "left", "interior", "in the middle"], [0], CONFIGS[:4])
def test_the_plan_is_the_reference_s(impl, name, place, config):
    shape = SHAPES[2]
    q, k, _ = inputs(shape, torch.bfloat16)
    require(impl, q, config)
    ours, theirs = (make_plan(q, k, config, **structure_of(name, shape), impl=room) for room in (impl, "reference"))
    assert torch.equal(ours.sight.limit, theirs.sight.limit)
    assert torch.equal(ours.sight.spans, theirs.sight.spans)
    if config.budget == "row":
        assert torch.equal(ours.selection.count, theirs.selection.count)
    assert ours.selection.uneven == theirs.selection.uneven
    kept, expected = (kept_pairs(plan.selection, 40) for plan in (ours, theirs))
    assert (kept == expected).float().mean() > 0.99  # scores at the threshold differ by a rounding


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["plain", "odd blocks", "long blocks", "left", "interior", "nothing"])
def test_without_sparsity_it_is_dense_attention(impl, name):
    shape = 2, 4, 2, 1100, 1500, 128
    q, k, v = inputs(shape, torch.bfloat16)
    require(impl, q, CONFIG)
    asked = structure_of(name, shape)
    host = {key: x.cpu() if isinstance(x, torch.Tensor) else x for key, x in asked.items()}
    visible, rows = visible_keys(*shape[3:5], **host).cuda(), wanted_rows(q, asked.get("query_mask")).cuda()
    exact, eager = (dense(*(x.to(kind) for x in (q, k, v)), visible) for kind in (torch.float64, torch.bfloat16))
    out = ba_attention(q, k, v, replace(CONFIG, sparsity=0.0), **asked, impl=impl)
    assert_within_budget(out[rows], eager[rows], exact[rows])


@mostly_pairs(
    "shape, name, dtype",
    [(2, 4, 2, 75, 301, 40, 16), (2, 2, 1, 500, 629, 256, 32), (2, 4, 4, 260, 260, 16, 64), (2, 2, 1, 9, 700, 80, 128)],
    ["plain", "odd blocks", "left", "scattered queries"],
    [torch.float32, torch.bfloat16, torch.float16],
)  # fmt: skip
def test_portable_shapes(shape, name, dtype):
    *shape, block_size = shape
    check("triton", *inputs(shape, dtype), replace(CONFIG, block_size=block_size), structure_of(name, shape))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [128, 1024])
def test_sorted_inside_a_block(impl, causal):
    segment = min(causal, 256)
    config = BAAttConfig(sparsity=0.5, sort="qk", segment=segment, score="covariance")
    check(impl, *inputs((1, 4, 2, 2048, 2048, 128), torch.bfloat16), config, {"causal": causal})


@pytest.mark.parametrize("impl", IMPLS)
@mostly_pairs("config, name", [CONFIG, replace(CONFIG, budget="head")], ["plain", "odd blocks", "left"])
def test_entries_are_alone_and_it_runs_in_a_graph(impl, config, name):
    """What an entry gives does not depend on the batch; nothing waits for the device, nor changes in a second run."""
    shape = 2, 4, 2, 1900, 2100, 128
    q, k, v = inputs(shape, torch.bfloat16)
    asked = structure_of(name, shape)
    require(impl, q, config)
    together = ba_attention(q, k, v, config, **asked, impl=impl)
    for i in range(2):
        mine = {key: x[i : i + 1] if isinstance(x, torch.Tensor) else x for key, x in asked.items()}
        alone = ba_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], config, **mine, impl=impl)
        rows = wanted_rows(q, asked.get("query_mask")).cuda()[i : i + 1]
        assert torch.equal(together[i : i + 1][rows], alone[rows])
    torch.cuda.set_sync_debug_mode("error")
    try:
        ba_attention(q, k, v, config, **asked, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = ba_attention(q, k, v, config, **asked, impl=impl)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    rows = wanted_rows(q, asked.get("query_mask")).cuda()
    assert torch.equal(captured[rows], together[rows])


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_in_one_graph(impl):
    q, k, v = inputs((1, 4, 2, 600, 900, 64), torch.bfloat16)
    require(impl, q, CONFIG)
    compiled = torch.compile(lambda q, k, v: ba_attention(q, k, v, CONFIG, causal=4, impl=impl) * 2, fullgraph=True)
    assert torch.equal(compiled(q, k, v), ba_attention(q, k, v, CONFIG, causal=4, impl=impl) * 2)


@mostly_pairs("name, shape", ["plain", "blocks", "odd blocks", "in the middle", "at the front", "behind"], SHAPES)
def test_sight_of_one_launch(name, shape):
    q, k, _ = inputs(shape, torch.bfloat16)
    asked = structure_of(name, shape)
    where = asked["causal"], asked.get("query_start", shape[4] - shape[3])
    for block_size in (16, 128):
        ours, theirs = (room.look_back(q, k, *where, block_size) for room in (triton_structure, structure))
        assert torch.equal(ours.limit, theirs.limit)
        assert torch.equal(ours.spans, theirs.spans)


@pytest.mark.parametrize("room", [triton_clusters, hopper_clusters], ids=["triton", "hopper"])
@mostly_pairs("name, representatives, peak", ["plain", "long blocks", "left", "interior"], [4, 16, 64], [True, False])
def test_clusters(room, name, representatives, peak):
    if room is hopper_clusters and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")
    shape = 2, 4, 2, 3500, 5000, 128
    q, k, _ = inputs(shape, torch.bfloat16)
    config = replace(CONFIG, representatives=representatives, peak=peak)
    plan = make_plan(q, k, config, **structure_of(name, shape), impl="reference")
    summaries = [side._replace(mean=side.mean.bfloat16()) for side in (plan.query_summary, plan.key_summary)]
    wide = [side._replace(mean=side.mean.float()) for side in summaries]
    seen = torch.arange(40, device="cuda") < plan.sight.spans[:, None, :, 3, None]
    actual = room.compare(*summaries, config, 0.1, plan.sight).where(seen, 0)
    expected = clusters.compare(*wide, config, 0.1, plan.sight).where(seen, 0)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-6)
    assert torch.equal(room.compare(*summaries, config, 0.1, plan.sight).where(seen, 0), actual)


@mostly_pairs("name, block_size, dtype", ["plain", "odd blocks", "left", "nothing"], [128, 32], DTYPES)
def test_mass(name, block_size, dtype):
    shape = 2, 4, 2, 1000, 1777, 64
    q, k, _ = inputs(shape, dtype)
    config = replace(CONFIG, block_size=block_size, score="covariance")
    plan = make_plan(q, k, config, **structure_of(name, shape), impl="reference")
    actual, expected = (block_mass(q, k, plan, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tokens", [3000, 40_000])
@mostly_pairs("budget, sparsity, keep_first", ["row", "head"], [0.0, 0.5, 0.9], [1, 3])
def test_selection_is_the_stage_s(tokens, budget, sparsity, keep_first):
    """Of the same scores, ties and NaN included, to the last pair; what lies beyond sight is not read."""
    blocks = -(-tokens // 128)
    x = torch.empty(2, 1, tokens, 1, device="cuda")
    padded = torch.arange(tokens, device="cuda") >= torch.tensor([[0], [1000]], device="cuda")
    sight = structure.look_back(x, x, 32, 0, 128, padded, padded)
    scores = torch.randn(2, 3, blocks, blocks, device="cuda").mul(20).round().div(20)
    scores[torch.rand_like(scores) < 0.01] = float("nan")
    scores = scores.where(torch.arange(blocks, device="cuda") < sight.spans[:, None, :, 3, None], float("nan"))
    size = (padded.sum(-1, keepdim=True) - 128 * torch.arange(blocks, device="cuda")).clamp(0, 128)
    summary = BlockStats(*2 * [torch.zeros(2, 3, blocks, 1, device="cuda")], size)
    room = triton_selection if budget == "row" else triton_budget
    ours = room.choose_blocks(summary, summary, lambda *_: scores.clone(), sparsity, keep_first, sight)
    options = {"budget": budget, "query_block_size": size, "sight": sight}
    theirs = select_blocks(scores, size, sparsity, keep_first, **options)
    assert torch.equal(ours.count, theirs.count)
    assert torch.equal(ours.index, theirs.index)
