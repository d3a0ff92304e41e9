"""`baatt.enable` on our own model: exactness, counts, policies, refusals, and that nothing is left behind."""

import copy
import dataclasses
import warnings

import pytest
import torch

import baatt
from baatt import BAAttConfig, Policy
from baatt.integrations.handle import NoSparseAttentionWarning
from baatt.integrations.progress import DenoisingProgress
from baatt.models import MaskedDiffusionLM
from baatt.models.config import ModelConfig
from baatt.sampling import SamplerConfig, generate
from baatt.stages.dense import dense_attention

MASK = 63
ALL_BLOCKS = BAAttConfig(block_size=16, sparsity=0.0)
HALF = BAAttConfig(block_size=16, sparsity=0.5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=32, n_heads=4, n_kv_heads=2, n_layers=3, mlp_hidden_size=48, vocab_size=64, mask_token_id=MASK
    )
    return MaskedDiffusionLM(config).eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 60, (2, 70), generator=torch.Generator().manual_seed(1))


def run(model, tokens, mask=None):
    with torch.no_grad():
        return model(tokens, mask)


def test_without_sparsity_it_is_the_model(model, tokens):
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :13] = False
    expected = run(model, tokens), run(model, tokens, mask)
    with baatt.enable(model, ALL_BLOCKS) as handle:
        actual = run(model, tokens), run(model, tokens, mask)
    assert handle.sparse_calls == 6
    assert handle.dense_calls == 0
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1][mask], expected[1][mask])


def test_layers_with_a_sparsity_of_their_own(model, tokens, tmp_path):
    profile = Policy(dense_layers=(0,), layer_sparsity=((-1, 0.8),))
    profile.save(tmp_path / "policy.json")
    with baatt.enable(model, HALF, Policy.load(tmp_path / "policy.json")) as handle:
        found = run(model, tokens)
    blocks, kept = 5, [5, 3, 1]  # of the 5 key blocks, by layer
    assert handle.sparsity == pytest.approx(1 - sum(kept) / (3 * blocks))
    with baatt.enable(model, BAAttConfig(block_size=16, sparsity=0.9), Policy(layer_sparsity=((1, 0.5), (0, 0.0)))):
        mixed = run(model, tokens)
    assert [handle.config_of(layer).sparsity for layer in (None, 1, 2)] == [0.5, 0.5, 0.8]
    torch.testing.assert_close(mixed, found)  # 0.9 of 5 blocks keeps one, as 0.8 does, and 0 is dense attention


def test_counts_by_layer_and_achieved_sparsity(model, tokens):
    with baatt.enable(model, HALF, Policy(dense_layers=(0, -1))) as handle:
        run(model, tokens)
    assert {layer: (calls.sparse, calls.dense) for layer, calls in handle.layers.items()} == {
        0: (0, 1),
        1: (1, 0),
        2: (0, 1),
    }
    assert handle.reasons == {"policy: dense layer 0": 1, "policy: dense layer 2": 1}
    # 70 tokens are 5 blocks, of which 3 are kept in one of three layers.
    assert handle.sparsity == pytest.approx((2 / 5) / 3)
    assert "1 sparse and 2 dense" in handle.report()
    handle.reset()
    assert (handle.sparse_calls, handle.dense_calls, handle.sparsity) == (0, 0, 0.0)


def state(model):
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_left_behind(model, tokens, fail):
    before, weights = copy.deepcopy(state(model)), copy.deepcopy(model.state_dict())
    expected = run(model, tokens)
    try:
        with baatt.enable(model, HALF):
            run(model, tokens)
            if fail:
                raise KeyError("a user's mistake")
    except KeyError:
        assert fail
    after = state(model)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].keys() == after[name].keys()
        assert not after[name]["_forward_pre_hooks"]
        assert not after[name]["_forward_hooks"]
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in weights.items())
    assert torch.equal(run(model, tokens), expected)


def test_one_line_on_and_one_line_off(model, tokens):
    handle = baatt.enable(model, HALF)
    run(model, tokens)
    handle.disable()
    handle.disable()
    run(model, tokens)
    assert handle.sparse_calls == 3


def test_two_models_do_not_disturb_each_other(model, tokens):
    other = copy.deepcopy(model)
    expected = run(other, tokens)
    with baatt.enable(model, HALF) as first:
        assert torch.equal(run(other, tokens), expected)
        with baatt.enable(other, ALL_BLOCKS) as second:
            run(model, tokens)
            torch.testing.assert_close(run(other, tokens), expected)
        run(model, tokens)
    assert (first.sparse_calls, second.sparse_calls) == (6, 3)


