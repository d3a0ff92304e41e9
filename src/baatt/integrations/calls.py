"""A call of `scaled_dot_product_attention`: its arguments, what rules out sparse attention, its node in a graph.

The node, `torch.ops.baatt.routed_attention`, runs eagerly when the graph runs: so steps, masks and counts are right
there and nothing is compiled again for them. Knows no library and no policy: it asks the handle whose number it holds.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Sequence  # noqa: UP035 - torch 2.6 infers no schema from that of collections.abc

import torch
from torch import Tensor
from torch.autograd import forward_ad

from baatt.checks import holds_values, is_differentiated
from baatt.integrations.masks import Structure

#: Handles by number, as long as they live.
HANDLES: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()

#: Length N of a sequence -> permutation [N] int64 that puts its tokens in the order they are cut into blocks, or None.
TokenPermutation = Callable[[int, torch.device], Tensor | None]

#: Is shown every call: layer, q [B, H, N, D], k and v [B, G, M, D], key mask, factor on q.k, tokens per causal block.
Watcher = Callable[[int | None, Tensor, Tensor, Tensor, Tensor | None, float, int | None], None]


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

    def refusal(self) -> str | None:
        """Why it stays dense whatever a policy says, or None; a call that is an error gets it from torch itself."""
        q, k, v, mask = self.query, self.key, self.value, self.attn_mask
        if q.is_nested or k.is_nested or v.is_nested:
            return "nested tensors"
        if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or len({x.shape[0] for x in (q, k, v)}) > 1:
            return "tensors that are not [B, H, N, D]"
        if 0 in q.shape or 0 in k.shape:
            return "tensors without elements"
        if k.shape[3] != q.shape[3] or v.shape != k.shape:
            return "values of another shape than keys, or keys of another width than queries"
        if q.shape[1] != k.shape[1] and (not self.enable_gqa or q.shape[1] % k.shape[1]):
            return "fewer heads of keys than of queries without enable_gqa"
        if self.is_causal and mask is not None:
            return "a causal flag beside a mask"
        if self.dropout_p > 0:
            return "dropout"
        if mask is not None:
            fitting = zip(reversed(mask.shape), (k.shape[2], *reversed(q.shape[:3])), strict=False)
            if mask.ndim not in (2, 3, 4) or any(size not in (1, full) for size, full in fitting):
                return f"a mask of shape {tuple(mask.shape)}"
        return None

    def without_values(self) -> str | None:
        """That there is nothing to choose blocks by, or None; in a compiled graph there is when it runs."""
        if all(map(holds_values, (self.query, self.key, self.value))):
            return None
        return "tensors that hold no values themselves: of FakeTensorMode, under vmap, or views that negate"

    def changed(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: Any
    ) -> "SdpaCall":  # `_replace`, which torch 2.6 does not compile
        """The same call of other tensors."""
        return SdpaCall(query, key, value, attn_mask, self.dropout_p, self.is_causal, scale, self.enable_gqa)

    def under_autocast(self) -> "SdpaCall":
        """The call in the dtype in which autocast would have it run, a mask with 4 axes."""
        q, k, v, mask = self.query, self.key, self.value, self.attn_mask
        if mask is not None:
            mask = mask[(None,) * (4 - mask.ndim)]
        device = q.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
            if mask is not None and mask.dtype not in (torch.bool, torch.float64):
                mask = mask.to(dtype)
        return self.changed(q, k, v, mask, self.scale)


def needs_gradients(*tensors: Tensor) -> bool:
    """Whether a result is to be differentiated, which the sparse operator cannot."""
    is_recorded = torch.is_grad_enabled() or forward_ad._current_level >= 0  # else there is nothing to ask of each
    return is_recorded and any(map(is_differentiated, tensors))


# A CUDA graph would replay the decision of the call that was captured, so the compiler leaves this node out of them;
# a torch that knows no such tag is refused while it captures.
_IS_TAGGED = hasattr(torch.Tag, "cudagraph_unsafe")
_TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if _IS_TAGGED else {}


@torch.library.custom_op("baatt::routed_attention", mutates_args=(), **_TAGS)
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: int | None,
    query_start: int | None,
    scale: float | None,
    layer: int | None,
    is_cross: bool | None,
    told: Sequence[Tensor],
    number: int,
) -> Tensor:
    """`Handle.in_graph` as one node of a compiled graph.

    A mask with 2 axes is one of keys; `told` are tensors for what must not be part of the graph.
    """
    if not _IS_TAGGED and q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "torch must have Tag.cudagraph_unsafe for a compiled model inside CUDA graphs, which "
            f'{torch.__version__} has not: compile without mode="reduce-overhead"'
        )
    key_mask, mask = (mask, None) if mask is not None and mask.ndim == 2 else (None, mask)
    call = SdpaCall(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    known = Structure(causal, query_start, key_mask)
    out: Tensor = HANDLES[number].in_graph(call, known, layer, is_cross, told)
    return out.to(q.dtype).contiguous()


@routed_attention.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
