"""The sampler against a hand-written one, with models whose logits are known, and with a small real model."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from baatt import BAAttConfig
from baatt.config import Policy
from baatt.integrations.enable import enable
from baatt.models import MaskedDiffusionLM, ModelConfig
from baatt.sampling import REMASKING, SamplerConfig, SampleResult, StepInfo, generate
from baatt.sampling.filling import penalise

MASK, VOCABULARY = 17, 19  # the mask token lies inside the vocabulary, as LLaDA's does
ALLOWED = [token for token in range(VOCABULARY) if token != MASK]
CONFIG = ModelConfig(
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    n_layers=3,
    mlp_hidden_size=48,
    vocab_size=VOCABULARY,
    embedding_size=24,
    mask_token_id=MASK,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small spend their time waiting for a second thread: 20 s instead of 4 s on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(seed: int = 0) -> MaskedDiffusionLM:
    torch.manual_seed(seed)
    model = MaskedDiffusionLM(CONFIG).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.35)
    return model


def make_prompt(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, MASK, (batch, length), generator=torch.Generator().manual_seed(seed))


class Known:
    """A model that guesses fixed tokens with fixed probabilities, whatever it reads, and records what it was asked."""

    def __init__(self, prompt_length: int, tokens: Tensor, probability: Tensor) -> None:
        self.config = CONFIG
        rest = (
            ((1 - probability) / (len(ALLOWED) - 1)).log()[..., None].expand(*tokens.shape, CONFIG.logit_size).clone()
        )
        self.table = rest.scatter(-1, tokens[..., None], probability.log()[..., None])
        self.table[..., MASK] = self.table[..., VOCABULARY:] = 50.0  # tempting, and forbidden
        self.prompt_length = prompt_length
        self.inputs: list[Tensor] = []
        self.masks: list[Tensor | None] = []
        self.spans: list[tuple[int, int]] = []
        self.evaluated: list[list[int]] = []

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, logits_from: int, logits_to: int
    ) -> Tensor:
        self.inputs.append(input_ids.clone())
        self.masks.append(attention_mask)
        self.spans.append((logits_from, logits_to))
        # Rows that are finished are left out: those that are there are known by their prompts.
        prompts = [row[: self.prompt_length].tolist() for row in self.inputs[0]]
        rows = [prompts.index(row[: self.prompt_length].tolist()) for row in input_ids]
        self.evaluated.append(rows)
        return self.table[rows, logits_from - self.prompt_length : logits_to - self.prompt_length]


def known(probability: list[list[float]], prompt_length: int = 2) -> tuple[Known, Tensor, Tensor]:
    """Model, prompt and the tokens it will guess, from the probability of every generated position."""
    confidence = torch.tensor(probability, dtype=torch.float64)
    tokens = (torch.arange(confidence.numel()) % MASK).view_as(confidence)
    return Known(prompt_length, tokens, confidence), make_prompt(len(probability), prompt_length), tokens


def reference(model: MaskedDiffusionLM, prompt: Tensor, config: SamplerConfig) -> Tensor:
    """One prompt [N], temperature 0, low confidence, no threshold: LLaDA's loop with python lists."""
    ids = [*prompt.tolist(), *[MASK] * config.gen_length]
    per_block = config.steps // (config.gen_length // config.block_length)
    for begin in range(len(prompt), len(ids), config.block_length):
        schedule = [config.block_length // per_block] * per_block
        for i in range(config.block_length % per_block):
            schedule[i] += 1
        for count in schedule:
            with torch.no_grad():
                logits = model(torch.tensor([ids]))[0]
                if config.cfg_scale > 0:
                    blind = model(torch.tensor([[MASK] * len(prompt) + ids[len(prompt) :]]))[0]
                    logits = blind + (config.cfg_scale + 1) * (logits - blind)
            candidates = []
            for position in range(begin, begin + config.block_length):
                if ids[position] == MASK:
                    row = logits[position].tolist()
                    best = max(ALLOWED, key=row.__getitem__)
                    total = sum(math.exp(row[token] - row[best]) for token in ALLOWED)
                    candidates.append((1 / total, position, best))
            for _, position, best in sorted(candidates, reverse=True)[:count]:
                ids[position] = best
    return torch.tensor(ids[len(prompt) :])


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize(
    ("steps", "gen_length", "block_length"), [(12, 12, 12), (6, 12, 4), (4, 14, 7), (12, 6, 3), (1, 5, 5)]
)
def test_equals_hand_written_sampler(steps: int, gen_length: int, block_length: int, cfg_scale: float) -> None:
    model, prompt = make_model(), make_prompt(2, 9)
    config = SamplerConfig(steps=steps, gen_length=gen_length, block_length=block_length, cfg_scale=cfg_scale)
    result = generate(model, prompt, config=config)
    expected = torch.stack([reference(model, row, config) for row in prompt])
    assert torch.equal(result.tokens, expected)
    assert result.steps == min(steps, gen_length)
    assert result.seconds > 0
    assert (result.full_evaluations, result.cached_evaluations) == (result.steps, 0)
    assert result.tokens_per_second == 2 * gen_length / result.seconds
    assert len(set(expected.flatten().tolist())) > 2  # the model is not constant


def test_guidance_changes_the_result() -> None:
    model, prompt = make_model(), make_prompt(1, 9)
    plain, guided = (
        generate(model, prompt, config=SamplerConfig(steps=8, gen_length=16, block_length=8, cfg_scale=scale)).tokens
        for scale in (0.0, 3.0)
    )
    assert not torch.equal(plain, guided)


def test_guidance_masks_the_prompt_and_doubles_the_batch() -> None:
    model, prompt, _ = known([[0.5, 0.6], [0.7, 0.8], [0.5, 0.6], [0.7, 0.8]])
    padding = torch.tensor([[0, 1], [1, 1]])
    generate(model, prompt[:2], padding, SamplerConfig(steps=2, gen_length=2, block_length=2, cfg_scale=1.0))
    assert model.inputs[0].shape == (4, 4)
    assert torch.equal(model.inputs[0][:2, :2], prompt[:2])
    assert (model.inputs[0][2:, :2] == MASK).all()
    assert torch.equal(model.inputs[1][2:, 2:], model.inputs[1][:2, 2:])
    assert torch.equal(model.masks[0], torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]] * 2).bool())


