"""One generation under way, and one step of it: predict the block, choose positions, fill them."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from baatt.models.cache import KeyValueCache
from baatt.models.config import ModelConfig
from baatt.sampling.caching import Span
from baatt.sampling.config import SamplerConfig
from baatt.sampling.filling import choose, guess


class DenoisingModel(Protocol):
    """What the sampler needs of a model: its config and the call of `MaskedDiffusionLM.forward`.

    `cache` and `start` are given only where `SamplerConfig.cache` is not "none".
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def __call__(self) -> Callable[..., Any]: ...


class Run(NamedTuple):
    """One generation under way; `tokens` and `unmasked_at` are written in place."""

    model: DenoisingModel
    config: SamplerConfig
    generator: torch.Generator
    tokens: Tensor  # [B, N + gen_length] int64
    padding: Tensor | None  # [B, N + gen_length] bool, True = real token
    prompt_length: int
    unmasked_at: Tensor  # [B, gen_length] int64, -1 = still masked

    @property
    def length(self) -> int:
        """Tokens of prompt and generation together."""
        return self.tokens.shape[1]

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

    def rows(self, chosen: Tensor) -> "Run":
        """A copy with the rows [B'] int64."""
        padding = None if self.padding is None else self.padding[chosen]
        return self._replace(tokens=self.tokens[chosen], padding=padding, unmasked_at=self.unmasked_at[chosen])

    def finish_rows(self, block: int, end: int) -> None:
        """Fill rows that have ended before a block with end-of-text tokens."""
        generated = self.tokens[:, self.prompt_length :]
        done = block * self.config.block_length
        ended = generated[:, :done].eq(end).any(dim=1, keepdim=True)
        generated[:, done:].masked_fill_(ended, end)


class BlockCache:
    """Keys and values of the rows of a batch that are under way in one block; with guidance, of both halves."""

    def __init__(self, rows: list[int], guided: bool) -> None:
        self.cache = KeyValueCache()
        self._rows, self._guided = rows, guided

    def keep(self, rows: list[int], device: torch.device) -> None:
        """Forget the rows that are not among these any more."""
        if rows == self._rows:
            return
        places = torch.tensor([self._rows.index(row) for row in rows], device=device)
        if self._guided:
            places = torch.cat((places, places + len(self._rows)))
        self.cache.keep_rows(places)
        self._rows = rows


def start_run(model: DenoisingModel, prompt_ids: Tensor, attention_mask: Tensor | None, config: SamplerConfig) -> Run:
    """A generation before its first step. Arguments as `generate`, already checked."""
    blank = prompt_ids.new_full((prompt_ids.shape[0], config.gen_length), model.config.mask_token_id)
    return Run(
        model=model,
        config=config,
        generator=torch.Generator(prompt_ids.device).manual_seed(config.seed),
        tokens=torch.cat((prompt_ids, blank), dim=1),
        padding=_pad_mask(attention_mask, config.gen_length),
        prompt_length=prompt_ids.shape[1],
        unmasked_at=torch.full_like(blank, -1),
    )


def denoise(run: Run, step: int, span: Span, cache: KeyValueCache | None) -> None:
    """One step: evaluate a span that holds the step's block, choose positions of the block, fill them."""
    block, inner = divmod(step, run.config.steps_per_block)
    masked = run.masked(block)
    logits = _predict(run, block, span, cache)
    guesses, confidence = guess(logits, masked, run.model.config, run.config, run.generator)
    chosen = choose(confidence, masked, inner, run.config)
    place = run.span(block)
    current = run.tokens[:, slice(*place)]
    current.copy_(torch.where(chosen, guesses, current))
    run.unmasked_at[:, place.start - run.prompt_length : place.stop - run.prompt_length].masked_fill_(chosen, step)


def _predict(run: Run, block: int, span: Span, cache: KeyValueCache | None) -> Tensor:
    """Logits [B, block_length, V] fp64 of a block, guided away from the model's guess without a prompt."""
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
    logits = logits.double()
    if scale == 0:
        return logits
    conditional, unconditional = logits.chunk(2)
    return unconditional + (scale + 1) * (conditional - unconditional)


def _pad_mask(attention_mask: Tensor | None, gen_length: int) -> Tensor | None:
    """The mask [B, N + gen_length] bool of prompt and generation, or None when nothing is padding."""
    if attention_mask is None or bool(attention_mask.bool().all()):
        return None
    generated = torch.ones_like(attention_mask[:, :1], dtype=torch.bool).expand(-1, gen_length)
    return torch.cat((attention_mask.bool(), generated), dim=1)
