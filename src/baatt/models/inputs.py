"""What the forward of `MaskedDiffusionLM` refuses: tokens, masks and spans that do not fit one another or the cache.

Reads shapes and dtypes only, never the values of a tensor, so that a check costs no wait for the device. An error names
the argument, what is required and what was given.
"""

import torch
from torch import Tensor

from baatt.models.cache import KeyValueCache


def check_inputs(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    logits_from: int,
    logits_to: int | None,
    cache: KeyValueCache | None,
    start: int,
    layers: int,
) -> None:
    """Refuse, with a ValueError or TypeError, what `MaskedDiffusionLM.forward` does not compute; same arguments."""
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise ValueError(f"input_ids must be [B, N] int64, got {tuple(input_ids.shape)} {input_ids.dtype}")
    batch, tokens = input_ids.shape
    length = None if cache is None else cache.length
    if cache is not None and torch.is_grad_enabled():
        raise ValueError("cache must be None while gradients are recorded: call the model under torch.no_grad()")
    if length is None and start != 0:
        empty = "without a cache" if cache is None else "for an empty cache, which a whole sequence fills"
        raise ValueError(f"start must be 0 {empty}, got {start}")
    if cache is not None and length is not None:
        held = len(cache.layers)
        if held != layers:
            raise ValueError(f"cache must hold {layers} layers, got {held}: the pass that filled it failed")
        if batch != cache.batch:
            raise ValueError(f"input_ids must have B={cache.batch} rows as the cache, got {batch}")
        if tokens > length:
            raise ValueError(f"input_ids must have at most N={length} tokens as the cache, got {tokens}")
        if not 0 <= start <= length - tokens:
            raise ValueError(f"start must be in [0, {length - tokens}] for {tokens} of N={length} tokens, got {start}")
    if attention_mask is not None:
        whose, expected = ("input_ids", tokens) if length is None else ("the cached sequence", length)
        shape = tuple(attention_mask.shape)
        if shape != (batch, expected):
            raise ValueError(f"attention_mask must have the shape of {whose} {(batch, expected)}, got {shape}")
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            raise TypeError(f"attention_mask must be bool or integer, got {attention_mask.dtype}")
    if not 0 <= logits_from <= tokens:
        raise ValueError(f"logits_from must be in [0, N={tokens}], got {logits_from}")
    if logits_to is not None and not logits_from <= logits_to <= tokens:
        raise ValueError(f"logits_to must be in [logits_from={logits_from}, N={tokens}] or None, got {logits_to}")
