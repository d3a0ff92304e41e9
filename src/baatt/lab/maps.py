"""Attention maps in the order of several settings, what each skips dimmed (as the paper's Fig. 5): a PNG or a page.

In: q and k of one layer, or a `Capture` and configs. Out: cell averages of the dense attention map in a given token
order, a picture of some, or the text of an HTML file of all layers and heads that needs nothing else: `maps_page.html`
with the maps put in. Computed over slabs of query rows, so the whole map is never stored.
"""

import base64
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baatt.attention import make_plan
from baatt.config import BAAttConfig
from baatt.lab.capture import Capture
from baatt.lab.describe import selection_name
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
#: How much white lies over a skipped block of a picture.
SHADE = 0.62


def paper_like(config: BAAttConfig) -> BAAttConfig:
    """The paper's setting at the block size and sparsity of another."""
    return replace(BAAttConfig.preset("paper"), block_size=config.block_size, sparsity=config.sparsity)


def compared(config: BAAttConfig) -> list[BAAttConfig]:
    """The paper's setting, a config and the unsorted oracle, all of its block size and sparsity; each once."""
    paper = paper_like(config)
    return list(dict.fromkeys([paper, config, replace(paper, sort="none", segment=None, score="oracle")]))


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
    table = torch.zeros(len(index), -(-int(plan.key_order.length[0]) // size), dtype=torch.bool, device=index.device)
    for row, blocks, kept in zip(table, index.long(), count.tolist(), strict=True):
        row[blocks[:kept]] = True
    return table


def draw_maps(q: Tensor, k: Tensor, plans: Sequence[Plan], head: int, caption: str, path: Path) -> None:
    """Write the maps of one head in the orders of several plans side by side to a PNG.

    Args:
        q: [1, H, N, D]; k: [1, G, M, D]; plans: of both.

    Raises:
        ImportError: matplotlib is missing (`pip install baatt[plots]`).
    """
    maps = [attention_cells(q, k, plan, head) for plan in plans]
    with picture(path, caption, 1, len(plans), (6.4 * len(plans), 6.6)) as axes:
        from matplotlib.collections import PatchCollection
        from matplotlib.colors import LogNorm
        from matplotlib.patches import Rectangle

        norm = LogNorm(vmin=DARKEST, vmax=max(float(cells.max()) for cells in maps))
        for axis, cells, plan in zip(axes[0], maps, plans, strict=True):
            size, rows = plan.config.block_size, plan.query_order.index.shape[-1]
            columns, kept = int(plan.key_order.length[0]), kept_table(plan, head)
            extent = (0, columns, rows, 0)
            image = axis.imshow(cells.numpy(), norm=norm, cmap="magma", interpolation="nearest", extent=extent)
            boxes = [
                Rectangle((block * size, row * size), min(size, columns - block * size), min(size, rows - row * size))
                for row, block in kept.nonzero().tolist()
            ]
            shade = np.zeros((*kept.shape, 4))
            shade[..., :] = (1, 1, 1, SHADE)
            shade[kept.numpy(), 3] = 0
            ends = (0, kept.shape[1] * size, kept.shape[0] * size, 0)  # the last blocks may reach beyond the map
            axis.imshow(shade, interpolation="nearest", extent=ends)
            axis.add_collection(PatchCollection(boxes, facecolor="none", edgecolor="#35d0ff", linewidth=0.4, alpha=0.8))
            share = float(_kept_shares(q, k, plan)[head])
            counted = f"keeps {int(kept.sum())} of {kept.numel()} block pairs, {100 * share:.1f} % of the attention"
            axis.set(title=f"{selection_name(vars(plan.config), ())}\n{counted}", xlim=(0, columns), ylim=(rows, 0))
            axis.set(xlabel="keys (in this order)", ylabel="queries (in this order)")
        axes[0][0].figure.colorbar(image, ax=axes[0], shrink=0.75, label="attention / uniform attention")


def maps_page(
    capture: Capture, configs: Sequence[BAAttConfig], title: str, progress: Callable[[], None] = lambda: None
) -> str:
    """The page.

    Args:
        configs: of one block size, side by side on the page. progress: called once for each layer and config.
    """
    names = [selection_name(vars(config), ()) for config in configs]
    maps: dict[str, dict[str, Any]] = {}
    brightest, first = 1.0, list[int]()
    for layer, (q, k, _) in capture.layers.items():
        for name, config in zip(names, configs, strict=True):
            plan = make_plan(q, k, config, scale=capture.scale, impl="reference")
            first = first or [layer, most_structured_head(q, k, plan)]
            shares = _kept_shares(q, k, plan).tolist()
            for head in range(q.shape[1]):
                cells = attention_cells(q, k, plan, head, PAGE_CELLS)
                brightest = max(brightest, float(cells.max()))
                maps[f"{layer}/{head}/{name}"] = _map(cells, plan, head) | {"mass": shares[head]}
            progress()
    data = {
        "title": title, "layers": list(capture.layers), "orders": names,
        "heads": {str(layer): found.q.shape[1] for layer, found in capture.layers.items()},
        "first": first, "block_size": configs[0].block_size, "low": DARKEST, "high": brightest, "maps": maps,
    }  # fmt: skip
    template = files("baatt.lab").joinpath("maps_page.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", json.dumps(data).replace("<", "\\u003c"))


def _kept_shares(q: Tensor, k: Tensor, plan: Plan) -> Tensor:
    """Mean share of the attention that every head's kept blocks hold, [H], for batch entry 0."""
    return kept_mass(block_mass(q, k, plan), plan.selection)[0].mean(dim=-1)


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
