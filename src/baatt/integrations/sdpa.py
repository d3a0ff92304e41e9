"""Any code that ends in `torch.nn.functional.scaled_dot_product_attention`, while a context is open in this thread.

Calls with a causal flag, dropout or a mask that is no key mask stay as they are. Nothing is assigned in
`torch.nn.functional`, so other models, a video decoder in the same pipeline for one, see nothing unless they run inside
the context. Misses the fused path of `nn.MultiheadAttention` and code that calls FlashAttention itself.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from baatt.config import BAAttConfig, Policy
from baatt.integrations.handle import Handle, check_setting, needs_gradients
from baatt.integrations.masks import KeyMask, KeyMaskReader
from baatt.integrations.routed import SdpaCall, into_graph, take_number

T = TypeVar("T")


class Current(Generic[T]):
    """A value that holds for the forward under way: each thread has its own, traced code sees the last one set."""

    def __init__(self, default: T) -> None:
        self.last = self.default = default
        self._own = threading.local()

    def set(self, value: T) -> None:
        """Hold another value."""
        self.last = value
        if not torch.compiler.is_compiling():
            self._own.value = value

    def get(self) -> T:
        """The value that this thread holds."""
        if torch.compiler.is_compiling():
            return self.last
        value: T = getattr(self._own, "value", self.default)
        return value


class Route:
    """Brings calls with the arguments of `scaled_dot_product_attention` to a handle.

    Args:
        handle: decides and counts.
        key_mask: (mask, B, M) -> the key mask of a call; None = a `KeyMaskReader`.
    """

    def __init__(self, handle: Handle, key_mask: Callable[[Tensor | None, int, int], KeyMask] | None = None) -> None:
        self.handle = handle
        self.key_mask = KeyMaskReader() if key_mask is None else key_mask
        self.number = take_number(self)

    def attention(
        self,
        call: SdpaCall,
        dense: Callable[[], Tensor],
        *,
        layer: int | None,
        is_cross: bool | None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of one call; `dense` is the code's own, `layer` and `is_cross` are as `Handle.attention`.

        A mask is looked at when the call runs: in a compiled graph it goes with the call through one opaque operator.
        `key_mask` [B, M] is one that the caller has found out and the code does not know: then there is none in the
        call, and dense attention takes it too.
        """
        refusal = _refusal(call)
        if refusal is not None:
            self.handle.count_dense(layer, refusal)
            return dense()
        q, k, v, mask = _under_autocast(call)
        if mask is not None:
            if torch.compiler.is_compiling():
                if needs_gradients(q, k, v, mask):
                    return dense()
                return into_graph(self.number, call._replace(query=q, key=k, value=v, attn_mask=mask), layer, is_cross)
            found = self.key_mask(mask, k.shape[0], k.shape[2])
            if found.refusal is not None:
                self.handle.count_dense(layer, found.refusal)
                return dense()
            key_mask = found.mask
        return self.handle.attention(
            q, k, v, layer=layer, key_mask=key_mask, scale=call.scale, is_cross=is_cross,
            dense=dense if mask is not None or key_mask is None else None,
        )  # fmt: skip

    def decide(self, call: SdpaCall, layer: int | None, is_cross: bool | None, told: Sequence[Tensor]) -> Tensor:
        """A call of a compiled graph, when the graph runs."""
        q, k, v, mask = call[:4]

        def dense() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, mask, scale=call.scale, enable_gqa=call.enable_gqa)

        return Route.attention(self, call, dense, layer=layer, is_cross=is_cross)


class SparseSDPA(TorchFunctionMode):
    """Sends calls of `scaled_dot_product_attention` to a handle.

    Args:
        handle: decides and counts.
        layer: number of the layer that is running, or None; asked at every call.
        is_cross: as `Handle.attention`; None tells by the numbers of queries and keys.
        key_mask: as `Route`.
    """

    def __init__(
        self,
        handle: Handle,
        *,
        layer: Callable[[], int | None] = lambda: None,
        is_cross: bool | None = None,
        key_mask: Callable[[Tensor | None, int, int], KeyMask] | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.is_cross = layer, is_cross
        self.route = Route(handle, key_mask)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Route `scaled_dot_product_attention`; everything else is called as it is."""
        kwargs = {} if kwargs is None else kwargs
        if func is F.scaled_dot_product_attention:
            return self.route.attention(
                SdpaCall(*args, **kwargs), lambda: func(*args, **kwargs), layer=self.layer(), is_cross=self.is_cross
            )
        if func is Tensor.unflatten and torch.compiler.is_compiling():
            func = torch.unflatten  # the method calls super(), which cannot be traced here
        return func(*args, **kwargs)


@contextmanager
def sparse_sdpa(
    config: BAAttConfig, *, policy: Policy | None = None, min_length: int | None = None, impl: str = "auto"
) -> Iterator[Handle]:
    """Make `scaled_dot_product_attention` sparse inside the context, in this thread, whoever calls it.

    Args:
        config: the method's options.
        policy: what stays dense; layers are not known here. None = `Policy()`.
        min_length: calls over fewer keys stay dense; shorthand for the policy's.
        impl: as `ba_attention`.

    Yields:
        Handle with the counts. `handle.at_step(step, total)` tells the step where `policy.dense_steps` needs it.

    Raises:
        TypeError, ValueError: arguments that do not fit, or a policy that names layers.
    """
    check_setting(config, policy, impl)
    policy = Policy() if policy is None else policy
    if policy.dense_layers:
        raise ValueError(
            f"policy.dense_layers must be empty: a call does not tell its layer, got {policy.dense_layers}"
        )
    if min_length is not None:
        policy = dataclasses.replace(policy, min_length=min_length)
    handle = Handle(config, policy, impl=impl)
    with SparseSDPA(handle):
        yield handle


def _refusal(call: SdpaCall) -> str | None:
    """Why a call stays dense whatever the handle says, or None; a call that is an error gets it from torch itself."""
    q, k, v, mask = call[:4]
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or len({x.shape[0] for x in (q, k, v)}) > 1:
        return "tensors that are not [B, H, N, D]"
    if 0 in q.shape or 0 in k.shape:
        return "tensors without elements"
    if k.shape[3] != q.shape[3] or v.shape != k.shape:
        return "values of another shape than keys, or keys of another width than queries"
    if q.shape[1] != k.shape[1] and (not call.enable_gqa or q.shape[1] % k.shape[1]):
        return "fewer heads of keys than of queries without enable_gqa"
    if call.is_causal:
        return "causal attention"
    if call.dropout_p > 0:
        return "dropout"
    if mask is not None:
        fitting = zip(reversed(mask.shape), (k.shape[2], *reversed(q.shape[:3])), strict=False)
        if mask.ndim not in (2, 3, 4) or any(size not in (1, full) for size, full in fitting):
            return f"a mask of shape {tuple(mask.shape)}"
    return None


def _under_autocast(call: SdpaCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v and the mask with 4 axes, in the dtype in which autocast would have the function run."""
    q, k, v, mask = call[:4]
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
    device = q.device.type
    if not torch.is_autocast_enabled(device):
        return q, k, v, mask
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    if mask is not None and mask.dtype not in (torch.bool, torch.float64):
        mask = mask.to(dtype)
    return q, k, v, mask
