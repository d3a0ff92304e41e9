"""How much memory a call takes beyond what was there, and a lower bound of what a whole case takes.

In: a function, or sizes. Out: bytes. On the GPU PyTorch counts; on the CPU the growth of the resident set is read from
/proc, after the allocator has handed back what it kept, so it is known on Linux with glibc only.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS, MARK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes that a call held at once beyond its inputs, result included; None where it cannot be told."""
    return _gpu_peak(function, device) if device.type == "cuda" else _resident_peak(function)


def _gpu_peak(function: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _resident_peak(function: Callable[[], Any]) -> int | None:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        MARK.write_text("5")  # the high-water mark starts again from here
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        return None
    function()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[field].split()[0]) * 1024
