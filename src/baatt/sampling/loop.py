"""The loop over blocks and steps: fill a row of mask tokens block by block, the surest positions first.

In: a masked-diffusion model, prompt ids [B, N] and a `SamplerConfig`. Out: `SampleResult` with tokens [B, gen_length].
Knows nothing of text, tokenizers or how attention is computed.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from baatt.models.cache import KeyValueCache
from baatt.models.config import ModelConfig
from baatt.sampling.config import CACHES, SamplerConfig, Span
from baatt.sampling.filling import REMASKING, choose, guess, penalise
from baatt.types import widest


class DenoisingModel(Protocol):
    """What the sampler needs of a model: its config and the call of `MaskedDiffusionLM.forward`.

    `cache` and `start` are given only where `SamplerConfig.cache` is not "none".
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def __call__(self) -> Callable[..., Any]: ...


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
    cached_evaluations: int = 0  # of `steps`, those of a part of the sequence against keys and values of earlier ones

    @property
    def full_evaluations(self) -> int:
        """Of `steps`, those of the whole sequence."""
        return self.steps - self.cached_evaluations

    @property
    def filled(self) -> int:
        """Positions of all rows that a step has filled; the others lie behind an end-of-text token."""
        return int((self.unmasked_at >= 0).sum())

    @property
    def tokens_per_second(self) -> float:
        """`filled` by the seconds of the whole call, first pass over the prompts included."""
        return self.filled / self.seconds


class Run(NamedTuple):
    """One generation under way; `tokens` and `unmasked_at` are written in place."""

    model: DenoisingModel
    config: SamplerConfig
    generator: torch.Generator
    tokens: Tensor  # [B, N + gen_length] int64
    padding: Tensor | None  # [B, N + gen_length] bool, True = real token
    prompt_length: int
    unmasked_at: Tensor  # [B, gen_length] int64, -1 = still masked

    def span(self, block: int) -> Span:
        """Where a block lies in `tokens`."""
        start = self.prompt_length + block * self.config.block_length
        return Span(start, start + self.config.block_length)

    def masked(self, block: int) -> Tensor:
        """Positions [B, block_length] bool of a block that are still to be filled."""
        return self.tokens[:, slice(*self.span(block))] == self.model.config.mask_token_id

    def unfinished(self, block: int) -> list[int]:
        """Rows of the batch that have a position of a block still to be filled; waits for the device."""
        open_rows = self.masked(block).any(dim=1).tolist()
        return [row for row, is_open in enumerate(open_rows) if is_open]

    def finish_rows(self, block: int, ends: tuple[int, ...]) -> None:
        """Fill rows that have ended before a block with the first of the end-of-text tokens."""
        generated = self.tokens[:, self.prompt_length :]
        done = block * self.config.block_length
        ended = generated.new_zeros(len(generated), 1, dtype=torch.bool)
        for end in ends:
            ended |= generated[:, :done].eq(end).any(dim=1, keepdim=True)
        generated[:, done:].masked_fill_(ended, ends[0])


@torch.inference_mode()
def generate(
    model: DenoisingModel,
    prompt_ids: Tensor,
    attention_mask: Tensor | None = None,
    config: SamplerConfig = SamplerConfig(),  # noqa: B008  (frozen)
    *,
    on_step: Callable[[int, int], None] | None = None,
    progress: Callable[[StepInfo], None] | None = None,
) -> SampleResult:
    """Continue prompts by `config.gen_length` tokens.

    Args:
        model: a `MaskedDiffusionLM`, or anything called like one that has its `config`.
        prompt_ids: [B, N] int64 on the model's device; prompts of unequal length are padded on the left.
        attention_mask: [B, N] bool or 0/1 ints, True = real token; None = all real.
        on_step: called with (step, total_steps) before every model evaluation: `handle.at_step` of `baatt.enable`,
            which makes a model sparse.
        progress: called after every model evaluation.

    Returns:
        SampleResult; the mask token and ids from `vocab_size` on never occur in its tokens. At temperature 0 with
        dense attention a row does not depend on the other rows. Rows without a mask token left in the block are not
        evaluated.

    Raises:
        TypeError, ValueError: prompt or mask of a wrong shape or dtype, or `stop_at_eos` for a model without an
            end-of-text token.
    """
    started = time.perf_counter()
    _check_prompt(prompt_ids, attention_mask)
    ends = model.config.end_tokens
    if config.stop_at_eos and not ends:
        raise ValueError("stop_at_eos must be False for a model whose config has no eos_token_id, got True")
    run = _start(model, prompt_ids, attention_mask, config)

    def report(step: int) -> None:
        if progress is None:
            return
        generated = run.tokens[:, run.prompt_length :].clone()
        remaining = int((generated == model.config.mask_token_id).sum())
        block, seconds = step // config.steps_per_block, time.perf_counter() - started
        progress(StepInfo(step, config.steps, block, remaining, seconds, generated))

    steps = full = 0
    for block in range(config.blocks):
        if config.stop_at_eos:
            run.finish_rows(block, ends)
        taken = _fill_block(run, block, on_step, report)
        steps += taken
        full += min(taken, 1) if config.cache != "none" else taken
    if run.tokens.is_cuda:
        torch.cuda.synchronize(run.tokens.device)
    seconds = time.perf_counter() - started
    with torch.inference_mode(False):  # copies that the caller may change in place
        tokens, unmasked_at = run.tokens[:, run.prompt_length :].clone(), run.unmasked_at.clone()
    return SampleResult(tokens, steps, seconds, unmasked_at, steps - full)


