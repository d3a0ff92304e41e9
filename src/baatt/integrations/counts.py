"""What became of the attention calls of a model: counts by layer and reason, and the share of block pairs skipped.

In: a call's layer, why it stayed dense, its block pairs. Out: numbers to read. `block_pairs` tells the pairs from
lengths and structure alone: it knows no masks of keys and no scores, so of a budget of a head it knows the mean.
"""

import functools
import math
import threading
from collections import Counter
from typing import NamedTuple

from baatt.config import BAAttConfig

#: Reasons that a policy asked for: a forward without a sparse call is no surprise then.
BY_POLICY = "policy: "


class LayerCalls(NamedTuple):
    """Calls of one layer: sparse, dense, and the reasons of the dense ones with their number."""

    sparse: int
    dense: int
    reasons: dict[str, int]


class Counts:
    """Counts of calls, from 0. seconds: of all that was timed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: Counter[tuple[int | None, str | None]] = Counter()  # by layer and reason, None = sparse
        self._pairs = self._kept_pairs = self.seconds = 0.0

    def count(self, layer: int | None, reason: str | None, pairs: int = 0, kept: int = 0) -> None:
        """One call: dense for a reason, which keeps all its block pairs, or sparse (None)."""
        with self._lock:
            self._calls[layer, reason] += 1
            self._pairs += pairs
            self._kept_pairs += kept if reason is None else pairs

    @property
    def sparse_calls(self) -> int:
        """Attention calls that went sparse."""
        return sum(count for (_, reason), count in self._calls.copy().items() if reason is None)

    @property
    def dense_calls(self) -> int:
        """Attention calls that came here and stayed dense."""
        return sum(self._calls.values()) - self.sparse_calls

    @property
    def reasons(self) -> dict[str, int]:
        """Why calls stayed dense, with their number."""
        found: dict[str, int] = {}
        for (_, reason), count in self._calls.copy().items():
            if reason is not None:
                found[reason] = found.get(reason, 0) + count
        return found

    @property
    def layers(self) -> dict[int | None, LayerCalls]:
        """Counts by layer; None holds calls of which the layer is not known."""
        found: dict[int | None, LayerCalls] = {}
        for layer in sorted(
            {layer for layer, _ in self._calls.copy()}, key=lambda layer: -1 if layer is None else layer
        ):
            reasons = {reason: count for (one, reason), count in self._calls.copy().items() if one == layer and reason}
            found[layer] = LayerCalls(self._calls[layer, None], sum(reasons.values()), reasons)
        return found

    @property
    def sparsity(self) -> float:
        """Achieved share of block pairs skipped, over all calls that came here; a dense call skips none.

        Counts every key block that a query block of a call may see, padding included.
        """
        return 1 - self._kept_pairs / self._pairs if self._pairs else 0.0

    def report(self) -> str:
        """The counts in a few lines."""
        calls = f"{self.sparse_calls} sparse and {self.dense_calls} dense attention calls"
        lines = [f"  {count} dense: {reason}" for reason, count in sorted(self.reasons.items())]
        return "\n".join([f"{calls}, {100 * self.sparsity:.1f} % of block pairs skipped", *lines])

    def reset(self) -> None:
        """Start counting anew."""
        self._calls.clear()
        self._pairs = self._kept_pairs = self.seconds = 0.0

    @property
    def calls_as_asked(self) -> int:
        """Calls that went sparse, or stayed dense because the policy says so."""
        return sum(
            count for (_, reason), count in self._calls.copy().items() if not reason or reason.startswith(BY_POLICY)
        )


@functools.lru_cache(64)
def block_pairs(config: BAAttConfig, queries: int, keys: int, causal: int | None, start: int) -> tuple[int, int]:
    """(pairs of a query block and a key block that it may see, pairs that are kept); arguments as `ba_attention`."""
    size = config.block_size
    rows = math.ceil(queries / size)
    if causal is None:
        blocks = math.ceil(keys / size)
        return rows * blocks, rows * config.kept_blocks(blocks)
    pairs = kept = 0
    for row in range(rows):
        first, last = (start + min(row * size + place, queries - 1) for place in (0, size - 1))
        seen = math.ceil(min(keys, (last // causal + 1) * causal) / size)
        own = {min(place, keys - 1) // size for place in (first, last)}
        pairs += seen
        kept += min(seen, max(config.kept_blocks(seen), len(own)))
    return pairs, kept
