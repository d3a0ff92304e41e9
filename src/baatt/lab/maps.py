"""Attention maps before and after sorting, with the kept blocks outlined (the paper's Fig. 5): a PNG, or a page.

In: q and k of one layer, or a `Capture` and configs. Out: cell averages of the dense attention map in a given token
order, a picture of some, or the text of an HTML file of all layers and heads that needs nothing else: `maps_page.html`
with the maps put in. Computed over slabs of query rows, so the whole map is never stored.
"""

import base64
import json
import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baatt.attention import make_plan
from baatt.config import BAAttConfig
from baatt.lab.capture import Capture
from baatt.lab.plots import picture
from baatt.lab.recall import block_mass, kept_mass
from baatt.plan import Plan

CELLS = 256
#: Columns of a map of a page at most: 128 KiB for three orders of one head.
PAGE_CELLS = 128
SLAB_ROWS = 1024
#: Colours of a page begin at this share of uniform attention.
DARKEST = 0.03
LEVELS = 65535


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
        [ceil(N / c), ceil(M / c)] fp32 for cells of c tokens, c as small as `columns` allows, on the CPU. Each cell is
        scaled so that uniform attention is 1 everywhere.
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
        rows.append(torch.nn.functional.avg_pool2d(attention[None], cell, ceil_mode=True)[0])
    return torch.cat(rows).cpu() * keys_used


def most_structured_head(q: Tensor, k: Tensor, plan: Plan) -> int:
    """The head whose map differs most from block to block: the one worth looking at."""
    spread = [float(attention_cells(q, k, plan, head).clamp(min=1e-6).log().std()) for head in range(q.shape[1])]
    return max(range(len(spread)), key=spread.__getitem__)


def kept_table(plan: Plan, head: int) -> Tensor:
    """Which blocks a head keeps, [I, J] bool on the CPU, for batch entry 0; J without blocks that are masked."""
    index, count = (x[0, head].cpu() for x in plan.selection[:2])
    size = plan.config.block_size
    table = torch.zeros(len(index), -(-int(plan.key_order.length[0]) // size), dtype=torch.bool)
    for row, blocks, kept in zip(table, index.long(), count.tolist(), strict=True):
        row[blocks[:kept]] = True
    return table


def draw_maps(panels: Sequence[Panel], head: int, caption: str, path: Path) -> None:
    """Write the panels side by side to a PNG.

    Raises:
        ImportError: matplotlib is missing (`pip install baatt[plots]`).
    """
    with picture(path, caption, 1, len(panels), (7.2 * len(panels), 7.6)) as axes:
        from matplotlib.collections import PatchCollection
        from matplotlib.colors import LogNorm
        from matplotlib.patches import Rectangle

        norm = LogNorm(vmin=0.03, vmax=max(float(panel.mass.max()) for panel in panels))
        for axis, (mass, plan, title) in zip(axes[0], panels, strict=True):
            size, rows = plan.config.block_size, plan.query_order.index.shape[-1]
            columns = int(plan.key_order.length[0])
            extent = (0, columns, rows, 0)
            image = axis.imshow(mass.numpy(), norm=norm, cmap="magma", interpolation="nearest", extent=extent)
            boxes = [
                Rectangle((block * size, row * size), min(size, columns - block * size), min(size, rows - row * size))
                for row, block in kept_table(plan, head).nonzero().tolist()
            ]
            axis.add_collection(PatchCollection(boxes, facecolor="none", edgecolor="#35d0ff", linewidth=0.4, alpha=0.8))
            axis.set(title=title, xlabel="keys (in this order)", ylabel="queries (in this order)")
            axis.set(xlim=(0, columns), ylim=(rows, 0))
        axes[0][0].figure.colorbar(image, ax=axes[0], shrink=0.75, label="attention / uniform attention")


def maps_page(
    capture: Capture,
    configs: Sequence[BAAttConfig],
    name: Callable[[BAAttConfig], str],
    title: str,
    progress: Callable[[], None] = lambda: None,
) -> str:
    """The page.

    Args:
        configs: orders and budgets of one block size, side by side on the page. name: of each, all different.
        progress: called once for each layer and config.
    """
    maps: dict[str, dict[str, Any]] = {}
    brightest, first = 1.0, list[int]()
    for layer, (q, k, _) in capture.layers.items():
        for config in configs:
            plan = make_plan(q, k, config, scale=capture.scale, impl="reference")
            first = first or [layer, most_structured_head(q, k, plan)]
            shares = kept_mass(block_mass(q, k, plan), plan.selection)[0].mean(dim=-1).tolist()
            for head in range(q.shape[1]):
                cells = attention_cells(q, k, plan, head, PAGE_CELLS)
                brightest = max(brightest, float(cells.max()))
                maps[f"{layer}/{head}/{name(config)}"] = _map(cells, plan, head) | {"mass": shares[head]}
            progress()
    data = {
        "title": title, "layers": list(capture.layers), "orders": [name(one) for one in configs],
        "heads": {str(layer): found.q.shape[1] for layer, found in capture.layers.items()},
        "first": first, "block_size": configs[0].block_size, "low": DARKEST, "high": brightest, "maps": maps,
    }  # fmt: skip
    template = files("baatt.lab").joinpath("maps_page.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", json.dumps(data).replace("<", "\\u003c"))


def _map(cells: Tensor, plan: Plan, head: int) -> dict[str, Any]:
    queries, keys = plan.query_order.index.shape[-1], int(plan.key_order.length[0])
    kept = kept_table(plan, head)
    positive = cells[cells > 0].log()
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (0.0, 1.0)
    high = max(high, math.nextafter(low, math.inf))
    codes = 1 + ((cells.clamp(min=1e-45).log() - low) / (high - low) * (LEVELS - 1)).clamp(0, LEVELS - 1).round()
    packed = torch.where(cells > 0, codes, 0).to(torch.int32).numpy().astype("<u2").tobytes()
    return {
        "cells": base64.b64encode(packed).decode(), "range": [low, high], "shape": list(cells.shape),
        "cell": -(-max(queries, keys) // PAGE_CELLS), "tokens": [queries, keys], "blocks": list(kept.shape),
        "kept": base64.b64encode(kept.numpy().tobytes()).decode(), "count": int(kept.sum()), "pairs": kept.numel(),
    }  # fmt: skip
