"""The operator taken apart: one function per stage, with everything it needs at hand, and the attention kernel alone.

The only file here that knows how a `Backend` is put together; `benchmark` times what it returns.
"""

from collections.abc import Callable
from typing import Any

from baatt.analysis.baselines import Inputs, sort_tokens
from baatt.backend import Backend
from baatt.types import Partial, Plan

#: Implementations whose attention works on sorted copies, which `pool` makes.
SORTS = ("triton", "hopper")
STAGES = ("order", "pool", "score_and_select", "attend")


def stage_functions(inputs: Inputs, plan: Plan, backend: Backend) -> dict[str, Callable[[], Any]]:
    """What to call for each of `STAGES`, as `ba_attention` does it with this backend.

    Args:
        inputs: q, k, v in the original order.
        plan: made from them.
        backend: of the implementation under test.
    """
    q, k, v = inputs
    config = plan.config
    order_queries, order_keys = backend.orders[config.sort]

    def order() -> Any:
        return order_queries(q, config.segment, None), order_keys(k, config.segment, None)

    def pool() -> Any:
        queries = backend.pool_tokens(q, plan.query_order, config.block_size)
        keys = backend.pool_tokens(k, plan.key_order, config.block_size)
        if backend.name not in SORTS:
            return queries, keys
        from baatt.kernels.triton_pooling import permute

        return queries, keys, permute(v, plan.key_order)

    def score_and_select() -> Any:
        return backend.choose_blocks(plan.query_stats, plan.key_stats, config, plan.scale)

    functions = order, pool, score_and_select, attention_kernel(inputs, plan, backend)
    return dict(zip(STAGES, functions, strict=True))


def attention_kernel(inputs: Inputs, plan: Plan, backend: Backend) -> Callable[[], Partial]:
    """The attention of a plan alone: on sorted copies where the implementation makes them, else with its gathers."""
    size, scale = plan.config.block_size, plan.scale
    if backend.name not in SORTS:
        sides = plan.query_order, plan.key_order, plan.selection
        return lambda: backend.sparse_attention(*inputs, *sides, block_size=size, scale=scale)
    if backend.name == "hopper":
        from baatt.kernels.hopper import attend_sorted
    else:
        from baatt.kernels.triton_attention import attend_sorted
    orders = plan.query_order, plan.key_order, plan.key_order
    q, k, v = (sort_tokens(x, order) for x, order in zip(inputs, orders, strict=True))
    length = plan.key_order.length
    return lambda: attend_sorted(q, k, v, plan.query_order, length, plan.selection, block_size=size, scale=scale)
