"""What `baatt analyze` measures on a capture: recall of every score at equal budgets, and the bound against the truth.

In: a `Capture` and dials. Out: lists of records, one per combination, ready for JSON. Works on one layer at a time.
Does not print, draw or read files.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from baatt.analysis.bound import deviation, pearson
from baatt.analysis.capture import Capture, Heads
from baatt.analysis.error import OutputError, output_error
from baatt.analysis.oracle import block_mass, kept_mass, summarise
from baatt.attention import attend, make_plan
from baatt.config import BAAttConfig
from baatt.plan import Plan

#: Points of a scatter plot that are kept, of any number measured.
POINTS = 250


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


class BoundRecord(NamedTuple):
    """The bound U against the truth in one layer and order, over all pairs of blocks.

    correlation_largest, correlation_mean: Pearson's R of U with the largest and the mean deviation of a logit from its
    block logit; bound_mean, largest_mean, deviation_mean: of all three; points: [U, largest deviation] of some pairs,
    evenly spread over the list of all.
    """

    layer: int
    sort: str
    segment: int | None
    block_size: int
    pairs: int
    correlation_largest: float
    correlation_mean: float
    bound_mean: float
    largest_mean: float
    deviation_mean: float
    points: list[list[float]]


def measure_recall(
    capture: Capture,
    configs: Sequence[BAAttConfig],
    sparsities: Sequence[float],
    scores: Sequence[str],
    *,
    outputs: bool = True,
    progress: Callable[[], None] | None = None,
) -> list[RecallRecord]:
    """Recall of every score, config and sparsity: per layer, then over all layers.

    Args:
        configs: orders, blocks and beta to try; their sparsity is replaced.
        scores: names in `baatt.scores.SCORES`.
        outputs: also attend and compare with dense attention, which takes most of the time.
        progress: called once for each layer and config.
    """
    shares: dict[tuple[BAAttConfig, str], list[Tensor]] = {}
    errors: dict[tuple[BAAttConfig, str], list[OutputError]] = {}
    skipped: dict[tuple[BAAttConfig, str], list[float]] = {}
    records: list[RecallRecord] = []
    for layer, heads in capture.layers.items():
        dense = _dense(heads, capture.scale) if outputs else None
        for config in configs:
            for chosen, score, plan, share in _selections(heads, capture.scale, config, sparsities, scores):
                key = chosen, score
                found = None
                if dense is not None:
                    found = output_error(attend(*_wide(heads), plan, impl="auto"), dense)
                    errors.setdefault(key, []).append(found)
                shares.setdefault(key, []).append(share.flatten())
                skipped.setdefault(key, []).append(_skipped(plan))
                records.append(_recall_record(layer, key, [share], [skipped[key][-1]], [found] if found else []))
            if progress is not None:
                progress()
    for key in shares:
        records.append(_recall_record(None, key, shares[key], skipped[key], errors.get(key, [])))
    return records


def measure_bound(
    capture: Capture, configs: Sequence[BAAttConfig], progress: Callable[[], None] | None = None
) -> list[BoundRecord]:
    """U of E9 and the true deviations for every layer and order (the paper's Fig. 2)."""
    records = []
    for (layer, heads), config in itertools.product(capture.layers.items(), configs):
        q, k, _ = _wide(heads)
        plan = make_plan(q, k, config, scale=capture.scale, impl="reference")
        found = deviation(q, k, plan)
        flat = [x.flatten()[x.flatten().isfinite()] for x in found]
        step = max(1, len(flat[0]) // POINTS)
        points = torch.stack([flat[0], flat[1]], dim=1)[::step]
        bound_mean, largest_mean, deviation_mean = (float(x.mean()) for x in flat)
        records.append(
            BoundRecord(
                layer, config.sort, config.segment, config.block_size, len(flat[0]),
                pearson(flat[0], flat[1]), pearson(flat[0], flat[2]), bound_mean, largest_mean, deviation_mean,
                [[round(float(value), 5) for value in point] for point in points],
            )
        )  # fmt: skip
        if progress is not None:
            progress()
    return records


def _selections(
    heads: Heads, scale: float, config: BAAttConfig, sparsities: Sequence[float], scores: Sequence[str]
) -> Iterator[tuple[BAAttConfig, str, Plan, Tensor]]:
    """Every score at every budget: its config, name, plan, and the kept mass [B, H, I]."""
    q, k, _ = _wide(heads)
    plan = make_plan(q, k, config, scale=scale, impl="reference")
    mass = block_mass(q, k, plan)
    for sparsity, score in itertools.product(sparsities, scores):
        chosen = dataclasses.replace(config, sparsity=sparsity)
        selected = make_plan(q, k, dataclasses.replace(chosen, score=score), scale=scale, impl="reference")
        yield chosen, score, selected, kept_mass(mass, selected.selection)


def _dense(heads: Heads, scale: float) -> Tensor:
    q, k, v = _wide(heads)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _wide(heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """At least float32, so that what is measured is the selection and not the rounding."""
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in heads)
    return q, k, v


def _skipped(plan: Plan) -> float:
    pairs: int = plan.selection.count.numel() * plan.key_summary.size.shape[1]
    return 1 - int(plan.selection.count.sum()) / pairs


def _recall_record(
    layer: int | None,
    key: tuple[BAAttConfig, str],
    shares: Sequence[Tensor],
    skipped: Sequence[float],
    errors: Sequence[OutputError],
) -> RecallRecord:
    config, score = key
    recall = summarise(torch.cat([share.flatten() for share in shares]))
    means: list[float | None] = [None] * 3
    if errors:
        means = [sum(values) / len(errors) for values in zip(*errors, strict=True)]
    return RecallRecord(
        layer, score, config.beta, config.sort, config.segment, config.block_size, config.sparsity,
        sum(skipped) / len(skipped), recall.mean, recall.fifth_percentile, *means,
    )  # fmt: skip
