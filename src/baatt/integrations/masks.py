"""From the masks that other libraries hand to attention to a key mask [B, M] bool, or the reason why there is none.

In: None, bool (True = attend) or additive floats that broadcast to [B, H, N, M]. Only a mask that treats all heads and
all queries alike is a key mask; every other one stays with dense attention, which takes it as it is. `as_key_mask`
looks at shapes and at one row of queries; `KeyMaskReader` also compares the rows of a mask that is written out for
every query.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

#: An additive value of at most this bars a key: exp of it is 0 next to any score that is less than 9000 lower.
BARRED = -1e4

#: Entries of a mask that are looked at together, so that the copies made on the way stay small.
CHUNK = 2**26


class KeyMask(NamedTuple):
    """mask: [B, M] bool (True = attend), or None where every key counts; refusal: why it is no key mask, else None."""

    mask: Tensor | None
    refusal: str | None


NO_MASK = KeyMask(None, None)


def as_key_mask(mask: Tensor | None, batch: int, keys: int) -> KeyMask:
    """The key mask that an attention mask amounts to.

    Args:
        mask: None; [B or 1, M] bool; or [B or 1, H or 1, N or 1, M], bool or additive. An axis of heads or queries
            counts as one entry if it is expanded (stride 0), as libraries make it from a padding mask. Additive values
            are 0 or at most `BARRED`; they are not looked at, and refused, in a compiled graph.
        batch, keys: B and M of the call.
    """
    if mask is None:
        return NO_MASK
    refusal = _wrong_shape(mask, batch, keys)
    if refusal is not None:
        return KeyMask(None, refusal)
    if mask.ndim == 2:
        return KeyMask(mask.expand(batch, keys), None)
    if mask.shape[2] != 1 and mask.stride(2) != 0:
        return KeyMask(None, "a mask that differs between queries")
    row = mask[:, 0, 0]
    if row.dtype != torch.bool:
        if torch.compiler.is_compiling():
            return KeyMask(None, "an additive mask in a compiled graph")  # its values cannot be looked at there
        attended = _attended(row)
        if not bool((attended | (row <= BARRED)).all()):
            return KeyMask(None, "an additive mask with weights")
        row = attended
    return KeyMask(row.expand(batch, keys), None)


class KeyMaskReader:
    """`as_key_mask` that looks further and remembers the last mask, which all layers of a forward share.

    A mask [B, 1, N, M] that is written out for every query is a key mask if all its rows are alike, or if it is the
    product of a key mask with itself: then queries that are padding attend to nothing, and their rows of the result
    mean nothing to the caller; with a key mask they attend to what all others do. Costs one pass over the mask, N * M
    reads against the 4 * N * M * D operations of every head, and a wait for the device. A mask of which the first and
    the last row differ costs no more than those two.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], tuple[object, ...], KeyMask] | None = None

    def __call__(self, mask: Tensor | None, batch: int, keys: int) -> KeyMask:
        """The key mask of a call, arguments as `as_key_mask`; in a compiled graph it is `as_key_mask`."""
        if mask is None or torch.compiler.is_compiling() or mask.ndim != 4 or _wrong_shape(mask, batch, keys):
            return as_key_mask(mask, batch, keys)
        # Layers take slices of one mask. One of inference mode has no version: it may have been written to.
        owner = mask if mask._base is None else mask._base
        state = None
        if not mask.is_inference():
            state = mask._version, mask.storage_offset(), mask.shape, mask.stride(), mask.dtype
        if self._last is not None and state is not None and self._last[0]() is owner and self._last[1] == state:
            found = self._last[2]
        else:
            alike = mask.shape[2] == 1 or mask.stride(2) == 0
            found = as_key_mask(mask, mask.shape[0], keys) if alike else _compare_rows(mask[:, 0])
            if state is not None:
                self._last = weakref.ref(owner), state, found
        return found if found.mask is None else KeyMask(found.mask.expand(batch, keys), None)


def _wrong_shape(mask: Tensor, batch: int, keys: int) -> str | None:
    """Why the shape or the dtype of a mask alone rules a key mask out, or None."""
    if mask.ndim not in (2, 4) or (mask.ndim == 2 and mask.dtype != torch.bool):
        return f"a mask of {mask.dtype} with {mask.ndim} axes"
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return f"a mask of {mask.dtype}"
    if mask.shape[-1] != keys:
        return f"a mask over {mask.shape[-1]} of {keys} keys"
    if mask.shape[0] not in (1, batch):
        return f"a mask for {mask.shape[0]} of {batch} batch entries"
    if mask.ndim == 4 and mask.shape[1] != 1 and mask.stride(1) != 0:
        return "a mask that differs between heads"
    return None


def _compare_rows(mask: Tensor) -> KeyMask:
    """The key mask of [B, N, M], which has a row for every query: that mask or, where the query is padding, nothing."""
    batch, queries, keys = mask.shape
    first, last = _attended(mask[:, 0]), _attended(mask[:, -1])
    comparable = first.any(dim=1) & last.any(dim=1)
    if bool(((first != last).any(dim=1) & comparable).any()):
        return KeyMask(None, "a mask that differs between queries")
    known = torch.ones((), dtype=torch.bool, device=mask.device)
    visible = torch.zeros(batch, keys, dtype=torch.bool, device=mask.device)
    counts = []
    step = max(1, CHUNK // (batch * keys))
    for start in range(0, queries, step):
        rows = mask[:, start : start + step]
        attended = _attended(rows)
        if rows.dtype != torch.bool:
            known &= (attended | (rows <= BARRED)).all()
        visible |= attended.any(dim=1)
        counts.append(attended.sum(dim=2))
    count = torch.cat(counts, dim=1)
    # A row is a part of `visible`, so it is `visible` where it has as many entries.
    full, empty = count == visible.sum(dim=1, keepdim=True), count == 0
    alike = full.all(dim=1)
    if queries == keys:
        alike |= (full | empty).all(dim=1) & (empty == ~visible).all(dim=1)
    if not bool(known):
        return KeyMask(None, "an additive mask with weights")
    return KeyMask(visible, None) if bool(alike.all()) else KeyMask(None, "a mask that differs between queries")


def _attended(x: Tensor) -> Tensor:
    return x if x.dtype == torch.bool else x == 0