# --- order of filling ------------------------------------------------------------------------------------------------


def test_surest_first_block_by_block() -> None:
    model, prompt, tokens = known([[0.3, 0.9, 0.5, 0.7, 0.99, 0.2, 0.98, 0.4]])
    result = generate(model, prompt, config=SamplerConfig(steps=8, gen_length=8, block_length=4))
    assert torch.equal(result.tokens, tokens)
    assert result.unmasked_at.tolist() == [[3, 0, 2, 1, 4, 7, 5, 6]]
    assert model.spans == [(2, 6)] * 4 + [(6, 10)] * 4  # no logits outside of the block
    assert [int((x == MASK).sum()) for x in model.inputs] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert all(torch.equal(x[:, :2], prompt) for x in model.inputs)


def test_remainder_goes_to_the_first_steps() -> None:
    model, prompt, _ = known([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25]])
    result = generate(model, prompt, config=SamplerConfig(steps=3, gen_length=8, block_length=8))
    assert result.unmasked_at.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]


def test_ties_are_filled_from_the_left() -> None:
    same = torch.zeros(1, 6, dtype=torch.int64)  # other tokens would round the sum of the softmax otherwise
    model = Known(2, same, torch.full((1, 6), 0.5, dtype=torch.float64))
    result = generate(model, make_prompt(1, 2), config=SamplerConfig(steps=3, gen_length=6, block_length=6))
    assert result.unmasked_at.tolist() == [[0, 0, 1, 1, 2, 2]]


def test_more_steps_than_tokens_stop_early() -> None:
    model, prompt, tokens = known([[0.9, 0.8, 0.7, 0.6]])
    result = generate(model, prompt, config=SamplerConfig(steps=20, gen_length=4, block_length=2))
    assert torch.equal(result.tokens, tokens)
    assert result.steps == len(model.inputs) == 4
    assert result.unmasked_at.tolist() == [[0, 1, 10, 11]]


