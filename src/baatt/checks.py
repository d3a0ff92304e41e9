"""Every error a caller of the operator can provoke, raised before any work is done.

Each message names the argument, what is required and what was given. Reads shapes, dtypes and devices only, never the
values of a tensor, so a check costs no wait for the device.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from baatt.config import MOST, BAAttConfig
from baatt.plan import Plan
from baatt.types import as_float

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: Arguments of scaled_dot_product_attention that the operator has under another name, or not at all.
SDPA_ARGUMENTS = {
    "attn_mask": "key_mask=[B, M] bool says which keys are attended to, causal=1 and causal=32 are causal masks",
    "is_causal": "causal=1 is causal attention, query_start=0 where the first query stands at the first key",
    "dropout_p": "leave it out, there is no dropout",
    "enable_gqa": "leave it out, grouped heads are taken as they are",
}


def refuse_arguments(unknown: Mapping[str, object]) -> None:
    """A TypeError for arguments that there are not, with what those of scaled_dot_product_attention are called here."""
    for name in unknown:
        if name in BAAttConfig.__dataclass_fields__:
            raise TypeError(f"{name} is no argument of ba_attention: it is a field of config, BAAttConfig({name}=...)")
        if name not in SDPA_ARGUMENTS:
            raise TypeError(f"ba_attention() got an unexpected keyword argument {name!r}")
        raise TypeError(
            f"{name} is no argument of ba_attention: {SDPA_ARGUMENTS[name]}; calls of scaled_dot_product_attention as "
            "they are: `with baatt.integrations.sdpa.sparse_sdpa(config): ...`"
        )


def check_make_plan(
    q: Tensor, k: Tensor, config: BAAttConfig, key_mask: Tensor | None, query_mask: Tensor | None, scale: float | None
) -> None:
    """Refuse arguments that `make_plan` cannot work with."""
    check_query_and_key(q, k)
    _check_config(config)
    for name, mask, x, axes in (("key_mask", key_mask, k, "[B, M]"), ("query_mask", query_mask, q, "[B, N]")):
        if mask is not None:
            _check_mask(name, mask, x, axes)
    scale = as_number(scale)
    _check_is_number(scale)
    if scale is not None and not (math.isfinite(as_float(scale)) and scale > 0):
        raise ValueError(f"scale must be finite and positive, got {scale}")


def check_constants(config: BAAttConfig, causal: int | None, query_start: int | None, scale: float | None) -> None:
    """Refuse, while a graph is being traced, what its operator would take for something else: True for 1."""
    _check_config(config)
    for name, value in (("causal", causal), ("query_start", query_start)):
        _check_is_integer(name, value)
    if isinstance(scale, bool):
        _check_is_number(scale)


def _check_config(config: object) -> None:
    if not isinstance(config, BAAttConfig):
        hint = f" in the place of attn_mask: {SDPA_ARGUMENTS['attn_mask']}" if isinstance(config, Tensor) else ""
        raise TypeError(f"config must be a BAAttConfig, got {type(config).__name__}{hint}")


def _check_is_number(scale: object) -> None:
    if scale is not None and (not isinstance(scale, (int, float)) or isinstance(scale, bool)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")


def _check_is_integer(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        hint = ": causal=1 is causal attention, None is none" if isinstance(value, bool) and name == "causal" else ""
        raise TypeError(f"{name} must be an int or None, got {value!r}{hint}")


def as_number(scale: Any) -> Any:
    """A number as PyTorch takes them, of numpy or a tensor without axes, as Python's; anything else as it is."""
    if isinstance(scale, (int, float)) or getattr(scale, "ndim", None) != 0:
        return scale
    return scale if isinstance(scale, Tensor) and not holds_values(scale) else scale.item()


def check_structure(
    q: Tensor,
    k: Tensor,
    config: BAAttConfig,
    causal: int | None,
    query_start: int | None,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
) -> tuple[int, int] | None:
    """Tokens per causal block and position of the first query; None if attention is bidirectional."""
    for name, value, least in (("causal", causal, 1), ("query_start", query_start, 0)):
        _check_is_integer(name, value)
        if value is not None and not least <= value <= MOST:
            bound = f"least {least}" if value < least else f"most {MOST}"
            raise ValueError(f"{name} must be at {bound}, got {value}")
    if causal is None:
        if query_start is not None:
            raise ValueError(f"query_start must be None where causal is None, got {query_start}")
        return None
    queries, keys = q.shape[2], k.shape[2]
    if query_start is None and queries > keys:
        raise ValueError(f"query must have at most M={keys} tokens where query_start is None, got N={queries}")
    start = keys - queries if query_start is None else query_start
    if config.sort != "none":
        _check_sorted_structure(config, causal, start, masked=key_mask is not None or query_mask is not None)
    return causal, start


def _check_sorted_structure(config: BAAttConfig, causal: int, start: int, *, masked: bool) -> None:
    """Tokens may only change places among those that see and are seen alike."""
    required, segment = f"sort must be 'none' with causal={causal}", config.segment
    if masked:
        raise ValueError(f"{required} and masked tokens, which move the segments, got {config.sort!r}")
    if segment is None or causal % segment:
        raise ValueError(f"{required} unless segment divides it, got {config.sort!r} with segment={segment}")
    if "q" in config.sort and start % segment:
        raise ValueError(f"{required} unless segment={segment} divides query_start={start}, got {config.sort!r}")


