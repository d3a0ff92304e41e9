"""Why an order helps or hurts a layer: how norms vary, how wide blocks are, and over how many blocks attention spreads.

In: a `Capture` and options. Out: one record per layer and order, ready for JSON. Sorting by norm makes the norms inside
a block alike; it also parts neighbours, so the attention of a block may spread over more blocks. Both are measured.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from baatt.analysis.oracle import block_mass
from baatt.attention import make_plan
from baatt.config import BAAttConfig
from baatt.lab.bound import extents
from baatt.lab.capture import Capture
from baatt.plan import Plan

#: Share of a query block's attention mass that counts as all that matters.
MOST = 0.9


class LayerRecord(NamedTuple):
    """One layer in one order; means over heads.

    query_norm_variation, key_norm_variation: standard deviation of the tokens' norms over their mean, the same in every
    order. query_radius, key_radius: largest distance of a token to its block's mean over the mean norm, mean over
    blocks. blocks_for_most: share of the key blocks that hold 90 % of a query block's mass. on_diagonal: share of the
    mass in the key block at the query block's own place and its two neighbours.
    """

    layer: int
    sort: str
    segment: int | None
    block_size: int
    query_norm_variation: float
    key_norm_variation: float
    query_radius: float
    key_radius: float
    blocks_for_most: float
    on_diagonal: float


def measure_layers(
    capture: Capture, configs: Sequence[BAAttConfig], progress: Callable[[], None] | None = None
) -> list[LayerRecord]:
    """All layers of a capture in all orders."""
    records = []
    for layer, heads in capture.layers.items():
        q, k, _ = heads.widened()
        for config in configs:
            plan = make_plan(q, k, config, scale=capture.scale, impl="reference")
            mass = block_mass(q, k, plan)
            query_radius, key_radius = (
                float(found.radius.mean() / x.norm(dim=-1).mean())
                for found, x in zip(extents(q, k, plan), (q, k), strict=True)
            )
            records.append(
                LayerRecord(
                    layer, config.sort, config.segment, config.block_size, _variation(q), _variation(k),
                    query_radius, key_radius, _blocks_for_most(mass, plan), _on_diagonal(mass),
                )
            )  # fmt: skip
            if progress is not None:
                progress()
    return records


def _variation(x: Tensor) -> float:
    norms = x.norm(dim=-1)
    return float((norms.std(dim=-1) / norms.mean(dim=-1)).mean())


def _blocks_for_most(mass: Tensor, plan: Plan) -> float:
    """Blocks needed from the heaviest on, over the blocks there are."""
    needed = (mass.sort(dim=-1, descending=True).values.cumsum(dim=-1) < MOST).sum(dim=-1) + 1
    there = rearrange((plan.key_summary.size > 0).sum(dim=-1), "b -> b 1 1")
    return float((torch.minimum(needed, there) / there).mean())


def _on_diagonal(mass: Tensor) -> float:
    rows, columns = mass.shape[2:]
    own = (torch.arange(rows, device=mass.device) + 0.5) * columns / rows
    near = (rearrange(own, "i -> i 1") - torch.arange(columns, device=mass.device) - 0.5).abs() < 1.5
    return float((mass * near).sum(dim=-1).mean())
