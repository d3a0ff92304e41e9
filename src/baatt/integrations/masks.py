"""From the masks that other libraries hand to attention to a key mask [B, M] bool, or the reason why there is none.

In: None, bool (True = attend) or additive floats that broadcast to [B, H, N, M]. Only a mask that treats all heads and
all queries alike is a key mask; every other one stays with dense attention, which takes it as it is.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class KeyMask(NamedTuple):
    """mask: [B, M] bool (True = attend), or None where every key counts; refusal: why it is no key mask, else None."""

    mask: Tensor | None
    refusal: str | None


NO_MASK = KeyMask(None, None)


def as_key_mask(mask: Tensor | None, batch: int, keys: int) -> KeyMask:
    """The key mask that an attention mask amounts to.

    Args:
        mask: None; [B or 1, M]; or [.., 1 or N, M] with 2 to 4 axes, broadcast over heads. An axis of queries counts as
            one row if it is expanded (stride 0), as libraries make it from a padding mask.
        batch, keys: B and M of the call.
    """
    if mask is None:
        return NO_MASK
    if mask.ndim == 2 and mask.shape[0] in (1, batch) and mask.shape[1] == keys and mask.dtype == torch.bool:
        return KeyMask(mask.expand(batch, keys), None)
    if mask.ndim != 4 or mask.shape[0] not in (1, batch):
        return KeyMask(None, f"a mask with {mask.ndim} axes")
    if mask.shape[3] != keys:
        return KeyMask(None, f"a mask over {mask.shape[3]} of {keys} keys")
    for axis, name in ((1, "heads"), (2, "queries")):
        if mask.shape[axis] != 1 and mask.stride(axis) != 0:
            return KeyMask(None, f"a mask that differs between {name}")
    row = mask[:, 0, 0]
    if row.dtype != torch.bool:
        if torch.compiler.is_compiling():
            return KeyMask(None, "an additive mask in a compiled graph")  # its values cannot be looked at there
        barred = row <= torch.finfo(row.dtype).min / 2
        if not bool((barred | (row == 0)).all()):
            return KeyMask(None, "an additive mask with weights")
        row = ~barred
    return KeyMask(row.expand(batch, keys), None)
