"""The operator as `torch.ops.baatt.attention`, so that `torch.compile(fullgraph=True)` can pass through it.

`ba_attention` calls it while a graph is being traced; the compiler sees one opaque node with the shape of q. Importing
baatt registers this one name in its own namespace and changes nothing else.
"""

from typing import Any

import torch
from torch import Tensor

from baatt.attention import ba_attention
from baatt.config import OPTION_TYPES, BAAttConfig

_TYPES = {int: "int", float: "float", str: "str", bool: "bool", int | None: "int?", float | None: "float?"}
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, int? causal, int? query_start, Tensor? key_mask, Tensor? query_mask, "
    "float? scale, str impl, {}) -> Tensor"
)


@torch.library.custom_op(
    "baatt::attention",
    mutates_args=(),
    schema=_SCHEMA.format(", ".join(f"{_TYPES[kind]} {name}" for name, kind in OPTION_TYPES.items())),
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: int | None,
    query_start: int | None,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    scale: float | None,
    impl: str,
    *options: Any,
) -> Tensor:
    """`baatt.ba_attention` with its config as `BAAttConfig.values`: same errors, the result is contiguous."""
    return ba_attention(
        q, k, v, BAAttConfig(*options), causal=causal, query_start=query_start, key_mask=key_mask,
        query_mask=query_mask, scale=scale, impl=impl,
    )  # fmt: skip


@attention.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