def test_threshold_fills_all_that_is_sure() -> None:
    model, prompt, tokens = known([[0.95, 0.2, 0.92, 0.3, 0.99, 0.1], [0.3, 0.2, 0.1, 0.95, 0.96, 0.97]])
    config = SamplerConfig(steps=6, gen_length=6, block_length=3, threshold=0.9)
    result = generate(model, prompt, config=config)
    assert torch.equal(result.tokens, tokens)
    # Row 0: two at once, then one. Row 1: one per step, then three at once; it is left out while row 0 goes on.
    assert result.unmasked_at.tolist() == [[0, 1, 0, 4, 3, 5], [0, 1, 2, 3, 3, 3]]
    assert result.steps == 6


def test_threshold_is_exceeded_not_met_and_all_sure_takes_one_step() -> None:
    model, prompt, _ = known([[1.0, 1.0, 1.0, 1.0]])
    at = SamplerConfig(steps=4, gen_length=4, block_length=4, threshold=1.0)
    assert generate(model, prompt, config=at).steps == 4
    below = SamplerConfig(steps=4, gen_length=4, block_length=4, threshold=0.999)
    assert generate(model, prompt, config=below).steps == 1


def test_threshold_finishes_in_its_share_of_the_steps() -> None:
    model, prompt, tokens = known([[0.5, 0.4, 0.95, 0.3, 0.2, 0.97, 0.96, 0.1]])
    result = generate(model, prompt, config=SamplerConfig(steps=3, gen_length=8, block_length=8, threshold=0.9))
    assert torch.equal(result.tokens, tokens)
    assert result.unmasked_at.tolist() == [[1, 1, 0, 1, 2, 0, 0, 2]]


def test_random_remasking_orders_by_the_seed() -> None:
    model, prompt, tokens = known([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])

    def run(seed: int) -> SampleResult:
        return generate(
            model, prompt, config=SamplerConfig(steps=6, gen_length=6, block_length=3, remasking="random", seed=seed)
        )

    orders = [run(seed).unmasked_at for seed in range(20)]
    assert torch.equal(run(3).unmasked_at, orders[3])
    assert all(sorted(x[0, :3].tolist()) == [0, 1, 2] and sorted(x[0, 3:].tolist()) == [3, 4, 5] for x in orders)
    assert len({tuple(x[0, :3].tolist()) for x in orders}) == 6  # every order occurs in 20 seeds
    assert torch.equal(run(0).tokens, tokens)


# --- temperature -----------------------------------------------------------------------------------------------------


def test_temperature_is_deterministic_given_the_seed() -> None:
    model, prompt = make_model(), make_prompt(2, 6)

    def run(seed: int, temperature: float) -> Tensor:
        torch.manual_seed(torch.seed() % 1000)  # the global generator must not matter
        config = SamplerConfig(steps=4, gen_length=8, block_length=8, temperature=temperature, seed=seed)
        return generate(model, prompt, config=config).tokens

    assert torch.equal(run(5, 1.0), run(5, 1.0))
    assert not torch.equal(run(5, 1.0), run(6, 1.0))
    assert torch.equal(run(5, 0.0), run(6, 0.0))


def test_temperature_one_samples_the_model_distribution() -> None:
    model, prompt, tokens = known([[0.6] * 2000])
    one = SamplerConfig(steps=1, gen_length=2000, block_length=2000, temperature=1.0)
    hits = (generate(model, prompt, config=one).tokens == tokens).double().mean().item()
    assert abs(hits - 0.6) < 4 * math.sqrt(0.6 * 0.4 / 2000)
    half = SamplerConfig(steps=1, gen_length=2000, block_length=2000, temperature=0.5)
    weight, rest = 0.6**2, 17 * (0.4 / 17) ** 2
    hits = (generate(model, prompt, config=half).tokens == tokens).double().mean().item()
    assert abs(hits - weight / (weight + rest)) < 0.02


def test_confidence_ignores_the_noise() -> None:
    model, prompt, tokens = known([[0.96, 0.99, 0.97, 0.98]])
    for seed in range(5):
        config = SamplerConfig(steps=4, gen_length=4, block_length=4, temperature=0.3, seed=seed)
        result = generate(model, prompt, config=config)
        assert torch.equal(result.tokens, tokens)
        assert result.unmasked_at.tolist() == [[3, 0, 2, 1]]


