"""CPU twin of `stages.sorting.by_norm` (E2): PyTorch's norms, sorted in C, all segments and heads at once.

In: what the stage takes, but for float64. The norms are those of the stage, so the order is the same to the last token.
Needs the library of `cpu_native`.
"""

import ctypes

import torch
from torch import Tensor

from baatt.kernels import cpu_native
from baatt.types import TokenOrder, norms


class _Order(ctypes.Structure):
    """`Order` of cpu_orders.c: the same fields in the same order."""

    _fields_ = cpu_native.fields(
        pointers=("norm", "mask", "places", "length", "index", "scratch"),
        sizes=("batch", "heads", "tokens", "segment", "threads"),
    )


def by_norm(x: Tensor, segment: int | None, mask: Tensor | None) -> TokenOrder:
    """Sort the tokens of every segment by L2 norm, ascending (E2); see `stages.sorting.by_norm`."""
    batch, heads, tokens, _ = x.shape
    segment, threads = tokens if segment is None else min(segment, tokens), torch.get_num_threads()
    whole = {"dtype": torch.int64, "device": x.device}
    index, length = (torch.empty(shape, **whole) for shape in ((batch, heads, tokens), (batch,)))
    tensors = {
        "norm": norms(x).contiguous(),
        "places": torch.empty(batch, tokens, **whole),
        "length": length,
        "index": index,
        "scratch": torch.empty(threads, 4 * segment, dtype=torch.float32, device=x.device),
    }
    if mask is not None:
        tensors["mask"] = mask.contiguous()
    order = _Order(batch=batch, heads=heads, tokens=tokens, segment=segment, threads=threads)
    cpu_native.call(cpu_native.library().baatt_sort, order, tensors)
    return TokenOrder(index, length)