def check_value(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse a value that does not fit query and key."""
    _check_tensor("value", v)
    if v.shape != k.shape:
        raise ValueError(f"value must have the shape of key {tuple(k.shape)}, got {tuple(v.shape)}")
    _check_like_query("value", v, q)
    _check_values("value", v)


def check_plan(plan: Plan, q: Tensor, k: Tensor) -> None:
    """Refuse a plan that was made for other shapes or another device, or edited into what no kernel can carry out."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan from make_plan, got {type(plan).__name__}")
    if not isinstance(plan.config, BAAttConfig):
        raise TypeError(f"plan.config must be a BAAttConfig, got {type(plan.config).__name__}")
    if not isinstance(plan.scale, (int, float)) or not (math.isfinite(as_float(plan.scale)) and plan.scale > 0):
        raise ValueError(f"plan.scale must be a finite, positive number, got {plan.scale!r}")
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1], k.shape[2]
    rows = (batch, heads, -(-queries // plan.config.block_size))
    required: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("query_order.index", plan.query_order.index, (batch, heads, queries)),
        ("query_order.length", plan.query_order.length, (batch,)),
        ("key_order.index", plan.key_order.index, (batch, groups, keys)),
        ("key_order.length", plan.key_order.length, (batch,)),
        ("selection.index", plan.selection.index, (*rows, max([1, *plan.selection.index.shape[-1:]]))),
        ("selection.count", plan.selection.count, rows),
    ]
    if plan.sight is not None:
        blocks = (batch, rows[2])
        required += [("sight.limit", plan.sight.limit, (*blocks, plan.config.block_size))]
        required += [("sight.spans", plan.sight.spans, (*blocks, 4))]
    for name, x, shape in required:
        if x.shape != shape:
            raise ValueError(f"plan.{name} must have shape {shape} to fit query and key, got {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"plan.{name} must be on the device of query {q.device}, got {x.device}")
        dtype = torch.int64 if "order" in name else torch.int32
        if x.dtype != dtype and not ("selection" in name and x.dtype == torch.int64):
            raise TypeError(f"plan.{name} must have dtype {dtype}, got {x.dtype}")


def check_query_and_key(q: Tensor, k: Tensor) -> None:
    """Refuse query and key that do not fit one another."""
    _check_tensor("query", q)
    _check_tensor("key", k)
    if q.ndim != 4:
        raise ValueError(f"query must have shape [B, H, N, D], got {tuple(q.shape)}")
    if 0 in q.shape:
        raise ValueError(f"query must have shape [B, H, N, D] without an empty axis, got {tuple(q.shape)}")
    batch, heads, _, channels = q.shape
    if k.ndim != 4 or k.shape[3] != channels:
        raise ValueError(f"key must have shape [B, G, M, D] with D={channels}, got {tuple(k.shape)}")
    if 0 in k.shape:
        raise ValueError(f"key must have shape [B, G, M, D] without an empty axis, got {tuple(k.shape)}")
    if k.shape[0] != batch:
        raise ValueError(f"key must have shape [B, G, M, D] with B={batch}, got {tuple(k.shape)}")
    if heads % k.shape[1]:
        raise ValueError(f"key must have shape [B, G, M, D] with G dividing H={heads}, got {tuple(k.shape)}")
    _check_like_query("key", k, q)
    _check_values("query", q)
    _check_values("key", k)


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must have a dtype of {[str(dtype) for dtype in DTYPES]}, got {x.dtype}")
    _check_layout(name, x)
    if is_differentiated(x):
        received = "requires_grad=True" if x.requires_grad else "a tangent of torch.autograd.forward_ad"
        raise ValueError(
            f"{name} must not require gradients, got {received}: baatt is inference only; "
            "call it under torch.no_grad() or torch.inference_mode()"
        )


def _check_layout(name: str, x: Tensor) -> None:
    if x.layout != torch.strided or x.is_nested:
        received = "a nested tensor" if x.is_nested else x.layout
        raise TypeError(f"{name} must have the layout torch.strided, got {received}")


def is_differentiated(x: Tensor) -> bool:
    """Whether a derivative of what is computed from a tensor is asked for, backward or forward: kernels have none."""
    if x.requires_grad and torch.is_grad_enabled():
        return True
    unpack: Any = forward_ad.unpack_dual  # which has no types
    return forward_ad._current_level >= 0 and unpack(x).tangent is not None


def holds_values(x: Tensor) -> bool:
    """Whether a tensor's numbers lie in memory as they are, for kernels to read: not those of a FakeTensor, under vmap,
    or of a view that negates them, as the imaginary part of a conjugate is one."""
    is_plain = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__ and not x.is_neg()
    return x.device.type != "meta" and is_plain and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _check_values(name: str, x: Tensor) -> None:
    """Refuse a tensor that has no memory of its own, for which a kernel would read that of others."""
    if x.device.type == "meta":
        raise ValueError(f"{name} must be on a device that holds values, got meta")
    if x.is_neg():
        raise TypeError(f"{name} must hold its values itself, got a view that negates them: call resolve_neg()")
    if not holds_values(x):
        received = "one under vmap" if type(x) is Tensor else f"a {type(x).__name__}"
        raise TypeError(f"{name} must hold its values itself, got {received}")


def _check_like_query(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise TypeError(f"{name} must have the dtype of query {q.dtype}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of query {q.device}, got {x.device}")


def _check_mask(name: str, mask: Tensor, x: Tensor, axes: str) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        meaning = "attend" if name == "key_mask" else "wanted"
        raise TypeError(f"{name} must have dtype torch.bool (True = {meaning}), got {mask.dtype}")
    batch, tokens = x.shape[0], x.shape[2]
    if mask.shape != (batch, tokens):
        raise ValueError(f"{name} must have shape {axes} = ({batch}, {tokens}), got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"{name} must be on the device of query {x.device}, got {mask.device}")
    _check_layout(name, mask)
    _check_values(name, mask)
