"""Scores by name for what still chooses them beside the config; goes with its last caller."""

import dataclasses

from torch import Tensor

from baatt.attention import make_plan
from baatt.plan import Plan
from baatt.scores import SCORES
from baatt.types import BlockSelection

RIVALS = SCORES


def select_by(rival: str, q: Tensor, k: Tensor, plan: Plan) -> BlockSelection:
    """The selection of a score at the plan's sparsity, for keys without a mask."""
    config = dataclasses.replace(plan.config, score=rival)
    return make_plan(q, k, config, scale=plan.scale, impl="reference").selection
