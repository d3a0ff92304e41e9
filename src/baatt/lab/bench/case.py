"""What a benchmark is given, a `Case`, and what is known of it beforehand: which backend runs it, in how much memory.

Measures nothing.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from baatt.backend import Backend, Workload, choose_backend
from baatt.config import BAAttConfig


class RefusedError(Exception):
    """A baseline that cannot run, with the reason."""


class Shape(NamedTuple):
    """B, H, G, N = M and D."""

    batch: int
    heads: int
    groups: int
    tokens: int
    channels: int

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.groups == self.heads else f"{self.heads}:{self.groups}"
        return f"{self.batch}x{heads}x{self.tokens}x{self.channels}"


class Inputs(NamedTuple):
    """q: [B, H, N, D]; k, v: [B, G, N, D]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Case(NamedTuple):
    """What to measure: a name in `BENCHMARKS`, on which tensors, with which options, against which `BASELINES`.

    causal: tokens per causal block, of the operator only; None: bidirectional.
    """

    what: str
    shape: Shape
    config: BAAttConfig
    dtype: torch.dtype
    device: torch.device
    impl: str = "auto"
    against: tuple[str, ...] = ()
    seed: int = 0
    causal: int | None = None

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return 1 / math.sqrt(self.shape.channels)

    @property
    def blocks(self) -> int:
        """J, key blocks of a head."""
        return -(-self.shape.tokens // self.config.block_size)


def resolve(case: Case) -> Backend:
    """The backend of a case; RuntimeError with the reason if it cannot run."""
    workload = Workload(case.dtype, case.shape.channels, case.config.block_size, case.scale)
    return choose_backend(case.impl, case.device, workload)


def make_inputs(case: Case) -> Inputs:
    """q, k and v, normally distributed, from the seed."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    batch, heads, groups, tokens, channels = case.shape
    sizes = ((batch, count, tokens, channels) for count in (heads, groups, groups))
    draw = functools.partial(torch.randn, device=case.device, dtype=case.dtype, generator=generator)
    return Inputs(*(draw(size) for size in sizes))


def estimated_bytes(case: Case) -> int:
    """About what a case holds at once: tensors, sorted copies, orders, scores and lists, FlexAttention's tables."""
    batch, heads, groups, tokens, channels = case.shape
    query_side = batch * heads * tokens * channels * case.dtype.itemsize
    key_sides = 2 * query_side * groups // heads
    inputs = query_side + key_sides
    pairs = batch * heads * case.blocks**2
    slots = case.config.kept_blocks(case.blocks) if case.config.budget == "row" else case.blocks
    lists = 4 * batch * heads * case.blocks * slots
    total = inputs + query_side + 8 * batch * (heads + groups) * tokens + lists
    if case.device.type == "cuda" and case.config.sort in ("k", "qk"):
        total += key_sides  # sorted copies
    if case.what == "operator":
        # Kernels score in slabs of 256 MiB; the stages hold scores and two sorts of them, with int64 places.
        total += min(4 * pairs, 2**28) if case.device.type == "cuda" else 28 * pairs
    if "flex" in case.against:
        total += inputs + query_side + 28 * pairs
    return total
