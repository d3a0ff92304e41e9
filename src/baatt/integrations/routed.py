"""`torch.ops.baatt.routed_attention`: what is decided about an attention call, as one node of a compiled graph.

In: the arguments of a call and what its forward tells. Out: attention [B, H, N, D]. The node runs eagerly, so steps,
masks and counts are right there and nothing is compiled again for them. Knows no library and no policy: it asks the
handle, or the route to one, whose number the graph holds.
"""

import itertools
import weakref
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_numbers = itertools.count()
_deciders: "weakref.WeakValueDictionary[int, Decider]" = weakref.WeakValueDictionary()


class SdpaCall(NamedTuple):
    """The arguments of `scaled_dot_product_attention` by its own names."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class Decider(Protocol):
    """What the node asks."""

    def decide(self, call: SdpaCall, layer: int | None, is_cross: bool | None, told: Sequence[Tensor]) -> Tensor:
        """Attention of a call of a compiled graph, when the graph runs; `told` as in `into_graph`."""


def take_number(decider: Decider) -> int:
    """The number under which the node finds it, as long as it lives."""
    number = next(_numbers)
    _deciders[number] = decider
    return number


def into_graph(
    number: int, call: SdpaCall, layer: int | None, is_cross: bool | None, told: Sequence[Tensor] = ()
) -> Tensor:
    """Put a call that is being traced into the graph; `told` are tensors for what must not be part of the graph."""
    q, k, v, mask = call[:4]
    layer = -1 if layer is None else layer
    routed: Tensor = torch.ops.baatt.routed_attention(q, k, v, mask, call.scale, layer, is_cross, list(told), number)
    return routed


# A CUDA graph would replay the decision of the call that was captured, so the compiler leaves this node out of them.
_TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


@torch.library.custom_op("baatt::routed_attention", mutates_args=(), tags=_TAGS)
def _routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    layer: int,
    is_cross: bool | None,
    told: Sequence[Tensor],
    number: int,
) -> Tensor:
    """`Decider.decide` as one node of a compiled graph; layer -1: not known."""
    call = SdpaCall(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    out = _deciders[number].decide(call, None if layer < 0 else layer, is_cross, told)
    return out.to(q.dtype).contiguous()


@_routed.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
