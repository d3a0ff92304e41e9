"""Attention maps before and after sorting, with the kept blocks outlined (the paper's Fig. 5).

In: q and k of one layer and head. Out: cell averages of the dense attention map in a given token order, and a PNG.
Computed over slabs of query rows, so the whole map is never stored.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from baatt.analysis.oracle import run_means
from baatt.lab.plots import picture
from baatt.plan import Plan

CELLS = 256
SLAB_ROWS = 1024


class Panel(NamedTuple):
    """One map: mass [rows, columns] fp32, mean attention of each cell; plan: its orders and kept blocks; title."""

    mass: Tensor
    plan: Plan
    title: str


def attention_cells(q: Tensor, k: Tensor, plan: Plan, head: int, columns: int = CELLS) -> Tensor:
    """Mean dense attention of square cells of the map in the plan's token order, for batch entry 0.

    Args:
        q: [1, H, N, D]; k: [1, G, M, D]; head: query head.
        columns: at most as many rows and columns of cells.

    Returns:
        [ceil(N / c), ceil(M / c)] fp32 for cells of c tokens, c as small as `columns` allows. Each cell
        is scaled so that uniform attention is 1 everywhere.
    """
    key_head = head * k.shape[1] // q.shape[1]
    keys_used = int(plan.key_order.length[0])
    queries = q[0, head, plan.query_order.index[0, head]].float()
    keys = k[0, key_head, plan.key_order.index[0, key_head, :keys_used]].float()
    cell = -(-max(len(queries), keys_used) // columns)
    slab = max(cell, SLAB_ROWS // cell * cell)
    rows = []
    for first in range(0, len(queries), slab):
        attention = torch.softmax(plan.scale * queries[first : first + slab] @ keys.T, dim=-1)
        rows.append(run_means(run_means(attention, cell).T, cell).T)
    return torch.cat(rows) * keys_used


def most_structured_head(q: Tensor, k: Tensor, plan: Plan) -> int:
    """The head whose map differs most from block to block: the one worth looking at."""
    spread = [float(attention_cells(q, k, plan, head).clamp(min=1e-6).log().std()) for head in range(q.shape[1])]
    return max(range(len(spread)), key=spread.__getitem__)


def draw_maps(panels: list[Panel], head: int, caption: str, path: Path) -> None:
    """Write the panels side by side to a PNG.

    Raises:
        ImportError: matplotlib is missing (`pip install baatt[plots]`).
    """
    with picture(path, caption, 1, len(panels), (7.2 * len(panels), 7.6)) as axes:
        from matplotlib.collections import PatchCollection
        from matplotlib.colors import LogNorm
        from matplotlib.patches import Rectangle

        norm = LogNorm(vmin=0.03, vmax=max(float(panel.mass.max()) for panel in panels))
        for axis, panel in zip(axes[0], panels, strict=True):
            plan, size = panel.plan, panel.plan.config.block_size
            rows, columns = plan.query_order.index.shape[-1], int(plan.key_order.length[0])
            extent = (0, columns, rows, 0)
            image = axis.imshow(panel.mass.numpy(), norm=norm, cmap="magma", interpolation="nearest", extent=extent)
            boxes = [
                Rectangle((block * size, row * size), min(size, columns - block * size), min(size, rows - row * size))
                for row, blocks in enumerate(plan.selection.index[0, head].tolist())
                for block in blocks[: int(plan.selection.count[0, head, row])]
            ]
            axis.add_collection(PatchCollection(boxes, facecolor="none", edgecolor="#35d0ff", linewidth=0.4, alpha=0.8))
            axis.set(title=panel.title, xlabel="keys (in this order)", ylabel="queries (in this order)")
            axis.set(xlim=(0, columns), ylim=(rows, 0))
        axes[0][0].figure.colorbar(image, ax=axes[0], shrink=0.75, label="attention / uniform attention")
