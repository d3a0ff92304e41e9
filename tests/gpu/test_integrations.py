"""Attached models on a GPU: the kernels behind the hooks, compiled graphs with CUDA graphs inside, devices refused.

Run with `pytest -m gpu tests/gpu`; what needs transformers is skipped where it is not installed.
"""

import pytest
import torch
import torch.nn.functional as F

import baatt
from baatt import BAAttConfig, Policy
from baatt.integrations.masks import MaskReader, read_mask
from baatt.integrations.sdpa import sparse_sdpa
from tests.budget import assert_within_budget
from tests.integrations.stubs import Config, DreamModel, LLaDAModelLM

pytestmark = pytest.mark.gpu

ALL_BLOCKS = BAAttConfig(sparsity=0.0)
HALF = BAAttConfig(sparsity=0.5)


def draw(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("channels", [64, 128])
def test_sdpa_without_sparsity_is_within_the_budget(channels):
    q, k, v = (draw(2, 4, 1500, channels, seed=seed) for seed in range(3))
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    with sparse_sdpa(ALL_BLOCKS) as handle:
        out = F.scaled_dot_product_attention(q, k, v)
    assert_within_budget(out, F.scaled_dot_product_attention(q, k, v), exact)
    assert handle.sparse_calls == 1


@pytest.mark.parametrize("causal", [1, 32])
@pytest.mark.parametrize("queries", [1500, 1100])
def test_causal_masks_are_within_the_budget(causal, queries):
    q, k, v = (draw(2, 4, length, 128, seed=seed) for seed, length in enumerate((queries, 1500, 1500)))
    blocks = torch.arange(1500, device="cuda") // causal
    mask = (blocks[:, None] >= blocks)[-queries:][None, None]
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), mask)
    with sparse_sdpa(ALL_BLOCKS) as handle:
        out = F.scaled_dot_product_attention(q, k, v, mask)
    assert_within_budget(out, F.scaled_dot_product_attention(q, k, v, mask), exact)
    assert handle.sparse_calls == 1


def test_a_mask_is_waited_for_once():
    blocks, real = torch.arange(700) // 32, torch.arange(700) >= torch.tensor([[0], [50]])
    mask = (blocks[:, None] >= blocks)[None, None] & real[:, None, None] & real[:, None, :, None]
    read, on_device = MaskReader(), mask.cuda()
    additive = torch.zeros(mask.shape, device="cuda").masked_fill(~on_device, torch.finfo(torch.float32).min)
    expected = read_mask(mask)
    for given in (on_device, additive):
        found = read(given, 2, 700)
        assert found[:2] == expected[:2] == (32, 0)
        assert torch.equal(found.key_mask.cpu(), expected.key_mask)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert read(given[:, :, :700], 2, 700).key_mask is not None
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_decoders():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).cuda().to(torch.bfloat16).eval()
    tokens = torch.randint(1, 200, (2, 1300), device="cuda")
    mask = torch.ones_like(tokens)
    mask[1, :300] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        with baatt.enable(model, ALL_BLOCKS) as handle:
            actual = model(tokens, attention_mask=mask).logits
            model.generate(tokens, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    error = (actual - expected)[mask.bool()].float().norm() / expected[mask.bool()].float().norm()
    assert error < 0.02  # a few roundings of bfloat16 through two layers
    assert (handle.sparse_calls, handle.dense_calls) == (2 + 2, 2 * 3)


def test_a_head_that_no_kernel_takes_stays_dense():
    q, k, v = (draw(1, 1, 600, 1024, seed=seed) for seed in range(3))
    with sparse_sdpa(HALF) as handle:
        out = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    assert list(handle.reasons) == ["no kernel for torch.bfloat16 with D=1024 on this device"]


@pytest.mark.parametrize("kind", [LLaDAModelLM, DreamModel])
def test_remote_code(kind):
    torch.manual_seed(0)
    model = kind(Config()).cuda().eval()
    tokens = torch.randint(0, 60, (2, 700), device="cuda")
    with torch.no_grad():
        expected = model(tokens).logits
        with baatt.enable(model, BAAttConfig(block_size=64, sparsity=0.0)) as handle:
            actual = model(tokens).logits
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)  # fp32 products of other kernels
    assert handle.sparse_calls > 0
    assert not handle.dense_calls


@pytest.fixture
def modernbert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    config = transformers.ModernBertConfig(
        vocab_size=200, hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        global_attn_every_n_layers=2, local_attention=64, attn_implementation="sdpa", **tokens,
    )  # fmt: skip
    return transformers.ModernBertModel(config).cuda().to(torch.bfloat16).eval()


def test_transformers(modernbert):
    tokens = torch.randint(1, 200, (2, 1000), device="cuda")
    mask = torch.ones_like(tokens)
    mask[1, 700:] = 0
    with torch.no_grad():
        expected = modernbert(tokens, attention_mask=mask).last_hidden_state
        with baatt.enable(modernbert, ALL_BLOCKS) as handle:
            actual = modernbert(tokens, attention_mask=mask).last_hidden_state
    error = (actual - expected)[mask.bool()].float().norm() / expected[mask.bool()].float().norm()
    assert error < 0.02  # a few roundings of bfloat16 through four layers
    assert handle.sparse_calls == 2


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_model_counts_and_follows_the_steps(modernbert, mode):
    torch._dynamo.reset()
    tokens = torch.randint(1, 200, (1, 900), device="cuda")
    with torch.no_grad(), baatt.enable(modernbert, HALF, Policy(dense_steps=0.5)) as handle:
        compiled = torch.compile(modernbert, mode=mode)
        found = []
        for step in range(8):
            handle.at_step(step, 8)
            found.append(compiled(tokens).last_hidden_state.clone())
        handle.at_step(7, 8)
        eager = modernbert(tokens).last_hidden_state
    assert (handle.sparse_calls, handle.dense_calls) == (2 * 4 + 2, 2 * 4 + 2)
    assert torch.equal(found[0], found[3])
    assert torch.equal(found[4], found[7])
    assert not torch.equal(found[0], found[7])
    error = (found[7] - eager).float().norm() / eager.float().norm()
    assert error < 0.05
