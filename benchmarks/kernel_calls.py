"""Every GPU kernel once or more on small shapes, for tools that look into each access: `bash benchmarks/sanitize.sh`.

Each call is the operator with other options, shapes and masks; a result that is not finite ends the run. Printed: how
many calls ran, and the kernels of `baatt.kernels` that none of them launched.
"""

import argparse
import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import baatt.kernels
from baatt import BAAttConfig, attend_partial, ba_attention, make_plan
from baatt.backend import Workload, choose_backend

PAPER = BAAttConfig.preset("paper")


class Call(NamedTuple):
    """shape: B, H, G, N, M, D. masked: keys and queries have padding."""

    shape: tuple[int, int, int, int, int, int]
    config: BAAttConfig
    causal: int | None = None
    masked: bool = False


SQUARE, RAGGED, NARROW = (1, 2, 1, 640, 640, 128), (2, 2, 1, 333, 461, 128), (1, 2, 2, 333, 333, 64)
CALLS: dict[str, Call] = {
    "default": Call(SQUARE, BAAttConfig()),
    "default ragged masked": Call(RAGGED, BAAttConfig(), masked=True),
    "default D 64": Call(NARROW, BAAttConfig()),
    "default one token": Call((1, 1, 1, 1, 1, 128), BAAttConfig()),
    "fast": Call(SQUARE, BAAttConfig.preset("fast")),
    "causal": Call(SQUARE, BAAttConfig(), causal=1),
    "causal 32 masked": Call((2, 2, 1, 333, 333, 128), BAAttConfig(), causal=32, masked=True),
    "paper": Call(SQUARE, PAPER),
    "paper ragged masked": Call(RAGGED, PAPER, masked=True),
    "paper causal": Call(SQUARE, BAAttConfig(sort="none", score="covariance"), causal=1),
    "mean": Call(SQUARE, BAAttConfig(score="mean")),
    "exact": Call(SQUARE, BAAttConfig(score="exact")),
    "exact-peak causal": Call(SQUARE, BAAttConfig(score="exact-peak"), causal=1),
    "budget of a head": Call(SQUARE, BAAttConfig(budget="head")),
    "budget of a head, many blocks": Call((1, 1, 1, 1100, 1100, 64), BAAttConfig(16, 0.9, budget="head")),
    "budget of a head, many blocks, causal": Call((1, 1, 1, 1100, 1100, 64), BAAttConfig(16, 0.9, budget="head"), 32),
}  # fmt: skip


def run(call: Call, device: torch.device, dtype: torch.dtype, impl: str) -> bool:
    """Whether the implementation can run it, which it then did, as a whole and with its log-sum-exp."""
    batch, heads, groups, queries, keys, channels = call.shape
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, device=device, dtype=dtype, generator=generator)
    sides = (heads, queries), (groups, keys), (groups, keys)
    q, k, v = (draw(batch, count, tokens, channels) for count, tokens in sides)
    try:
        choose_backend(impl, device, Workload(dtype, channels, call.config.block_size, channels**-0.5))
    except RuntimeError:
        return False
    options: dict[str, Any] = {"impl": impl, "causal": call.causal}
    if call.masked:
        options |= {"key_mask": real_tokens(batch, keys, device), "query_mask": real_tokens(batch, queries, device)}
    out = ba_attention(q, k, v, call.config, **options)
    partial = attend_partial(q, k, v, make_plan(q, k, call.config, **options), impl=impl)
    for x in (out, partial.out):
        if not bool(torch.isfinite(x).all()):
            raise RuntimeError(f"{call} gave a result that is not finite")
    return True


def real_tokens(batch: int, tokens: int, device: torch.device) -> Tensor:
    """A mask with padding at the end of every row but the first."""
    length = torch.tensor([tokens - 70 * row for row in range(batch)], device=device)
    return torch.arange(tokens, device=device) < length[:, None]


def kernels() -> Iterator[tuple[str, Any]]:
    """The kernels that are launched, by module and name: in `baatt.kernels` their names end so."""
    folder = Path(baatt.kernels.__file__).parent
    for file in sorted(folder.glob("*.py")):
        names = re.findall(r"@\w+\.jit.*\ndef (\w*kernel)\(", file.read_text(encoding="utf-8"))
        if names:
            module = importlib.import_module(f"baatt.kernels.{file.stem}")
            yield from ((f"{file.stem}.{name}", getattr(module, name)) for name in names)


def was_launched(kernel: Any) -> bool:
    """Whether a kernel was compiled in this process, which launching it does."""
    return any(cache[0] for cache in getattr(kernel, "device_caches", {}).values())  # the interpreter has none


def main(argv: Sequence[str] | None = None, was_run: Callable[[Any], bool] = was_launched) -> int:
    """Command line; returns 1 where a kernel was not launched, unless --part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impls", default="hopper,triton")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", action="store_true", help="of all calls: kernels that others launch may be missing")
    arguments = parser.parse_args(argv)
    device, ran = torch.device(arguments.device), 0
    for impl in arguments.impls.split(","):
        for dtype in arguments.dtypes.split(","):
            for name, call in CALLS.items():
                done = run(call, device, getattr(torch, dtype), impl)
                ran += done
                sys.stdout.write(f"{impl} {dtype} {name}: {'ran' if done else 'not for it'}\n")
                sys.stdout.flush()
    missing = [name for name, kernel in kernels() if not was_run(kernel)]
    sys.stdout.write(f"{ran} calls ran; kernels not launched: {', '.join(missing) or 'none'}\n")
    return 1 if missing and not arguments.part else 0


if __name__ == "__main__":
    sys.exit(main())
