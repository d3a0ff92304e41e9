"""Attention over a sequence that is spread over processes, by trading parts of the sequence for heads and back.

In: q, k, v of a part of the sequence with all heads, on every process. Out: the same part of the result. In between
each process holds the whole sequence of its share of the heads (DeepSpeed-Ulysses), so any attention function gives
there what it gives in one process. There is no ring attention: BA-Att ranks all key blocks of a head against each other
before it attends, and a step of a ring sees the keys of one process alone. Knows no sparsity.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange, repeat
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: What all processes must agree on.
_AGREED = ("B", "H", "G", "length n of q", "length m of k and v", "D", "dtype", "number of key masks", "causal")


def ulysses_attention(
    fn: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: "dist.ProcessGroup | None" = None,
    *,
    key_mask: Tensor | None = None,
    causal: int | None = None,
) -> Tensor:
    """Attention over the whole sequence, of which every process holds one part; for inference.

    A collective: all w processes of the group call it, with parts of equal length, in the order of their ranks. A
    sequence that w does not divide is padded and the padding masked by `key_mask`. Keys and values with G heads are
    sent as they are if w divides G, else repeated to G' = lcm(G, w) heads, the fewest that w divides. Before anything
    else is sent, one small collective compares the sizes, so that a misfit raises on all processes and none waits; on
    a GPU it waits for the work queued before. An exception of `fn` on one process alone leaves the others waiting.

    Args:
        fn: called as fn(q, k, v, key_mask=...) with [B, H/w, w n, D], [B, G'/w, w m, D] and [B, w m] or None, and with
            causal=... where it is given.
        q: [B, H, n, D], the part of this process, w dividing H. k, v: [B, G, m, D] with H a multiple of G.
        group: of any backend; None = the default group.
        key_mask: [B, m] bool, True = attend, the part of this process; all have one or none has.
        causal: tokens per causal block of the whole sequence, handed to `fn`; the same on all processes.

    Returns:
        [B, H, n, D], the part of this process.

    Raises:
        TypeError: q, k, v or key_mask is no tensor.
        ValueError: tensors that do not fit one another, the group or those of the other processes.
        RuntimeError: torch.distributed is not initialised, or this process is not of the group.
    """
    size = _group_size(group)
    for name, x in (("q", q), ("k", k), ("v", v), ("key_mask", key_mask)):
        if not isinstance(x, Tensor) and not (name == "key_mask" and x is None):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if causal is not None:
        fn = functools.partial(fn, causal=causal)
    if size == 1:
        return fn(q, k, v, key_mask=key_mask)
    problem = _problem(q, k, v, key_mask, size)
    sizes = [0] * len(_AGREED)
    if problem is None:
        (batch, heads, queries, channels), (groups, keys) = q.shape, k.shape[1:3]
        sizes = [batch, heads, groups, queries, keys, channels, _DTYPES.index(q.dtype), int(key_mask is not None)]
        sizes.append(causal or 0)
    _agree(problem, sizes, q.device, group, size)
    q, k, v = _whole_sequences(q, k, v, group, size)
    if key_mask is not None:
        key_mask = torch.cat(_gather(key_mask.to(torch.uint8), group, size), dim=1).bool()
    out = fn(q, k, v, key_mask=key_mask)
    if out.shape[:3] != q.shape[:3]:
        raise ValueError(f"fn must return [B, H/w, w n, D] like its q {tuple(q.shape)}, got {tuple(out.shape)}")
    (parts,) = _exchange([rearrange(out, "B h (w n) D -> w B h n D", w=size)], group)
    return rearrange(parts, "w B h n D -> B (w h) n D")


def _group_size(group: Any) -> int:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed must be initialised: start the script with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    size = dist.get_world_size(group)
    if size < 1:
        raise RuntimeError(f"group must hold the calling process, got one without rank {dist.get_rank()}")
    return size


def _problem(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, size: int) -> str | None:
    """What is wrong with the tensors of this process alone: name, requirement, received."""
    if q.ndim != 4 or 0 in q.shape:
        return f"q must have shape [B, H, n, D] without an empty axis, got {tuple(q.shape)}"
    batch, heads, _, channels = q.shape
    if k.ndim != 4 or 0 in k.shape or (k.shape[0], k.shape[3]) != (batch, channels) or heads % k.shape[1]:
        return f"k must have shape [B={batch}, G, m, D={channels}] with G dividing H={heads}, got {tuple(k.shape)}"
    if v.shape != k.shape:
        return f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in _DTYPES or x.dtype != q.dtype or x.device != q.device:
            return (
                f"{name} must have a dtype of {[str(dtype) for dtype in _DTYPES]}, the same as q, on the device of q "
                f"{q.device}, got {x.dtype} on {x.device} beside {q.dtype}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            return f"{name} must not require gradients, got requires_grad=True: call it under torch.no_grad()"
    if heads % size:
        return f"q must have a number of heads that the w={size} processes divide, got H={heads}"
    required = batch, k.shape[2]
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != required):
        return f"key_mask must be bool [B, m] = {required}, got {key_mask.dtype} {tuple(key_mask.shape)}"
    if key_mask is not None and key_mask.device != k.device:
        return f"key_mask must be on the device of k {k.device}, got {key_mask.device}"
    return None


def _agree(problem: str | None, sizes: Sequence[int], device: torch.device, group: Any, size: int) -> None:
    """Raise on every process if any has a problem or they differ."""
    mine = torch.tensor([int(problem is not None), *sizes], device=device)
    refused, *values = torch.stack(_gather(mine, group, size), dim=1).tolist()
    if problem is not None:
        raise ValueError(problem)
    if any(refused):
        ranks = [rank for rank, flag in enumerate(refused) if flag]
        required = "the tensors of all processes must fit one another"
        raise ValueError(f"{required}, those of ranks {ranks} of the group do not")
    for name, found in zip(_AGREED, values, strict=True):
        if len(set(found)) > 1:
            listed = ", ".join(str(_DTYPES[one] if name == "dtype" else one) for one in found)
            hint = ": pad the sequence and mask the padding" if "length" in name else ""
            raise ValueError(f"{name} must be the same on all {size} processes, got {listed} by rank{hint}")


def _whole_sequences(q: Tensor, k: Tensor, v: Tensor, group: Any, size: int) -> list[Tensor]:
    """q [B, H, n, D] and k, v [B, G, m, D] of all processes -> [B, H/w, w n, D] and [B, G'/w, w m, D] of this one."""
    copies = math.lcm(k.shape[1], size) // k.shape[1]
    k, v = (x if copies == 1 else repeat(x, "B G m D -> B (G r) m D", r=copies) for x in (k, v))
    by_heads = [rearrange(x, "B (w h) n D -> w B h n D", w=size) for x in (q, k, v)]
    return [rearrange(x, "w B h n D -> B h (w n) D") for x in _exchange(by_heads, group)]


def _exchange(parts: Sequence[Tensor], group: Any) -> list[Tensor]:
    """One all-to-all of several tensors [w, ...]: entry i goes to rank i, entry i of the result comes from rank i."""
    lengths = [part[0].numel() for part in parts]
    sent = parts[0].new_empty(parts[0].shape[0], sum(lengths))
    for slot, part in zip(torch.split(sent, lengths, dim=1), parts, strict=True):
        slot.view(part.shape).copy_(part)  # view and not rearrange, which may copy: the slot itself is written
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return [slot.view(part.shape) for slot, part in zip(torch.split(received, lengths, dim=1), parts, strict=True)]


def _gather(x: Tensor, group: Any, size: int) -> list[Tensor]:
    """A tensor of every process, by rank."""
    gathered = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(gathered, x.contiguous(), group=group)
    return gathered
