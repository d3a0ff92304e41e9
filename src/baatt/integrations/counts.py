"""What became of the attention calls of a model: counts by layer and reason, and the share of block pairs skipped.

In: a call's layer, why it stayed dense, its block pairs. Out: numbers to read. `block_pairs` tells the pairs from
lengths and structure alone: it knows no masks of keys and no scores, so of a budget of a head it knows the mean.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from baatt.config import BAAttConfig
from baatt.integrations.reasons import ONE_QUERY, is_asked


class LayerCalls(NamedTuple):
    """Calls of one layer: sparse, dense, and the reasons of the dense ones with their number."""

    sparse: int
    dense: int
    reasons: dict[str, int]


class Tally(NamedTuple):
    """Calls, their block pairs, the pairs kept, those that the config's sparsity asked for, and calls of unknown size.

    A pair is a query block and a key block that it may see, of one head and batch entry, padding included; where a call
    stayed dense because of its mask, every key block.
    """

    calls: int = 0
    pairs: int = 0
    kept: int = 0
    asked: float = 0.0
    unsized: int = 0

    @property
    def skipped(self) -> float:
        """Share of the pairs."""
        return 1 - self.kept / self.pairs if self.pairs else 0.0


_NOTHING = Tally()


class _Forward(threading.local):
    """Reasons of the calls since the forward of this thread began; None stands for sparse ones."""

    def __init__(self) -> None:  # once a thread
        self.reasons: set[str | None] = set()


class Counts:
    """Counts of calls, from 0.

    Attributes:
        seconds: of all that was timed. layer_count: layers of the model, once they are known.
        outside: what an adapter knows of attention that never comes here, a line each.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tallies: dict[tuple[int | None, str | None], Tally] = {}  # by layer and reason, None = sparse
        self._forward = _Forward()
        self.seconds = 0.0
        self.layer_count: int | None = None
        self.outside: list[str] = []

    def count(self, layer: int | None, reason: str | None, pairs: int = 0, kept: int = 0, asked: float = 0.0) -> None:
        """One call: dense for a reason, which keeps all its block pairs, or sparse (None)."""
        if reason is not None:
            kept, asked = pairs, float(pairs)
        with self._lock:
            self._add(layer, reason, pairs, kept, asked)
        self._forward.reasons.add(reason)

    def count_short_step(self, layers: Iterable[int], reason: str, pairs: int) -> None:
        """One dense call of each layer, of so many block pairs: for a step that has no time to count one by one."""
        with self._lock:
            for layer in layers:
                self._add(layer, reason, pairs, pairs, float(pairs))
        self._forward.reasons.add(reason)

    def _add(self, layer: int | None, reason: str | None, pairs: int, kept: int, asked: float) -> None:
        """A call to its tally, which is locked."""
        before = self._tallies.get((layer, reason), _NOTHING)
        self._tallies[layer, reason] = Tally(  # field by field, as this runs at every call of a short step
            before.calls + 1, before.pairs + pairs, before.kept + kept, before.asked + asked,
            before.unsized + (not pairs),
        )  # fmt: skip

    def start_forward(self) -> None:
        """A forward of the model begins in this thread."""
        self._forward.reasons = set()

    def unasked(self) -> set[str] | None:
        """Why the forward that ends in this thread had no sparse call; None if it had, or as the policy asked for."""
        reasons = {reason for reason in self._forward.reasons if reason is not None}
        if len(reasons) < len(self._forward.reasons) or (reasons and all(map(is_asked, reasons))):
            return None
        if ONE_QUERY in reasons and self.sparse_calls:  # of a prompt, which is all that can be sparse here
            return None
        return {reason for reason in reasons if not is_asked(reason)}

    def tally(self, wanted: Callable[[str | None], bool] = lambda reason: True) -> Tally:
        """The sum over all calls of wanted reasons, None = sparse."""
        return _sum(one for (_, reason), one in self._tallies.copy().items() if wanted(reason))

    @property
    def sparse_calls(self) -> int:
        """Attention calls that went sparse."""
        return self.tally(lambda reason: reason is None).calls

    @property
    def dense_calls(self) -> int:
        """Attention calls that came here and stayed dense."""
        return self.tally().calls - self.sparse_calls

    @property
    def reasons(self) -> dict[str, int]:
        """Why calls stayed dense, with their number."""
        found: dict[str, int] = {}
        for (_, reason), one in self._tallies.copy().items():
            if reason is not None:
                found[reason] = found.get(reason, 0) + one.calls
        return found

    @property
    def layers(self) -> dict[int | None, LayerCalls]:
        """Counts by layer; None holds calls of which the layer is not known."""
        found: dict[int | None, LayerCalls] = {}
        tallies = self._tallies.copy()
        for layer in sorted({layer for layer, _ in tallies}, key=lambda layer: -1 if layer is None else layer):
            reasons = {reason: one.calls for (at, reason), one in tallies.items() if at == layer and reason is not None}
            found[layer] = LayerCalls(tallies.get((layer, None), Tally()).calls, sum(reasons.values()), reasons)
        return found

    @property
    def sparsity(self) -> float:
        """Share of block pairs skipped over all calls that were counted, sparse and dense, whatever the reason.

        A dense call skips none of its pairs, which are defined at `Tally`. Not counted is what `report` lists as
        outside, and a call whose size its adapter did not tell.
        """
        return self.tally().skipped

    @property
    def sparse_sparsity(self) -> float:
        """Share of block pairs skipped in the sparse calls alone."""
        return self.tally(lambda reason: reason is None).skipped

    def report(self) -> str:
        """Sparse and dense calls with their reasons, shares of block pairs skipped, and what is outside the count.

        Block pairs are those of `Tally`: of the sparse calls, how many were kept and what the sparsity asked for, which
        whole blocks round up; then the share skipped of the pairs of all calls counted, as `sparsity`.
        """
        every, sparse = self.tally(), self.tally(lambda reason: reason is None)
        lines = [f"{sparse.calls} sparse and {every.calls - sparse.calls} dense attention calls"]
        lines += [f"  {count} dense: {reason}" for reason, count in sorted(self.reasons.items())]
        if sparse.pairs:
            lines.append(
                f"block pairs of the sparse calls: {sparse.kept:,} of {sparse.pairs:,} kept, "
                f"{sparse.skipped:.1%} skipped ({1 - sparse.asked / sparse.pairs:.1%} asked)"
            )
        lines.append(f"block pairs of all calls counted: {every.skipped:.1%} of {every.pairs:,} skipped")
        outside = [*self.outside, f"the size of {every.unsized} calls"] if every.unsized else list(self.outside)
        found = {layer for layer, _ in self._tallies.copy()}
        missing = [layer for layer in range(self.layer_count or 0) if layer not in found]
        if missing and found - {None}:
            outside.append(f"layers {', '.join(map(str, missing))}, of which no call came")
        return "\n".join([*lines, *(f"not counted: {one}" for one in outside)])

    def reset(self) -> None:
        """Start counting anew."""
        self._tallies.clear()
        self.seconds = 0.0


def _sum(tallies: Iterable[Tally]) -> Tally:
    columns = zip(Tally(), *tallies, strict=True)
    return Tally(*map(sum, columns))


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
