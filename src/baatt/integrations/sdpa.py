"""Any code that ends in `torch.nn.functional.scaled_dot_product_attention`, while a context is open in this thread.

Calls with dropout, or a mask whose structure the operator does not know, stay as they are. Nothing is assigned in
`torch.nn.functional`, so other models, a video decoder in the same pipeline for one, see nothing unless they run inside
the context. `nn.MultiheadAttention` calls it where no weights are needed. Misses code that calls FlashAttention itself.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from baatt.config import BAAttConfig, Policy
from baatt.integrations.calls import SdpaCall
from baatt.integrations.handle import Handle
from baatt.integrations.reasons import warn_dense

T = TypeVar("T")


class Current(Generic[T]):
    """A value that holds for the forward under way: each thread has its own, traced code sees the last one set."""

    def __init__(self, default: T) -> None:
        self.last = self.default = default
        self._own = threading.local()

    def set(self, value: T) -> None:
        self.last = value
        if not torch.compiler.is_compiling():
            self._own.value = value

    def get(self) -> T:
        if torch.compiler.is_compiling():
            return self.last
        value: T = getattr(self._own, "value", self.default)
        return value


class SparseSDPA(TorchFunctionMode):
    """Sends calls of `scaled_dot_product_attention`, with what else would compute them, to a function."""

    def __init__(self, attention: Callable[[SdpaCall, Callable[[], Tensor]], Tensor]) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is F.scaled_dot_product_attention:
            return self.attention(SdpaCall(*args, **kwargs), lambda: func(*args, **kwargs))
        if func is F.multi_head_attention_forward and not torch.compiler.is_compiling():
            with self:
                return _opened()(*args, **kwargs)
        if func is Tensor.unflatten and torch.compiler.is_compiling():
            func = torch.unflatten  # the method calls super(), which cannot be traced here
        return func(*args, **kwargs)


@functools.cache
def _opened() -> Callable[..., Any]:
    """The body of `multi_head_attention_forward`, which as a whole would hide its calls from a mode."""
    function: Any = F.multi_head_attention_forward
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__)


@contextmanager
def sparse_sdpa(
    config: BAAttConfig, *, policy: Policy | None = None, min_length: int | None = None, impl: str = "auto"
) -> Iterator[Handle]:
    """Make `scaled_dot_product_attention` sparse inside the context, in this thread, whoever calls it.

    Warns at its end where no call was sparse, or none was seen, unless the policy asked for just that.

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
    handle = Handle(config, policy, impl=impl)
    if layers := handle.policy.named_layers:
        raise ValueError(f"policy must name no layers: a call does not tell its layer, got {layers}")
    if min_length is not None:
        handle.policy = dataclasses.replace(handle.policy, min_length=min_length)
    handle.start_forward()
    with SparseSDPA(handle.sdpa):
        yield handle
    reasons = handle.unasked()
    if reasons is not None:
        warn_dense("sparse_sdpa ended", reasons)
