"""Any code that ends in `torch.nn.functional.scaled_dot_product_attention`, while a context is open in this thread.

Calls with a causal flag, dropout or a mask that is no key mask stay as they are. Nothing is assigned in
`torch.nn.functional`, so other models, a video decoder in the same pipeline for one, see nothing unless they run inside
the context. Misses the fused path of `nn.MultiheadAttention` and code that calls FlashAttention itself.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from baatt.config import BAAttConfig, Policy
from baatt.integrations.handle import Handle
from baatt.integrations.masks import KeyMask, as_key_mask


class SparseSDPA(TorchFunctionMode):
    """Sends calls to a handle.

    Args:
        handle: decides and counts.
        layer: number of the layer that is running, or None; asked at every call.
        is_cross: as `Handle.attention`; None tells by the numbers of queries and keys.
        key_mask: (mask, B, M) -> the key mask of a call; an adapter that knows better than the mask gives its own.
    """

    def __init__(
        self,
        handle: Handle,
        *,
        layer: Callable[[], int | None] = lambda: None,
        is_cross: bool | None = None,
        key_mask: Callable[[Tensor | None, int, int], KeyMask] = as_key_mask,
    ) -> None:
        super().__init__()
        self.handle, self.layer, self.is_cross, self.key_mask = handle, layer, is_cross, key_mask

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Route `scaled_dot_product_attention`; everything else is called as it is."""
        kwargs = {} if kwargs is None else kwargs
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v, mask, dropout, causal, scale = _arguments(*args, **kwargs)
        refusal = None
        found = KeyMask(None, None)
        if q.ndim != 4 or k.ndim != 4 or q.shape[1] % k.shape[1]:
            refusal = "tensors that are not [B, H, N, D]"
        elif causal:
            refusal = "causal attention"
        elif dropout > 0:
            refusal = "dropout"
        else:
            found = self.key_mask(mask, k.shape[0], k.shape[2])
            refusal = found.refusal
        if refusal is not None:
            self.handle.count_dense(self.layer(), refusal)
            return func(*args, **kwargs)
        return self.handle.attention(
            q, k, v, layer=self.layer(), key_mask=found.mask, scale=scale, is_cross=self.is_cross,
            dense=lambda: func(*args, **kwargs),
        )  # fmt: skip


@contextmanager
def sparse_sdpa(
    config: BAAttConfig, *, policy: Policy | None = None, min_length: int | None = None, impl: str = "auto"
) -> Iterator[Handle]:
    """Make `scaled_dot_product_attention` sparse inside the context, in this thread, whoever calls it.

    Args:
        config: the method's dials.
        policy: what stays dense; layers are not known here. None = `Policy()`.
        min_length: calls over fewer keys stay dense; shorthand for the policy's.
        impl: as `ba_attention`.

    Yields:
        Handle with the counts. `handle.at_step(step, total)` tells the step where `policy.dense_steps` needs it.

    Raises:
        TypeError, ValueError: arguments that do not fit, or a policy that names layers.
    """
    if not isinstance(config, BAAttConfig):
        raise TypeError(f"config must be a BAAttConfig, got {type(config).__name__}")
    policy = Policy() if policy is None else policy
    if policy.dense_layers:
        raise ValueError(
            f"policy.dense_layers must be empty: a call does not tell its layer, got {policy.dense_layers}"
        )
    if min_length is not None:
        policy = Policy(**{**vars(policy), "min_length": min_length})
    handle = Handle(config, policy, impl=impl)
    with SparseSDPA(handle):
        yield handle


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float, bool, float | None]:
    """The arguments of `scaled_dot_product_attention` by its own names."""
    return query, key, value, attn_mask, dropout_p, is_causal, scale
