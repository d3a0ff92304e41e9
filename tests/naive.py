"""BA-Att written naively from its equations: Python loops over batch, heads, blocks and tokens, float64, one file.

Shares no code with the package and is as slow as it looks. Every function takes one head; `naive_ba_attention` loops.
"""

import math

import torch
from torch import Tensor


def naive_order(x: Tensor, mask: list[bool], sort: bool, segment: int | None) -> list[int]:
    """E2 for x [N, D]: positions of the unmasked tokens, sorted by norm inside each segment of them."""
    kept = [n for n in range(x.shape[0]) if mask[n]]
    if not sort:
        return kept
    length = segment if segment is not None else max(1, len(kept))
    result = []
    for start in range(0, len(kept), length):
        run = kept[start : start + length]
        result += sorted(run, key=lambda n: math.sqrt(sum(float(value) ** 2 for value in x[n])))
    return result


def naive_blocks(order: list[int], block_size: int) -> list[list[int]]:
    """Consecutive runs of P sorted tokens."""
    return [order[start : start + block_size] for start in range(0, len(order), block_size)]


def naive_moments(x: Tensor, block: list[int]) -> tuple[Tensor, Tensor]:
    """E3 for the tokens of one block of x [N, D]: mean [D] and variance [D]."""
    mean = sum(x[n] for n in block) / len(block)
    variance = sum((x[n] - mean) ** 2 for n in block) / len(block)
    return mean, variance


def naive_score(query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor], scale: float, beta: float) -> float:
    """E4 and E5 for one pair of blocks, from their moments; the paper's 1/D is scale^2."""
    (query_mean, query_variance), (key_mean, key_variance) = query, key
    score = compensation = 0.0
    for t in range(query_mean.shape[0]):
        score += float(query_mean[t] * key_mean[t]) * scale
        compensation += float(
            query_variance[t] * key_mean[t] ** 2
            + key_variance[t] * query_mean[t] ** 2
            + query_variance[t] * key_variance[t]
        )
    return score + beta * scale**2 * compensation


def naive_selection(scores: list[float], sparsity: float) -> list[int]:
    """E7 for one query block: ids of the kept key blocks, ascending."""
    if not scores:
        return []
    kept = max(1, math.ceil((1 - sparsity) * len(scores)))
    return sorted(sorted(range(len(scores)), key=lambda block: (-scores[block], block))[:kept])


def naive_head_selection(
    scores: list[list[float]], rows: list[bool], sparsity: float, keep_first: int
) -> list[list[int]]:
    """E7 with one budget for a head, from its scores [I][J]; the rows that have no token keep what they would alone."""
    if not scores[0]:
        return [[] for _ in scores]
    kept = max(1, math.ceil((1 - sparsity) * len(scores[0])))
    first = list(range(min(keep_first, kept)))
    chosen = []
    for i, row in enumerate(scores):
        best = min(range(len(row)), key=lambda block: (-row[block], block))
        chosen.append({*first, best} if keep_first < kept else set(first))
        if not rows[i]:
            others = sorted((j for j in range(len(row)) if j not in first), key=lambda block: (-row[block], block))
            chosen[i] = {*first, *others[: kept - len(first)]}
    pairs = [(i, j) for i, row in enumerate(scores) for j in range(len(row)) if rows[i] and j not in chosen[i]]
    room = kept * sum(rows) - sum(len(one) for one, real in zip(chosen, rows, strict=True) if real)
    for i, j in sorted(pairs, key=lambda pair: (-scores[pair[0]][pair[1]], *pair))[:room]:
        chosen[i].add(j)
    return [sorted(one) for one in chosen]


def naive_row(query: Tensor, k: Tensor, v: Tensor, keys: list[int], scale: float) -> tuple[Tensor, float]:
    """E8 for one query [D] over the given keys of k, v [M, D]: output [D] and log-sum-exp."""
    if not keys:
        return torch.zeros_like(v[0]), -math.inf
    logits = [float(query @ k[m]) * scale for m in keys]
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    output = sum(weight * v[m] for weight, m in zip(weights, keys, strict=True)) / sum(weights)
    return output, top + math.log(sum(weights))


