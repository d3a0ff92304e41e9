"""Builds `cpu_native.c` with the C compiler of this machine, once per process, and calls it on tensors.

Built at the first call and for this very CPU, into a directory that is gone once the library is loaded: nothing is
cached on disk, so nothing can be stale or belong to another machine. It takes about half a second. Without a compiler
`library` returns None and the caller uses `cpu_gather`.
"""

import ctypes
import functools
import logging
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

from baatt.kernels.cpu_gather import Group

SOURCE = Path(__file__).with_name("cpu_native.c")
COMPILERS = ("cc", "gcc", "clang")
#: Tried in turn: the second is how Clang spells the first on ARM, the third builds anywhere.
CPU_FLAGS = (("-march=native",), ("-mcpu=native",), ())
FLAGS = ("-O3", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
BUILD_SECONDS = 120

logger = logging.getLogger("baatt")
_build_lock = threading.Lock()

_POINTERS = (
    *("query", "key", "value", "query_order", "key_order", "kept", "count"),
    *("output", "lse", "packed_key", "packed_value", "scratch"),
)
_SIZES = (
    *("query_head_stride", "query_row_stride", "key_row_stride", "value_row_stride"),
    *("heads", "queries", "keys", "channels", "block_size", "kept_slots", "threads"),
)


class _Problem(ctypes.Structure):
    """`Problem` of cpu_native.c: the same fields in the same order."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_double),
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
        logger.warning("impl='cpu' gathers blocks with PyTorch: building %s failed: %s", SOURCE.name, detail)
        return None
    for name in ("baatt_scratch_size", "baatt_padded_channels"):
        getattr(loaded, name).restype = ctypes.c_int64
    loaded.baatt_scratch_size.argtypes = (ctypes.c_int64, ctypes.c_int64)
    loaded.baatt_padded_channels.argtypes = (ctypes.c_int64,)
    loaded.baatt_sparse_attention.argtypes = (ctypes.POINTER(_Problem),)
    loaded.baatt_sparse_attention.restype = None
    return loaded


def _build(compiler: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="baatt-") as directory:
        target = Path(directory) / "cpu_native.so"
        for cpu_flags in CPU_FLAGS:
            command = [compiler, *FLAGS, *cpu_flags, "-o", str(target), str(SOURCE), "-lm"]
            built = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
            if built.returncode == 0:
                break
        built.check_returncode()
        return ctypes.CDLL(str(target))


def attend_group(kernel: ctypes.CDLL, group: Group, *, block_size: int, scale: float) -> None:
    """Block-sparse attention of one `Group` in float32; writes `group.out` and `group.lse`.

    Extra memory: the group's keys and values once, in the layout of the products, and some tens of KiB per thread; for
    half precision also float32 copies of the group's inputs and output.
    """
    inputs = (x.float() for x in (group.q, group.k, group.v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in inputs)
    out = group.out if group.out.dtype == torch.float32 else torch.empty_like(group.out, dtype=torch.float32)
    heads, queries, channels = q.shape
    keys, threads = group.key_order.shape[0], torch.get_num_threads()
    padded_keys = -(-keys // block_size) * block_size
    # The dict holds every copy until the call is over.
    tensors = {
        "query": q,
        "key": k,
        "value": v,
        "query_order": group.query_order.contiguous(),
        "key_order": group.key_order.contiguous(),
        "kept": group.kept.to(torch.int32).contiguous(),
        "count": group.count.to(torch.int32).contiguous(),
        "output": out,
        "lse": group.lse,
        "packed_key": q.new_empty(padded_keys, channels),
        "packed_value": q.new_empty(padded_keys, kernel.baatt_padded_channels(channels)),
        "scratch": q.new_empty(threads, kernel.baatt_scratch_size(block_size, channels)),
    }
    strides = q.stride(0), q.stride(1), k.stride(0), v.stride(0)
    counts = heads, queries, keys, channels, block_size, group.kept.shape[-1], threads
    sizes = dict(zip(_SIZES, (*strides, *counts), strict=True))
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    problem = _Problem(**pointers, **sizes, scale=scale)
    kernel.baatt_sparse_attention(ctypes.byref(problem))
    if out is not group.out:
        group.out.copy_(out)
