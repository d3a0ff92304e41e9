"""Likelihood of an answer under a masked-diffusion model, by Monte Carlo as LLaDA estimates it.

In: a model, context and answer as token ids. Out: a lower bound of log p(answer | context) in nats. One draw masks l of
the L answer tokens, l uniform in 1..L, and weighs their cross-entropy by L / l; the estimate is minus the mean over
draws. Draws depend on seed and ids alone, not on the order of requests, the device or the batch size. Knows nothing of
text.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from baatt.sampling import DenoisingModel


class MaskDraws(NamedTuple):
    """The different masks among the draws."""

    masks: Tensor  # [R, L] bool, True = masked
    counts: Tensor  # [R] int64: how many draws gave this mask; they sum to the number of draws


def draw_masks(length: int, draws: int, generator: torch.Generator) -> MaskDraws:
    """Masks of l of `length` tokens, l spread evenly over 1..length from a random start, as LLaDA's evaluation does.

    Equal masks are joined: the model gives them the same loss, and a short answer has few. One of a single token is
    evaluated once instead of `draws` times. Both numbers are at least 1 (ValueError), `generator` is on the CPU.
    """
    if length < 1 or draws < 1:
        raise ValueError(f"length and draws must be at least 1, got {length} and {draws}")
    start = torch.randint(length, (), generator=generator, device="cpu")
    sizes = (start + torch.arange(draws, device="cpu") * length // draws) % length + 1
    places = torch.rand(draws, length, generator=generator, dtype=torch.float32, device="cpu").argsort(dim=1)
    masks, counts = torch.unique(places < sizes[:, None], dim=0, return_counts=True)
    return MaskDraws(masks, counts)


@torch.inference_mode()
def log_likelihood(
    model: DenoisingModel,
    context: Sequence[int],
    answer: Sequence[int],
    *,
    device: torch.device,
    draws: int = 128,
    batch_size: int = 1,
    seed: int = 0,
    cfg_scale: float = 0.0,
) -> float:
    """Estimate of log p(answer | context) in nats.

    Args:
        model: a `MaskedDiffusionLM` on `device`, or anything called like one that has its `config`; `baatt.enable`
            makes it sparse.
        context, answer: ids before the answer, which may be none, and ids to score.
        draws: masks per estimate; LLaDA's evaluation takes 128.
        batch_size: masks evaluated together.
        seed, cfg_scale: as `SamplerConfig`; with the ids, the seed fixes the draws.

    Raises:
        ValueError: an empty answer, or numbers below 1.
    """
    if not answer:
        raise ValueError("answer must hold at least one token, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    generator = torch.Generator("cpu").manual_seed(request_seed(seed, context, answer))
    drawn = draw_masks(len(answer), draws, generator)
    row = torch.tensor([*context, *answer], device=device)
    total = 0.0
    for first in range(0, len(drawn.masks), batch_size):
        masks, counts = (x[first : first + batch_size] for x in drawn)
        losses = _masked_losses(model, row, len(context), masks.to(device), cfg_scale)
        total += float((losses.cpu().double() * counts).sum())
    return -total / draws


def request_seed(seed: int, *rows: Sequence[int]) -> int:
    """A seed for a request that is the same wherever and whenever it is evaluated."""
    text = ";".join(",".join(map(str, row)) for row in rows)
    digest = hashlib.blake2b(f"{seed};{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits: what manual_seed takes


def rolling_windows(ids: Sequence[int], window: int) -> list[tuple[list[int], list[int]]]:
    """Split a text into (context, answer) pairs of at most `window` tokens, 2 or more; every token is answer once.

    The first window is all answer; the others have a token of context, the last as much context as fits: what
    lm-evaluation-harness asks of a rolling likelihood.
    """
    if not ids or window < 2:
        raise ValueError(f"ids must not be empty and window at least 2, got {len(ids)} ids and {window}")
    windows: list[tuple[list[int], list[int]]] = [([], list(ids[:window]))]
    for start in range(window, len(ids), window - 1):
        stop = min(start + window - 1, len(ids))
        windows.append((list(ids[stop - window : start]), list(ids[start:stop])))
    return windows


def _masked_losses(model: DenoisingModel, row: Tensor, prompt_length: int, masks: Tensor, cfg_scale: float) -> Tensor:
    """L / l times the summed cross-entropy of the masked tokens, for every mask: [R] fp32."""
    mask_token = model.config.mask_token_id
    answer = row[prompt_length:].expand_as(masks)
    tokens = row.repeat(len(masks), 1)
    tokens[:, prompt_length:].masked_fill_(masks, mask_token)
    if cfg_scale > 0:
        blind = tokens.clone()
        blind[:, :prompt_length] = mask_token
        tokens = torch.cat((tokens, blind))
    logits: Tensor = model(tokens, logits_from=prompt_length)
    if cfg_scale > 0:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + (cfg_scale + 1) * (conditional - unconditional)
    losses = F.cross_entropy(logits[masks].float(), answer[masks], reduction="none")
    per_mask = torch.zeros(masks.shape, device=row.device).masked_scatter_(masks, losses)
    return per_mask.sum(dim=1) * masks.shape[1] / masks.sum(dim=1)
