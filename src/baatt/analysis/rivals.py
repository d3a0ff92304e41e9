"""Scores by name for what still chooses them beside the config; goes with its last caller."""

import dataclasses
import functools
from collections.abc import Callable

from torch import Tensor

from baatt.attention import ba_attention, make_plan
from baatt.config import BAAttConfig
from baatt.plan import Plan
from baatt.scores import SCORES
from baatt.types import BlockSelection

RIVALS = SCORES


def select_by(rival: str, q: Tensor, k: Tensor, plan: Plan) -> BlockSelection:
    """The selection of a score at the plan's sparsity, for keys without a mask."""
    config = dataclasses.replace(plan.config, score=rival)
    return make_plan(q, k, config, scale=plan.scale, impl="reference").selection


def rival_attention(rival: str, config: BAAttConfig, impl: str) -> Callable[..., Tensor]:
    """`ba_attention` with another score, (q, k, v, *, key_mask) -> out."""

    def attention(q: Tensor, k: Tensor, v: Tensor, /, *, key_mask: Tensor | None = None) -> Tensor:
        query_mask = key_mask if q.shape[2] == k.shape[2] else None
        sparse = functools.partial(ba_attention, config=dataclasses.replace(config, score=rival), impl=impl)
        return sparse(q, k, v, key_mask=key_mask, query_mask=query_mask)

    return attention
