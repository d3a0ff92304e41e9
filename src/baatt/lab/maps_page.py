"""Attention maps of all layers and heads as one HTML file that needs nothing else: pick, compare, read values.

In: a `Capture` and options. Out: the text of the page: `maps_page.html` with the maps put in.
"""

import base64
import json
import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from baatt.analysis.oracle import block_mass, kept_mass
from baatt.attention import make_plan
from baatt.config import BAAttConfig
from baatt.lab.capture import Capture
from baatt.lab.maps import attention_cells, most_structured_head
from baatt.plan import Plan

#: Columns of a map at most: 128 KiB of page for three orders of one head.
PAGE_CELLS = 128
#: Colours begin at this share of uniform attention.
DARKEST = 0.03
LEVELS = 65535


def maps_page(
    capture: Capture,
    configs: Sequence[BAAttConfig],
    name: Callable[[BAAttConfig], str],
    title: str,
    progress: Callable[[], None] | None = None,
) -> str:
    """The page.

    Args:
        configs: orders and budgets of one block size, side by side on the page. name: of each, all different.
        progress: called once for each layer and config.
    """
    maps: dict[str, dict[str, Any]] = {}
    brightest = 1.0
    first_layer = next(iter(capture.layers))
    for layer, (q, k, _) in capture.layers.items():
        for config in configs:
            plan = make_plan(q, k, config, scale=capture.scale, impl="reference")
            shares = kept_mass(block_mass(q, k, plan), plan.selection)[0].mean(dim=-1).tolist()
            for head in range(q.shape[1]):
                cells = attention_cells(q, k, plan, head, PAGE_CELLS).cpu()
                brightest = max(brightest, float(cells.max()))
                maps[f"{layer}/{head}/{name(config)}"] = _map(cells, plan, head, k.shape[2]) | {"mass": shares[head]}
            if progress is not None:
                progress()
    q, k, _ = capture.layers[first_layer]
    plan = make_plan(q, k, configs[0], scale=capture.scale, impl="reference")
    data = {
        "title": title, "layers": list(capture.layers), "orders": [name(one) for one in configs],
        "heads": {str(layer): found.q.shape[1] for layer, found in capture.layers.items()},
        "first": [first_layer, most_structured_head(q, k, plan)], "block_size": configs[0].block_size,
        "low": DARKEST, "high": brightest, "maps": maps,
    }  # fmt: skip
    template = files("baatt.lab").joinpath("maps_page.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", json.dumps(data).replace("<", "\\u003c"))


def _map(cells: Tensor, plan: Plan, head: int, keys: int) -> dict[str, Any]:
    """One map in the words of the page; batch entry 0."""
    queries, keys = plan.query_order.index.shape[-1], min(keys, int(plan.key_order.length[0]))
    size = plan.config.block_size
    kept = torch.zeros(-(-queries // size), -(-keys // size), dtype=torch.uint8)
    for row, (blocks, count) in enumerate(
        zip(plan.selection.index[0, head].tolist(), plan.selection.count[0, head].tolist(), strict=True)
    ):
        kept[row, blocks[:count]] = 1
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
