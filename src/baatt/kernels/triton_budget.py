"""Selection on the GPU by one threshold over all rows of a head: the twin of `stages.selection` for budget "head".

Scores become unsigned integers of the same order. Their 32 bits are found 8 at a time: each pass counts the next digit
of the numbers that agree with the digits found so far, over all rows of a head. Only whole numbers are ever added
atomically, so the result does not depend on the order of programs. Equals of the threshold go to the first rows. A head
of few block pairs fits in a program, which does all of that alone: a dozen launches take longer than their work then.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from baatt.kernels.launching import SIZES, cdiv, next_power_of_2
from baatt.kernels.triton_attention import head_and_place
from baatt.kernels.triton_selection import (
    SLAB_SCORES,
    double_bits,
    kept_anyway,
    kept_of,
    ordered,
    own_blocks,
    row_budget,
    store_list,
    threshold,
)
from baatt.types import BlockSelection, BlockSummary, Sight, slabs_of_heads

#: Block pairs of a head that one program takes.
ALONE = 4096
DIGITS = tl.constexpr(256)
#: Values of a row that are counted one by one; of more a histogram is made first.
ONE_BY_ONE = tl.constexpr(64)
FORCED = tl.constexpr(0xFFFFFFFF)


def choose_blocks(
    query_summary: BlockSummary,
    key_summary: BlockSummary,
    score: Callable[[BlockSummary, BlockSummary, Sight | None], Tensor],
    sparsity: float,
    keep_first: int = 0,
    sight: Sight | None = None,
    *,
    logits: bool = False,
) -> BlockSelection:
    """Score every block pair and keep the I * K best of every head (E7), ties to the lower row, then the lower id.

    Args:
        query_summary, key_summary, sparsity, keep_first, sight: see `triton_selection.choose_blocks`.
        score: (query_summary, key_summary, sight) -> [B, h, I, J] of its own, called with slabs of heads and written
            over.
        logits: scores go through a softmax over the key blocks first (E6).

    Returns:
        BlockSelection as `stages.selection.select_blocks` with budget "head".
    """
    query_size, key_size = query_summary.size.contiguous(), key_summary.size.contiguous()
    (batch, heads), (query_blocks, key_blocks) = query_summary[0].shape[:2], (query_size.shape[1], key_size.shape[1])
    index = torch.empty(batch, heads, query_blocks, key_blocks, dtype=torch.int32, device=key_size.device)
    count = torch.empty(index.shape[:3], dtype=torch.int32, device=index.device)
    share = double_bits(1 - sparsity)
    spans = None if sight is None else sight.spans.contiguous()
    height, width = (max(16, next_power_of_2(blocks)) for blocks in (query_blocks, key_blocks))
    launch = {"WIDTH": width, "num_warps": min(16, max(1, width // 1024))}
    for part, queries, keys in slabs_of_heads(query_summary, key_summary, SLAB_SCORES // batch):
        scores, some = score(queries, keys, sight).float().contiguous(), part.stop - part.start
        sizes = query_size, key_size, spans
        if height * width <= ALONE:
            _head_kernel[(batch * some,)](
                scores, *sizes, count, index, some, heads, part.start, query_blocks, key_blocks, share, keep_first,
                LOGITS=logits, ROWS=height, WIDTH=width, num_warps=min(16, max(4, height * width // 512)),
            )  # fmt: skip
            continue
        values = scores.view(torch.int32)
        histogram = torch.zeros(batch * some, DIGITS.value, dtype=torch.int32, device=index.device)
        # The digits of the threshold found so far, and how many values with these digits are kept.
        found = torch.empty(batch * some, 2, dtype=torch.int32, device=index.device)
        rows = (query_blocks * batch * some,)
        _rank_kernel[rows](
            scores, values, *sizes, histogram, some, query_blocks, key_blocks, share, keep_first, LOGITS=logits,
            WIDTH=width, num_warps=min(16, max(1, width // 256)),
        )  # fmt: skip
        for digit in range(4):
            if digit:
                _digit_kernel[rows](
                    values, query_size, histogram, found, some, query_blocks, key_blocks, digit, **launch
                )
            _narrow_kernel[(batch * some,)](
                histogram, found, *sizes, some, query_blocks, key_blocks, share, FIRST=digit == 0,
                ROWS=height, WIDTH=width, num_warps=launch["num_warps"],
            )  # fmt: skip
        ties = torch.empty(batch * some, query_blocks, dtype=torch.int32, device=index.device)
        _tie_kernel[rows](values, query_size, found, ties, some, query_blocks, key_blocks, **launch)
        _list_kernel[rows](
            values, *sizes, found, ties.cumsum(-1, dtype=torch.int32), count, index, some, heads, part.start,
            query_blocks, key_blocks, share, **launch,
        )  # fmt: skip
    return BlockSelection(index, count, uneven=True)


def longest_first(count: Tensor, together: int) -> Tensor:
    """In which order a kernel takes rows that keep different numbers of blocks.

    Args:
        count: [B, H, I] int32, of `BlockSelection`.
        together: heads whose rows are sorted as one; those of the next heads stand behind them.

    Returns:
        [1 + B * H * I] int32: a 0 to count with, then the rows, counted over all heads, by descending count; of equals
        the lower one first.
    """
    rows, window, step = count.numel(), together * count.shape[-1], 64
    order = torch.empty(1 + rows, dtype=torch.int32, device=count.device)
    _longest_kernel[(cdiv(rows, window), cdiv(window, step))](count.contiguous(), order, rows, window, ROWS=step)
    return order


@triton.jit(do_not_specialize=SIZES)
def _longest_kernel(count_ptr, order_ptr, rows, window, ROWS: tl.constexpr):
    """Places of some rows of a window: how many others stand before each."""
    first = tl.program_id(0) * window
    last = tl.minimum(first + window, rows)
    own = first + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    count = tl.load(count_ptr + own, mask=own < last, other=0)[:, None]
    place = tl.zeros([ROWS], tl.int32)
    for start in range(first, last, ROWS):
        others = start + tl.arange(0, ROWS)
        counts = tl.load(count_ptr + others, mask=others < last, other=-1)[None, :]
        before = (counts > count) | ((counts == count) & (others[None, :] < own[:, None]))
        place += tl.sum(before.to(tl.int32), axis=1)
    tl.store(order_ptr + 1 + first + place, own, mask=own < last)
    tl.store(order_ptr, 0)  # every program the same


@triton.jit
def _load_row(values_ptr, query_size_ptr, heads, query_blocks, key_blocks, WIDTH: tl.constexpr):
    """The head and row of a program, of a slab of `heads` heads; its numbers, 0 where no block is, and its tokens."""
    head_entry, row = head_and_place(query_blocks)
    columns = tl.arange(0, WIDTH)
    start = (head_entry * query_blocks + row) * key_blocks
    values = tl.load(values_ptr + start + columns, mask=columns < key_blocks, other=0).to(tl.uint32, bitcast=True)
    tokens = tl.load(query_size_ptr + head_entry // heads * query_blocks + row)
    return head_entry, row, values, tokens


@triton.jit
def _count_digits(digits, counted, histogram_ptr, head_entry):
    """Add the digits of a row to the histogram of its head."""
    histogram_ptr += head_entry * DIGITS
    if tl.sum(counted.to(tl.int32), axis=0) > ONE_BY_ONE:
        counts = tl.histogram(digits.to(tl.int32), DIGITS, mask=counted)
        tl.atomic_add(histogram_ptr + tl.arange(0, DIGITS), counts, mask=counts > 0, sem="relaxed")
    else:  # the third and fourth digit of nearly all rows
        tl.atomic_add(histogram_ptr + digits.to(tl.int32), 1, mask=counted, sem="relaxed")


@triton.jit
def _rank(scores, columns, filled, forced, room, LOGITS: tl.constexpr, WIDTH: tl.constexpr):
    """Scores [rows, WIDTH] to numbers in their order: 0 for a key block that is empty or not seen, FORCED for those
    that are `forced` and, where there is `room`, the best."""
    if LOGITS:
        scores -= tl.max(scores, axis=1)[:, None]
        scores -= tl.log(tl.sum(tl.exp(scores), axis=1))[:, None]
    scores = tl.where(scores == scores, scores, float("-inf"))
    values = tl.where(filled, ordered(scores), 0)
    best = tl.min(tl.where(values == tl.max(values, axis=1)[:, None], columns[None, :], WIDTH), axis=1)
    forced = forced | ((columns[None, :] == best[:, None]) & room)
    return tl.where(filled & forced, tl.full((), FORCED, tl.uint32), values)


@triton.jit
def _seen_by_rows(spans_ptr, filled, rows, inside, share):
    """Of rows with sight: their own blocks, how many key blocks they see, and K."""
    first = tl.load(spans_ptr + rows * 4, mask=inside, other=0)
    last = tl.load(spans_ptr + rows * 4 + 1, mask=inside, other=0)
    seen = tl.load(spans_ptr + rows * 4 + 3, mask=inside, other=0)
    seen = tl.minimum(seen, tl.sum(filled.to(tl.int32), axis=0))
    return first, last, seen, kept_of(seen, own_blocks(first, last), share)


@triton.jit(do_not_specialize=SIZES)
def _head_kernel(
    scores_ptr, query_size_ptr, key_size_ptr, spans_ptr, count_ptr, index_ptr, heads, all_heads, first_head,
    query_blocks, key_blocks, share, keep_first, LOGITS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """All lists of a head."""
    head_entry = tl.program_id(0).to(tl.int64)
    entry = head_entry // heads
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = rows < query_blocks
    size_ptr = key_size_ptr + entry * key_blocks
    filled, wanted, forced, room = row_budget(size_ptr, None, columns, key_blocks, share, keep_first)
    wanted += tl.zeros([ROWS], tl.int32)
    if spans_ptr is None:
        filled, forced = filled[None, :], forced[None, :]
    else:
        first, last, seen, wanted = _seen_by_rows(spans_ptr + entry * query_blocks * 4, filled, rows, inside, share)
        filled = columns[None, :] < seen[:, None]
        forced, room = kept_anyway(first[:, None], last[:, None], wanted[:, None], columns[None, :], keep_first)
    tokens = tl.load(query_size_ptr + entry * query_blocks + rows, mask=inside, other=0)
    places = (head_entry * query_blocks + rows)[:, None] * key_blocks + columns[None, :]
    scores = tl.load(scores_ptr + places, mask=inside[:, None] & filled, other=float("-inf"))
    values = tl.where(inside[:, None], _rank(scores, columns, filled, forced, room, LOGITS, WIDTH), 0)
    present = tokens > 0
    shared = tl.reshape(tl.where(present[:, None], values, 0), (ROWS * WIDTH,), can_reorder=True)
    low, room = threshold(shared, tl.sum(tl.where(present, wanted, 0), axis=0))
    low, room = low + tl.zeros([ROWS], tl.uint32), room + tl.zeros([ROWS], tl.int32)
    ties = tl.sum(((values == low[:, None]) & (values > 0) & present[:, None]).to(tl.int32), axis=1)
    room -= tl.cumsum(ties, axis=0) - ties
    if tl.min(present.to(tl.int32) | (rows >= query_blocks).to(tl.int32), axis=0) == 0:  # rows without tokens
        own = tl.zeros([ROWS], tl.uint32)
        bit = tl.full((), 0x80000000, tl.uint32)
        for _ in range(32):
            reached = tl.sum((values >= (own | bit)[:, None]).to(tl.int32), axis=1) >= wanted
            own = tl.where(reached, own | bit, own)
            bit = bit >> 1
        low = tl.where(present, low, own)
        room = tl.where(present, room, wanted - tl.sum((values > own[:, None]).to(tl.int32), axis=1))
    tied = (values == low[:, None]) & (values > 0)
    kept = (values > low[:, None]) | (tied & (tl.cumsum(tied.to(tl.int32), axis=1) <= room[:, None]))
    count = tl.sum(kept.to(tl.int32), axis=1)
    list_start = (entry * all_heads + first_head + head_entry % heads) * query_blocks + rows
    list_ptrs = index_ptr + (list_start * key_blocks)[:, None]
    tl.store(list_ptrs + tl.cumsum(kept.to(tl.int32), axis=1) - 1, columns[None, :] + rows[:, None] * 0, mask=kept)
    last = tl.max(tl.where(kept, columns[None, :], 0), axis=1)[:, None]
    beyond = inside[:, None] & (columns[None, :] >= count[:, None]) & (columns < key_blocks)[None, :]
    tl.store(list_ptrs + columns[None, :], last + columns[None, :] * 0, mask=beyond)
    tl.store(count_ptr + list_start, count, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _rank_kernel(
    scores_ptr, values_ptr, query_size_ptr, key_size_ptr, spans_ptr, histogram_ptr, heads, query_blocks, key_blocks,
    share, keep_first, LOGITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Scores of a row to numbers in their order, in place, as `_rank`."""
    head_entry, row = head_and_place(query_blocks)
    entry = head_entry // heads
    columns = tl.arange(0, WIDTH)
    if spans_ptr is not None:
        spans_ptr += (entry * query_blocks + row) * 4
    filled, _, forced, room = row_budget(
        key_size_ptr + entry * key_blocks, spans_ptr, columns, key_blocks, share, keep_first
    )
    start = (head_entry * query_blocks + row) * key_blocks
    scores = tl.load(scores_ptr + start + columns, mask=filled, other=float("-inf"))
    values = _rank(scores[None, :], columns, filled[None, :], forced[None, :], room, LOGITS, WIDTH)
    values = tl.reshape(values, (WIDTH,))
    tl.store(values_ptr + start + columns, values.to(tl.int32, bitcast=True), mask=columns < key_blocks)
    tokens = tl.load(query_size_ptr + entry * query_blocks + row)
    _count_digits(values >> 24, filled & (tokens > 0), histogram_ptr, head_entry)


