"""The loop over blocks and steps: fill a row of mask tokens block by block, the surest positions first.

In: a masked-diffusion model, prompt ids [B, N] and a `SamplerConfig`. Out: `SampleResult` with tokens [B, gen_length].
Knows nothing of text, tokenizers or how attention is computed.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from baatt.sampling.caching import CACHES, Span
from baatt.sampling.config import SamplerConfig
from baatt.sampling.run import BlockCache, DenoisingModel, Run, denoise, start_run


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
    end = model.config.eos_token_id
    if config.stop_at_eos and end is None:
        raise ValueError("stop_at_eos must be False for a model whose config has no eos_token_id, got True")
    run = start_run(model, prompt_ids, attention_mask, config)

    def begin(step: int) -> None:
        if on_step is not None:
            on_step(step, config.steps)

    def report(step: int) -> None:
        if progress is None:
            return
        generated = run.tokens[:, run.prompt_length :].clone()
        remaining = int((generated == model.config.mask_token_id).sum())
        block, seconds = step // config.steps_per_block, time.perf_counter() - started
        progress(StepInfo(step, config.steps, block, remaining, seconds, generated))

    steps = full = 0
    for block in range(config.blocks):
        if config.stop_at_eos and end is not None:
            run.finish_rows(block, end)
        taken = _fill_block(run, block, begin, report)
        steps += taken
        full += min(taken, 1) if config.cache != "none" else taken
    if run.tokens.is_cuda:
        torch.cuda.synchronize(run.tokens.device)
    seconds = time.perf_counter() - started
    with torch.inference_mode(False):  # copies that the caller may change in place
        tokens, unmasked_at = run.tokens[:, run.prompt_length :].clone(), run.unmasked_at.clone()
    return SampleResult(tokens, steps, seconds, unmasked_at, steps - full)


def _fill_block(run: Run, block: int, begin: Callable[[int], None], report: Callable[[int], None]) -> int:
    """All steps of a block; returns how many it took. The first one fills the cache for the others."""
    config, everything = run.config, Span(0, run.length)
    later = CACHES[config.cache](run.span(block), run.length)
    reused = later != everything and config.steps_per_block > 1
    kept: BlockCache | None = None
    for inner in range(config.steps_per_block):
        rows = run.unfinished(block)
        if not rows:
            return inner
        if reused and kept is None:
            kept = BlockCache(rows, guided=config.cfg_scale > 0)
        if kept is not None:
            kept.keep(rows, run.tokens.device)
        span = everything if inner == 0 else later
        step = block * config.steps_per_block + inner
        cache = None if kept is None else kept.cache
        begin(step)
        if len(rows) == run.tokens.shape[0]:
            denoise(run, step, span, cache)
        else:
            chosen = torch.tensor(rows, device=run.tokens.device)
            some = run.rows(chosen)
            denoise(some, step, span, cache)
            run.tokens[chosen], run.unmasked_at[chosen] = some.tokens, some.unmasked_at
        report(step)
    return config.steps_per_block


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
