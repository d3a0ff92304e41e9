"""The operator taken apart: one function per stage, with everything it needs at hand, and the attention kernel alone.

The only file here that knows how a `Backend` is put together; benchmarks time what it returns.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from baatt.backend import Backend
from baatt.lab.bench.baselines import sort_tokens
from baatt.lab.bench.case import Inputs
from baatt.plan import Plan
from baatt.types import Partial

#: Implementations whose attention takes the sorted copies that `arrange` made.
TAKES_COPIES = ("triton", "hopper")
STAGES = ("arrange", "score_and_select", "attend")


def stage_functions(inputs: Inputs, plan: Plan, backend: Backend) -> dict[str, Callable[[], Any]]:
    """What to call for each of `STAGES`, as `ba_attention` does it with this backend.

    Args:
        inputs: q, k, v in the original order.
        plan: made from them.
        backend: of the implementation under test.
    """
    arrange = functools.partial(backend.sort_blocks, *inputs, plan.config, None)
    score_and_select = functools.partial(
        backend.choose_blocks, plan.query_summary, plan.key_summary, plan.config, plan.scale
    )
    functions = arrange, score_and_select, attention_kernel(inputs, plan, backend)
    return dict(zip(STAGES, functions, strict=True))


def attention_kernel(inputs: Inputs, plan: Plan, backend: Backend) -> Callable[[], Partial]:
    """The attention of a plan alone: on sorted keys where the implementation takes them, else with its gathers."""
    copies: dict[str, Tensor] = {}
    if backend.name in TAKES_COPIES:
        copies = {"sorted_k": sort_tokens(inputs.k, plan.key_order), "sorted_v": sort_tokens(inputs.v, plan.key_order)}
    return functools.partial(
        backend.sparse_attention, *inputs, plan.query_order, plan.key_order, plan.selection,
        block_size=plan.config.block_size, scale=plan.scale, **copies,
    )  # fmt: skip
