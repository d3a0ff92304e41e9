"""The GPU implementations on a GPU: against the stages in fp64, under compilation, in a graph, without waiting.

Run with `pytest -m gpu tests/gpu` on a machine with a CUDA device; `hopper` cases need compute capability 9.0.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from baatt import BAAttConfig, attend, ba_attention, make_plan
from baatt.backend import Workload, choose_backend
from baatt.types import BlockSelection
from tests.budget import assert_within_budget, eager_dtype
from tests.pairs import mostly_pairs
from tests.settings import sorted_config

pytestmark = pytest.mark.gpu

IMPLS = ("triton", "hopper")
#: The path that sorts and copies: norms, block moments, E5.
SORTED = sorted_config()
SETTINGS = {"sorted": SORTED, "clusters": BAAttConfig()}
both_settings = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
#: Keys stay where they are.
UNSORTED = {"none": replace(SORTED, sort="none"), "q": replace(SORTED, sort="q"), "clusters": BAAttConfig()}
SHAPES = [  # B, H, G, N, M, D
    (1, 1, 1, 1, 1, 64),
    (2, 4, 2, 1000, 777, 128),
    (1, 6, 2, 333, 1500, 64),
    (3, 2, 1, 129, 257, 128),
    (1, 3, 3, 2048, 2048, 64),
]
PORTABLE_SHAPES = [
    (2, 4, 2, 75, 301, 40, 16),
    (1, 2, 1, 500, 129, 256, 32),
    (1, 4, 4, 260, 260, 16, 64),
    (1, 2, 2, 300, 700, 256, 128),
    (1, 2, 1, 700, 300, 128, 128),
]


def inputs(shape, dtype, seed=0):
    batch, heads, groups, queries, keys, channels = shape
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = lambda *size: torch.randn(*size, device="cuda", generator=generator).to(dtype)  # noqa: E731
    return (
        draw(batch, heads, queries, channels),
        draw(batch, groups, keys, channels),
        draw(batch, groups, keys, channels),
    )


def require(impl, q, config):
    try:
        choose_backend(impl, q.device, Workload(q.dtype, q.shape[-1], config.block_size, q.shape[-1] ** -0.5))
    except RuntimeError as error:
        pytest.skip(str(error))


def check(impl, q, k, v, config, key_mask=None, scale=None):
    """Within the budget of exact attention with the plan the implementation itself made."""
    require(impl, q, config)
    plan = make_plan(q, k, config, key_mask=key_mask, scale=scale, impl=impl)
    exact = attend(q.double(), k.double(), v.double(), plan, impl="reference")
    eager = attend(*(x.to(eager_dtype(x.dtype)) for x in (q, k, v)), plan, impl="reference").to(q.dtype)
    actual = ba_attention(q, k, v, config, key_mask=key_mask, scale=scale, impl=impl)
    assert torch.isfinite(actual).all()
    assert_within_budget(actual, eager, exact)
    return plan


@pytest.mark.parametrize("impl", IMPLS)
@mostly_pairs(
    "shape, config, dtype",
    SHAPES,
    [replace(SORTED, sort="qk"), replace(SORTED, sort="none"), BAAttConfig()],
    [torch.bfloat16, torch.float16],
)
def test_within_the_error_budget(impl, dtype, shape, config):
    check(impl, *inputs(shape, dtype), replace(config, sparsity=0.6))


@mostly_pairs(
    "shape, config, dtype", PORTABLE_SHAPES, list(SETTINGS.values()), [torch.float32, torch.bfloat16, torch.float16]
)
def test_portable_shapes(dtype, shape, config):
    *shape, block_size = shape
    check("triton", *inputs(shape, dtype), replace(config, block_size=block_size))


@pytest.mark.parametrize("impl", IMPLS)
@both_settings
def test_masked_keys_influence_nothing(impl, config):
    q, k, v = inputs((3, 4, 2, 300, 900, 64), torch.bfloat16)
    mask = torch.rand(3, 900, device="cuda") > 0.3
    mask[1, 100:] = False
    hidden = ~mask[:, None].expand(3, 2, 900)
    clean = ba_attention(q, k, v, config, key_mask=mask, impl=impl)
    k[hidden], v[hidden] = float("nan"), float("nan")
    assert torch.equal(ba_attention(q, k, v, config, key_mask=mask, impl=impl), clean)
    k[hidden], v[hidden] = 0, 0
    check(impl, q, k, v, config, key_mask=mask)
    nothing = torch.zeros_like(mask)
    assert (ba_attention(q, k, v, config, key_mask=nothing, impl=impl) == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_plan_is_the_stages_plan(impl):
    q, k, _ = inputs((2, 4, 2, 3000, 3000, 128), torch.bfloat16)
    config = replace(SORTED, sparsity=0.7)
    require(impl, q, config)
    ours, theirs = make_plan(q, k, config, impl=impl), make_plan(q, k, config, impl="reference")
    # Norms that agree to the last bit but one may stand in either order.
    assert (ours.key_order.index != theirs.key_order.index).float().mean() < 1e-3
    kept = [set(row.tolist()) for row in ours.selection.index.flatten(0, 2)]
    expected = [set(row.tolist()) for row in theirs.selection.index.flatten(0, 2)]
    same = sum(len(one & two) for one, two in zip(kept, expected, strict=True))
    assert same / sum(map(len, expected)) > 0.999
    assert torch.equal(ours.selection.count, theirs.selection.count)


@pytest.mark.parametrize("impl", IMPLS)
@both_settings
def test_no_sparsity_is_dense_attention(impl, config):
    q, k, v = inputs((1, 4, 2, 700, 650, 128), torch.bfloat16)
    require(impl, q, config)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    eager = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), enable_gqa=True).to(q.dtype)
    assert_within_budget(ba_attention(q, k, v, replace(config, sparsity=0.0), impl=impl), eager, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_lse_and_variable_counts(impl):
    q, k, v = inputs((1, 2, 1, 400, 1000, 128), torch.bfloat16)
    plan = make_plan(q, k, replace(SORTED, sparsity=0.3, sort="qk"), impl=impl)
    index, count = plan.selection.index, torch.randint(1, 6, plan.selection.count.shape, device="cuda").int()
    plan = plan._replace(selection=BlockSelection(index, count))
    functions = {name: choose_backend(name, q.device).sparse_attention for name in (impl, "reference")}
    sides = (plan.query_order, plan.key_order, plan.selection)
    actual = functions[impl](q, k, v, *sides, block_size=128, scale=plan.scale)
    exact = functions["reference"](q.double(), k.double(), v.double(), *sides, block_size=128, scale=plan.scale)
    assert (actual.lse - exact.lse).abs().max() < 1e-5
    assert (actual.out - exact.out).norm() / exact.out.norm() < 4e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", ["covariance", "clusters", "window"])
def test_one_budget_for_a_head(impl, score):
    """By the kernels' own scores: the selection is the stage's, attention is right over uneven lists, nothing waits."""
    q, k, v = inputs((2, 8, 2, 3000, 3000, 128), torch.bfloat16)
    k[:, :, 512:1024] *= 3
    config = replace(SORTED, sparsity=0.8, score=score, keep_first=1, budget="head")
    require(impl, q, config)
    plan = make_plan(q, k, config, impl=impl)
    ours, theirs = plan.selection, make_plan(q, k, config, impl="reference").selection
    assert (ours.count.sum(-1) == ours.count.shape[-1] * config.kept_blocks(24)).all()
    kept, expected = (torch.zeros_like(ours.index).scatter_(-1, some.index.long(), 1) for some in (ours, theirs))
    assert (kept * expected).sum() / expected.sum() > 0.99  # scores at the threshold differ by a rounding
    check(impl, q, k, v, config)
    alone = [ba_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], config, impl=impl) for i in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        together = ba_attention(q, k, v, config, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(together, torch.cat(alone))


@mostly_pairs(
    "shape, launches, sort, channels",
    [(2, 8, 2, 3000, 4000), (1, 3, 1, 40_000, 2500), (3, 2, 2, 129, 5000), (1, 1, 1, 90, 90), (1, 40, 40, 2048, 1024)],
    ["one", "several"],
    ["none", "qk"],
    [64, 128],
)
def test_uneven_lists_wherever_their_tiles_run(shape, launches, sort, channels, monkeypatch):
    """Tiles that are claimed give to the last bit what dealt ones give, and that is right; also after one another."""
    from baatt.kernels import hopper

    *_, keys = shape
    q, k, v = inputs((*shape, channels), torch.bfloat16)
    config = BAAttConfig(sparsity=0.5, sort=sort, score="covariance", budget="row")
    require("hopper", q, config)
    plan = make_plan(q, k, config, impl="hopper")
    rows, blocks = plan.selection.count.shape, -(-keys // 128)
    generator = torch.Generator("cuda").manual_seed(0)
    drawn = torch.empty(rows, device="cuda").exponential_(generator=generator)
    count = drawn.mul(blocks / 4).int().clamp(1, blocks)
    index = torch.rand(*rows, blocks, generator=generator, device="cuda").argsort(-1)
    kept = torch.arange(blocks, device="cuda") < count[..., None]
    index = torch.where(kept, index, blocks).sort(-1).values.clamp(max=blocks - 1).int()
    uneven = BlockSelection(index, count, max(1, blocks // 4))
    if launches == "several":
        monkeypatch.setattr(hopper, "_tiles_per_launch", lambda *_: 300)
    orders, sides = (plan.query_order, plan.key_order), {"block_size": 128, "scale": plan.scale}
    dealt = hopper.sparse_attention(q, k, v, *orders, uneven._replace(uneven=False), **sides)
    for _ in range(3):
        claimed = hopper.sparse_attention(q, k, v, *orders, uneven, **sides)
        assert torch.equal(claimed.out, dealt.out)
        assert torch.equal(claimed.lse, dealt.lse)
    reference = choose_backend("reference", q.device).sparse_attention
    exact = reference(q.double(), k.double(), v.double(), *orders, uneven, **sides)
    assert (claimed.lse - exact.lse).abs().max() < 1e-5
    assert (claimed.out - exact.out).norm() / exact.out.norm() < 4e-3


@pytest.mark.parametrize("tokens", [3000, 8000, 40_000])
def test_the_budget_of_a_head_is_the_stage_s(tokens):
    """Of the same scores, ties and NaN included, to the last pair."""
    from baatt.kernels import triton_budget
    from baatt.stages.selection import select_blocks
    from baatt.types import BlockStats

    blocks = -(-tokens // 128)
    scores = torch.randn(2, 3, blocks, blocks, device="cuda").mul(20).round().div(20)
    scores[torch.rand_like(scores) < 0.01] = float("nan")
    size = torch.full((2, blocks), 128, device="cuda")
    size[1, blocks // 2 :] = 0
    scores = scores.masked_fill((size == 0)[:, None, None], float("-inf"))
    summary = BlockStats(torch.zeros(2, 3, blocks, 1, device="cuda"), torch.zeros(2, 3, blocks, 1, device="cuda"), size)
    for sparsity in (0.5, 0.9):
        ours = triton_budget.choose_blocks(summary, summary, lambda *_: scores.clone(), sparsity, 1)
        theirs = select_blocks(scores, size, sparsity, 1, budget="head", query_block_size=size)
        assert torch.equal(ours.count, theirs.count)
        assert torch.equal(ours.index, theirs.index)


@pytest.mark.parametrize("impl", IMPLS)
@both_settings
def test_batch_entries_do_not_see_one_another(impl, config):
    q, k, v = inputs((3, 4, 2, 900, 900, 128), torch.bfloat16)
    together = ba_attention(q, k, v, config, impl=impl)
    alone = [ba_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], config, impl=impl) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, ba_attention(q, k, v, config, impl=impl))


FAR = {**SETTINGS, "exact": BAAttConfig(score="exact"), "budget of a head": BAAttConfig(budget="head")}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("config", FAR.values(), ids=FAR)
def test_heads_that_lie_more_than_2_31_elements_apart(impl, config):
    near = inputs((1, 3, 3, 300, 300, 64), torch.bfloat16)
    require(impl, near[0], config)
    room = torch.empty(3 * 2**30, dtype=torch.bfloat16, device="cuda")  # one place for all three, side by side
    places = [room[place * 2**20 :].as_strided(x.shape, (2**30, 2**30, 64, 1)) for place, x in enumerate(near)]
    far = [place.copy_(x) for place, x in zip(places, near, strict=True)]
    assert torch.equal(ba_attention(*far, config, impl=impl), ba_attention(*near, config, impl=impl))


@pytest.mark.parametrize("config", FAR.values(), ids=FAR)
@pytest.mark.parametrize("causal", [None, 32])
def test_more_heads_than_the_second_axis_of_a_grid_holds(config, causal):
    q, k, v = inputs((66, 1000, 1, 70, 70, 16), torch.bfloat16)
    config = replace(config, block_size=16, sort="none" if causal else config.sort)
    out = ba_attention(q, k, v, config, causal=causal, impl="triton")[-1:]
    assert torch.equal(out, ba_attention(q[-1:], k[-1:], v[-1:], config, causal=causal, impl="triton"))


@pytest.mark.parametrize("impl", IMPLS)
@both_settings
def test_strided_inputs(impl, config):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs((2, 4, 2, 500, 500, 64), torch.bfloat16))
    check(impl, q, k, v, config)


def inside(x, axes, step=1):
    """x [B, H, N, D] as a view into a larger tensor of NaN: axes in that order, channels `step` apart."""
    moved = x.permute(axes)
    wide = moved.new_full([length + 8 for length in moved.shape[:3]] + [moved.shape[3] * step], float("nan"))
    view = wide[tuple(slice(4, length + 4) for length in moved.shape[:3])][..., ::step]
    return view.copy_(moved).permute([axes.index(axis) for axis in range(4)])


VIEWS = {
    "heads of a cache": lambda x: inside(x, (0, 1, 2, 3)),
    "tokens before heads": lambda x: inside(x, (0, 2, 1, 3)),
    "tokens before entries": lambda x: inside(x, (2, 0, 1, 3)),
    "channels apart": lambda x: inside(x, (0, 2, 1, 3), step=2),
    "channels before tokens": lambda x: inside(x, (0, 1, 3, 2)),
    "contiguous": torch.clone,
}


@pytest.mark.parametrize("impl", IMPLS)
@mostly_pairs("view, setting, channels", list(VIEWS), list(UNSORTED), [64, 128])
def test_views_give_what_contiguous_inputs_give(impl, setting, channels, view):
    q, k, v = inputs((2, 4, 2, 700, 777, channels), torch.bfloat16)
    config = replace(UNSORTED[setting], sparsity=0.6)
    require(impl, q, config)
    plan = make_plan(q, k, config, impl=impl)
    expected = attend(q, k, v, plan, impl=impl)
    function = VIEWS[view]
    views = [function(x) for x in (q, k, v)]
    assert torch.equal(attend(*views, plan, impl=impl), expected)
    assert torch.equal(attend(q, k, views[2], plan, impl=impl), expected)
    check(impl, *views, config)
    check(impl, q, *(x[:, :1].expand(2, 2, 777, channels) for x in (k, v)), config)  # heads that share their memory


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sort", ["none", "q"])
def test_keys_that_are_not_sorted_are_not_copied(impl, sort):
    q, k, v = inputs((1, 2, 2, 256, 32768, 128), torch.bfloat16)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    config = UNSORTED[sort]
    require(impl, q, config)
    ba_attention(q, k, v, config, impl=impl)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ba_attention(q, k, v, config, impl=impl)
    assert torch.cuda.max_memory_allocated() - before < k.nbytes / 4


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("channels", [64, 128])
@both_settings
def test_inputs_that_are_not_aligned(impl, channels, config):
    """Rows that start at any element, and channels that are not side by side."""
    wide = inputs((1, 2, 2, 300, 300, 2 * channels + 3), torch.bfloat16)
    check(impl, *(x[..., 3 : channels + 3] for x in wide), config)
    check(impl, *(x[..., 1 : 2 * channels : 2] for x in wide), config)


@pytest.mark.parametrize("impl", IMPLS)
@both_settings
def test_never_waits_for_the_device_and_runs_in_a_graph(impl, config):
    q, k, v = inputs((1, 4, 2, 1024, 1024, 128), torch.bfloat16)
    expected = ba_attention(q, k, v, config, impl=impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ba_attention(q, k, v, config, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = ba_attention(q, k, v, config, impl=impl)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("impl", IMPLS)
@both_settings
def test_compiles_in_one_graph(impl, config):
    q, k, v = inputs((1, 4, 2, 600, 600, 64), torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: ba_attention(q, k, v, config, impl=impl) * 2, fullgraph=True)
    assert torch.equal(compiled(q, k, v), ba_attention(q, k, v, config, impl=impl) * 2)


@pytest.mark.parametrize("segment", [256, 1024, None])
def test_large_magnitudes_and_ties(segment):
    q, k, v = inputs((1, 2, 2, 1500, 1500, 128), torch.bfloat16)
    k[:, :, ::2] = k[:, :, :1]
    for impl in IMPLS:
        check(impl, q * 8, k, v, replace(SORTED, segment=segment))
        check(impl, q * 8, k, v, BAAttConfig())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "config", [*(replace(SORTED, sort=sort) for sort in ("none", "k", "qk")), BAAttConfig()],
    ids=["none", "k", "qk", "clusters"],
)  # fmt: skip
def test_padding_on_both_sides_changes_nothing(impl, config):
    q, k, v = inputs((2, 4, 2, 1000, 1000, 64), torch.bfloat16)
    config = replace(config, sparsity=0.6)
    require(impl, q, config)
    mask = (torch.arange(1000, device="cuda") >= 300).expand(2, -1)
    alone = ba_attention(*(x[:, :, 300:] for x in (q, k, v)), config, impl=impl)
    out = ba_attention(q, k, v, config, key_mask=mask, query_mask=mask, impl=impl)
    assert torch.equal(out[:, :, 300:], alone)
