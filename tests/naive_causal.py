"""Causal BA-Att in Python loops, float64, unsorted: what every query may see, and what follows for its block.

As `tests.naive`, whose functions it uses, it shares no code with the package.
"""

import math

import torch
from torch import Tensor

from tests.naive import (
    naive_blocks,
    naive_cluster_scores,
    naive_cluster_tokens,
    naive_clusters,
    naive_moments,
    naive_row,
    naive_score,
)


def naive_visible(keys: list[int], position: int, causal: int) -> list[int]:
    """Of the unmasked keys those that a query at `position` sees."""
    return [m for m in keys if m // causal <= position // causal]


def naive_own(keys: list[int], visible: list[int], position: int) -> int:
    """Number of the key at a query's place among the unmasked ones: it, or the next one it sees, or the last one."""
    later = [m for m in visible if m >= position]
    return keys.index(later[0] if later else visible[-1])


def naive_causal_selection(scores: list[float], own: set[int], sparsity: float, keep_first: int) -> list[int]:
    """E7 for one query block, from the scores of the key blocks it sees."""
    if not scores:
        return []
    kept = max(1, math.ceil((1 - sparsity) * len(scores)), len(own))
    chosen = set(own)
    for block in range(min(keep_first, len(scores))):
        if len(chosen) < kept:
            chosen.add(block)
    for block in sorted(range(len(scores)), key=lambda block: (-scores[block], block)):
        if len(chosen) < kept:
            chosen.add(block)
    return sorted(chosen)


def naive_mass(rows: list[Tensor], visible: list[list[int]], k: Tensor, blocks: list[list[int]], scale: float) -> list:
    """E1 for one query block: of every key block the mean of what its queries attend to, each over what it sees."""
    shares = [0.0] * len(blocks)
    for row, keys in zip(rows, visible, strict=True):
        weights = {m: math.exp(float(row @ k[m]) * scale) for m in keys}
        for j, block in enumerate(blocks):
            shares[j] += sum(weights.get(m, 0.0) for m in block) / max(sum(weights.values()), 1e-300) / len(rows)
    return shares


def naive_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config,
    *,
    causal: int,
    query_start: int,
    scale: float,
    key_mask=None,
    query_mask=None,
) -> tuple[Tensor, list[list[list[list[int]]]]]:
    """Out [B, H, N, D], NaN where a row is not wanted, and the kept key blocks per [B][H][I]."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, queries, _ = q.shape
    out, selection, size = torch.full_like(q, math.nan), [], config.block_size
    for b in range(batch):
        keys = [m for m in range(k.shape[2]) if key_mask is None or key_mask[b, m]]
        wanted = [n for n in range(queries) if query_mask is None or query_mask[b, n]]
        key_blocks = naive_blocks(keys, size)
        selection.append([])
        for h in range(heads):
            rows, columns, values = q[b, h], k[b, h * k.shape[1] // heads], v[b, h * k.shape[1] // heads]
            selection[b].append([])
            for block in naive_blocks(wanted, size):
                visible = {n: naive_visible(keys, query_start + n, causal) for n in block}
                seen = [some for some in key_blocks if any(set(some) & set(visible[n]) for n in block)]
                own = [naive_own(keys, visible[n], query_start + n) // size for n in block if visible[n]]
                if config.score == "covariance":
                    mine = naive_moments(rows, block)
                    scores = [naive_score(mine, naive_moments(columns, some), scale, config.beta) for some in seen]
                elif config.score == "exact":
                    some = [rows[n] for n in block], [visible[n] for n in block]
                    scores = naive_mass(*some, columns, seen, scale)
                else:
                    options = config.representatives, config.refinements
                    mine, *theirs = (
                        naive_clusters(x, naive_cluster_tokens(x, some, *options))
                        for x, some in ((rows, block), *((columns, some) for some in seen))
                    )
                    scores = naive_cluster_scores(mine, theirs, scale, config.peak) if seen else []
                ends = {min(own), max(own)} if own else set()
                kept = naive_causal_selection(scores, ends, config.sparsity, config.keep_first)
                selection[b][h].append(kept)
                for n in block:
                    attended = [m for j in kept for m in key_blocks[j] if m in visible[n]]
                    out[b, h, n] = naive_row(rows[n], columns, values, attended, scale)[0]
    return out, selection
