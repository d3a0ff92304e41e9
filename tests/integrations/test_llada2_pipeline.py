"""diffusers' LLaDA2Pipeline around a tiny bidirectional Llama, end to end, through the adapter of the Llama."""

import pytest
import torch

import baatt
from baatt import BAAttConfig, Policy

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

MASK, PADDING = 63, 0
ALL_BLOCKS = BAAttConfig(block_size=16, sparsity=0.0)
HALF = BAAttConfig(block_size=16, sparsity=0.5)
LAYERS, STEPS, BLOCK = 2, 4, 16
#: Prompts of 37 tokens, of which one block and a part are filled before 40 more are made: windows end at 48, 64 and 80.
WINDOWS = 3


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": PADDING},
    )
    config.is_causal = False
    model = transformers.LlamaForCausalLM(config).eval()
    pipeline = diffusers.LLaDA2Pipeline(model=model, scheduler=diffusers.BlockRefinementScheduler(), tokenizer=None)
    pipeline.mask_token_id = MASK
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, **changes):
    prompt = torch.randint(1, 60, (2, 37), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompt)
    prompt[1, :9], mask[1, :9] = PADDING, 0
    options = {
        **{"gen_length": 40, "block_length": BLOCK, "num_inference_steps": STEPS, "threshold": 2.0},
        **{"editing_threshold": None, "output_type": "seq", "use_chat_template": False, "sampling_method": "greedy"},
    }
    return pipeline(input_ids=prompt, attention_mask=mask, **{**options, **changes}).sequences


def test_without_sparsity_the_tokens_are_the_same(pipeline):
    expected = generate(pipeline)
    with baatt.enable(pipeline, ALL_BLOCKS) as handle:
        assert torch.equal(generate(pipeline), expected)
    assert (handle.sparse_calls, handle.dense_calls) == (WINDOWS * STEPS * LAYERS, 0)
    assert set(handle.layers) == {0, 1}
    with baatt.enable(pipeline, HALF) as handle:
        generate(pipeline)
    assert handle.sparse_calls == WINDOWS * STEPS * LAYERS
    assert handle.sparsity > 0.3
    assert torch.equal(generate(pipeline), expected)


def test_padding_does_not_matter(pipeline):
    prompt = torch.randint(1, 60, (1, 28), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.full((1, 9), PADDING), prompt], dim=1)
    other = torch.cat([torch.full((1, 9), 17), prompt], dim=1)
    mask = torch.cat([torch.zeros(1, 9, dtype=torch.int64), torch.ones_like(prompt)], dim=1)
    options = {"gen_length": 40, "block_length": BLOCK, "num_inference_steps": STEPS, "output_type": "seq"}
    with baatt.enable(pipeline, ALL_BLOCKS) as handle:
        first, second = (
            pipeline(input_ids=tokens, attention_mask=mask, temperature=0.0, **options).sequences
            for tokens in (padded, other)
        )
    assert torch.equal(first, second)
    assert handle.sparse_calls > 0


def test_first_steps_of_every_block_are_dense(pipeline):
    expected = generate(pipeline)
    with baatt.enable(pipeline, ALL_BLOCKS, Policy(dense_steps=0.4)) as handle:
        assert torch.equal(generate(pipeline), expected)
    # Four steps have a block's masks: the first finds none gone, the second a quarter of them.
    assert handle.reasons == {"policy: one of the first steps": WINDOWS * 2 * LAYERS}
    assert handle.sparse_calls == WINDOWS * 2 * LAYERS


def test_the_step_is_not_known_without_the_mask_token(pipeline):
    pipeline.mask_token_id = None
    with (
        baatt.enable(pipeline, ALL_BLOCKS, Policy(dense_steps=0.4)) as handle,
        pytest.warns(UserWarning, match="at_step"),
    ):
        generate(pipeline, mask_token_id=MASK)
    assert list(handle.reasons) == ["the denoising step is not known: call handle.at_step(step, total) in the loop"]
    with baatt.enable(pipeline, ALL_BLOCKS, Policy(dense_steps=0.4)) as handle:
        handle.at_step(1, 2)
        generate(pipeline, mask_token_id=MASK)
    assert (handle.sparse_calls, handle.dense_calls) == (WINDOWS * STEPS * LAYERS, 0)


def test_nothing_is_left_behind(pipeline):
    model = pipeline.model
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    config = dict(model.config.__dict__)
    with pytest.raises(ValueError, match="`gen_length` must be > 0"), baatt.enable(pipeline, HALF):
        generate(pipeline, gen_length=0)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert dict(model.config.__dict__) == config
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_model_that_nobody_knows_is_refused(pipeline):
    pipeline.model = torch.nn.Linear(2, 2).eval()
    with pytest.raises(ValueError, match=r"model must be of a known kind: .*; got torch.nn.modules.linear.Linear"):
        baatt.enable(pipeline, HALF)
