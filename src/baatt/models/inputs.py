"""What the forward of `MaskedDiffusionLM` refuses: tokens, masks and spans that do not fit one another or the cache.

Reads shapes and dtypes only, never the values of a tensor, so that a check costs no wait for the device. Each raises a
ValueError or TypeError that names the argument, what is required and what was given.
"""

import torch
from torch import Tensor

from baatt.models.cache import KeyValueCache


def check_part(input_ids: Tensor, cache: KeyValueCache | None, start: int, layers: int) -> None:
    """Refuse tokens that are no batch of ids, or no part of the sequence that the cache holds."""
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise ValueError(f"input_ids must be [B, N] int64, got {tuple(input_ids.shape)} {input_ids.dtype}")
    if cache is None:
        if start != 0:
            raise ValueError(f"start must be 0 without a cache, got {start}")
        return
    if torch.is_grad_enabled():
        raise ValueError("cache must be None while gradients are recorded: call the model under torch.no_grad()")
    batch, tokens = input_ids.shape
    cache.check(layers, batch, tokens, start)


def check_mask(attention_mask: Tensor | None, input_ids: Tensor, cache: KeyValueCache | None) -> None:
    """Refuse a mask that is not one of the whole sequence."""
    if attention_mask is None:
        return
    length = None if cache is None else cache.length
    whose = "input_ids" if length is None else "the cached sequence"
    expected = tuple(input_ids.shape) if length is None else (input_ids.shape[0], length)
    if tuple(attention_mask.shape) != expected:
        raise ValueError(f"attention_mask must have the shape of {whose} {expected}, got {tuple(attention_mask.shape)}")
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(f"attention_mask must be bool or integer, got {attention_mask.dtype}")


def check_logits(first: int, stop: int | None, count: int) -> None:
    """Refuse a span of logits outside of the given tokens."""
    if not 0 <= first <= count:
        raise ValueError(f"logits_from must be in [0, N={count}], got {first}")
    if stop is not None and not first <= stop <= count:
        raise ValueError(f"logits_to must be in [logits_from={first}, N={count}] or None, got {stop}")