@triton.jit(do_not_specialize=SIZES)
def _digit_kernel(
    values_ptr, query_size_ptr, histogram_ptr, found_ptr, heads, query_blocks, key_blocks, digit, WIDTH: tl.constexpr
):  # fmt: skip
    """Count the digit of number `digit` of the values of a row whose digits before it are those found."""
    head_entry, _, values, tokens = _load_row(values_ptr, query_size_ptr, heads, query_blocks, key_blocks, WIDTH)
    before = tl.load(found_ptr + head_entry * 2).to(tl.uint32, bitcast=True)
    counted = (values > 0) & (tokens > 0) & ((values >> (32 - 8 * digit)) == before)
    _count_digits((values >> (24 - 8 * digit)) & 255, counted, histogram_ptr, head_entry)


@triton.jit(do_not_specialize=SIZES)
def _narrow_kernel(
    histogram_ptr, found_ptr, query_size_ptr, key_size_ptr, spans_ptr, heads, query_blocks, key_blocks, share,
    FIRST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Find the next digit of a head's threshold and clear its histogram."""
    head_entry = tl.program_id(0).to(tl.int64)
    entry = head_entry // heads
    if FIRST:
        size_ptr, rows = key_size_ptr + entry * key_blocks, tl.arange(0, ROWS)
        filled, wanted, _, _ = row_budget(size_ptr, None, tl.arange(0, WIDTH), key_blocks, share, 0)
        inside = rows < query_blocks
        tokens = tl.load(query_size_ptr + entry * query_blocks + rows, mask=inside, other=0)
        wanted += tl.zeros([ROWS], tl.int32)
        if spans_ptr is not None:
            _, _, _, wanted = _seen_by_rows(spans_ptr + entry * query_blocks * 4, filled, rows, inside, share)
        room = tl.sum(tl.where(tokens > 0, wanted, 0), axis=0)
        before = 0
    else:
        room = tl.load(found_ptr + head_entry * 2 + 1)
        before = tl.load(found_ptr + head_entry * 2)
    digits = tl.arange(0, DIGITS)
    counts = tl.load(histogram_ptr + head_entry * DIGITS + digits)
    tl.store(histogram_ptr + head_entry * DIGITS + digits, tl.zeros([DIGITS], tl.int32))
    at_least = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    digit = tl.max(tl.where(at_least >= room, digits, 0), axis=0)
    tl.store(found_ptr + head_entry * 2, (before << 8) | digit)
    tl.store(found_ptr + head_entry * 2 + 1, room - tl.sum(tl.where(digits > digit, counts, 0), axis=0))


@triton.jit(do_not_specialize=SIZES)
def _tie_kernel(values_ptr, query_size_ptr, found_ptr, ties_ptr, heads, query_blocks, key_blocks, WIDTH: tl.constexpr):
    """How many values of a row equal the threshold of its head."""
    head_entry, row, values, tokens = _load_row(values_ptr, query_size_ptr, heads, query_blocks, key_blocks, WIDTH)
    low = tl.load(found_ptr + head_entry * 2).to(tl.uint32, bitcast=True)
    ties = tl.sum(((values == low) & (values > 0) & (tokens > 0)).to(tl.int32), axis=0)
    tl.store(ties_ptr + head_entry * query_blocks + row, ties)


@triton.jit(do_not_specialize=SIZES)
def _list_kernel(
    values_ptr, query_size_ptr, key_size_ptr, spans_ptr, found_ptr, ties_ptr, count_ptr, index_ptr, heads, all_heads,
    first_head, query_blocks, key_blocks, share, WIDTH: tl.constexpr,
):  # fmt: skip
    """The list of a row, by the threshold of its head; of a row without tokens by its own."""
    head_entry, row, values, tokens = _load_row(values_ptr, query_size_ptr, heads, query_blocks, key_blocks, WIDTH)
    columns = tl.arange(0, WIDTH)
    entry = head_entry // heads
    if tokens > 0:
        low = tl.load(found_ptr + head_entry * 2).to(tl.uint32, bitcast=True)
        ties = tl.sum(((values == low) & (values > 0)).to(tl.int32), axis=0)
        up_to_here = tl.load(ties_ptr + head_entry * query_blocks + row)
        room = tl.load(found_ptr + head_entry * 2 + 1) - (up_to_here - ties)
    else:
        if spans_ptr is not None:
            spans_ptr += (entry * query_blocks + row) * 4
        _, wanted, _, _ = row_budget(key_size_ptr + entry * key_blocks, spans_ptr, columns, key_blocks, share, 0)
        low, room = threshold(values, wanted)
    list_start = (entry * all_heads + first_head + head_entry % heads) * query_blocks + row
    list_ptr = index_ptr + list_start * key_blocks
    count = store_list(values, low, room, columns, values > 0, list_ptr, key_blocks, WIDTH)
    tl.store(count_ptr + list_start, count)