def penalised(logits: Tensor, written: list[list[int]], ends: list[int], penalty: float) -> Tensor:
    """Element by element."""
    found = logits.clone()
    for row, ids in enumerate(written):
        for token in set(ids) - {MASK, *ends}:
            if not 0 <= token < logits.shape[-1]:
                continue
            for place in range(logits.shape[1]):
                value = float(logits[row, place, token])
                found[row, place, token] = value / penalty if value > 0 else value * penalty
    return found


@pytest.mark.parametrize("penalty", [1.3, 0.5])
def test_penalty_is_for_tokens_of_the_text(penalty: float) -> None:
    logits = torch.randn(2, 5, CONFIG.logit_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    written = [[3, 7, 7, MASK, 5], [1, -1, 5, MASK, CONFIG.logit_size + 2]]
    model = dataclasses.replace(CONFIG, eos_token_id=5)
    found = penalise(logits, torch.tensor(written), model, penalty)
    assert torch.equal(found, penalised(logits, written, [5], penalty))


def test_penalty_equals_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(2, CONFIG.logit_size, generator=torch.Generator().manual_seed(1))
    written = torch.tensor([[3, 7, 7], [1, 2, 1]])
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.2)(written, logits.clone())
    assert torch.equal(penalise(logits[:, None], written, CONFIG, 1.2)[:, 0], expected)


def test_penalty_keeps_a_model_from_repeating_itself() -> None:
    model, _, tokens = known([[0.5] * 8])
    prompt = torch.tensor([[10, 11]])
    model.table[:, :, :VOCABULARY] = -5.0
    model.table.scatter_(-1, tokens[..., None], 1.9)
    model.table[..., 3] = 2.0  # surer than every position's own token, by less than the penalty
    model.table[..., MASK] = 50.0
    config = SamplerConfig(steps=8, gen_length=8, block_length=8, remasking="left_to_right")
    assert generate(model, prompt, config=config).tokens.tolist() == [[3] * 8]
    penalised_once = dataclasses.replace(config, repetition_penalty=1.1)
    assert generate(model, prompt, config=penalised_once).tokens.tolist() == [[3, 1, 2, 3, 4, 5, 6, 7]]


def test_padding_is_not_penalised() -> None:
    model, prompt = make_model(), make_prompt(1, 6)
    config = SamplerConfig(steps=8, gen_length=8, block_length=4, repetition_penalty=1.5)
    alone = generate(model, prompt, config=config).tokens
    padded = torch.cat((torch.full((1, 3), int(alone[0, 0])), prompt), dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    found = generate(model, padded, mask, config).tokens
    assert torch.equal(found, alone)


def test_low_confidence_is_the_probability_of_the_guess() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    guesses = torch.tensor([[0, 1, 2], [4, 3, 2]])
    confidence = REMASKING["low_confidence"](logits, guesses, torch.ones(2, 3, dtype=torch.bool), torch.Generator())
    for b in range(2):
        for n in range(3):
            expected = logits[b, n, guesses[b, n]].exp() / logits[b, n].exp().sum()
            torch.testing.assert_close(confidence[b, n], expected)
    assert confidence.dtype == torch.float64


def test_left_to_right_is_no_surer_than_what_stands_before() -> None:
    probabilities = [0.5, 0.1, 0.9, 0.3, 0.8]
    logits = torch.tensor([[[math.log(p), math.log(1 - p)] for p in probabilities]], dtype=torch.float64)
    masked = torch.tensor([[True, False, True, True, True]])
    guesses = torch.zeros(1, 5, dtype=torch.int64)
    confidence = REMASKING["left_to_right"](logits, guesses, masked, torch.Generator())
    expected = torch.tensor([[0.5, 0.5, 0.5, 0.3, 0.3]], dtype=torch.float64)  # the filled 0.1 holds nothing back
    torch.testing.assert_close(confidence, expected)


def test_left_to_right_fills_in_order_up_to_the_first_that_is_not_sure() -> None:
    model, prompt, _ = known([[0.6, 0.5, 0.7, 0.9]])
    dials = {"gen_length": 4, "block_length": 4, "remasking": "left_to_right"}
    assert generate(model, prompt, config=SamplerConfig(steps=4, **dials)).unmasked_at.tolist() == [[0, 1, 2, 3]]
    assert generate(model, prompt, config=SamplerConfig(steps=2, **dials)).unmasked_at.tolist() == [[0, 0, 1, 1]]
    model, prompt, _ = known([[0.95, 0.95, 0.5, 0.99]])
    result = generate(model, prompt, config=SamplerConfig(steps=4, threshold=0.9, **dials))
    assert result.unmasked_at.tolist() == [[0, 0, 1, 2]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 5.0},
        {"cfg_scale": 2.0},
        {"threshold": 0.2},
        {"remasking": "random"},
        {"remasking": "left_to_right"},
    ],
    ids=str,
)
def test_never_emits_mask_or_unused_ids(changes: dict[str, Any]) -> None:
    model = make_model()
    with torch.no_grad():  # a model that wants nothing else
        model.transformer.ff_out.weight[[MASK, *range(VOCABULARY, CONFIG.logit_size)]] *= 40
    result = generate(model, make_prompt(3, 5), config=SamplerConfig(steps=4, gen_length=8, block_length=4, **changes))
    assert result.tokens.shape == (3, 8)
    assert set(result.tokens.flatten().tolist()) <= set(ALLOWED)
    assert (result.unmasked_at >= 0).all()


