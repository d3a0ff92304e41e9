"""What a step fills: logits of a block in, the token of every position and the positions that take theirs now out.

A confidence orders the positions of a block: the surest are filled first, the others stay masked.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from baatt.models.config import ModelConfig


def low_confidence(logits: Tensor, guesses: Tensor, masked: Tensor, generator: torch.Generator) -> Tensor:
    """Probability [B, L] of the guesses under the un-noised logits [B, L, V]."""
    return logits.softmax(dim=-1).gather(-1, guesses[..., None])[..., 0]


def left_to_right(logits: Tensor, guesses: Tensor, masked: Tensor, generator: torch.Generator) -> Tensor:
    """The least of the probabilities [B, L] up to and including a position, so that none is surer than one before it.

    The leftmost positions are filled first; with a threshold, all up to the first one that is not sure. For answers of
    which a place is not known before what stands to its left, such as lists of words of several tokens.
    """
    confidence = low_confidence(logits, guesses, masked, generator)
    return confidence.masked_fill(~masked, 1).cummin(dim=-1).values


def random_confidence(logits: Tensor, guesses: Tensor, masked: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform random numbers [B, L]: positions are filled in random order."""
    return torch.rand(guesses.shape, generator=generator, device=guesses.device, dtype=logits.dtype)


#: logits [B, L, V], guesses [B, L], masked [B, L] bool (True: still to be filled), generator -> confidence [B, L].
REMASKING: dict[str, Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]] = {
    "low_confidence": low_confidence,
    "left_to_right": left_to_right,
    "random": random_confidence,
}


def guess(logits: Tensor, model: ModelConfig, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The token [B, L] each position would take, and the logits [B, L, V] without tokens that none may take."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    logits = logits.masked_fill((ids == model.mask_token_id) | (ids >= model.vocab_size), -math.inf)
    if temperature == 0:
        return logits.argmax(dim=-1), logits
    # argmax of exp(logits) / (-log u)^T, as LLaDA, in logarithms.
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
    return (logits - temperature * torch.log(-torch.log(uniform))).argmax(dim=-1), logits


def penalise(logits: Tensor, written: Tensor, model: ModelConfig, penalty: float) -> Tensor:
    """Logits [B, L, V] with less for tokens of the text so far, `written` [B, N], whose other places are mask tokens.

    A positive one is divided by the penalty, a negative one multiplied, as transformers does. An end-of-text
    token of the prompt is no repetition: a text that has one may still end.
    """
    excepted = torch.tensor([model.mask_token_id, *model.end_tokens], device=written.device)
    size = logits.shape[-1]
    is_other = torch.isin(written, excepted) | (written < 0) | (written >= size)
    ids = written.masked_fill(is_other, size)  # a column more, cut again
    seen = torch.zeros(len(ids), size + 1, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)[:, None, :size]
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(confidence: Tensor, masked: Tensor, step: int, steps: int, threshold: float | None) -> Tensor:
    """Positions [B, L] bool to fill at a step of a block: the surest of the masked ones, ties to the left."""
    if threshold is None:
        share, remainder = divmod(masked.shape[1], steps)
        count = torch.full_like(masked[:, :1], share + (step < remainder), dtype=torch.int64)
    else:
        left = steps - step
        least = (masked.sum(dim=1, keepdim=True) + left - 1) // left
        count = torch.maximum(least, (masked & (confidence > threshold)).sum(dim=1, keepdim=True))
    order = confidence.masked_fill(~masked, -math.inf).argsort(dim=1, descending=True, stable=True)
    return masked & (order.argsort(dim=1) < count)
