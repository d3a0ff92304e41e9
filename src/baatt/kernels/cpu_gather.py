"""Block-sparse attention on the CPU in plain PyTorch: gather the kept blocks, then dense attention per query block.

The way for float64 and for machines without a C compiler. Query blocks become the batch of PyTorch's fused CPU
attention; a chunk of them bounds the memory of the gathered copies.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

#: Elements of gathered keys per chunk: 4 MiB in float32 stay in the last-level cache; larger was 10 % slower.
CHUNK_ELEMENTS = 1 << 20


class Group(NamedTuple):
    """One batch entry and key/value head with its R query heads.

    q: [R, N, D]; k, v: [m, D], the unmasked keys in sorted order, m >= 1; query_order: [R, N] int64; kept: [R, I, K]
    and count: [R, I] int32; out: [R, N, D] and lse: [R, N], contiguous, are written. limit: [I, P] int32, the keys that
    each query sees, from the front; None = all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    query_order: Tensor
    kept: Tensor
    count: Tensor  # type: ignore[assignment]
    out: Tensor
    lse: Tensor
    limit: Tensor | None = None


def attend_group(group: Group, *, block_size: int, scale: float) -> None:
    """Block-sparse attention of one `Group`, float32 or float64 inside; writes `group.out` and `group.lse`.

    Extra memory: the rows of one query head in sorted order, and a chunk of gathered keys and values.
    """
    dtype = group.lse.dtype
    key_blocks = _as_blocks(group.k.to(dtype), block_size)
    value_blocks = _as_blocks(group.v.to(dtype), block_size)
    queries, channels = group.q.shape[1:]
    for head, order in enumerate(group.query_order):
        query_blocks = _as_blocks(group.q[head].index_select(0, order).to(dtype), block_size)
        kept, visible = _kept_tokens(group, head, key_blocks.shape[0], block_size)
        out, lse = torch.empty_like(query_blocks), query_blocks.new_empty(query_blocks.shape[:2])
        chunk = max(1, CHUNK_ELEMENTS // (kept.shape[-1] * block_size * channels))
        for first in range(0, query_blocks.shape[0], chunk):
            blocks = slice(first, first + chunk)
            kept_k, kept_v = _take_blocks(key_blocks, kept[blocks]), _take_blocks(value_blocks, kept[blocks])
            out[blocks], lse[blocks] = _attend(query_blocks[blocks], kept_k, kept_v, visible[blocks], scale)
        group.out[head].index_copy_(0, order, rearrange(out, "i p d -> (i p) d")[:queries].to(group.out.dtype))
        group.lse[head].index_copy_(0, order, rearrange(lse, "i p -> (i p)")[:queries])


def _kept_tokens(group: Group, head: int, key_blocks: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Ids of the kept key blocks, [I, K], made safe to gather with, and which of their tokens are real and seen.

    The latter is [I, 1 or P, K * P].
    """
    kept = group.kept[head].long()
    used = torch.arange(kept.shape[-1], device=kept.device) < rearrange(group.count[head], "i -> i 1")
    used = used & (kept >= 0) & (kept < key_blocks)
    kept = kept.clamp(0, key_blocks - 1)
    place = rearrange(kept * block_size, "i k -> i k 1") + torch.arange(block_size, device=kept.device)
    present = rearrange(used, "i k -> i k 1") & (place < group.k.shape[0])
    visible = rearrange(present, "i k p -> i 1 (k p)")
    if group.limit is not None:
        visible = visible & (rearrange(place, "i k p -> i 1 (k p)") < rearrange(group.limit, "i p -> i p 1"))
    return kept, visible


def _as_blocks(x: Tensor, block_size: int) -> Tensor:
    padding = -x.shape[0] % block_size
    return rearrange(torch.nn.functional.pad(x, (0, 0, 0, padding)), "(l p) d -> l p d", p=block_size)


def _take_blocks(blocks: Tensor, kept: Tensor) -> Tensor:
    taken = blocks.index_select(0, rearrange(kept, "i k -> (i k)"))
    return rearrange(taken, "(i k) p d -> i 1 (k p) d", k=kept.shape[-1])


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [C, P, D] over k, v [C, 1, T, D] where `visible` [C, 1 or P, T]; out [C, P, D] and lse [C, P]."""
    bias = None
    if not visible.all():
        bias = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, -math.inf)
        bias = rearrange(bias.expand(-1, q.shape[1], -1), "c p t -> c 1 p t")
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rearrange(q, "c p d -> c 1 p d"), k, v, attn_mask=bias, scale=scale
    )
    # For rows without a key the operator gives out = 0 but lse = 0.
    lse = lse.masked_fill(rearrange(~visible.any(-1), "c p -> c 1 p"), -math.inf)
    return rearrange(out, "c 1 p d -> c p d"), rearrange(lse, "c 1 p -> c p")