def test_forbidden_ids_have_no_share_of_the_confidence() -> None:
    model, prompt, _ = known([[0.95, 0.5]])  # without the forbidden ids, whose logits are 50
    result = generate(model, prompt, config=SamplerConfig(steps=2, gen_length=2, block_length=2, threshold=0.9))
    assert result.unmasked_at.tolist() == [[0, 1]]
    model, prompt, _ = known([[0.95, 0.94]])
    result = generate(model, prompt, config=SamplerConfig(steps=2, gen_length=2, block_length=2, threshold=0.9))
    assert result.unmasked_at.tolist() == [[0, 0]]


# --- stopping at the end of the text ---------------------------------------------------------------------------------


def ending(tokens: list[list[int]]) -> tuple[Known, Tensor]:
    """A model that is sure of the given tokens, whose end-of-text token is 7, and a prompt."""
    found = torch.tensor(tokens)
    model = Known(2, found, torch.full(found.shape, 0.99, dtype=torch.float64))
    model.config = dataclasses.replace(CONFIG, eos_token_id=7)
    return model, make_prompt(len(tokens), 2)


def test_rows_that_have_ended_are_not_evaluated() -> None:
    model, prompt = ending([[1, 7, 2, 3, 4, 5], [1, 2, 3, 7, 4, 5], [1, 2, 3, 4, 5, 6]])
    config = SamplerConfig(steps=3, gen_length=6, block_length=2, threshold=0.9, stop_at_eos=True)
    result = generate(model, prompt, config=config)
    assert model.evaluated == [[0, 1, 2], [1, 2], [2]]
    assert result.tokens.tolist() == [[1, 7, 7, 7, 7, 7], [1, 2, 3, 7, 7, 7], [1, 2, 3, 4, 5, 6]]
    assert result.unmasked_at.tolist() == [[0, 0, -1, -1, -1, -1], [0, 0, 1, 1, -1, -1], [0, 0, 1, 1, 2, 2]]
    assert result.steps == 3


def test_all_rows_ended_stops() -> None:
    model, prompt = ending([[1, 7, 2, 3, 4, 5]])
    config = SamplerConfig(steps=3, gen_length=6, block_length=2, threshold=0.9, stop_at_eos=True)
    result = generate(model, prompt, config=config)
    assert (result.steps, result.tokens.tolist()) == (1, [[1, 7, 7, 7, 7, 7]])
    without = generate(model, prompt, config=dataclasses.replace(config, stop_at_eos=False))
    assert (without.steps, without.tokens.tolist()) == (3, [[1, 7, 2, 3, 4, 5]])


def test_any_of_several_end_tokens_stops() -> None:
    model, prompt = ending([[1, 5, 2, 3, 4, 6], [1, 2, 3, 7, 4, 6], [1, 2, 3, 4, 2, 6]])
    model.config = dataclasses.replace(CONFIG, eos_token_id=[7, 5])
    config = SamplerConfig(steps=3, gen_length=6, block_length=2, threshold=0.9, stop_at_eos=True)
    result = generate(model, prompt, config=config)
    assert model.evaluated == [[0, 1, 2], [1, 2], [2]]
    assert result.tokens.tolist() == [[1, 5, 7, 7, 7, 7], [1, 2, 3, 7, 7, 7], [1, 2, 3, 4, 2, 6]]