def naive_ba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    sparsity: float,
    sort: str,
    segment: int | None,
    beta: float,
    scale: float,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[list[list[list[int]]]]]:
    """All of it: out [B, H, N, D] and lse [B, H, N] in float64, kept key blocks per [B][H][I]."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, queries, channels = q.shape
    repeats = heads // k.shape[1]
    out, lse = torch.zeros(batch, heads, queries, channels).double(), torch.zeros(batch, heads, queries).double()
    selection = []
    for b in range(batch):
        mask = [True] * k.shape[2] if key_mask is None else key_mask[b].tolist()
        selection.append([])
        for h in range(heads):
            rows, keys, values = q[b, h], k[b, h // repeats], v[b, h // repeats]
            query_blocks = naive_blocks(naive_order(rows, [True] * queries, "q" in sort, segment), block_size)
            key_blocks = naive_blocks(naive_order(keys, mask, "k" in sort, segment), block_size)
            key_moments = [naive_moments(keys, block) for block in key_blocks]
            selection[b].append([])
            for block in query_blocks:
                moments = naive_moments(rows, block)
                kept = naive_selection([naive_score(moments, key, scale, beta) for key in key_moments], sparsity)
                selection[b][h].append(kept)
                attended = [m for j in kept for m in key_blocks[j]]
                for n in block:
                    out[b, h, n], lse[b, h, n] = naive_row(rows[n], keys, values, attended, scale)
    return out, lse, selection


def naive_cluster_tokens(x: Tensor, block: list[int], representatives: int, refinements: int) -> list[list[int]]:
    """C1 and C2 for the tokens of one block of x [N, D]: the tokens of every cluster that is not empty."""

    def squared(a: Tensor, b: Tensor) -> float:
        return sum(float(difference) ** 2 for difference in a - b)

    mean = sum(x[n] for n in block) / len(block)
    points = [x[min(block, key=lambda n: squared(x[n], mean))]]
    while len(points) < representatives:
        points.append(x[max(block, key=lambda n: min(squared(x[n], point) for point in points))])
    for _ in range(refinements + 1):
        members: list[list[int]] = [[] for _ in points]
        for n in block:
            members[min(range(len(points)), key=lambda r: squared(x[n], points[r]))].append(n)
        points = [
            sum(x[n] for n in some) / len(some) if some else point for some, point in zip(members, points, strict=True)
        ]
    return [some for some in members if some]


def naive_clusters(x: Tensor, clusters: list[list[int]]) -> list[tuple[Tensor, Tensor, int]]:
    """Mean, variance and number of the tokens of every cluster."""
    return [(*naive_moments(x, some), len(some)) for some in clusters]


def naive_cluster_scores(
    query: list[tuple[Tensor, Tensor, int]],
    keys: list[list[tuple[Tensor, Tensor, int]]],
    scale: float,
    peak: bool,
    beta: float = 0.0,
) -> list[float]:
    """C3 to C5 for one query block: a score of every key block, from their clusters; beta: of their variances."""
    of_clusters = []
    for mean, _, _ in query:
        weights = []
        for block in keys:
            spreads = [min(beta * scale**2 * float(mean**2 @ variance), 4.0) for _, variance, _ in block]
            logits = [scale * float(mean @ point) + more for (point, _, _), more in zip(block, spreads, strict=True)]
            weights.append([count * math.exp(logit) for (*_, count), logit in zip(block, logits, strict=True)])
        total = sum(sum(block) for block in weights)
        of_clusters.append([sum(block) / total for block in weights])
    if peak:
        return [max(shares) for shares in zip(*of_clusters, strict=True)]
    counts = [count for *_, count in query]
    return [
        sum(count * share for count, share in zip(counts, shares, strict=True)) / sum(counts)
        for shares in zip(*of_clusters, strict=True)
    ]
