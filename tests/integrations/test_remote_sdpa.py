"""Models shaped like Dream, LLaDA-V, LLaDA-MoE and SDAR: layers, masks by their values, compiled, everything undone."""

import copy
import inspect
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import baatt
from baatt import BAAttConfig, Policy
from baatt.integrations import remote_sdpa
from baatt.integrations.handle import NoSparseAttentionWarning
from tests.integrations.stubs import (
    MASK,
    Config,
    DreamAttention,
    DreamModel,
    LLaDAAttention,
    LLaDAModelLM,
    LLaDAMoESdpaAttention,
    LLaDAVModelLM,
    SDARModel,
    denoise,
    merge,
    positions,
    split,
)

ALL_BLOCKS = BAAttConfig(block_size=16, sparsity=0.0)
HALF = BAAttConfig(block_size=16, sparsity=0.5)
MODELS = {
    "Dream": DreamModel,
    "LLaDA-V": LLaDAVModelLM,
    "LLaDA-MoE": lambda config: DreamModel(config, LLaDAMoESdpaAttention),
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def build(name, **config):
    torch.manual_seed(0)
    return MODELS[name](Config(**({"kv_heads": 2} | config))).eval()


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


@pytest.fixture
def dream():
    return build("Dream")


@pytest.fixture
def tokens():
    return torch.randint(0, 60, (2, 70), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[0, :13], mask[1, -9:], mask[1, 30] = 0, 0, 0
    return mask


def counts(handle):
    return handle.sparse_calls, handle.dense_calls


def test_without_sparsity_it_is_the_model(model, tokens, mask):
    real = mask.bool()
    expected = model(tokens).logits, model(tokens, attention_mask=mask).logits
    with baatt.enable(model, ALL_BLOCKS) as handle:
        torch.testing.assert_close(model(tokens).logits, expected[0])
        assert [(layer, *calls[:2]) for layer, calls in handle.layers.items()] == [(0, 1, 0), (1, 1, 0), (2, 1, 0)]
        torch.testing.assert_close(model(tokens, mask).logits[real], expected[1][real])
    assert counts(handle) == (6, 0)
    assert not torch.allclose(expected[0][real], expected[1][real], atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_blocks_is_ba_attention(name, tokens, mask):
    model = build(name, n_layers=1)
    layer = model.model.layers[0]
    x = model.model.embed_tokens(tokens) + positions(70)
    q, k, v = (split(getattr(layer.self_attn, f"{part}_proj")(x)) for part in "qkv")
    for given in (None, mask):
        key_mask = None if given is None else mask.bool()
        y = x + layer.self_attn.o_proj(merge(baatt.ba_attention(q, k, v, HALF, key_mask=key_mask, query_mask=key_mask)))
        expected = model.lm_head(y + layer.mlp(F.silu(y)))
        with baatt.enable(model, HALF) as handle:
            actual = model(tokens, given).logits
        torch.testing.assert_close(actual, expected)
        assert counts(handle) == (1, 0)


def test_masks_that_a_caller_makes(dream, tokens, mask):
    """Dream's own sampler makes bool [B, 1, N, N] before it calls the model."""
    real = mask.bool()
    expected = dream(tokens, mask).logits[real]
    for made in (
        real[:, None, :, None] & real[:, None, None, :],
        real[:, None, None, :],
        real[:, None, None, :].expand(-1, -1, 70, -1),
    ):
        with baatt.enable(dream, ALL_BLOCKS) as handle:
            torch.testing.assert_close(dream(tokens, made).logits[real], expected)
        assert counts(handle) == (3, 0)


def test_other_masks_stay_dense(dream, tokens):
    mask = torch.ones(1, 1, 70, 70, dtype=torch.bool).triu()
    expected = dream(tokens, mask).logits
    with (
        baatt.enable(dream, HALF) as handle,
        pytest.warns(NoSparseAttentionWarning, match="a mask that differs between queries"),
    ):
        assert torch.equal(dream(tokens, mask).logits, expected)
    assert handle.reasons == {"a mask that differs between queries": 3}


def test_block_causal_models(tokens):
    model = SDARModel().eval()
    expected = model(tokens).logits
    with baatt.enable(model, ALL_BLOCKS) as handle:
        torch.testing.assert_close(model(tokens).logits, expected)
    assert counts(handle) == (3, 0)
    with baatt.enable(model, HALF):
        assert not torch.allclose(model(tokens).logits, expected, atol=1e-3)


@pytest.mark.parametrize(("build", "attention"), [(DreamModel, DreamAttention), (LLaDAVModelLM, LLaDAAttention)])
def test_eager_attention_is_named(build, attention, tokens):
    model = build(attention=attention).eval()
    if attention is LLaDAAttention:
        model.model.make_mask = lambda mask, x: None
    expected = model(tokens).logits
    reason = (
        f"{attention.__name__} does not call scaled_dot_product_attention: "
        "load the model with attn_implementation='sdpa'"
    )
    with (
        baatt.enable(model, HALF) as handle,
        pytest.warns(NoSparseAttentionWarning, match=f"Stack ran without a single .*: {reason}"),
    ):
        assert torch.equal(model(tokens).logits, expected)
    assert handle.reasons == {reason: 3}
    assert list(handle.layers) == [0, 1, 2]


def test_a_layer_that_fails_is_not_counted(dream, tokens):
    dream.model.layers[1].self_attn.q_proj = nn.Linear(5, 5)
    with baatt.enable(dream, HALF) as handle, pytest.raises(RuntimeError):
        dream(tokens)
    assert counts(handle) == (1, 0)


def test_the_stack_may_be_called_without_the_model(tokens):
    """As LLaDA-V's sampler does, which gives embeddings."""
    model = build("LLaDA-V")
    embeddings = model.model.embed_tokens(tokens)
    expected = model.generate_with_embeds(embeddings)
    with baatt.enable(model, ALL_BLOCKS) as handle:
        torch.testing.assert_close(model.generate_with_embeds(embeddings), expected)
        assert counts(handle) == (3, 0)
        model.model.forward(tokens)
    assert counts(handle) == (6, 0)


def test_other_parts_of_a_model_are_untouched(dream, tokens):
    """A vision tower that calls the function too."""

    class Multimodal(nn.Module):
        def __init__(self):
            super().__init__()
            self.language = dream

        def forward(self, input_ids):
            x = torch.randn(1, 4, 64, 8, generator=torch.Generator().manual_seed(0))
            return self.language(input_ids).logits, F.scaled_dot_product_attention(x, x, x)

    model = Multimodal().eval()
    expected = model(tokens)
    with baatt.enable(model, HALF) as handle:
        actual = model(tokens)
    assert counts(handle) == (3, 0)
    assert torch.equal(actual[1], expected[1])
    assert not torch.allclose(actual[0], expected[0], atol=1e-3)


def test_a_cache_that_replaces_the_layers_forward(dream, tokens):
    """dLLM-Cache hands the attention layers q, k and v, of which q may be a part."""

    def attend(self, q, k, v):
        return self.o_proj(merge(F.scaled_dot_product_attention(split(q), split(k), split(v), enable_gqa=True)))

    def forward(self, x, attention_mask=None):
        attention = self.self_attn
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        return x + torch.cat((attention(q[:, :40], k, v), attention(q[:, 40:], k, v)), dim=1)

    def register():
        for layer in dream.model.layers:
            layer.forward = types.MethodType(forward, layer)
            layer.self_attn.forward = types.MethodType(attend, layer.self_attn)

    with baatt.enable(dream, ALL_BLOCKS, Policy(min_queries=40)) as handle:
        register()
        actual = dream(tokens).logits
    torch.testing.assert_close(actual, dream(tokens).logits)
    assert [(layer, *calls[:2]) for layer, calls in handle.layers.items()] == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]
    assert handle.reasons == {"policy: fewer queries than min_queries=40, of more keys": 3}


@pytest.mark.parametrize("guided", [False, True])
def test_first_steps_by_the_tokens_that_are_masked(dream, guided):
    prompt = torch.randint(0, 60, (1, 40), generator=torch.Generator().manual_seed(2))
    expected = denoise(dream, prompt, 32, 8, guided=guided)
    with baatt.enable(dream, ALL_BLOCKS, Policy(dense_steps=0.25)) as handle:
        assert torch.equal(denoise(dream, prompt, 32, 8, guided=guided), expected)
    assert handle.progress.mask_token_id == MASK
    assert (handle.sparse_calls, handle.reasons) == (6 * 3, {"policy: one of the first steps": 2 * 3})


def test_a_step_that_is_not_known(tokens):
    reason = "the denoising step is not known: call handle.at_step(step, total) in the loop"
    model = build("Dream", mask_token_id=None)
    with baatt.enable(model, HALF, Policy(dense_steps=0.5)) as handle:
        with pytest.warns(NoSparseAttentionWarning, match="the denoising step is not known"):
            model(tokens)
        assert handle.reasons == {reason: 3}
        handle.at_step(3, 4)
        model(tokens)
    assert counts(handle) == (3, 3)


def test_layers(dream, tokens):
    with baatt.enable(dream, HALF, Policy(dense_layers=(0, -1))) as handle:
        dream(tokens)
    assert [(layer, *calls[:2]) for layer, calls in handle.layers.items()] == [(0, 0, 1), (1, 1, 0), (2, 0, 1)]
    for layer in dream.model.layers:
        layer.self_attn.layer_idx = None  # remote code lets it be missing
    with baatt.enable(dream, HALF, Policy(dense_layers=(0, -1))) as handle:
        dream(tokens)
    assert [(layer, *calls[:2]) for layer, calls in handle.layers.items()] == [(0, 0, 1), (1, 1, 0), (2, 0, 1)]
    with pytest.raises(ValueError, match=r"policy.dense_layers must lie in \[-3, 3\) for 3 layers, got 3"):
        baatt.enable(dream, HALF, Policy(dense_layers=(3,)))


def state(model):
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_is_left_behind(dream, tokens, wrapped):
    if wrapped:
        dream.model.forward = dream.model.forward  # as a library that wraps the forward of an instance does
    before, signature = copy.copy(state(dream)), inspect.signature(dream.model.forward)
    expected = dream(tokens).logits

    def fail():
        with baatt.enable(dream, HALF):
            assert inspect.signature(dream.model.forward) == signature
            dream(tokens)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with pytest.raises(ValueError, match="dense_layers"):
        baatt.enable(dream, HALF, Policy(dense_layers=(3,)))
    after = state(dream)
    for name, values in before.items():
        assert after[name].keys() == values.keys()
        assert all(after[name][key] is value for key, value in values.items())
        assert not after[name]["_forward_pre_hooks"]
        assert not after[name]["_forward_hooks"]
        assert not after[name]["_forward_hooks_always_called"]
    assert torch.equal(dream(tokens).logits, expected)
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_two_models_do_not_disturb_each_other(dream, tokens):
    other = copy.deepcopy(dream)
    expected = other(tokens).logits
    with baatt.enable(dream, HALF) as first:
        assert torch.equal(other(tokens).logits, expected)
        with baatt.enable(other, ALL_BLOCKS) as second:
            dream(tokens)
            torch.testing.assert_close(other(tokens).logits, expected)
            with pytest.raises(ValueError, match="must not be attached to already"):
                baatt.enable(dream, HALF)
    assert (counts(first), counts(second)) == ((3, 0), (3, 0))


def test_autocast(model, tokens):
    """LLaDA-V's sampler always runs under it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(tokens).logits
        with baatt.enable(model, ALL_BLOCKS) as handle:
            torch.testing.assert_close(model(tokens).logits, expected, atol=2e-2, rtol=2e-2)
    assert counts(handle) == (3, 0)


def test_what_is_recognised(dream):
    class Renamed(type(dream.model.layers[0].self_attn)):
        pass

    assert remote_sdpa.roots(nn.Sequential(Renamed(Config(), 0)))
    assert not remote_sdpa.roots(LLaDAModelLM())
    assert not remote_sdpa.roots(nn.Linear(2, 2))
    assert not remote_sdpa.roots("dream")
    assert remote_sdpa.roots(dream) == [dream.model]
    alone = Renamed(Config(), 0)
    assert remote_sdpa.roots(alone) == [alone]


@pytest.mark.parametrize(
    ("name", "when", "backend"),
    [
        ("Dream", "before", "eager"),
        pytest.param("Dream", "inside", "aot_eager", marks=pytest.mark.slow),
        pytest.param("LLaDA-V", "inside", "eager", marks=pytest.mark.slow),
    ],
)
def test_in_a_compiled_graph(name, when, backend, tokens, mask):
    torch._dynamo.reset()
    model, real = build(name, n_layers=2), mask.bool()
    expected = model(tokens).logits, model(tokens, mask).logits
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    if when == "before":
        compiled(tokens, mask)
    with baatt.enable(model, ALL_BLOCKS, Policy(dense_layers=(1,))) as handle:
        torch.testing.assert_close(compiled(tokens).logits, expected[0])
        torch.testing.assert_close(compiled(tokens, mask).logits[real], expected[1][real])
    torch.testing.assert_close(compiled(tokens, mask).logits, expected[1])
    assert [(layer, *calls) for layer, calls in handle.layers.items()] == [
        (0, 2, 0, {}),
        (1, 0, 2, {"policy: dense layer 1": 2}),
    ]


def test_block_causal_in_a_compiled_graph(tokens):
    torch._dynamo.reset()
    model = SDARModel(Config(n_layers=1)).eval()
    expected = model(tokens).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with baatt.enable(model, ALL_BLOCKS) as handle:
        torch.testing.assert_close(compiled(tokens).logits, expected)
    assert counts(handle) == (1, 0)


@pytest.mark.parametrize("decorated", [False, True])
def test_the_warning_points_at_the_line_that_ran_the_model(dream, tokens, decorated):
    run = torch.inference_mode()(dream) if decorated else dream  # one more frame of torch on the way
    with baatt.enable(dream, HALF), pytest.warns(NoSparseAttentionWarning) as warned:
        run(tokens, torch.ones(1, 1, 70, 70, dtype=torch.bool).triu())
    lines = {Path(one.filename).name for one in warned}  # of whoever calls the part that is attached to: not of torch
    assert lines <= {Path(__file__).name, "stubs.py"}