def test_stopping_needs_an_end_token() -> None:
    model, prompt, _ = known([[0.5, 0.6]])
    with pytest.raises(ValueError, match="stop_at_eos must be False for a model whose config has no eos_token_id"):
        generate(model, prompt, config=SamplerConfig(steps=1, gen_length=2, block_length=2, stop_at_eos=True))


# --- batches and padding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"cfg_scale": 1.0}, {"threshold": 0.3}, {"steps": 4, "block_length": 4}], ids=str
)
def test_left_padded_batch_equals_single_runs(changes: dict[str, Any]) -> None:
    model = make_model()
    config = SamplerConfig(**{"steps": 8, "gen_length": 8, "block_length": 8, **changes})
    lengths = [3, 11, 7]
    prompts = [make_prompt(1, length, seed=length) for length in lengths]
    padded, mask = torch.zeros(3, 11, dtype=torch.int64), torch.zeros(3, 11, dtype=torch.int64)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        padded[row, 11 - length :], mask[row, 11 - length :] = prompt[0], 1
    together = generate(model, padded, mask, config)
    singles = [generate(model, prompt, config=config) for prompt in prompts]
    assert torch.equal(together.tokens, torch.cat([single.tokens for single in singles]))
    assert torch.equal(together.unmasked_at, torch.cat([single.unmasked_at for single in singles]))
    assert together.steps == max(single.steps for single in singles) or config.block_length < 8
    ignored = generate(model, padded, config=config)
    assert not torch.equal(ignored.tokens, together.tokens)  # the mask is what made them equal


def test_mask_of_ones_is_dropped() -> None:
    model, prompt, _ = known([[0.5, 0.6]])
    generate(model, prompt, torch.ones(1, 2, dtype=torch.bool), SamplerConfig(steps=1, gen_length=2, block_length=2))
    assert model.masks == [None]


def test_inputs_are_not_changed_and_mask_ids_in_the_prompt_stay() -> None:
    model, prompt, _ = known([[0.5, 0.6]])
    prompt[0, 0] = MASK
    before = prompt.clone()
    generate(model, prompt, config=SamplerConfig(steps=2, gen_length=2, block_length=2))
    assert torch.equal(prompt, before)
    assert all(x[0, 0] == MASK for x in model.inputs)


# --- sparse attention ------------------------------------------------------------------------------------------------

SPARSE = BAAttConfig(block_size=16, sparsity=0.5)


def test_sparse_run_is_sparse_where_the_policy_says() -> None:
    model, prompt = make_model(), make_prompt(2, 90)
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[0, :33] = False
    config = SamplerConfig(steps=4, gen_length=8, block_length=4)
    keys: list[Tensor] = []
    after: list[dict[int | None, tuple[int, int]]] = []

    def progress(info: StepInfo) -> None:
        after.append({layer: (calls.sparse, calls.dense) for layer, calls in handle.layers.items()})

    policy = Policy(dense_layers=(1,), dense_steps=0.5)
    with enable(model, SPARSE, policy, impl="reference") as handle:
        handle.watch(lambda layer, q, k, *_: keys.append(k))
        result = generate(model, prompt, mask, config, on_step=handle.at_step, progress=progress)
    assert result.tokens.shape == (2, 8)
    assert {k.shape for k in keys} == {(2, 2, 98, 8)}
    assert after[:2] == [dict.fromkeys(range(3), (0, steps)) for steps in (1, 2)]
    assert after[3] == {0: (2, 2), 1: (0, 4), 2: (2, 2)}
    assert not torch.equal(result.tokens, generate(model, prompt, mask, config).tokens)


def test_zero_sparsity_equals_dense() -> None:
    model, prompt = make_model(), make_prompt(2, 50)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, :9] = False
    config = SamplerConfig(steps=8, gen_length=8, block_length=8)
    exact = BAAttConfig(block_size=16, sparsity=0.0)
    with enable(model, exact, impl="reference") as handle:
        sparse = generate(model, prompt, mask, config, on_step=handle.at_step)
    assert torch.equal(sparse.tokens, generate(model, prompt, mask, config).tokens)


# --- progress and errors ---------------------------------------------------------------------------------------------


