"""LLaDA's semi-autoregressive sampler: fill a row of mask tokens block by block, the surest positions first.

In: a masked-diffusion model, prompt ids [B, N] and a `SamplerConfig`. Out: `SampleResult` with tokens [B, gen_length].
Which layers attend densely or sparsely at a step is decided in one place, `layer_attention`. Knows nothing of text,
tokenizers or how attention is computed.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from baatt.attention import ba_attention
from baatt.config import BAAttConfig, Policy
from baatt.models.llada import AttentionFunction, ModelConfig, dense_attention

WrapAttention = Callable[[int, AttentionFunction], AttentionFunction]


class DenoisingModel(Protocol):
    """What the sampler needs of a model: its config and the call of `MaskedDiffusionLM.forward`."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def __call__(self) -> Callable[..., Any]: ...


def low_confidence(logits: Tensor, guesses: Tensor, generator: torch.Generator) -> Tensor:
    """Probability [B, L] of the guesses under the un-noised logits [B, L, V]."""
    return logits.softmax(dim=-1).gather(-1, guesses[..., None])[..., 0]


def random_confidence(logits: Tensor, guesses: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform random numbers [B, L]: positions are filled in random order."""
    return torch.rand(guesses.shape, generator=generator, device=guesses.device, dtype=logits.dtype)


# Above `SamplerConfig`, not at the bottom of the file: the default of `generate` is checked against it on import.
REMASKING: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "low_confidence": low_confidence,
    "random": random_confidence,
}


@dataclass(frozen=True)
class SamplerConfig:
    """The sampler's dials; the defaults are those of LLaDA's `generate`.

    Args:
        steps: denoising steps of the whole generation, shared evenly by the blocks.
        gen_length: tokens to generate.
        block_length: tokens denoised together, left to right; divides `gen_length`.
        temperature: of Gumbel noise added to the logits; 0 takes the most probable token.
        cfg_scale: weight of classifier-free guidance, un + (cfg_scale + 1) * (cond - un); 0 leaves it out.
        remasking: confidence that orders the positions of a block, a name in `REMASKING`.
        threshold: None fills equally many positions per step. A probability fills every position surer than it, and
            never fewer than it takes to finish the block in its share of `steps`.
        seed: of the noise and of remasking "random".
        stop_at_eos: a row that has an end-of-text token in a finished block is done; the rest of it is filled with that
            token without evaluating the model. The text before the token is the same either way at temperature 0.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value outside its range, or sizes that do not divide each other.
    """

    steps: int = 128
    gen_length: int = 128
    block_length: int = 128
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    threshold: float | None = None
    seed: int = 0
    stop_at_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "gen_length", "block_length", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1 and name != "seed":
                raise ValueError(f"{name} must be positive, got {value}")
        if not isinstance(self.stop_at_eos, bool):
            raise TypeError(f"stop_at_eos must be a bool, got {self.stop_at_eos!r}")
        for name in ("temperature", "cfg_scale", "threshold"):
            value = getattr(self, name)
            if value is None and name == "threshold":
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if self.gen_length % self.block_length:
            raise ValueError(f"block_length must divide gen_length={self.gen_length}, got {self.block_length}")
        if self.steps % self.blocks:
            raise ValueError(f"steps must be a multiple of gen_length / block_length = {self.blocks}, got {self.steps}")
        if self.remasking not in REMASKING:
            raise ValueError(f"remasking must be one of {list(REMASKING)}, got {self.remasking!r}")
        if self.threshold is not None and self.threshold > 1:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold}")
        if self.threshold is not None and self.remasking != "low_confidence":
            raise ValueError(f"threshold must be None unless remasking is 'low_confidence', got {self.threshold}")

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.gen_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        """Steps a block may take."""
        return self.steps // self.blocks


class StepInfo(NamedTuple):
    """State after one model evaluation, handed to `progress`."""

    step: int  # planned index of the step, from 0; a block that finishes early leaves the rest of its indices out
    total_steps: int
    block: int  # from 0
    masked_remaining: int  # mask tokens left in the whole batch
    seconds: float  # since `generate` began
    tokens: Tensor  # [B, gen_length] int64 as they stand, mask tokens included


class SampleResult(NamedTuple):
    """What `generate` returns."""

    tokens: Tensor  # [B, gen_length] int64
    steps: int  # model evaluations; one with guidance counts once
    seconds: float
    unmasked_at: Tensor  # [B, gen_length] int64: planned index of the step that filled the position, -1 = none had to


def layer_attention(
    sparse: BAAttConfig | None, policy: Policy, *, layers: int, step: int, total_steps: int, length: int, impl: str
) -> list[AttentionFunction]:
    """The attention function of every layer at one denoising step.

    Args:
        sparse: dials of BA-Att; None keeps everything dense.
        policy: what stays dense nevertheless.
        layers: number of layers. step: from 0, of `total_steps`. length: tokens of prompt and generation together.
        impl: as `ba_attention`.

    Raises:
        ValueError: `policy.dense_layers` names a layer the model does not have.
    """
    for layer in policy.dense_layers:
        if not -layers <= layer < layers:
            raise ValueError(f"policy.dense_layers must lie in [{-layers}, {layers}) for {layers} layers, got {layer}")
    if sparse is None or step < policy.dense_steps * total_steps or length < policy.min_length:
        return [dense_attention] * layers
    dense_layers = {layer % layers for layer in policy.dense_layers}
    approximate = functools.partial(ba_attention, config=sparse, impl=impl)
    return [dense_attention if layer in dense_layers else approximate for layer in range(layers)]


@torch.inference_mode()
def generate(
    model: DenoisingModel,
    prompt_ids: Tensor,
    attention_mask: Tensor | None = None,
    config: SamplerConfig = SamplerConfig(),
    *,
    sparse: BAAttConfig | None = None,
    policy: Policy = Policy(),  # noqa: B008  (frozen)
    impl: str = "auto",
    wrap_attention: WrapAttention | None = None,
    progress: Callable[[StepInfo], None] | None = None,
) -> SampleResult:
    """Continue prompts by `config.gen_length` tokens.

    Args:
        model: a `MaskedDiffusionLM`, or anything called like one that has its `config`.
        prompt_ids: [B, N] int64 on the model's device; prompts of unequal length are padded on the left.
        attention_mask: [B, N] bool or 0/1 ints, True = real token; None = all real.
        sparse: dials of BA-Att for the calls that `policy` does not keep dense; None = dense everywhere.
        impl: as `ba_attention`.
        wrap_attention: called with (layer, function) at every step; what it returns is used instead of the function.
        progress: called after every model evaluation.

    Returns:
        SampleResult; the mask token and ids from `vocab_size` on never occur in its tokens. At temperature 0 with
        dense attention a row does not depend on the other rows. Rows without a mask token left in the block are not
        evaluated.

    Raises:
        TypeError, ValueError: prompt or mask of a wrong shape or dtype, a policy that does not fit the model, or
            `stop_at_eos` for a model without an end-of-text token.
    """
    started = time.perf_counter()
    _check_prompt(prompt_ids, attention_mask)
    if config.stop_at_eos and model.config.eos_token_id is None:
        raise ValueError("stop_at_eos must be False for a model whose config has no eos_token_id, got True")
    run = _start(model, prompt_ids, attention_mask, config)
    layers, length = model.config.n_layers, run.tokens.shape[1]
    evaluations = 0
    for step in range(config.steps):
        block, inner = divmod(step, config.steps_per_block)
        if config.stop_at_eos and inner == 0 and model.config.eos_token_id is not None:
            run.finish_rows(block, model.config.eos_token_id)
        unfinished = run.masked(block).any(dim=1)
        if not unfinished.any():
            continue
        functions: Sequence[AttentionFunction] = layer_attention(
            sparse, policy, layers=layers, step=step, total_steps=config.steps, length=length, impl=impl
        )
        if wrap_attention is not None:
            functions = [wrap_attention(layer, function) for layer, function in enumerate(functions)]
        if unfinished.all():
            _denoise(run, step, functions)
        else:
            some = run.rows(unfinished)
            _denoise(some, step, functions)
            run.tokens[unfinished], run.unmasked_at[unfinished] = some.tokens, some.unmasked_at
        evaluations += 1
        if progress is not None:
            generated = run.tokens[:, run.prompt_length :].clone()
            remaining = int((generated == model.config.mask_token_id).sum())
            progress(StepInfo(step, config.steps, block, remaining, time.perf_counter() - started, generated))
    if run.tokens.is_cuda:
        torch.cuda.synchronize(run.tokens.device)
    seconds = time.perf_counter() - started
    with torch.inference_mode(False):  # copies that the caller may change in place
        tokens, unmasked_at = run.tokens[:, run.prompt_length :].clone(), run.unmasked_at.clone()
    return SampleResult(tokens, evaluations, seconds, unmasked_at)


class _Run(NamedTuple):
    """One generation under way; `tokens` and `unmasked_at` are written in place."""

    model: DenoisingModel
    config: SamplerConfig
    generator: torch.Generator
    tokens: Tensor  # [B, N + gen_length] int64
    padding: Tensor | None  # [B, N + gen_length] bool, True = real token
    prompt_length: int
    unmasked_at: Tensor  # [B, gen_length] int64, -1 = still masked

    def block_of(self, tokens: Tensor, block: int) -> Tensor:
        """The view [B, block_length] of one block in tokens [B, gen_length]."""
        return tokens[:, block * self.config.block_length : (block + 1) * self.config.block_length]

    def masked(self, block: int) -> Tensor:
        """Positions [B, block_length] bool of a block that are still to be filled."""
        return self.block_of(self.tokens[:, self.prompt_length :], block) == self.model.config.mask_token_id

    def rows(self, chosen: Tensor) -> "_Run":
        """A copy with the rows where chosen [B] bool is True."""
        padding = None if self.padding is None else self.padding[chosen]
        return self._replace(
            tokens=self.tokens[chosen], padding=padding, unmasked_at=self.unmasked_at[chosen]
        )  # fmt: skip

    def finish_rows(self, block: int, end: int) -> None:
        """Fill rows that have ended before a block with end-of-text tokens."""
        generated = self.tokens[:, self.prompt_length :]
        done = block * self.config.block_length
        ended = generated[:, :done].eq(end).any(dim=1, keepdim=True)
        generated[:, done:].masked_fill_(ended, end)


def _start(model: DenoisingModel, prompt_ids: Tensor, attention_mask: Tensor | None, config: SamplerConfig) -> _Run:
    blank = prompt_ids.new_full((prompt_ids.shape[0], config.gen_length), model.config.mask_token_id)
    return _Run(
        model=model,
        config=config,
        generator=torch.Generator(prompt_ids.device).manual_seed(config.seed),
        tokens=torch.cat((prompt_ids, blank), dim=1),
        padding=_pad_mask(attention_mask, config.gen_length),
        prompt_length=prompt_ids.shape[1],
        unmasked_at=torch.full_like(blank, -1),
    )


def _denoise(run: _Run, step: int, functions: Sequence[AttentionFunction]) -> None:
    """One step: predict the block, choose positions, fill them."""
    block, inner = divmod(step, run.config.steps_per_block)
    masked = run.masked(block)
    guesses, confidence = _guess(_predict(run, block, functions), run.model.config, run.config, run.generator)
    chosen = _choose(confidence, masked, inner, run.config)
    current = run.block_of(run.tokens[:, run.prompt_length :], block)
    current.copy_(torch.where(chosen, guesses, current))
    run.block_of(run.unmasked_at, block).masked_fill_(chosen, step)


def _predict(run: _Run, block: int, functions: Sequence[AttentionFunction]) -> Tensor:
    """Logits [B, block_length, V] fp64 of a block, guided away from the model's guess without a prompt."""
    length, scale = run.config.block_length, run.config.cfg_scale
    tokens, padding = run.tokens, run.padding
    if scale > 0:
        blind = tokens.clone()
        blind[:, : run.prompt_length] = run.model.config.mask_token_id
        tokens = torch.cat((tokens, blind))
        padding = None if padding is None else torch.cat((padding, padding))
    first = run.prompt_length + block * length
    logits: Tensor = run.model(tokens, padding, attention=functions, logits_from=first)
    logits = logits[:, :length].double()
    if scale == 0:
        return logits
    conditional, unconditional = logits.chunk(2)
    return unconditional + (scale + 1) * (conditional - unconditional)


def _guess(
    logits: Tensor, model_config: ModelConfig, config: SamplerConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The token [B, L] each position would take, and how sure the model is of it [B, L] fp64."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    forbidden = (ids == model_config.mask_token_id) | (ids >= model_config.vocab_size)
    logits = logits.masked_fill(forbidden, -math.inf)
    noisy = logits
    if config.temperature > 0:
        # argmax of exp(logits) / (-log u)^T, as LLaDA, in logarithms.
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
        noisy = logits - config.temperature * torch.log(-torch.log(uniform))
    guesses = noisy.argmax(dim=-1)
    return guesses, REMASKING[config.remasking](logits, guesses, generator)


def _choose(confidence: Tensor, masked: Tensor, inner: int, config: SamplerConfig) -> Tensor:
    """Positions [B, L] bool to fill now: the surest of the masked ones, ties to the left."""
    if config.threshold is None:
        share, remainder = divmod(config.block_length, config.steps_per_block)
        count = torch.full_like(masked[:, :1], share + (inner < remainder), dtype=torch.int64)
    else:
        steps_left = config.steps_per_block - inner
        least = (masked.sum(dim=1, keepdim=True) + steps_left - 1) // steps_left
        sure = (masked & (confidence > config.threshold)).sum(dim=1, keepdim=True)
        count = torch.maximum(least, sure)
    order = confidence.masked_fill(~masked, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return masked & (rank < count)


def _pad_mask(attention_mask: Tensor | None, gen_length: int) -> Tensor | None:
    """The mask [B, N + gen_length] bool of prompt and generation, or None when nothing is padding."""
    if attention_mask is None or bool(attention_mask.bool().all()):
        return None
    generated = torch.ones_like(attention_mask[:, :1], dtype=torch.bool).expand(-1, gen_length)
    return torch.cat((attention_mask.bool(), generated), dim=1)


def _check_prompt(prompt_ids: Tensor, attention_mask: Tensor | None) -> None:
    if prompt_ids.dim() != 2 or prompt_ids.dtype != torch.int64 or prompt_ids.numel() == 0:
        raise ValueError(
            f"prompt_ids must be [B, N] int64 with B, N >= 1, got {tuple(prompt_ids.shape)} {prompt_ids.dtype}"
        )
    if attention_mask is None:
        return
    if attention_mask.shape != prompt_ids.shape:
        expected, received = tuple(prompt_ids.shape), tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must have the shape of prompt_ids {expected}, got {received}")
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(f"attention_mask must be bool or integer, got {attention_mask.dtype}")
