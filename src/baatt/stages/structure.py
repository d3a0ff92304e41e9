"""Causal and block-causal structure: what every query may see, as a number of keys from the front.

In: lengths, masks and the length of a causal block. Out: a `Sight`. Query n stands at position `query_start` + n and
sees the keys of all blocks up to its own: those in front of a limit. Keys keep their order among themselves when the
masked ones go to the end, so that a limit counts the unmasked keys before it. Knows nothing of heads or scores.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor

from baatt.types import Sight


def look_back(
    q: Tensor,
    k: Tensor,
    causal: int,
    query_start: int,
    block_size: int,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Sight:
    """Limits of all queries, in their order with the masked ones behind, and what follows for every query block.

    Args:
        q: [B, H, N, D]; k: [B, G, M, D]; only their shapes and device are read.
        causal: tokens per causal block; query and key see one another iff the key's block is not a later one.
        query_start: position of the first query among the keys.
        block_size: P.
        key_mask: [B, M] bool; query_mask: [B, N] bool.

    Returns:
        Sight with limit [B, I, P] and spans [B, I, 4].
    """
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    places = query_start + torch.arange(queries, device=q.device)
    edge = ((places // causal + 1) * causal).clamp(max=keys)
    if key_mask is None:
        limit, own = (repeat(x, "n -> b n", b=batch) for x in (edge, places))
    else:
        before = torch.nn.functional.pad(key_mask.cumsum(-1), (1, 0))
        limit, own = before[:, edge], before[:, places.clamp(max=keys)]
    if query_mask is not None:
        order = (~query_mask).byte().argsort(dim=-1, stable=True)
        limit, own = limit.gather(-1, order), own.gather(-1, order)
    wanted = places.new_full((batch,), queries) if query_mask is None else query_mask.sum(-1)
    real = torch.arange(-(-queries // block_size) * block_size, device=q.device) < rearrange(wanted, "b -> b 1")
    missing = real.shape[1] - queries
    limit, own, real = (
        rearrange(x, "b (i p) -> b i p", p=block_size)
        for x in (*(torch.nn.functional.pad(x, (0, missing)) for x in (limit, own)), real)
    )
    limit = torch.where(real, limit, 0)
    sees = limit > 0
    own = torch.minimum(own, limit - 1) // block_size
    first = torch.where(sees, own, keys).amin(-1)
    last = torch.where(sees, own, 0).amax(-1)
    whole = torch.where(real, limit // block_size, keys).amin(-1)
    seen = -(-limit.amax(-1) // block_size)
    spans = torch.stack([torch.minimum(first, last), last, torch.minimum(whole, seen), seen], dim=-1)
    return Sight(limit.int().contiguous(), spans.int().contiguous())
