"""How much attention mass a selection keeps, beside the oracle at equal budgets, and how far its output is from dense.

In: q and k of a layer and a `Plan`, or a `Capture` and configs. Out: the mass of every block pair (E1) and the share of
it that is kept; one record per layer and config, ready for JSON. Works on one layer at a time. The errors of the output
are screens only: what counts is the accuracy on a task.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from baatt.attention import attend, make_plan
from baatt.backend import Workload, choose_backend, gpu_comparison
from baatt.config import BAAttConfig
from baatt.lab.capture import Capture
from baatt.plan import Plan
from baatt.scores import exact
from baatt.stages.dense import dense_attention
from baatt.types import BlockSelection, widest


class OutputError(NamedTuple):
    """relative_l1: sum |x - y| / sum |y|; relative_l2: of the norms; cosine: mean over the rows, 1 = same direction."""

    relative_l1: float
    relative_l2: float
    cosine: float


def block_mass(q: Tensor, k: Tensor, plan: Plan, *, impl: str = "auto") -> Tensor:
    """Attention mass of every block pair in the plan's token order, averaged over the queries of a block (E1).

    Args:
        q: [B, H, N, D]; k: [B, G, M, D], in the original order.
        plan: gives orders, block size and scale; its selection is not looked at.
        impl: "reference" (eager, any device and dtype), "triton" (a GPU, any dtype but float64) or "auto": "triton"
            for bfloat16 and float16 where it can run, else "reference". float32 has no matrix units to gain from.

    Returns:
        [B, H, I, J] float32 (float64 for float64), each row sums to 1, or less by the share of its queries that
        see no key.

    Raises:
        ValueError: an unknown `impl`.
        RuntimeError: `impl` "triton" cannot run here, with the reason.
    """
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl must be one of ['auto', 'reference', 'triton'], got {impl!r}")
    compare = exact.compare
    if impl == "triton" or (impl == "auto" and q.is_cuda):
        workload = Workload(q.dtype, q.shape[-1], plan.config.block_size, plan.scale)
        if choose_backend(impl, q.device, workload).name != "reference":
            compare = gpu_comparison(exact.compare, torch.bfloat16 if impl == "triton" else q.dtype)
    queries, keys = (exact.summarise(x, y, plan.config) for x, y in ((q, plan.query_order), (k, plan.key_order)))
    return compare(queries, keys, plan.config, plan.scale, plan.sight)


def kept_mass(mass: Tensor, selection: BlockSelection) -> Tensor:
    """Share of the attention mass in the kept blocks, [B, H, I]."""
    slots = torch.arange(selection.index.shape[-1], device=mass.device) < selection.count[..., None]
    return torch.where(slots, mass.gather(-1, selection.index.long()), 0).sum(dim=-1)


def measure_recall(
    capture: Capture,
    configs: Sequence[BAAttConfig],
    progress: Callable[[], None] = lambda: None,
    *,
    outputs: bool = True,
) -> list[dict[str, Any]]:
    """Recall of every config: per layer, then over all layers, where the layer is None.

    Args:
        configs: orders, scores and budgets to try.
        progress: called once for each layer and config.
        outputs: also attend and compare with dense attention, which takes most of the time.

    Returns:
        Records: the config; achieved_sparsity, share of block pairs skipped; recall_mean and recall_p5 of the attention
        mass that is kept; relative_l1, relative_l2 and cosine of the output against dense, None where not measured.
    """
    found: dict[BAAttConfig, list[tuple[Tensor, float, OutputError | None]]] = {config: [] for config in configs}
    records = []
    for layer, heads in capture.layers.items():
        q, k, v = heads.widened()
        dense = dense_attention(q, k, v, scale=capture.scale) if outputs else None
        masses: dict[tuple[str, int | None, int], Tensor] = {}
        for config in found:
            plan = make_plan(q, k, config, scale=capture.scale, impl="reference")
            order = config.sort, config.segment, config.block_size
            if order not in masses:
                masses[order] = block_mass(q, k, plan)
            pairs: int = plan.selection.count.numel() * plan.key_summary.size.shape[1]
            error = None if dense is None else output_error(attend(q, k, v, plan, impl="auto"), dense)
            shares = kept_mass(masses[order], plan.selection)
            found[config].append((shares, 1 - int(plan.selection.count.sum()) / pairs, error))
            records.append(_record(layer, config, found[config][-1:]))
            progress()
    return records + [_record(None, config, layers) for config, layers in found.items()]


def output_error(found: Tensor, dense: Tensor) -> OutputError:
    """Error of `found` against `dense`, both [B, H, N, D].

    Raises:
        ValueError: different shapes, or a dense output of zeros only.
    """
    if found.shape != dense.shape:
        raise ValueError(f"found must have the shape of dense, {tuple(dense.shape)}, got {tuple(found.shape)}")
    found, dense = (x.to(widest(x.device)) for x in (found, dense))
    if not dense.any():
        raise ValueError("dense must not be zero everywhere")
    apart = found - dense
    # A row of zeros has no direction; where both are zero they agree.
    cosine = torch.nn.functional.cosine_similarity(found, dense, dim=-1)
    cosine = torch.where(~found.any(-1) & ~dense.any(-1), 1.0, cosine)
    return OutputError(
        float(apart.abs().sum() / dense.abs().sum()), float(apart.norm() / dense.norm()), float(cosine.mean())
    )


def _record(
    layer: int | None, config: BAAttConfig, found: Sequence[tuple[Tensor, float, OutputError | None]]
) -> dict[str, Any]:
    # In NumPy, for torch.quantile refuses large inputs.
    kept = torch.cat([shares.flatten() for shares, _, _ in found]).cpu().double().numpy()
    errors = [error for _, _, error in found if error is not None]
    means = [sum(values) / len(errors) for values in zip(*errors, strict=True)] if errors else [None] * 3
    return {
        "layer": layer,
        **dataclasses.asdict(config),
        "achieved_sparsity": sum(skipped for _, skipped, _ in found) / len(found),
        "recall_mean": float(kept.mean()),
        "recall_p5": float(np.quantile(kept, 0.05)),
        **dict(zip(OutputError._fields, means, strict=True)),
    }