def test_refusals(model):
    with baatt.enable(model, HALF):
        with pytest.raises(ValueError, match="must not be attached to already"):
            baatt.enable(model, HALF)
        with pytest.raises(ValueError, match="known kind"):
            baatt.enable(torch.nn.Sequential(model), HALF)
    with pytest.raises(ValueError, match=r"must be in evaluation mode, got training mode: call model.eval\(\)"):
        baatt.enable(model.train(), HALF)
    model.eval()
    with pytest.raises(ValueError, match=r"policy.dense_layers must lie in \[-3, 3\) for 3 layers, got 3"):
        baatt.enable(model, HALF, Policy(dense_layers=(3,)))
    with pytest.raises(ValueError, match=r"policy.layer_sparsity must lie in \[-3, 3\) for 3 layers, got -4"):
        baatt.enable(model, HALF, Policy(layer_sparsity=((-4, 0.5),)))
    baatt.enable(model, HALF).disable()  # a refusal leaves nothing attached
    with pytest.raises(ValueError, match=r"known kind: .*ModernBERT.*; got torch.nn.modules.linear.Linear"):
        baatt.enable(torch.nn.Linear(2, 2).eval(), HALF)
    with pytest.raises(TypeError, match="config must be a BAAttConfig or None, got float"):
        baatt.enable(model, 0.5)
    with pytest.raises(TypeError, match="policy must be a Policy or None, got dict"):
        baatt.enable(model, HALF, {})
    with pytest.raises(TypeError, match=r"order must be callable or None, such as VideoTiles\(\), got str"):
        baatt.enable(model, HALF, order="tiles")
    with pytest.raises(ValueError, match=r"impl must be one of .* got 'fast'"):
        baatt.enable(model, HALF, impl="fast")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module or a diffusers pipeline, got str"):
        baatt.enable("model", HALF)


def test_a_forward_with_gradients_is_dense_and_warned_of(model, tokens):
    handle = baatt.enable(model, HALF)
    with pytest.warns(NoSparseAttentionWarning, match="gradients are asked for"):
        model(tokens).sum().backward()
    handle.disable()
    assert handle.dense_calls == 3
    assert model.transformer.wte.weight.grad is not None


