"""The operator as `torch.ops.baatt.attention`, so that `torch.compile(fullgraph=True)` can pass through it.

`ba_attention` calls it while a graph is being traced; the compiler sees one opaque node with the shape of q. Importing
baatt registers this one name in its own namespace and changes nothing else.
"""

import torch
from torch import Tensor

from baatt.attention import ba_attention
from baatt.config import BAAttConfig


@torch.library.custom_op("baatt::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    config: str,
    scale: float | None,
    impl: str,
) -> Tensor:
    """`baatt.ba_attention` with what an operator can be given.

    Args:
        q: [B, H, N, D]; k, v: [B, G, M, D]; key_mask: [B, M] bool or None; query_mask: [B, N] bool or None.
        config: `BAAttConfig.as_json`.
        scale, impl: of `ba_attention`.

    Returns:
        [B, H, N, D] contiguous, in q's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as `ba_attention`.
    """
    options = BAAttConfig.from_json(config)
    return ba_attention(q, k, v, options, key_mask=key_mask, query_mask=query_mask, scale=scale, impl=impl)


@attention.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
