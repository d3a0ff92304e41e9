"""What a step fills: logits of a block in, the token of every position and the positions that take theirs now out."""

import math

import torch
from torch import Tensor

from baatt.models.config import ModelConfig
from baatt.sampling.config import SamplerConfig
from baatt.sampling.remasking import REMASKING


def guess(
    logits: Tensor, masked: Tensor, model_config: ModelConfig, config: SamplerConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The token [B, L] each position would take, how sure the model is of it [B, L] fp64; masked: still to fill."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    forbidden = (ids == model_config.mask_token_id) | (ids >= model_config.vocab_size)
    logits = logits.masked_fill(forbidden, -math.inf)
    noisy = logits
    if config.temperature > 0:
        # argmax of exp(logits) / (-log u)^T, as LLaDA, in logarithms.
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
        noisy = logits - config.temperature * torch.log(-torch.log(uniform))
    guesses = noisy.argmax(dim=-1)
    return guesses, REMASKING[config.remasking](logits, guesses, masked, generator)


def choose(confidence: Tensor, masked: Tensor, inner: int, config: SamplerConfig) -> Tensor:
    """Positions [B, L] bool to fill at step `inner` of a block: the surest of the masked ones, ties to the left."""
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