def _start(model: DenoisingModel, prompt_ids: Tensor, attention_mask: Tensor | None, config: SamplerConfig) -> Run:
    """A generation before its first step. Arguments as `generate`, already checked."""
    blank = prompt_ids.new_full((prompt_ids.shape[0], config.gen_length), model.config.mask_token_id)
    padding = None
    if attention_mask is not None and not bool(attention_mask.bool().all()):
        padding = torch.cat((attention_mask.bool(), torch.ones_like(blank, dtype=torch.bool)), dim=1)
    return Run(
        model=model,
        config=config,
        generator=torch.Generator(prompt_ids.device).manual_seed(config.seed),
        tokens=torch.cat((prompt_ids, blank), dim=1),
        padding=padding,
        prompt_length=prompt_ids.shape[1],
        unmasked_at=torch.full_like(blank, -1),
    )


def _fill_block(run: Run, block: int, on_step: Callable[[int, int], None] | None, report: Callable[[int], None]) -> int:
    """All steps of a block; returns how many it took. The first one fills the cache for the others."""
    config, everything, device = run.config, Span(0, run.tokens.shape[1]), run.tokens.device
    later = CACHES[config.cache](run.span(block), everything.stop)
    if run.model.config.predicts == "next":  # the token before a block tells its first one
        later = Span(max(later.start - 1, 0), later.stop)
    cache = KeyValueCache() if later != everything and config.steps_per_block > 1 else None
    held = run.unfinished(block)
    for inner in range(config.steps_per_block):
        rows = run.unfinished(block) if inner else held
        if not rows:
            return inner
        if cache is not None and rows != held:
            kept = torch.tensor([held.index(row) for row in rows], device=device)
            cache.keep_rows(torch.cat((kept, kept + len(held))) if config.cfg_scale > 0 else kept)
        held = rows
        step = block * config.steps_per_block + inner
        if on_step is not None:
            on_step(step, config.steps)
        chosen = torch.tensor(rows, device=device)
        padding = None if run.padding is None else run.padding[chosen]
        some = run._replace(tokens=run.tokens[chosen], padding=padding, unmasked_at=run.unmasked_at[chosen])
        _denoise(some, step, later if inner else everything, cache)
        run.tokens[chosen], run.unmasked_at[chosen] = some.tokens, some.unmasked_at
        report(step)
    return config.steps_per_block


def _denoise(run: Run, step: int, span: Span, cache: KeyValueCache | None) -> None:
    """One step: evaluate a span that holds the step's block, choose positions of the block, fill them."""
    config = run.config
    block, inner = divmod(step, config.steps_per_block)
    masked, place = run.masked(block), run.span(block)
    logits = _predict(run, block, span, cache)
    if config.repetition_penalty != 1:
        written = run.tokens
        if run.padding is not None:
            written = written.masked_fill(~run.padding, run.model.config.mask_token_id)
        logits = penalise(logits, written, run.model.config, config.repetition_penalty)
    guesses, logits = guess(logits, run.model.config, config.temperature, run.generator)
    confidence = REMASKING[config.remasking](logits, guesses, masked, run.generator)
    chosen = choose(confidence, masked, inner, config.steps_per_block, config.threshold)
    current = run.tokens[:, slice(*place)]
    current.copy_(torch.where(chosen, guesses, current))
    run.unmasked_at[:, place.start - run.prompt_length : place.stop - run.prompt_length].masked_fill_(chosen, step)


def _predict(run: Run, block: int, span: Span, cache: KeyValueCache | None) -> Tensor:
    """Logits [B, block_length, V] of a block, fp64 where there is one, guided away from the guess without a prompt."""
    scale, place = run.config.cfg_scale, run.span(block)
    tokens, padding = run.tokens[:, slice(*span)], run.padding
    if scale > 0:
        blind = tokens.clone()
        blind[:, : max(0, run.prompt_length - span.start)] = run.model.config.mask_token_id
        tokens = torch.cat((tokens, blind))
        padding = None if padding is None else torch.cat((padding, padding))
    held = {} if cache is None else {"cache": cache, "start": span.start}
    wanted = {"logits_from": place.start - span.start, "logits_to": place.stop - span.start}
    logits: Tensor = run.model(tokens, padding, **wanted, **held)
    logits = logits.to(widest(logits.device))
    if scale == 0:
        return logits
    conditional, unconditional = logits.chunk(2)
    return unconditional + (scale + 1) * (conditional - unconditional)


def _check_prompt(prompt_ids: Tensor, attention_mask: Tensor | None) -> None:
    shape = tuple(prompt_ids.shape)
    if prompt_ids.dim() != 2 or prompt_ids.dtype != torch.int64 or prompt_ids.numel() == 0:
        raise ValueError(f"prompt_ids must be [B, N] int64 with B, N >= 1, got {shape} {prompt_ids.dtype}")
    if attention_mask is None:
        return
    if attention_mask.shape != prompt_ids.shape:
        received = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must have the shape of prompt_ids {shape}, got {received}")
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(f"attention_mask must be bool or integer, got {attention_mask.dtype}")
