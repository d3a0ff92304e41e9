"""LLaDA-shaped models: padding recovered, cached passes, guidance, compiled graphs, and everything undone."""

import copy
import threading
import types
import warnings

import pytest
import torch
from torch import nn

import baatt
from baatt import BAAttConfig, Policy
from baatt.integrations import llada
from baatt.integrations.handle import NoSparseAttentionWarning
from baatt.stages.dense import dense_attention
from tests.integrations.stubs import MASK, Config, DreamModel, LLaDAModelLM, denoise, merge, positions, split

ALL_BLOCKS = BAAttConfig(block_size=16, sparsity=0.0)
HALF = BAAttConfig(block_size=16, sparsity=0.5)
EVERYTHING = Policy(min_queries=0)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=[4, 2], ids=["MHA", "GQA"])
def model(request):
    torch.manual_seed(0)
    return LLaDAModelLM(Config(kv_heads=request.param)).eval()


@pytest.fixture
def masked(model):
    """The same weights in a model that does hand its mask on, as dllm's copy does: [B, 1, N, N], additive."""
    masked = LLaDAModelLM(model.config, hands_mask=True).eval()
    masked.load_state_dict(model.state_dict())
    return masked


@pytest.fixture
def tokens():
    return torch.randint(0, 60, (2, 70), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    """Left padding in one entry, right and interior padding in the other."""
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[0, :13], mask[1, -9:], mask[1, 30] = 0, 0, 0
    return mask


def counts(handle):
    return handle.sparse_calls, handle.dense_calls


def native_calls(model):
    return sum(block.native_calls for block in model.blocks)


def test_without_a_mask_it_is_the_model(model, tokens):
    expected = model(tokens).logits
    with baatt.enable(model, ALL_BLOCKS) as handle:
        torch.testing.assert_close(model(tokens).logits, expected)
    assert counts(handle) == (3, 0)
    assert list(handle.layers) == [0, 1, 2]
    assert native_calls(model) == 3  # of the forward before


def test_half_of_the_blocks_is_ba_attention(tokens, mask):
    torch.manual_seed(0)
    model = LLaDAModelLM(Config(n_layers=1, kv_heads=2)).eval()
    (block,) = model.blocks
    parts = model.model.transformer
    x = parts["wte"](tokens) + positions(70)
    q, k, v = split(block.q_proj(x)), split(block.k_proj(x)), split(block.v_proj(x))
    for key_mask in (None, mask.bool()):
        y = x + block.attn_out(merge(baatt.ba_attention(q, k, v, HALF, key_mask=key_mask, query_mask=key_mask)))
        expected = parts["ff_out"](y + block.ff(nn.functional.silu(y)))
        with baatt.enable(model, HALF) as handle:
            actual = model(tokens, attention_mask=None if key_mask is None else mask).logits
        torch.testing.assert_close(actual, expected)
        assert counts(handle) == (1, 0)
        assert handle.sparsity == pytest.approx(2 / 5)
        assert not torch.allclose(actual, model(tokens).logits, atol=1e-3)


def forms(mask):
    """The ways in which a mask may be given: LLaDA's own code reads [B, N] of any dtype with 1 = attend."""
    real = mask.bool()
    additive = torch.zeros(mask.shape).masked_fill(~real, torch.finfo(torch.float32).min)
    yield from (real, mask, mask.float(), mask.to(torch.uint8))
    yield from (real[:, None, None], mask[:, None, None], additive[:, None, None])
    yield real[:, None, None].repeat(1, 1, 70, 1)


def test_padding_is_recovered(model, masked, tokens, mask):
    real = mask.bool()
    expected, leaking = masked(tokens, attention_mask=mask).logits, model(tokens).logits
    assert torch.equal(model(tokens, attention_mask=mask).logits, leaking)  # the model's own code drops it
    with baatt.enable(model, ALL_BLOCKS) as handle:
        for form in forms(mask):
            handle.reset()
            torch.testing.assert_close(model(tokens, attention_mask=form).logits[real], expected[real])
            torch.testing.assert_close(model(tokens, None, form).logits[real], expected[real])
            assert counts(handle) == (6, 0)
        torch.testing.assert_close(model(tokens).logits, leaking)  # nothing is left over
        changed = tokens.masked_fill(~real, 7)
        torch.testing.assert_close(model(changed, attention_mask=mask).logits[real], expected[real])


def test_padding_is_not_recovered_where_the_policy_says_so(model, tokens, mask):
    leaking = model(tokens).logits
    with baatt.enable(model, ALL_BLOCKS, Policy(recover_padding=False)) as handle:
        torch.testing.assert_close(model(tokens, attention_mask=mask).logits, leaking)
        assert "forward" not in model.model.__dict__
    assert counts(handle) == (3, 0)


def test_what_stays_dense_takes_the_padding_too(model, masked, tokens, mask):
    expected = masked(tokens, attention_mask=mask).logits
    before = native_calls(model)
    with baatt.enable(model, HALF, Policy(min_length=71)) as handle:
        torch.testing.assert_close(model(tokens, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])
        assert native_calls(model) == before  # that would have dropped it
        model(tokens, attention_mask=torch.ones_like(mask))  # no padding at all
        assert native_calls(model) == before + 3
    assert handle.reasons == {"policy: fewer keys than min_length=71": 6}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda mask: mask[:, 3:], "a mask over 67 of 70 keys"),
        (lambda mask: torch.cat((mask, mask)), "a mask for 4 of 2 batch entries"),
        (lambda mask: mask[:, None, :], "a mask of torch.bool with 3 axes"),
        (lambda mask: mask[:, None, None].float(), "an additive mask with weights"),
        (lambda mask: mask.new_ones(1, 1, 70, 70).tril(), "a mask that differs between queries"),
    ],
)
def test_other_masks_leave_the_model_as_it_is(model, tokens, mask, make, reason):
    expected = model(tokens).logits
    with baatt.enable(model, HALF) as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore", NoSparseAttentionWarning)
        assert torch.equal(model(tokens, attention_mask=make(mask)).logits, expected)
    assert handle.reasons == {reason: 3}


