"""How much attention mass a selection keeps, beside the oracle at equal budgets, and how far its output is from dense.

In: a `Capture` and configs. Out: one record per layer and config, ready for JSON. Works on one layer at a time. The
errors of the output are screens only: what counts is the accuracy on a task.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from baatt.analysis.oracle import block_mass, kept_mass, summarise
from baatt.attention import attend, make_plan
from baatt.config import BAAttConfig
from baatt.lab.capture import Capture, Heads


class OutputError(NamedTuple):
    """relative_l1: sum |x - y| / sum |y|; relative_l2: of the norms; cosine: mean over the rows, 1 = same direction."""

    relative_l1: float
    relative_l2: float
    cosine: float


class RecallRecord(NamedTuple):
    """One score at one budget, over all heads and query blocks of a layer; layer None: over all layers.

    sparsity: asked for; achieved_sparsity: share of block pairs skipped. recall_mean, recall_p5: of the attention mass
    that is kept. relative_l1, relative_l2, cosine: of the attention output against dense, None where not measured.
    """

    layer: int | None
    score: str
    beta: float
    sort: str
    segment: int | None
    block_size: int
    sparsity: float
    achieved_sparsity: float
    recall_mean: float
    recall_p5: float
    relative_l1: float | None
    relative_l2: float | None
    cosine: float | None


class _Found(NamedTuple):
    """Of one layer: kept mass [B, H, I], share of block pairs skipped, error of the output."""

    shares: Tensor
    skipped: float
    error: OutputError | None


def measure_recall(
    capture: Capture,
    configs: Sequence[BAAttConfig],
    *,
    outputs: bool = True,
    progress: Callable[[], None] | None = None,
) -> list[RecallRecord]:
    """Recall of every config: per layer, then over all layers.

    Args:
        configs: orders, scores and budgets to try.
        outputs: also attend and compare with dense attention, which takes most of the time.
        progress: called once for each layer and config.
    """
    found: dict[BAAttConfig, list[_Found]] = {config: [] for config in configs}
    records: list[RecallRecord] = []
    for layer, heads in capture.layers.items():
        q, k, v = heads.widened()
        dense = _dense(heads, capture.scale) if outputs else None
        masses: dict[tuple[str, int | None, int], Tensor] = {}
        for config in found:
            plan = make_plan(q, k, config, scale=capture.scale, impl="reference")
            order = config.sort, config.segment, config.block_size
            if order not in masses:
                masses[order] = block_mass(q, k, plan)
            pairs: int = plan.selection.count.numel() * plan.key_summary.size.shape[1]
            found[config].append(
                _Found(
                    kept_mass(masses[order], plan.selection),
                    1 - int(plan.selection.count.sum()) / pairs,
                    None if dense is None else output_error(attend(q, k, v, plan, impl="auto"), dense),
                )
            )
            records.append(_record(layer, config, found[config][-1:]))
            if progress is not None:
                progress()
    return records + [_record(None, config, layers) for config, layers in found.items()]


def output_error(found: Tensor, dense: Tensor) -> OutputError:
    """Error of `found` against `dense`, both [B, H, N, D].

    Raises:
        ValueError: different shapes, or a dense output of zeros only.
    """
    if found.shape != dense.shape:
        raise ValueError(f"found must have the shape of dense, {tuple(dense.shape)}, got {tuple(found.shape)}")
    found, dense = found.double(), dense.double()
    if not dense.any():
        raise ValueError("dense must not be zero everywhere")
    apart = found - dense
    # A row of zeros has no direction; where both are zero they agree.
    cosine = torch.nn.functional.cosine_similarity(found, dense, dim=-1)
    cosine = torch.where(~found.any(-1) & ~dense.any(-1), 1.0, cosine)
    return OutputError(
        float(apart.abs().sum() / dense.abs().sum()), float(apart.norm() / dense.norm()), float(cosine.mean())
    )


def _dense(heads: Heads, scale: float) -> Tensor:
    q, k, v = heads.widened()
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _record(layer: int | None, config: BAAttConfig, found: Sequence[_Found]) -> RecallRecord:
    recall = summarise(torch.cat([one.shares.flatten() for one in found]))
    errors = [one.error for one in found if one.error is not None]
    means = [sum(values) / len(errors) for values in zip(*errors, strict=True)] if errors else [None] * 3
    return RecallRecord(
        layer, config.score, config.beta, config.sort, config.segment, config.block_size, config.sparsity,
        sum(one.skipped for one in found) / len(found), recall.mean, recall.fifth_percentile, *means,
    )  # fmt: skip
