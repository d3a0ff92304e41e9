"""Confidences that order the positions of a block: the surest are filled first, the others stay masked."""

from collections.abc import Callable

import torch
from torch import Tensor


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