def test_a_mask_ends_with_its_forward(model, tokens, mask):
    expected = model(tokens).logits
    with baatt.enable(model, ALL_BLOCKS):
        with pytest.raises(IndexError):
            model(tokens + 99, attention_mask=mask)
        torch.testing.assert_close(model(tokens).logits, expected)


def test_the_inner_model_may_be_called(model, masked, tokens, mask):
    expected = masked(tokens, attention_mask=mask).logits[mask.bool()]
    with baatt.enable(model, ALL_BLOCKS) as handle:
        torch.testing.assert_close(model.model(tokens, attention_mask=mask).logits[mask.bool()], expected)
        torch.testing.assert_close(model.model.forward(tokens, None, mask).logits[mask.bool()], expected)
    assert counts(handle) == (6, 0)


def test_a_wrapper_may_hand_on_another_mask(model, masked, tokens, mask):
    """As a multimodal model does, which puts the tokens of an image before the text."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask=None):
            front = torch.ones(2, 20, dtype=torch.int64)
            full = None if attention_mask is None else torch.cat((front, attention_mask), dim=1)
            return self.inner(torch.cat((front, input_ids), dim=1), attention_mask=full)

    real = torch.cat((torch.ones(2, 20, dtype=torch.bool), mask.bool()), dim=1)
    expected = masked(torch.cat((torch.ones(2, 20, dtype=torch.int64), tokens), dim=1), attention_mask=real.long())
    wrapper = Wrapper().eval()
    with baatt.enable(wrapper, ALL_BLOCKS) as handle:
        torch.testing.assert_close(wrapper(tokens, mask).logits[real], expected.logits[real])
    assert counts(handle) == (3, 0)


@pytest.mark.filterwarnings("ignore::baatt.integrations.handle.NoSparseAttentionWarning")
def test_threads_have_masks_of_their_own(model, masked, tokens, mask):
    masks = [mask, mask.flip(0), mask.flip(1), torch.ones_like(mask)]
    expected = [masked(tokens, attention_mask=one).logits[one.bool()] for one in masks]
    found = {}

    def run(index):
        with torch.no_grad():
            outputs = [model(tokens, attention_mask=masks[index]).logits[masks[index].bool()] for _ in range(5)]
        found[index] = outputs

    with baatt.enable(model, ALL_BLOCKS):
        threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index in range(4):
        for out in found[index]:
            torch.testing.assert_close(out, expected[index])


def test_a_fork_that_hands_its_mask_on(masked, tokens, mask):
    real = mask.bool()
    expected = masked(tokens, attention_mask=mask).logits
    for policy in (Policy(), Policy(recover_padding=False)):
        with baatt.enable(masked, ALL_BLOCKS, policy) as handle:
            torch.testing.assert_close(masked(tokens, attention_mask=mask).logits[real], expected[real])
        assert counts(handle) == (3, 0)
    bias = torch.zeros(1, 1, 70, 70).masked_fill(torch.ones(70, 70, dtype=torch.bool).tril(-1), -torch.inf)
    expected = masked(tokens, attention_bias=bias).logits
    with baatt.enable(masked, HALF) as handle, pytest.warns(NoSparseAttentionWarning):
        assert torch.equal(masked(tokens, attention_bias=bias).logits, expected)
    assert handle.reasons == {"a mask that differs between queries": 3}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"is_causal": True}, "arguments ['is_causal']"), ({"dropout_p": 0.1}, "dropout")],
)
def test_flags_of_the_method(model, arguments, reason):
    block = model.blocks[1]
    q, k, v = torch.randn(3, 2, 4, 70, 8).unbind()
    torch.manual_seed(1)
    expected = block._scaled_dot_product_attention(q, k, v, **arguments)
    with baatt.enable(model, HALF) as handle:
        torch.manual_seed(1)
        assert torch.equal(block._scaled_dot_product_attention(q, k, v, **arguments), expected)
        short = block._scaled_dot_product_attention(q, k, v, None, 0.0, False)
        assert torch.equal(short, baatt.ba_attention(q, k, v, HALF))
    assert handle.layers[1] == (1, 1, {reason: 1})


def test_arguments_of_a_fork_that_are_not_known(model):
    calls = []

    def forked(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, sparse_parameters=None):
        calls.append(sparse_parameters)
        return dense_attention(q, k, v)

    block = model.blocks[0]
    block._scaled_dot_product_attention = types.MethodType(forked, block)
    fork = block.__dict__["_scaled_dot_product_attention"]
    q = torch.randn(1, 4, 70, 8)
    with baatt.enable(model, HALF) as handle:
        block._scaled_dot_product_attention(q, q, q, sparse_parameters=None)
        block._scaled_dot_product_attention(q, q, q, sparse_parameters=3)
    assert calls == [3]
    assert handle.layers[0] == (1, 1, {"arguments ['sparse_parameters']": 1})
    assert block.__dict__["_scaled_dot_product_attention"] is fork  # what was there before is there again


def cached(model, tokens):
    """Fast-dLLM's passes: the last rows after a cached prefix, and rows in the middle of a whole cache."""
    prefix = [tuple(x[:, :, :62] for x in layer) for layer in model(tokens, use_cache=True).past_key_values]
    tail = model(tokens[:, 62:], past_key_values=prefix, use_cache=True).logits
    whole = model(tokens, use_cache=True).past_key_values
    where = torch.zeros(tokens.shape, dtype=torch.int64)
    where[:, 20:28] = 1
    middle = model(tokens[:, 20:28] + 1, past_key_values=whole, replace_position=where).logits
    return tail, middle