def test_progress_reports_every_evaluation() -> None:
    model, prompt, tokens = known([[0.95, 0.2, 0.92, 0.93, 0.99, 0.94]])
    infos: list[StepInfo] = []
    config = SamplerConfig(steps=6, gen_length=6, block_length=3, threshold=0.9)
    result = generate(model, prompt, config=config, progress=infos.append)
    assert [info[:4] for info in infos] == [(0, 6, 0, 4), (1, 6, 0, 3), (3, 6, 1, 0)]
    assert 0 < infos[0].seconds <= infos[1].seconds <= infos[2].seconds <= result.seconds
    assert infos[0].tokens.tolist() == [[0, MASK, 2, MASK, MASK, MASK]]
    assert torch.equal(infos[-1].tokens, tokens)


def test_every_evaluation_is_announced() -> None:
    model, prompt, _ = known([[0.95, 0.2, 0.92, 0.93, 0.99, 0.94]])
    told: list[tuple[int, int, int]] = []
    config = SamplerConfig(steps=6, gen_length=6, block_length=3, threshold=0.9)
    generate(model, prompt, config=config, on_step=lambda *step: told.append((*step, len(model.inputs))))
    assert told == [(0, 6, 0), (1, 6, 1), (3, 6, 2)]


def test_runs_in_inference_mode() -> None:
    modes: list[bool] = []
    model = make_model().train()
    model.register_forward_pre_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    result = generate(model, make_prompt(1, 3), config=SamplerConfig(steps=1, gen_length=2, block_length=2))
    assert modes == [True]
    assert not result.tokens.is_inference()
    assert not result.unmasked_at.is_inference()


def test_defaults_are_lladas() -> None:
    config = SamplerConfig()
    assert (config.steps, config.gen_length, config.block_length) == (128, 128, 128)
    assert (config.temperature, config.cfg_scale, config.remasking) == (0.0, 0.0, "low_confidence")
    assert config.repetition_penalty == 1
    assert (config.threshold, config.seed, config.cache) == (None, 0, "none")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be positive, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an int, got 1.5"),
        ({"gen_length": True}, TypeError, "gen_length must be an int, got True"),
        ({"block_length": -1}, ValueError, "block_length must be positive, got -1"),
        ({"block_length": 48}, ValueError, "block_length must divide gen_length=128, got 48"),
        ({"block_length": 32, "steps": 6}, ValueError, "steps must be a multiple of .* = 4, got 6"),
        ({"temperature": -0.1}, ValueError, "temperature must be finite and at least 0, got -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite"),
        ({"temperature": None}, TypeError, "temperature must be a number, got None"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be finite and above 0, got 0"),
        ({"repetition_penalty": 10**400}, ValueError, "repetition_penalty must be finite and above 0, got 1000"),
        ({"repetition_penalty": "1"}, TypeError, "repetition_penalty must be a number, got '1'"),
        ({"cfg_scale": math.inf}, ValueError, "cfg_scale must be finite"),
        ({"cfg_scale": "1"}, TypeError, "cfg_scale must be a number, got '1'"),
        (
            {"remasking": "high"},
            ValueError,
            r"remasking must be one of \['low_confidence', 'left_to_right', 'random'\], got",
        ),
        ({"threshold": 1.5}, ValueError, r"threshold must be in \[0, 1\], got 1.5"),
        ({"threshold": 0.5, "remasking": "random"}, ValueError, "threshold must be None where remasking is"),
        ({"seed": "x"}, TypeError, "seed must be an int, got 'x'"),
    ],
)
def test_config_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SamplerConfig(**changes)


@pytest.mark.parametrize(
    ("prompt", "mask", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), None, ValueError, r"prompt_ids must be \[B, N\] int64 .*, got \(3,\)"),
        (torch.zeros(1, 3), None, ValueError, "got .* torch.float32"),
        (torch.zeros(1, 0, dtype=torch.int64), None, ValueError, r"got \(1, 0\)"),
        (make_prompt(1, 3), torch.ones(1, 4).bool(), ValueError, r"attention_mask must have .* \(1, 3\), got \(1, 4\)"),
        (make_prompt(1, 3), torch.ones(1, 3), TypeError, "attention_mask must be bool or integer, got torch.float32"),
    ],
)
def test_prompt_errors(prompt: Tensor, mask: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generate(make_model(), prompt, mask)
