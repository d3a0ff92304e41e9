"""`sparse_sdpa`: which calls of scaled_dot_product_attention go sparse, that others stay exact, and where it ends."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention as imported_by_name

import baatt
from baatt import BAAttConfig, Policy
from baatt.integrations.handle import Handle
from baatt.integrations.masks import Structure
from baatt.integrations.reasons import UNEQUAL
from baatt.integrations.sdpa import Current, SparseSDPA, sparse_sdpa

ALL_BLOCKS = BAAttConfig(block_size=16, sparsity=0.0)
HALF = BAAttConfig(block_size=16, sparsity=0.5)
B, H, N, D = 2, 4, 70, 8


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def qkv():
    return draw(3, B, H, N, D).unbind()


@pytest.fixture
def real():
    real = torch.ones(B, N, dtype=torch.bool)
    real[0, -9:], real[1, :13] = False, False
    return real


def counts(handle):
    return handle.sparse_calls, handle.dense_calls


def test_it_is_ba_attention(qkv):
    with sparse_sdpa(HALF) as handle:
        out = F.scaled_dot_product_attention(*qkv)
        scaled = F.scaled_dot_product_attention(*qkv, scale=0.3)
        by_name = imported_by_name(query=qkv[0], key=qkv[1], value=qkv[2])
    assert counts(handle) == (3, 0)
    assert torch.equal(out, baatt.ba_attention(*qkv, HALF))
    assert torch.equal(by_name, out)
    assert torch.equal(scaled, baatt.ba_attention(*qkv, HALF, scale=0.3))
    assert not torch.allclose(out, F.scaled_dot_product_attention(*qkv))


@pytest.mark.parametrize("scale", [np.float32(0.25), torch.tensor(0.25), torch.tensor(1), 1, True])
def test_a_scale_of_any_kind_that_pytorch_takes(qkv, scale):
    seen = []
    with sparse_sdpa(HALF) as handle:
        handle.watch(lambda layer, q, k, v, mask, found, *_: seen.append(type(found)))
        out = F.scaled_dot_product_attention(*qkv, scale=scale)
    assert (counts(handle), seen) == ((1, 0), [float if float(scale) == 0.25 else int])
    assert torch.equal(out, baatt.ba_attention(*qkv, HALF, scale=float(scale)))
    F.scaled_dot_product_attention(*qkv, scale=scale)


@pytest.mark.parametrize("scale", [0.0, -0.3, np.float32(-0.3), torch.tensor(-0.3)])
def test_a_scale_that_turns_scores_around_stays_dense(qkv, scale):
    with sparse_sdpa(HALF) as handle:
        out = F.scaled_dot_product_attention(*qkv, scale=scale)
    assert counts(handle) == (0, 1)
    assert "a scale that is not finite and positive" in str(handle.reasons)
    assert torch.equal(out, F.scaled_dot_product_attention(*qkv, scale=scale))


def test_without_sparsity_it_is_exact(qkv):
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    with sparse_sdpa(ALL_BLOCKS) as handle:
        out = F.scaled_dot_product_attention(*strided)
    assert counts(handle) == (1, 0)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*qkv))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_queries(qkv, groups):
    q, k, v = qkv[0], qkv[1][:, :groups], qkv[2][:, :groups]
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with sparse_sdpa(ALL_BLOCKS) as handle:
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, enable_gqa=True), expected)
    assert counts(handle) == (1, 0)


def masks(real):
    """One [B, M] in every form that is a key mask; numbers of axes below four only where one serves all entries."""
    for mask in (real, torch.zeros(real.shape).masked_fill(~real, -torch.inf)):
        rows = mask[:, None, None, :]
        yield from (rows, rows.expand(B, H, N, N), rows.repeat(1, 1, N, 1))
        alike = mask[:1]
        yield from (alike, alike[None], alike.repeat(N, 1), alike[:, None, None, :], alike.expand(N, N)[None])


def test_key_masks(qkv, real):
    for mask in masks(real):
        expected = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
        with sparse_sdpa(ALL_BLOCKS) as handle:
            torch.testing.assert_close(F.scaled_dot_product_attention(*qkv, attn_mask=mask), expected)
        assert counts(handle) == (1, 0)
    with sparse_sdpa(HALF):
        out = F.scaled_dot_product_attention(*qkv, real[:, None, None])
    assert torch.equal(out, baatt.ba_attention(*qkv, HALF, key_mask=real, query_mask=real))


def test_padding_by_padding(qkv, real):
    mask = real[:, None, :, None] & real[:, None, None, :]
    expected = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
    with sparse_sdpa(ALL_BLOCKS) as handle:
        out = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
    assert counts(handle) == (1, 0)
    rows = real[:, None].expand(B, H, N)
    torch.testing.assert_close(out[rows], expected[rows])
    assert out.isfinite().all()


def test_two_axes_are_queries_and_keys_and_not_a_batch(qkv):
    q, k, v = (x[:, :, :B] for x in qkv)  # as many queries as batch entries
    mask = torch.tensor([[True, False], [True, True]])  # causal
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with sparse_sdpa(ALL_BLOCKS) as handle:
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), expected)
    assert counts(handle) == (1, 0)


@pytest.mark.parametrize(("queries", "keys"), [(N, N), (30, N), (N, 30)])
def test_the_causal_flag_stands_at_the_first_key(qkv, queries, keys):
    q, k, v = qkv[0][:, :, :queries], qkv[1][:, :, :keys], qkv[2][:, :, :keys]
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with sparse_sdpa(ALL_BLOCKS, policy=Policy(min_queries=0)) as handle:
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, is_causal=True), expected)
    with sparse_sdpa(HALF, policy=Policy(min_queries=0)):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(out, baatt.ba_attention(q, k, v, HALF, causal=1, query_start=0))
    assert counts(handle) == (1, 0)


@pytest.mark.parametrize("causal", [1, 4, 24])
@pytest.mark.parametrize("queries", [N, 40])
@pytest.mark.parametrize("pad", [False, True])
def test_causal_masks(qkv, real, causal, queries, pad):
    """As models write them out, the queries at the last keys."""
    q, blocks = qkv[0][:, :, -queries:], torch.arange(N) // causal
    rows = slice(N - queries, None)
    mask = (blocks[:, None] >= blocks)[rows].expand(B, 1, -1, -1) & (real | (not pad))[:, None, None]
    expected = F.scaled_dot_product_attention(q, *qkv[1:], attn_mask=mask)
    wanted = (real | (not pad))[:, None, rows].expand(B, H, -1)
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)):
        with sparse_sdpa(ALL_BLOCKS, policy=Policy(min_queries=40)) as handle:
            out = F.scaled_dot_product_attention(q, *qkv[1:], attn_mask=given)
        torch.testing.assert_close(out[wanted], expected[wanted])
        assert counts(handle) == (1, 0)
    masks = {"key_mask": real, "query_mask": real[:, rows]} if pad else {}
    with sparse_sdpa(HALF, policy=Policy(min_queries=40)):
        out = F.scaled_dot_product_attention(q, *qkv[1:], attn_mask=mask)
    half = baatt.ba_attention(q, *qkv[1:], HALF, causal=causal, query_start=N - queries, **masks)
    assert torch.equal(out[wanted], half[wanted])


def test_more_queries_than_keys_have_no_padding():
    """They are no one sequence, so a query at the place of a hidden key is wanted."""
    q, k = torch.randn(2, 2, 70, 8), torch.randn(2, 2, 50, 8)
    mask = torch.ones(70, 50, dtype=torch.bool).tril() & (torch.arange(50) != torch.tensor([[[7]], [[33]]]))
    with sparse_sdpa(BAAttConfig(block_size=16, sparsity=0.0)) as handle:
        out = F.scaled_dot_product_attention(q, k, k, mask[:, None])
    assert handle.sparse_calls == 1
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, k, mask[:, None]))


def test_an_order_and_a_causal_mask_stay_dense(qkv):
    handle = Handle(HALF, order=lambda length, device: torch.arange(length, device=device).flip(0))
    with SparseSDPA(handle.sdpa):
        out = F.scaled_dot_product_attention(*qkv, is_causal=True)
    assert torch.equal(out, F.scaled_dot_product_attention(*qkv, is_causal=True))
    assert handle.reasons == {"an order of tokens, which a causal mask does not allow": 1}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"attn_mask": torch.ones(N, N, dtype=torch.bool).triu()}, "a mask that differs between queries"),
        ({"attn_mask": torch.ones(N, N, dtype=torch.bool).tril().triu(-9)}, "a sliding window"),
        ({"attn_mask": draw(N, N).clamp(max=0)}, "an additive mask with weights"),
        ({"attn_mask": draw(B, 1, N, N)}, "an additive mask with weights"),
        ({"attn_mask": draw(1, N)}, "an additive mask with weights"),
        ({"attn_mask": draw(B, H, 1, N) > 0}, "a mask that differs between heads"),
        ({"attn_mask": draw(H, 1, N) > 0}, "a mask that differs between heads"),
        ({"attn_mask": torch.ones(1, 1, dtype=torch.bool)}, "a mask over 1 of 70 keys"),
    ],
)
def test_what_stays_dense_is_the_function_itself(qkv, arguments, reason):
    expected = F.scaled_dot_product_attention(*qkv, **arguments)
    with sparse_sdpa(HALF) as handle:
        assert torch.equal(F.scaled_dot_product_attention(*qkv, **arguments), expected)
    assert (handle.sparse_calls, handle.reasons) == (0, {reason: 1})


def test_dropout_stays_dense(qkv):
    with sparse_sdpa(HALF) as handle:
        torch.manual_seed(0)
        actual = F.scaled_dot_product_attention(*qkv, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(actual, F.scaled_dot_product_attention(*qkv, dropout_p=0.5))
    assert handle.reasons == {"dropout": 1}


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ([(3, N, D)] * 3, "tensors that are not [B, H, N, D]"),
        ([(N, D)] * 3, "tensors that are not [B, H, N, D]"),
        ([(1, B, H, N, D)] * 3, "tensors that are not [B, H, N, D]"),
        ([(B, H, N, D), (1, H, N, D), (1, H, N, D)], "tensors that are not [B, H, N, D]"),
        ([(B, H, 0, D), (B, H, N, D), (B, H, N, D)], "tensors without elements"),
        ([(0, H, N, D)] * 3, "tensors without elements"),
        ([(B, H, N, D), (B, 1, N, D), (B, 1, N, D)], "fewer heads of keys than of queries without enable_gqa"),
        (
            [(B, H, N, D), (B, H, N, D), (B, H, N, D + 3)],
            "values of another shape than keys, or keys of another width than queries",
        ),
    ],
)
def test_shapes_that_stay_dense(shapes, reason):
    tensors = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    expected = F.scaled_dot_product_attention(*tensors)
    with sparse_sdpa(HALF) as handle:
        assert torch.equal(F.scaled_dot_product_attention(*tensors), expected)
    assert handle.reasons == {reason: 1}


@pytest.mark.parametrize(
    "arguments",
    [
        {"key": draw(B, 3, N, D), "value": draw(B, 3, N, D)},
        {"key": draw(B, 3, N, D), "value": draw(B, 3, N, D), "enable_gqa": True},
        {"key": draw(B, H, N, D + 1)},
        {"attn_mask": torch.ones(B, 1, 5, N, dtype=torch.bool)},
        {"attn_mask": torch.ones(N, dtype=torch.bool)},
        {"attn_mask": torch.ones(B, 1, 1, 5, N, dtype=torch.bool)},
        {"attn_mask": torch.ones(B, 1, 1, N, dtype=torch.float64)},
        {"attn_mask": torch.ones(B, 1, 1, N, dtype=torch.int64)},
        {"attn_mask": torch.ones(B, 1, 1, N, dtype=torch.bool), "is_causal": True, "dropout_p": 2.0},
    ],
)
def test_errors_are_torch_s_own(qkv, arguments):
    call = {"query": qkv[0], "key": qkv[1], "value": qkv[2], **arguments}
    with pytest.raises((RuntimeError, ValueError, IndexError)) as expected:
        F.scaled_dot_product_attention(**call)
    with sparse_sdpa(HALF), pytest.raises(type(expected.value)) as actual:
        F.scaled_dot_product_attention(**call)
    assert str(actual.value) == str(expected.value)
    with sparse_sdpa(HALF), pytest.raises(TypeError, match="causal"):
        F.scaled_dot_product_attention(*qkv, causal=True)


def test_cross_attention_and_other_policies(qkv):
    q, k, v = qkv
    with sparse_sdpa(ALL_BLOCKS, min_length=64) as handle:
        F.scaled_dot_product_attention(q, k[:, :, :64], v[:, :, :64])
        F.scaled_dot_product_attention(*(x[:, :, :63] for x in qkv))
        F.scaled_dot_product_attention(*(x[:, :, :64] for x in qkv))
    assert handle.reasons == {UNEQUAL: 1, "policy: fewer keys than min_length=64": 1}
    assert handle.sparse_calls == 1
    anything = Policy(only_self_attention=False, min_queries=4, min_length=99)
    with sparse_sdpa(ALL_BLOCKS, policy=anything, min_length=0) as handle:
        for rows in (3, 4):
            expected = baatt.ba_attention(q[:, :, 30 : 30 + rows], k, v, ALL_BLOCKS)
            actual = F.scaled_dot_product_attention(q[:, :, 30 : 30 + rows], k, v)
            torch.testing.assert_close(actual, expected)
    assert handle.reasons == {"policy: fewer queries than min_queries=4, of more keys": 1}
    assert handle.sparse_calls == 1


def test_first_steps(qkv):
    with sparse_sdpa(HALF, policy=Policy(dense_steps=0.5)) as handle:
        F.scaled_dot_product_attention(*qkv)
        assert handle.reasons == {
            "the denoising step is not known: call handle.at_step(step, total) in the loop": 1,
        }
        handle.reset()
        for step in range(4):
            handle.at_step(step, 4)
            F.scaled_dot_product_attention(*qkv)
    assert (handle.sparse_calls, handle.reasons) == (2, {"policy: one of the first steps": 2})


def test_gradients_stay_dense(qkv):
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    with sparse_sdpa(HALF) as handle:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
        with torch.no_grad():
            F.scaled_dot_product_attention(q, k, v)
    assert q.grad is not None
    assert handle.reasons == {"gradients are asked for: call the model under torch.no_grad()": 1}
    assert handle.sparse_calls == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype(qkv, real, dtype):
    q, k, v = qkv[0], qkv[1].double().float(), qkv[2].to(dtype)  # rotary embeddings leave q and k in float32
    mask = torch.zeros(B, 1, 1, N).masked_fill(~real[:, None, None], torch.finfo(torch.float32).min)
    for arguments in ({}, {"attn_mask": mask}):
        with torch.autocast("cpu", dtype=dtype):
            expected = F.scaled_dot_product_attention(q, k, v, **arguments)
            with sparse_sdpa(ALL_BLOCKS) as handle:
                actual = F.scaled_dot_product_attention(q, k, v, **arguments)
        assert counts(handle) == (1, 0)
        assert actual.dtype == expected.dtype == dtype
        torch.testing.assert_close(actual, expected, atol=4e-3, rtol=2e-2)


def test_other_threads_are_untouched_and_leaving_restores(qkv):
    expected = F.scaled_dot_product_attention(*qkv)
    found = []
    with sparse_sdpa(HALF) as handle:
        thread = threading.Thread(target=lambda: found.append(F.scaled_dot_product_attention(*qkv)))
        thread.start()
        thread.join()
    assert counts(handle) == (0, 0)
    assert torch.equal(found[0], expected)
    with pytest.raises(KeyError), sparse_sdpa(HALF):
        raise KeyError
    assert torch.equal(F.scaled_dot_product_attention(*qkv), expected)
    assert F.scaled_dot_product_attention is imported_by_name


def test_contexts_nest(qkv):
    with sparse_sdpa(HALF) as outer, sparse_sdpa(ALL_BLOCKS) as inner:
        F.scaled_dot_product_attention(*qkv)
        F.scaled_dot_product_attention(*qkv, dropout_p=0.5)
    assert (inner.sparse_calls, inner.reasons) == (1, {"dropout": 1})
    assert (outer.sparse_calls, outer.reasons) == (0, {"dropout": 1})


def test_refusals():
    with pytest.raises(TypeError, match="config must be a BAAttConfig or None, got float"), sparse_sdpa(0.5):
        pass
    with pytest.raises(TypeError, match="policy must be a Policy or None, got dict"), sparse_sdpa(HALF, policy={}):
        pass
    with pytest.raises(ValueError, match=r"impl must be one of .* got 'fast'"), sparse_sdpa(HALF, impl="fast"):
        pass
    with (
        pytest.raises(ValueError, match=r"policy must name no layers: .* got \(0,\)"),
        sparse_sdpa(HALF, policy=Policy(dense_layers=(0,))),
    ):
        pass
    with pytest.raises(ValueError, match="min_length must be at least 0, got -1"), sparse_sdpa(HALF, min_length=-1):
        pass


def test_an_adapter_may_know_layer_and_mask_better(qkv, real):
    handle = Handle(ALL_BLOCKS, Policy(dense_layers=(1,)))
    layer = iter((0, 1))
    asked = []

    def key_mask(mask, batch, keys):
        asked.append((mask.shape, batch, keys))
        return Structure(key_mask=real)

    handle.masks = key_mask
    with SparseSDPA(lambda call, dense: handle.sdpa(call, dense, layer=next(layer))):
        out = F.scaled_dot_product_attention(*qkv, attn_mask=torch.zeros(N, N))
        F.scaled_dot_product_attention(*qkv)
    assert asked == [((1, 1, N, N), B, N)]
    assert [(calls.sparse, calls.dense) for calls in handle.layers.values()] == [(1, 0), (0, 1)]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*qkv, attn_mask=real[:, None, None]))


def net(x, mask=None, causal=False):
    """Projections, attention in two ways of calling it, and a method that dynamo cannot trace below a mode."""
    q, k, v = (x * factor for factor in (1.0, 0.5, 2.0))
    q, k, v = (y.unflatten(2, (H, D)).transpose(1, 2) for y in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return (out + imported_by_name(q, k, v)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("when", "dynamic"),
    [
        ("before", True),
        *(
            pytest.param(*both, marks=pytest.mark.slow)
            for both in (("before", False), ("inside", False), ("inside", True))
        ),
    ],
)
@torch._dynamo.config.patch(cache_size_limit=64)
def test_in_a_compiled_graph(real, when, dynamic):
    torch._dynamo.reset()
    x = draw(B, N, H * D)
    square = real[:, None, :, None] & real[:, None, None, :]
    additive = torch.zeros(B, 1, 1, N).masked_fill(~real[:, None, None], torch.finfo(torch.float32).min)
    asked = [None, real[:, None, None], additive, real[:, None, None].repeat(1, 1, N, 1), square, square.tril()]
    expected, causal = [net(x, mask) for mask in asked], net(x, causal=True)
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    if when == "before":
        for mask in asked[:2]:
            compiled(x, mask)
    with sparse_sdpa(ALL_BLOCKS, policy=Policy(dense_steps=0.5)) as handle:
        for step in range(2):
            handle.at_step(step, 2)
            for mask, out in zip(asked, expected, strict=True):
                rows = real if mask is not None and mask.shape[1:] == square.shape[1:] else torch.ones_like(real)
                torch.testing.assert_close(compiled(x, mask)[rows], out[rows])
        torch.testing.assert_close(compiled(x, causal=True), causal)
    torch.testing.assert_close(compiled(x), expected[0])
    # Two calls in each of six forwards of a dense and a sparse step, and in one more.
    assert handle.reasons == {"policy: one of the first steps": 12}
    assert handle.sparse_calls == 12 + 2


def test_a_compiled_graph_with_gradients_is_dense(real):
    torch._dynamo.reset()
    x = draw(B, N, H * D).requires_grad_()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with sparse_sdpa(HALF) as handle:
        out = compiled(x, real[:, None, None])
        out.sum().backward()
    assert handle.sparse_calls == 0
    torch.testing.assert_close(out, net(x, real[:, None, None]))


def test_a_compiled_graph_under_autocast(real):
    torch._dynamo.reset()
    x = draw(B, N, H * D)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for mask in (None, torch.zeros(B, 1, 1, N).masked_fill(~real[:, None, None], -torch.inf)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = net(x, mask)
            with sparse_sdpa(ALL_BLOCKS) as handle:
                out = compiled(x, mask)
        assert counts(handle) == (2, 0)
        assert out.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(out, expected, atol=4e-3, rtol=2e-2)


def test_threads_hold_values_of_their_own():
    current = Current(0)
    current.set(1)
    found = []
    thread = threading.Thread(target=lambda: (found.append(current.get()), current.set(2)))
    thread.start()
    thread.join()
    assert (found, current.get()) == ([0], 1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [None, "keys", "causal"])
def test_multi_head_attention_without_weights(batch_first, masked):
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=batch_first).eval()
    x = draw(2, 70, 32)
    hidden = torch.zeros(2, 70, dtype=torch.bool)
    hidden[1, 50:] = True
    causal = torch.ones(70, 70, dtype=torch.bool).triu(1)
    options = {None: {}, "keys": {"key_padding_mask": hidden}, "causal": {"attn_mask": causal}}[masked]
    x = x if batch_first else x.transpose(0, 1)
    rows = ~hidden if masked == "keys" else torch.ones_like(hidden)
    rows = rows if batch_first else rows.T

    with torch.no_grad():
        expected, weights = layer(x, x, x, need_weights=False, **options)[0], layer(x, x, x, **options)[1]
        with sparse_sdpa(BAAttConfig(block_size=16, sparsity=0.0)) as handle:
            torch.testing.assert_close(layer(x, x, x, need_weights=False, **options)[0][rows], expected[rows])
            torch.testing.assert_close(layer(x, x, x, **options)[1], weights)
    assert counts(handle) == (1, 0)


def test_layers_of_torch_around_multi_head_attention():
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval()
    model, x = torch.nn.TransformerEncoder(layer, 2).eval(), draw(2, 70, 32)
    with torch.no_grad():
        expected = model(x)
        with sparse_sdpa(BAAttConfig(block_size=16, sparsity=0.0)) as handle:
            torch.testing.assert_close(model(x), expected)
    assert counts(handle) == (2, 0)


def test_nested_tensors_stay_dense():
    rows = [draw(20, H, D), draw(33, H, D, seed=1)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    expected = F.scaled_dot_product_attention(nested, nested, nested)
    with sparse_sdpa(BAAttConfig(16, 0.5), policy=Policy(min_length=2**20)) as handle:  # which asks for no sparse call
        actual = F.scaled_dot_product_attention(nested, nested, nested)
    assert handle.reasons == {"nested tensors": 1}
    for one, other in zip(actual.unbind(), expected.unbind(), strict=True):
        assert torch.equal(one, other)