def test_cached_passes(model, tokens):
    expected = cached(model, tokens)
    reason = "too few queries over more keys to be worth it"
    with baatt.enable(model, ALL_BLOCKS) as handle, pytest.warns(NoSparseAttentionWarning, match=reason):
        found = cached(model, tokens)
    for actual, out in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, out)
    assert handle.sparse_calls == 6
    assert handle.reasons == {reason: 6}
    with baatt.enable(model, ALL_BLOCKS, Policy(min_queries=8)) as handle:
        for actual, out in zip(cached(model, tokens), expected, strict=True):
            torch.testing.assert_close(actual, out)
    assert counts(handle) == (12, 0)


@pytest.mark.filterwarnings("ignore::baatt.integrations.handle.NoSparseAttentionWarning")
def test_cached_passes_with_padding(model, masked, tokens, mask):
    past = [tuple(x[:, :, :62] for x in layer) for layer in model(tokens, use_cache=True).past_key_values]
    expected = masked(tokens[:, 62:], past_key_values=past, attention_mask=mask).logits
    leaking = model(tokens[:, 62:], past_key_values=past).logits
    with baatt.enable(model, ALL_BLOCKS, EVERYTHING) as handle:
        out = model(tokens[:, 62:], past_key_values=past, attention_mask=mask).logits
        narrow = model(tokens[:, 62:], past_key_values=past, attention_mask=mask[:, 62:]).logits
    assert (handle.sparse_calls, handle.reasons) == (3, {"a mask over 8 of 70 keys": 3})
    torch.testing.assert_close(out, expected)
    assert torch.equal(narrow, leaking)
    assert not torch.allclose(expected, leaking, atol=1e-3)


