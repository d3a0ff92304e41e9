"""The method on one page: check -> order -> summarise -> compare -> select, then attend.

`make_plan` decides which key blocks every query block attends to, `attend` carries the plan out, and `ba_attention`
does both. Holds no tensor arithmetic: the steps are the files of `baatt.stages` and `baatt.scores`, their fast twins
come from `baatt.backend`. Autocast is off inside, because scores in half precision would choose other blocks.
"""

import math
from typing import Any

import torch
from torch import Tensor

from baatt.backend import Backend, Workload, choose_backend
from baatt.checks import (
    check_constants,
    check_make_plan,
    check_plan,
    check_query_and_key,
    check_structure,
    check_value,
    refuse_arguments,
)
from baatt.config import BAAttConfig
from baatt.plan import Plan
from baatt.types import BlockSelection, Partial, SortedBlocks


def ba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: BAAttConfig = BAAttConfig(),  # noqa: B008  (frozen)
    *,
    causal: int | None = None,
    query_start: int | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    **others: Any,
) -> Tensor:
    """Block approximate sparse attention, bidirectional or (block-)causal, for inference.

    Beside `scaled_dot_product_attention(q, k, v)`: is_causal=True is causal=1, query_start=0; a boolean attn_mask that
    hides whole keys is key_mask; enable_gqa is not needed; dropout_p and other masks there are not. Calls that carry
    those go through `baatt.integrations.sdpa.sparse_sdpa` as they are, and stay dense where a mask is of another kind.

    Args:
        q: [B, H, N, D] after positional encoding; float64, float32, bfloat16 or float16.
        k: [B, G, M, D] with H % G == 0 (grouped queries); v: the same shape.
        config: the method's options.
        causal: tokens per causal block: a query sees the keys of its own block and of those before it; 1 is plain
            causal attention. None: bidirectional.
        query_start: position of the first query among the keys, where `causal` is given; blocks count from the first
            key. None: M - N, the queries stand at the last keys.
        key_mask: [B, M] bool, True = attend. Masked keys have no influence at all, whatever their values.
        query_mask: [B, N] bool, True = the row is wanted. Other rows take no part in choosing blocks, so that wanted
            ones do not depend on them; what they get means nothing. In padded self-attention it is the `key_mask`.
        scale: factor on q.k; None = 1 / sqrt(D).
        impl: "auto", "reference", "cpu", "triton" or "hopper".
        others: none; arguments of `scaled_dot_product_attention` are refused with what they are called here.

    Returns:
        [B, H, N, D] in q's dtype; rows that see no key that is not masked are 0.

    Raises:
        TypeError, ValueError: an argument that does not fit, saying what was required and what was given.
        RuntimeError: `impl` cannot run here, with the reason.
    """
    refuse_arguments(others)
    if torch.compiler.is_compiling():  # one opaque node of the graph, see baatt.operators
        check_constants(config, causal, query_start, scale)
        given = causal, query_start, key_mask, query_mask, scale, impl
        traced: Tensor = torch.ops.baatt.attention(q, k, v, *given, *config.values)
        return traced
    check_make_plan(q, k, config, key_mask, query_mask, scale)
    structure = check_structure(q, k, config, causal, query_start, key_mask, query_mask)
    check_value(q, k, v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    backend = _backend(impl, q, config, scale)
    plan, blocks = _decide(q, k, v, config, (key_mask, query_mask), structure, scale, backend)
    copies = {"sorted_k": blocks.sorted_k, "sorted_v": blocks.sorted_v}  # those that fell out on the way
    return _carry_out(q, k, v, plan, backend, {name: copy for name, copy in copies.items() if copy is not None}).out


def make_plan(
    q: Tensor,
    k: Tensor,
    config: BAAttConfig,
    *,
    causal: int | None = None,
    query_start: int | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Plan:
    """Decide which key blocks every query block attends to (E2-E7). Arguments and errors as `ba_attention`.

    Returns:
        Plan with query_order.index [B, H, N], key_order.index [B, G, M], selection.index [B, H, I, K] ascending
        ([B, H, I, J] with budget "head") and selection.count [B, H, I].
    """
    check_make_plan(q, k, config, key_mask, query_mask, scale)
    structure = check_structure(q, k, config, causal, query_start, key_mask, query_mask)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    backend = _backend(impl, q, config, scale)
    return _decide(q, k, None, config, (key_mask, query_mask), structure, scale, backend)[0]


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
    return attend_partial(q, k, v, plan, impl=impl).out


def attend_partial(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, impl: str = "auto") -> Partial:
    """`attend` with the log-sum-exp of every row, so that attention over other keys can be joined to it exactly.

    Of parts over keys that have none in common, weighted by exp(lse - logsumexp of all their lse), the outputs add up
    to attention over all of these keys: what ring attention exchanges. Arguments and errors as `attend`.

    Returns:
        Partial with out [B, H, N, D] in q's dtype and lse [B, H, N] in float32 (float64 for float64), the natural log;
        -inf for a row that sees no key, whose out is 0.
    """
    check_query_and_key(q, k)
    check_value(q, k, v)
    check_plan(plan, q, k)
    index, count, uneven = plan.selection
    plan = plan._replace(selection=BlockSelection(index.int(), count.int(), uneven))  # an edited one may have int64
    return _carry_out(q, k, v, plan, _backend(impl, q, plan.config, plan.scale), {})


def _backend(impl: str, q: Tensor, config: BAAttConfig, scale: float) -> Backend:
    return choose_backend(impl, q.device, Workload(q.dtype, q.shape[-1], config.block_size, scale))


def _decide(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    config: BAAttConfig,
    masks: tuple[Tensor | None, Tensor | None],
    structure: tuple[int, int] | None,
    scale: float,
    backend: Backend,
) -> tuple[Plan, SortedBlocks]:
    """The plan, and with it the sorted copies that fell out on the way.

    masks: of keys, of queries; structure: tokens per causal block, position of the first query.
    """
    with torch.autocast(q.device.type, enabled=False):
        blocks = backend.sort_blocks(q, k, v, config, *masks)
        summaries = blocks.query_summary, blocks.key_summary
        sight = None if structure is None else backend.look_back(q, k, *structure, config.block_size, *masks)
        selection = backend.choose_blocks(*summaries, config, scale, sight)
    return Plan(config, scale, blocks.query_order, blocks.key_order, *summaries, selection, sight), blocks


def _carry_out(q: Tensor, k: Tensor, v: Tensor, plan: Plan, backend: Backend, copies: dict[str, Tensor]) -> Partial:
    decided = plan.query_order, plan.key_order, plan.selection
    options = {"block_size": plan.config.block_size, "scale": plan.scale, "sight": plan.sight}
    with torch.autocast(q.device.type, enabled=False):
        return backend.sparse_attention(q, k, v, *decided, **options, **copies)
