"""Confidences that order the positions of a block: the surest are filled first, the others stay masked."""

from collections.abc import Callable

import torch
from torch import Tensor


def low_confidence(logits: Tensor, guesses: Tensor, generator: torch.Generator) -> Tensor:
    """Probability [B, L] of the guesses under the un-noised logits [B, L, V]."""
    return logits.softmax(dim=-1).gather(-1, guesses[..., None])[..., 0]


def random_confidence(logits: Tensor, guesses: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform random numbers [B, L]: positions are filled in random order."""
    return torch.rand(guesses.shape, generator=generator, device=guesses.device, dtype=logits.dtype)


REMASKING: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "low_confidence": low_confidence,
    "random": random_confidence,
}
