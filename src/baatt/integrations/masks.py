"""From the masks that other libraries hand to attention to their structure, or the reason why they have none we know.

In: None, bool (True = attend) or additive floats that broadcast to [B, H, N, M]. Out: `Structure`: which keys are
hidden from all, and the length of causal blocks. It is found in the values, never in shapes or flags: a mask is
measured row by row once, a structure is guessed from where rows grow, and every row is compared with it exactly. Every
other mask stays with dense attention, which takes it as it is.
"""

import itertools
import math
import threading
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from baatt.checks import holds_values

#: An additive value of at most this bars a key: exp of it is 0 next to any score that is less than 9000 lower.
BARRED = -1e4

#: Entries of a mask that are looked at together, so that the copies made on the way stay small.
CHUNK = 2**26

#: Masks that a reader remembers; models have one or two, for full layers and for windows.
REMEMBERED = 8

_Memory: Any = StorageWeakRef  # which has no types

DIFFERS = "a mask that differs between queries"
WEIGHTS = "an additive mask with weights"
WINDOW = "a sliding window"
PARTS = "parts of a sequence that do not see one another"


class Structure(NamedTuple):
    """What a mask amounts to.

    causal: tokens of a causal block, 1 for plain causal; None where all queries see alike.
    query_start: position of the first query among the keys where `causal` is given, else None.
    key_mask: [B, M] bool, True = attend, or None where every key counts.
    query_mask: [B, N] bool, False for rows of padding, where the mask tells; None where places do.
    refusal: why it is nothing of this, or None.
    """

    causal: int | None = None
    query_start: int | None = None
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    refusal: str | None = None

    def wanted(self, queries: int) -> Tensor | None:
        """[B, N] bool, False for rows of padding: those whose own key is hidden. None where no key is, or where queries
        stand behind the last one and so belong to another sequence."""
        if self.key_mask is None or self.query_mask is not None:
            return self.query_mask
        start = self.query_start or 0
        own = self.key_mask[:, start : start + queries]
        return own if own.shape[1] == queries else None

    def cut(self, q: Tensor, k: Tensor, v: Tensor) -> tuple["Structure", Tensor, Tensor]:
        """Without keys behind the last that a query sees, as a static cache has them; k, v: [B, G, M, D]."""
        if self.causal is None or self.query_start is None:
            return self, k, v
        end = ((self.query_start + q.shape[2] - 1) // self.causal + 1) * self.causal
        if end >= k.shape[2]:
            return self, k, v
        key_mask = None if self.key_mask is None else self.key_mask[:, :end]
        return self._replace(key_mask=key_mask), k[:, :, :end], v[:, :, :end]


NO_MASK = Structure()


class MaskReader:
    """Reads masks, and remembers those whose memory is alive and has not been written to since.

    A mask costs a few passes over it, 2 bytes an entry against the 4 * D operations of every head, and one wait for the
    device; all layers of a forward share that. Tensors of inference mode do not say whether they were written to: those
    are remembered between `start_forward` and `end_forward` alone.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[Any, Structure]] = {}
        self._forwards: dict[int, int] = {}  # by thread
        self._numbers = itertools.count()

    def start_forward(self) -> None:
        """A new forward of a model begins: tensors of inference mode may hold something else now."""
        self._forwards[threading.get_ident()] = next(self._numbers)

    def end_forward(self) -> None:
        """It has ended: what is called of the model now may not begin with `start_forward`."""
        self._forwards.pop(threading.get_ident(), None)

    def __call__(self, mask: Tensor | None, batch: int, keys: int) -> Structure:
        """The structure of a mask.

        Args:
            mask: None; [B or 1, M] bool; or [B or 1, H or 1, N or 1, M], bool or additive.
            batch, keys: B and M of the call.
        """
        if mask is None:
            return NO_MASK
        refusal = _wrong_shape(mask, batch, keys)
        if refusal is not None:
            return Structure(refusal=refusal)
        if mask.ndim == 2:
            return Structure(key_mask=mask.expand(batch, keys))
        has_one_row = all(mask.shape[axis] == 1 or mask.stride(axis) == 0 for axis in (1, 2))
        if has_one_row and mask.dtype == torch.bool:  # as it is: nothing to wait for
            return Structure(key_mask=mask[:, 0, 0].expand(batch, keys))
        if torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
            return Structure(refusal="a mask whose values cannot be looked at in a graph")
        if not holds_values(mask):
            return Structure(refusal="a mask that holds no values itself")
        found = self._remembered(mask)
        key_mask, query_mask = (x if x is None else x.expand(batch, -1) for x in (found.key_mask, found.query_mask))
        return found._replace(key_mask=key_mask, query_mask=query_mask)

    def _remembered(self, mask: Tensor) -> Structure:
        version = ("forward", self._forwards.get(threading.get_ident())) if mask.is_inference() else mask._version
        storage = _Memory(mask.untyped_storage())  # not its address, which is used again when it is gone
        place = mask.storage_offset(), mask.shape, mask.stride(), mask.dtype
        key = storage.cdata, version, *place
        known = self._known.get(key)
        if known is not None and not known[0].expired():
            return known[1]
        found = read_mask(mask)
        if version != ("forward", None):
            alive = [(one, entry) for one, entry in self._known.items() if not entry[0].expired()]
            self._known = dict([*alive, (key, (storage, found))][-REMEMBERED:])
        return found


def read_mask(mask: Tensor) -> Structure:
    """The structure of [B, H, N, M], bool or additive, by its values; an axis may be expanded.

    Rows of padding may see nothing instead, as in the product of a key mask with itself; what they get of a structure
    means nothing. They are those at whose place no query sees the key.
    """
    rows = _measure(_collapsed(mask))
    if not rows.alike:
        return Structure(refusal="a mask that differs between heads")
    if not rows.known:
        return Structure(refusal=WEIGHTS)
    # Some versions of transformers let padding on the left see all, because a row of nothing was not a number.
    # Its keys are then those that no other row sees.
    part = torch.where(rows.seen_in_part[:, :1], rows.seen, rows.seen_in_part)
    for seen in (rows.seen, part):
        visible = seen.cpu()
        found = _find(rows, visible)
        if found is not None:
            if bool(visible.all()):
                return found._replace(query_mask=None)
            told = None if found.query_mask is None else found.query_mask.to(mask.device)
            return found._replace(key_mask=seen, query_mask=told)
    return Structure(refusal=_reason(rows, rows.seen.cpu()))


class _Rows(NamedTuple):
    """Rows of a mask [B, N, M], all on the CPU but for the keys that are seen.

    counts, first, end: [B, N] int64, how many keys a row sees, its first one and the one behind its last.
    seen: [B, M] bool, keys that any row sees; seen_in_part: that any row sees which does not see all.
    known: whether all values attend or bar; alike: whether heads agree.
    """

    counts: Tensor
    first: Tensor
    end: Tensor
    seen: Tensor
    seen_in_part: Tensor
    known: bool
    alike: bool


def _collapsed(mask: Tensor) -> Tensor:
    """One entry of every axis but that of keys that is expanded."""
    for axis in range(3):
        mask = mask.narrow(axis, 0, 1) if mask.stride(axis) == 0 else mask
    return mask


def _measure(mask: Tensor) -> _Rows:
    batch, heads, queries, keys = mask.shape
    known, alike = torch.ones(2, dtype=torch.bool, device=mask.device)
    seen, seen_in_part = torch.zeros(2, batch, keys, dtype=torch.bool, device=mask.device)
    measures = []
    step = max(1, CHUNK // (batch * heads * keys))
    for start in range(0, queries, step):
        values = mask[:, :, start : start + step]
        every = values if values.dtype == torch.bool else values == 0
        if values.dtype != torch.bool:
            known = known & (every | (values <= BARRED)).all()
        attended = every[:, 0].contiguous()
        if heads > 1:
            alike = alike & (every == every[:, :1]).all()
        count = attended.sum(dim=2)
        seen |= attended.any(dim=1)
        seen_in_part |= (attended & rearrange(count < keys, "b n -> b n 1")).any(dim=1)
        ends = [side.view(torch.uint8).argmax(dim=2) for side in (attended, attended.flip(2))]
        measures.append(torch.stack([count, ends[0], keys - ends[1]]))
    count, first, end = torch.cat(measures, dim=2).cpu()
    end = torch.where(count > 0, end, 0)
    flags = torch.stack([known, alike]).tolist()
    return _Rows(count, first, end, seen, seen_in_part, *flags)


def _find(rows: _Rows, visible: Tensor) -> Structure | None:
    """The structure of rows that see the keys [B, M] which are visible, or None."""
    queries, keys = rows.counts.shape[1], visible.shape[1]
    fits = rows.counts == visible.sum(dim=1, keepdim=True)
    if queries == keys:
        fits |= (rows.counts == 0) & ~visible
    if bool(fits.all()):
        return Structure()
    # A row that sees further than the one before begins a block: at a key behind all that one saw.
    some = (rows.counts > 0) & ((rows.counts < keys) | visible.all(dim=1, keepdim=True))
    grows = some[:, 1:] & some[:, :-1] & (rows.end[:, 1:] > rows.end[:, :-1])
    places = (1 + torch.arange(queries - 1, device=grows.device)).expand_as(grows)[grows]
    if not len(places):
        return None
    behind = torch.where(visible, torch.arange(keys, device=visible.device), keys).flip(1).cummin(dim=1).values.flip(1)
    least = int((rows.end[:, :-1][grows] - places).max())
    most = int((behind.gather(1, rows.end[:, :-1].clamp(max=keys - 1))[grows] - places).min())
    for start in dict.fromkeys((0, keys - queries, least, most)):
        if not max(least, 0) <= start <= most:
            continue
        at = (start + 1 + grows.any(dim=0).nonzero()[:, 0]).tolist()
        # Where hidden keys leave it open at which place a query stands, only rows that see something else are padding.
        is_certain = least == most or (queries == keys and start == 0)
        for causal in _divisors(math.gcd(*at)):
            seeing, padding = _compare(rows, visible, causal, start)
            if bool((seeing | padding).all()):
                return Structure(causal, start, query_mask=None if is_certain else seeing)
    return None


def _compare(rows: _Rows, visible: Tensor, causal: int, start: int) -> tuple[Tensor, Tensor]:
    """Rows that see exactly the visible keys of their block and those before, and rows that look like padding."""
    keys = visible.shape[1]
    places = start + torch.arange(rows.counts.shape[1], device=visible.device)
    edge = ((places // causal + 1) * causal).clamp(max=keys)
    before = F.pad(visible.cumsum(dim=1), (1, 0))
    # All that a row sees is visible, so it sees all of that before the edge if it sees as many.
    seeing = (rows.counts == before[:, edge]) & (rows.end <= edge)
    own = places.clamp(max=keys - 1)
    hidden = ~visible[:, own] & (places < keys)
    return seeing, hidden & ((rows.counts == 0) | ((before[:, own] == 0) & (rows.counts == keys)))


def _reason(rows: _Rows, visible: Tensor) -> str:
    """What a mask is that has no structure we know."""
    before = F.pad(visible.cumsum(dim=1), (1, 0))
    some = rows.counts > 0
    is_run = rows.counts == before.gather(1, rows.end) - before.gather(1, rows.first)
    both = some[:, 1:] & some[:, :-1]
    moves, grows = (x[:, 1:] - x[:, :-1] for x in (rows.first, rows.end))
    if bool((is_run | ~some).all()) and bool(((moves >= 0) & (grows >= 0) | ~both).all()):
        moved = both & (moves > 0)
        if bool(moved.any()) and bool((both & (grows > 0)).any()):
            is_new = rows.first[:, 1:] >= rows.end[:, :-1]
            return PARTS if bool(is_new[moved].all()) else WINDOW
    return DIFFERS


def _divisors(number: int) -> list[int]:
    """The largest first."""
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)}, reverse=True)


def _wrong_shape(mask: Tensor, batch: int, keys: int) -> str | None:
    """Why the shape or the dtype of a mask alone rules a structure out, or None."""
    if mask.ndim not in (2, 4) or (mask.ndim == 2 and mask.dtype != torch.bool):
        return f"a mask of {mask.dtype} with {mask.ndim} axes"
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return f"a mask of {mask.dtype}"
    if mask.shape[-1] != keys:
        return f"a mask over {mask.shape[-1]} of {keys} keys"
    if mask.shape[0] not in (1, batch):
        return f"a mask for {mask.shape[0]} of {batch} batch entries"
    return None
