"""The method on one page: check -> order -> pool -> score -> select, then attend.

`make_plan` decides which key blocks every query block attends to, `attend` carries the plan out, and `ba_attention`
does both. Holds no tensor arithmetic: the steps are the files of `baatt.stages`, their fast twins come from
`baatt.backend`. Autocast is off inside, because scores in half precision would choose other blocks.
"""

import math

import torch
from torch import Tensor

from baatt.backend import choose_backend
from baatt.checks import check_make_plan, check_plan, check_tensors
from baatt.config import BAAttConfig
from baatt.stages.scoring import SCORES
from baatt.stages.selection import select_blocks
from baatt.stages.sorting import ORDERS
from baatt.types import Plan


def ba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: BAAttConfig = BAAttConfig(),  # noqa: B008  (frozen)
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Block approximate sparse attention, bidirectional, for inference.

    Args:
        q: [B, H, N, D] after positional encoding; float64, float32, bfloat16 or float16.
        k: [B, G, M, D] with H % G == 0 (grouped queries); v: the same shape.
        config: the method's dials.
        key_mask: [B, M] bool, True = attend. Masked keys have no influence at all, whatever their values.
        scale: factor on q.k; None = 1 / sqrt(D).
        impl: "auto", "reference", "cpu", "triton" or "hopper".

    Returns:
        [B, H, N, D] in q's dtype; rows of an entry whose keys are all masked are 0.

    Raises:
        TypeError, ValueError: an argument that does not fit, saying what was required and what was given.
        RuntimeError: `impl` cannot run here, with the reason.
    """
    check_tensors(q, k, v)
    plan = make_plan(q, k, config, key_mask=key_mask, scale=scale, impl=impl)
    return attend(q, k, v, plan, impl=impl)


def make_plan(
    q: Tensor,
    k: Tensor,
    config: BAAttConfig,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Plan:
    """Decide which key blocks every query block attends to (E2-E7). Arguments and errors as `ba_attention`.

    Returns:
        Plan with query_order.index [B, H, N], key_order.index [B, G, M], selection.index [B, H, I, K] ascending and
        selection.count [B, H, I].
    """
    check_make_plan(q, k, config, key_mask, scale)
    backend = choose_backend(impl, q.device)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    order_queries, order_keys = ORDERS[config.sort]

    with torch.autocast(q.device.type, enabled=False):
        query_order = order_queries(q, config.segment, None)
        key_order = order_keys(k, config.segment, key_mask)
        query_stats = backend.pool_blocks(q, query_order, config.block_size)
        key_stats = backend.pool_blocks(k, key_order, config.block_size)
        scores = SCORES[config.score](query_stats, key_stats, scale=scale, beta=config.beta)
        selection = select_blocks(scores, key_stats.size, config.sparsity)
    return Plan(config, scale, query_order, key_order, query_stats, key_stats, selection)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, impl: str = "auto") -> Tensor:
    """Exact attention over the key blocks of a plan (E8), in the original token order.

    Args:
        q: [B, H, N, D]; k, v: [B, G, M, D], the shapes the plan was made for.
        plan: from `make_plan`, or edited: a plan is data.
        impl: as `ba_attention`.

    Returns:
        [B, H, N, D] in q's dtype.

    Raises:
        TypeError, ValueError: tensors that do not fit one another or the plan.
        RuntimeError: `impl` cannot run here, with the reason.
    """
    check_tensors(q, k, v)
    check_plan(plan, q, k)
    backend = choose_backend(impl, q.device)
    orders_and_blocks = (plan.query_order, plan.key_order, plan.selection)
    with torch.autocast(q.device.type, enabled=False):
        partial = backend.sparse_attention(
            q, k, v, *orders_and_blocks, block_size=plan.config.block_size, scale=plan.scale
        )
    return partial.out