def test_dense_by_policy_is_not_warned_of(model, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with baatt.enable(model, HALF, Policy(min_length=71)) as handle:
            run(model, tokens)
    assert handle.reasons == {"policy: fewer keys than min_length=71": 3}


def test_first_steps_are_dense_by_the_masks_that_are_left(model):
    prompt = torch.randint(0, 60, (1, 40), generator=torch.Generator().manual_seed(2))
    sampler = SamplerConfig(steps=8, gen_length=32, block_length=32)
    steps = []
    for guidance in (0.0, 1.0):
        with baatt.enable(model, HALF, Policy(dense_steps=0.25)) as handle:
            sampler = SamplerConfig(steps=8, gen_length=32, block_length=32, cfg_scale=guidance)
            for _ in range(2):  # a second loop begins anew
                generate(model, prompt, None, sampler)
        steps.append((handle.sparse_calls, handle.dense_calls))
    # 2 of 8 steps, each of 3 layers, in two loops.
    assert steps == [(36, 12), (36, 12)]


def test_a_loop_may_tell_its_step(model, tokens):
    with baatt.enable(model, HALF, Policy(dense_steps=0.5)) as handle:
        for step in range(4):
            handle.at_step(step, 4)
            run(model, tokens)
        with pytest.raises(ValueError, match=r"step must be in \[0, total=4\), got 4"):
            handle.at_step(4, 4)
        with pytest.raises(TypeError, match=r"^step must be an int, got 'first'$"):
            handle.at_step("first", 4)
    assert (handle.sparse_calls, handle.dense_calls) == (6, 6)


def test_attention_that_a_forward_asks_for_stays(model, tokens):
    def own(q, k, v, /, *, key_mask):
        return dense_attention(q, k, v, key_mask=key_mask)

    with baatt.enable(model, HALF) as handle, torch.no_grad():
        model(tokens, attention=[own, dense_attention, own])
    assert {layer: calls.sparse for layer, calls in handle.layers.items()} == {1: 1}


def test_without_a_config_everything_is_dense_and_counted(model, tokens):
    expected = run(model, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with baatt.enable(model, None) as handle:
            assert torch.equal(run(model, tokens), expected)
    assert handle.reasons == {"policy: dense attention everywhere": 3}
    assert (handle.sparse_calls, handle.sparsity) == (0, 0.0)


def pattern(model, policy, *, step=0, total=10, keys=70, queries=None):
    """Of every layer, whether a call is dense or sparse."""
    q, k = torch.randn(1, 4, queries or keys, 8), torch.randn(1, 2, keys, 8)
    with warnings.catch_warnings(), baatt.enable(model, HALF, policy) as handle:
        handle.at_step(step, total)
        for layer in range(3):
            handle.attention(q, k, k, layer=layer)
    return "".join("s" if handle.layers[layer].sparse else "d" for layer in range(3))


def test_the_policy_decides_by_layer_step_and_length(model):
    assert pattern(model, Policy()) == "sss"
    assert pattern(model, Policy(dense_layers=(0, -1))) == "dsd"
    assert pattern(model, Policy(dense_layers=(-3, 2, 2))) == "dsd"
    assert [pattern(model, Policy(dense_steps=0.25), step=step) for step in range(4)] == ["ddd", "ddd", "ddd", "sss"]
    assert pattern(model, Policy(dense_steps=1.0), step=9) == "ddd"
    assert pattern(model, Policy(dense_steps=0.0), step=0) == "sss"
    assert pattern(model, Policy(dense_steps=0.07), step=7, total=100) == "ddd"  # 0.07 * 100 is above 7
    assert pattern(model, Policy(min_length=70), keys=69) == "ddd"
    assert pattern(model, Policy(min_length=70), keys=70) == "sss"
    assert pattern(model, Policy(min_queries=60), queries=59) == "ddd"
    assert pattern(model, Policy(min_queries=200), queries=70) == "sss"  # as many queries as keys


def test_a_permutation_before_the_blocks_changes_nothing_when_all_are_kept(model, tokens):
    asked = []

    def order(length, device):
        asked.append(length)
        return torch.randperm(length, generator=torch.Generator().manual_seed(3))

    expected = run(model, tokens)
    with baatt.enable(model, ALL_BLOCKS, order=order):
        torch.testing.assert_close(run(model, tokens), expected)
    assert asked == [70] * 3


@pytest.mark.parametrize("when", ["inside", pytest.param("before", marks=pytest.mark.slow)])
def test_a_compiled_graph_counts_and_follows_steps(model, tokens, when):
    torch._dynamo.reset()
    model = MaskedDiffusionLM(dataclasses.replace(model.config, n_layers=1)).eval()  # dynamo's time goes with it
    expected = run(model, tokens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if when == "before":
        run(compiled, tokens)
    with baatt.enable(compiled, ALL_BLOCKS, Policy(dense_steps=0.5)) as handle:
        for step in range(4):
            handle.at_step(step, 4)
            torch.testing.assert_close(run(compiled, tokens), expected)
    torch.testing.assert_close(run(compiled, tokens), expected)
    assert (handle.sparse_calls, handle.dense_calls) == (2, 2)


def test_cached_steps_leave_the_step_as_it_is(model):
    prompt = torch.randint(0, 60, (1, 40), generator=torch.Generator().manual_seed(2))
    for cache in ("prefix", "dual"):
        sampler = SamplerConfig(steps=8, gen_length=32, block_length=16, cache=cache)
        with baatt.enable(model, HALF, Policy(dense_steps=0.25, min_queries=0)) as handle:
            for _ in range(2):
                generate(model, prompt, None, sampler)
        assert (handle.sparse_calls, handle.dense_calls) == (24, 24)


def test_rows_that_leave_the_batch_are_no_new_loop():
    progress = DenoisingProgress(mask_token_id=MASK)
    shares = []
    for masked in ((8, 8), (2, 6), (4,), (2,), (8, 8)):
        rows = [[MASK] * count + [0] * (10 - count) for count in masked]
        progress.read_tokens(torch.tensor(rows))
        shares.append(progress.share)
    assert shares == [0.0, 0.75, 0.5, 0.75, 0.0]


def test_a_padded_row_reads_what_it_reads_alone(model, tokens):
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :13] = False
    with baatt.enable(model, HALF) as handle:
        padded, alone = run(model, tokens, mask)[1, 13:], run(model, tokens[1:, 13:])[0]
    assert handle.sparse_calls == 6
    torch.testing.assert_close(padded, alone)