def test_gathered_queries(model, tokens):
    """dLLM-Cache replaces `attention` of the blocks and gives a part of the queries, in any order."""
    index = torch.tensor([3, 60, 20, 69, 41])

    def gathered(self, q, k, v, *others):
        q, k, v = split(q)[:, :, index], split(k), split(v)
        return self.attn_out(merge(self._scaled_dot_product_attention(q, k, v))).repeat(1, 14, 1), None

    for block in model.blocks:
        block.attention = types.MethodType(gathered, block)
    expected = model(tokens).logits
    with baatt.enable(model, ALL_BLOCKS, EVERYTHING) as handle:
        torch.testing.assert_close(model(tokens).logits, expected)
        assert counts(handle) == (3, 0)
    with baatt.enable(model, HALF) as handle:
        torch.testing.assert_close(model(tokens).logits, expected)
        assert counts(handle) == (0, 3)
    assert all("attention" in block.__dict__ for block in model.blocks)


@pytest.mark.parametrize("guided", [False, True])
def test_first_steps_by_the_tokens_that_are_masked(model, guided):
    prompt = torch.randint(0, 60, (1, 40), generator=torch.Generator().manual_seed(2))
    expected = denoise(model, prompt, 32, 8, guided=guided)
    with baatt.enable(model, ALL_BLOCKS, Policy(dense_steps=0.25)) as handle:
        for _ in range(2):
            assert torch.equal(denoise(model, prompt, 32, 8, guided=guided), expected)
    assert handle.reasons == {"policy: one of the first steps": 2 * 2 * 3}
    assert handle.sparse_calls == 2 * 6 * 3


def test_cached_passes_leave_the_step_as_it_is(model, tokens):
    tokens[:, 40:] = MASK
    with baatt.enable(model, HALF, Policy(dense_steps=0.5, min_queries=0)) as handle:
        past = model(tokens, use_cache=True).past_key_values
        tokens[:, 40:60] = 1
        model(tokens[:, 60:], past_key_values=[tuple(x[:, :, :60] for x in layer) for layer in past])
        assert handle.progress.share == 0.0
        model(input_ids=tokens)
        assert handle.progress.share == pytest.approx(2 / 3)
        model(inputs_embeds=torch.randn(2, 70, 32))
    assert counts(handle) == (6, 6)


def test_the_mask_token(model):
    with baatt.enable(model, HALF) as handle:
        assert handle.progress.mask_token_id == MASK
    for config in (model.config._replace(mask_token_id=None), None):
        model.config = config
        with baatt.enable(model, HALF) as handle:
            assert handle.progress.mask_token_id == 126336


def test_layers(model, tokens):
    with baatt.enable(model, HALF, Policy(dense_layers=(-1,))) as handle:
        model(tokens)
    assert [layer for layer, calls in handle.layers.items() if calls.dense] == [2]
    for block in model.blocks:
        block.layer_id = 2 - block.layer_id
    with baatt.enable(model, HALF, Policy(dense_layers=(-1,))) as handle:
        model.blocks[0]._scaled_dot_product_attention(*torch.randn(3, 1, 4, 70, 8))
    assert handle.layers[2].dense == 1
    for block in model.blocks:
        block.layer_id = 7  # of no use
    with baatt.enable(model, HALF) as handle:
        model(tokens)
    assert list(handle.layers) == [0, 1, 2]


