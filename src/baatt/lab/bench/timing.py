"""What calls cost: median times of functions that take turns, the memory of one, and the two ceilings of a roofline.

In: functions without arguments. Out: milliseconds, bytes. All candidates run in every round, in another random order
each time, so that clocks, heat and neighbours hit each of them alike. On the GPU events and PyTorch's counters tell; on
the CPU the clock and the growth of the resident set in /proc, which is known on Linux with glibc only. Knows nothing of
attention.
"""

import ctypes
import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ROUNDS = 7
MOST_ROUNDS = 200
ENOUGH_MS = 300.0
# About 1 ms: the GPU stays busy while the next launches are prepared, so they cost no idle time inside the events, also
# those of another library that no CUDA graph holds.
SLEEP_CYCLES = 2_000_000
MATRIX_SIZES = {"cuda": (4096, 8192, 16384), "cpu": (1024,)}
COPY_BYTES = {"cuda": 2 * 2**30, "cpu": 2**28}
STATUS, MARK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def median_times(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, least: int = ROUNDS, *, graph: bool = False
) -> dict[str, float]:
    """Median milliseconds of one call of each function, which take turns.

    Args:
        functions: what to call, by name.
        device: where they work; the type decides how time is taken.
        least: timed calls of each; more where that takes less than 0.3 s.
        graph: time replays of a CUDA graph of each.
    """
    if graph:
        functions = {name: captured(function, device) for name, function in functions.items()}
    for function in functions.values():
        warm_up(function, device)
    one_round = _gpu_round if device.type == "cuda" else _cpu_round
    times: dict[str, list[float]] = {name: [] for name in functions}
    started, rounds, shuffle = time.perf_counter(), 0, random.Random(0)
    enough_s = ENOUGH_MS * len(functions) / 1e3
    while rounds < least or (rounds < MOST_ROUNDS and time.perf_counter() - started < enough_s):
        names = shuffle.sample(list(functions), len(functions))
        for name, milliseconds in one_round({name: functions[name] for name in names}).items():
            times[name].append(milliseconds)
        rounds += 1
    return {name: statistics.median(found) for name, found in times.items()}


def warm_up(function: Callable[[], Any], device: torch.device) -> None:
    """Up to three calls that do not count; one is enough for what takes long."""
    for _ in range(3):
        started = time.perf_counter()
        function()
        synchronise(device)
        if time.perf_counter() - started > 0.2:
            return


def captured(function: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """The function as replays of a CUDA graph, which leaves out what launching costs.

    Raises:
        RuntimeError: the function does something that a graph cannot hold.
    """
    warm_up(function, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    replay: Callable[[], None] = graph.replay
    return replay


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """10^12 floating-point operations per second of the fastest of a few large square matrix products."""
    best = 0.0
    for size in MATRIX_SIZES[device.type]:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = functools.partial(torch.mm, left, right, out=torch.empty_like(left))
        best = max(best, 2 * size**3 / median_times({"product": product}, device)["product"] / 1e9)
    return best


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, reading and writing counted."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / median_times({"copy": lambda: target.copy_(source)}, device)["copy"]


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes that a call held at once beyond its inputs, result included; None where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator kept goes back
        MARK.write_text("5")  # the high-water mark starts again from here
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        return None
    function()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def _gpu_round(functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    events = {}
    for name, function in functions.items():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        function()
        end.record()
        events[name] = start, end
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) for name, (start, end) in events.items()}


def _cpu_round(functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    times = {}
    for name, function in functions.items():
        started = time.perf_counter()
        function()
        times[name] = 1e3 * (time.perf_counter() - started)
    return times
