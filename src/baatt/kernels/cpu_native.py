"""Builds the C files of this folder with the C compiler of this machine, once per process, and calls them on tensors.

Built at the first call and for this very CPU, into a directory that is gone once the library is loaded: nothing is
cached on disk, so nothing can be stale or belong to another machine. It takes about a second. Without a compiler
`library` returns None: attention then gathers (`cpu_gather`), and the plan is eager.
"""

import ctypes
import functools
import logging
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from baatt.kernels.cpu_gather import Group

SOURCES = tuple(Path(__file__).with_name(f"cpu_{name}.c") for name in ("native", "orders", "summaries", "comparisons"))
COMPILERS = ("cc", "gcc", "clang")
#: Tried in turn: the second is how Clang spells the first on ARM, the third builds anywhere.
CPU_FLAGS = (("-march=native",), ("-mcpu=native",), ())
FLAGS = ("-O3", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
BUILD_SECONDS = 120

logger = logging.getLogger("baatt")
_build_lock = threading.Lock()


def fields(
    pointers: tuple[str, ...], sizes: tuple[str, ...], factors: tuple[str, ...] = ()
) -> tuple[tuple[str, type], ...]:
    """`_fields_` of a struct of pointers, then 64-bit integers, then doubles."""
    kinds = ((pointers, ctypes.c_void_p), (sizes, ctypes.c_int64), (factors, ctypes.c_double))
    return tuple((name, kind) for names, kind in kinds for name in names)


class _Problem(ctypes.Structure):
    """`Problem` of cpu_native.c: the same fields in the same order."""

    _fields_ = fields(
        pointers=("query", "key", "value", "query_order", "kept", "count", "limit", "output", "lse", "scratch"),
        sizes=(
            *("query_head_stride", "query_row_stride"),
            *("heads", "queries", "keys", "channels", "block_size", "kept_slots", "threads"),
        ),
        factors=("scale",),
    )


def find_compiler() -> str | None:
    """Path of the C compiler that would be used, or None."""
    if platform.system() not in ("Linux", "Darwin"):
        return None
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def library() -> ctypes.CDLL | None:
    """The compiled kernel, built at the first call; None without a compiler, or after a build that failed (logged)."""
    with _build_lock:
        return _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = find_compiler()
    if compiler is None:
        logger.info("impl='cpu' gathers blocks with PyTorch: no C compiler (%s) found", ", ".join(COMPILERS))
        return None
    try:
        loaded = _build(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("impl='cpu' gathers blocks with PyTorch: building its C files failed: %s", detail)
        return None
    sizes = ("scratch_size", "summary_scratch", "comparison_scratch")
    for name in sizes:
        getattr(loaded, f"baatt_{name}").restype = ctypes.c_int64
    loaded.baatt_scratch_size.argtypes = (ctypes.c_int64, ctypes.c_int64)
    return loaded


def _build(compiler: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="baatt-") as directory:
        target = Path(directory) / "cpu_native.so"
        for cpu_flags in CPU_FLAGS:
            command = [compiler, *FLAGS, *cpu_flags, "-o", str(target), *map(str, SOURCES), "-lm"]
            built = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
            if built.returncode == 0:
                break
        built.check_returncode()
        return ctypes.CDLL(str(target))


def point(problem: ctypes.Structure, tensors: Mapping[str, Tensor]) -> None:
    """Let the pointers of a problem point to contiguous tensors, which the caller holds until the call is over."""
    for name, tensor in tensors.items():
        setattr(problem, name, tensor.data_ptr())


def call(function: Callable[..., None], problem: ctypes.Structure, tensors: Mapping[str, Tensor]) -> None:
    """A function of the library on a problem, given its tensors by the names of its pointers."""
    point(problem, tensors)
    function(ctypes.byref(problem))


def attend_group(kernel: ctypes.CDLL, group: Group, *, block_size: int, scale: float) -> None:
    """Block-sparse attention of one `Group` in float32; writes `group.out` and `group.lse`.

    Extra memory: some tens of KiB per thread; copies of keys and values whose rows do not lie side by side; for half
    precision float32 copies of the group's inputs and output.
    """
    q = group.q.float()
    q = q if q.stride(-1) == 1 else q.contiguous()
    k, v = (x.float().contiguous() for x in (group.k, group.v))
    out = group.out if group.out.dtype == torch.float32 else torch.empty_like(group.out, dtype=torch.float32)
    heads, queries, channels = q.shape
    threads = torch.get_num_threads()
    tensors = {
        "query": q,
        "key": k,
        "value": v,
        "query_order": group.query_order.contiguous(),
        "kept": group.kept.to(torch.int32).contiguous(),
        "count": group.count.to(torch.int32).contiguous(),
        "output": out,
        "lse": group.lse,
        "scratch": q.new_empty(threads, kernel.baatt_scratch_size(block_size, channels)),
    }
    if group.limit is not None:
        tensors["limit"] = group.limit.to(torch.int32).contiguous()
    problem = _Problem(
        query_head_stride=q.stride(0), query_row_stride=q.stride(1), heads=heads, queries=queries, keys=k.shape[0],
        channels=channels, block_size=block_size, kept_slots=group.kept.shape[-1], threads=threads, scale=scale,
    )  # fmt: skip
    call(kernel.baatt_sparse_attention, problem, tensors)
    if out is not group.out:
        group.out.copy_(out)