def state(model):
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_left_behind(model, tokens, mask, fail):
    model.forward = model.forward  # as a library that wraps the forward of an instance does
    before, values = state(model), copy.deepcopy(model.state_dict())
    try:
        with baatt.enable(model, HALF):
            model(tokens, attention_mask=mask)
            if fail:
                raise KeyError
    except KeyError:
        assert fail
    with pytest.raises(ValueError, match="dense_layers"):
        baatt.enable(model, HALF, Policy(dense_layers=(3,)))
    assert state(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_signatures_stay_and_a_second_time_is_refused(model):
    import inspect

    signature = inspect.signature(model.forward)
    with baatt.enable(model, HALF):
        assert inspect.signature(model.forward) == signature
        with pytest.raises(ValueError, match="must not be attached to already"):
            baatt.enable(model, HALF)


def test_two_models_do_not_disturb_each_other(model, tokens, mask):
    other = copy.deepcopy(model)
    expected = other(tokens).logits
    with baatt.enable(model, HALF) as first:
        assert torch.equal(other(tokens, attention_mask=mask).logits, expected)
        with baatt.enable(other, ALL_BLOCKS) as second:
            model(tokens, attention_mask=mask)
            torch.testing.assert_close(other(tokens).logits, expected)
    assert (counts(first), counts(second)) == ((3, 0), (3, 0))


def test_autocast(model, tokens, mask):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(tokens).logits
        with baatt.enable(model, ALL_BLOCKS) as handle:
            torch.testing.assert_close(model(tokens).logits, expected, atol=2e-2, rtol=2e-2)
    assert counts(handle) == (3, 0)


def test_a_model_that_never_calls_the_method_is_reported(model, tokens):
    for block in model.blocks:
        block.attention = types.MethodType(lambda self, q, k, v, *others: (self.attn_out(q), None), block)
    with (
        baatt.enable(model, HALF) as handle,
        pytest.warns(NoSparseAttentionWarning, match="LLaDAModelLM ran .* never called its attention through baatt"),
    ):
        model(tokens)
    assert counts(handle) == (0, 0)


def test_methods_of_that_name_of_other_models_are_not_llada_s():
    class Other(nn.Module):
        def _scaled_dot_product_attention(self, query, key, value, mask=None):
            return query, None

    assert not llada.roots(Other())
    assert not llada.roots(DreamModel())
    assert not llada.roots("llada")
    with pytest.raises(ValueError, match=r"known kind: .*LLaDA-8B"):
        baatt.enable(Other().eval(), HALF)


@pytest.fixture(scope="module")
def small():
    """Two layers, and the same weights in a model that hands its mask on."""
    torch.manual_seed(0)
    model, masked = (LLaDAModelLM(Config(n_layers=2, kv_heads=2), hands_mask=hands).eval() for hands in (False, True))
    masked.load_state_dict(model.state_dict())
    return model, masked


@pytest.mark.parametrize(
    "when", ["before", *(pytest.param(when, marks=pytest.mark.slow) for when in ("inside", "blocks"))]
)
def test_in_a_compiled_graph(small, tokens, mask, when):
    torch._dynamo.reset()
    model, masked = copy.deepcopy(small)
    layers = 2 if when == "blocks" else 1  # dynamo's time goes with the number of layers
    for one in (model, masked):
        del one.blocks[layers:]
    real = mask.bool()
    expected, plain = masked(tokens, attention_mask=mask).logits, model(tokens).logits
    compiled = model
    if when == "blocks":
        for block in model.blocks:
            block.compile(fullgraph=True, backend="eager")
    else:
        compiled = torch.compile(model, fullgraph=True, backend="eager" if when == "before" else "aot_eager")
    if when == "before":
        torch.testing.assert_close(compiled(tokens, attention_mask=mask).logits, plain)
    with baatt.enable(model, ALL_BLOCKS, Policy(dense_steps=0.5)) as handle:
        for step in range(2):
            handle.at_step(step, 2)
            torch.testing.assert_close(compiled(tokens, attention_mask=mask).logits[real], expected[real])
            torch.testing.assert_close(compiled(tokens).logits, plain)
    torch.testing.assert_close(compiled(tokens, attention_mask=mask).logits, plain)
    assert (handle.sparse_calls, handle.reasons) == (2 * layers, {"policy: one of the first steps": 2 * layers})


def test_a_fork_that_hands_its_mask_on_in_a_compiled_graph(small, tokens, mask):
    torch._dynamo.reset()
    masked, real = small[1], mask.bool()
    expected = masked(tokens, attention_mask=mask).logits
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    with baatt.enable(masked, ALL_BLOCKS) as handle:
        torch.testing.assert_close(compiled(tokens, attention_mask=mask).logits[real], expected[real])
    assert counts(handle) == (2, 0)
