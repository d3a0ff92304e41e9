"""Norm order on the GPU: the twin of `stages.sorting.by_norm`.

Norms first, then one program per segment sorts 64-bit numbers that hold norm and position, so equal norms keep their
order. Counting for every token how many stand before it took two to three times as long. Masked tokens and segments
beyond `LONGEST` tokens take PyTorch's sort.
"""

import math

import torch
import triton
import triton.language as tl
from einops import rearrange, repeat
from torch import Tensor

from baatt.types import TokenOrder

LONGEST = 4096
ROWS = 128


def by_norm(x: Tensor, segment: int | None, mask: Tensor | None) -> TokenOrder:
    """Sort the tokens of every segment by L2 norm, ascending (E2); see `stages.sorting.by_norm`."""
    batch, heads, tokens = x.shape[:3]
    segment = tokens if segment is None else min(segment, tokens)
    if mask is None:
        length = torch.full((batch,), tokens, device=x.device)
        if segment <= LONGEST:
            return TokenOrder(_sort_segments(x, segment), length)
        positions = repeat(torch.arange(tokens, device=x.device), "n -> b h n", b=batch, h=heads)
    else:
        length = mask.sum(-1)
        positions = repeat((~mask).byte().argsort(dim=-1, stable=True), "b n -> b h n", h=heads)
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    # As in the stage: a NaN stays in front of the masked tokens.
    norm = norm.gather(-1, positions).nan_to_num(nan=math.inf, posinf=math.inf)
    absent = torch.arange(tokens, device=x.device) >= rearrange(length, "b -> b 1 1")
    norm = norm.masked_fill(absent, math.inf)
    segments = -(-tokens // segment)
    norm = torch.nn.functional.pad(norm, (0, segments * segment - tokens), value=math.inf)
    inside = rearrange(norm, "b h (s t) -> b h s t", t=segment).argsort(dim=-1, stable=True)
    first = torch.arange(0, segments * segment, segment, device=x.device)
    rank = rearrange(inside + rearrange(first, "s -> s 1"), "b h s t -> b h (s t)")[..., :tokens]
    return TokenOrder(positions.gather(-1, rank), length)


def _sort_segments(x: Tensor, segment: int) -> Tensor:
    batch, heads, tokens, channels = x.shape
    index = torch.empty(batch, heads, tokens, dtype=torch.int64, device=x.device)
    norms = torch.empty(batch, heads, tokens, dtype=torch.int32, device=x.device)
    columns = max(16, triton.next_power_of_2(channels))
    _norm_kernel[(triton.cdiv(tokens, ROWS), batch * heads)](
        x, norms, heads, tokens, *x.stride(),
        CHANNELS=channels, COLUMNS=columns, ROWS=ROWS, num_warps=8 if columns > 64 else 4,
    )  # fmt: skip
    width = max(16, triton.next_power_of_2(segment))
    _sort_kernel[(triton.cdiv(tokens, segment), batch * heads)](
        norms, index, tokens, segment, WIDTH=width, num_warps=4 if width <= 1024 else 8
    )
    return index


@triton.jit
def _norm_kernel(
    x_ptr, norms_ptr, heads, tokens, stride_batch, stride_head, stride_token, stride_channel,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head_entry = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    start = (head_entry // heads) * stride_batch + (head_entry % heads) * stride_head
    offsets = rows[:, None].to(tl.int64) * stride_token + columns[None, :].to(tl.int64) * stride_channel
    mask = (rows < tokens)[:, None] & (columns < CHANNELS)[None, :]
    members = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    squares = tl.sum(members * members, axis=1)
    squares = tl.where(squares == squares, squares, float("inf"))  # NaN counts as infinite
    tl.store(norms_ptr + head_entry * tokens + rows, squares.to(tl.int32, bitcast=True), mask=rows < tokens)


@triton.jit
def _sort_kernel(norms_ptr, index_ptr, tokens, segment, WIDTH: tl.constexpr):
    head_start = tl.program_id(1).to(tl.int64) * tokens
    first = tl.program_id(0) * segment
    places = tl.arange(0, WIDTH)
    inside = (places < segment) & (first + places < tokens)
    # Bits of a float that is not negative sort like the float; the padding stands behind infinity.
    norms = tl.load(norms_ptr + head_start + first + places, mask=inside, other=0x7FFFFFFF)
    order = tl.sort((norms.to(tl.int64) << 32) | places) & 0xFFFFFFFF
    tl.store(index_ptr + head_start + first + places, first + order, mask=inside)
