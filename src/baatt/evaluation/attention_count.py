"""Counts the attention calls of an evaluation: how many were sparse, and which share of block pairs they skipped.

In: the attention function of every layer and step. Out: the same function, counted. A dense call skips nothing. Knows
nothing of what is evaluated.
"""

import math

from torch import Tensor

from baatt.config import BAAttConfig
from baatt.stages.dense import AttentionFunction, dense_attention


class AttentionCount:
    """Calls so far.

    Args:
        sparse: dials of the sparse calls; None where there are none.
    """

    def __init__(self, sparse: BAAttConfig | None) -> None:
        self._config = sparse or BAAttConfig(sparsity=0.0)
        self.sparse_calls = self.dense_calls = 0
        self._pairs = self._kept = 0.0

    @property
    def sparsity(self) -> float:
        """Share of block pairs skipped over all calls, padding included; 0 before the first call."""
        return 1 - self._kept / self._pairs if self._pairs else 0.0

    def wrap(self, layer: int, function: AttentionFunction) -> AttentionFunction:
        """The function of a layer, counted: a `WrapAttention`."""
        dense = function is dense_attention

        def counted(q: Tensor, k: Tensor, v: Tensor, /, *, key_mask: Tensor | None) -> Tensor:
            self._add(q, k, dense)
            return function(q, k, v, key_mask=key_mask)

        return counted

    def _add(self, q: Tensor, k: Tensor, dense: bool) -> None:
        size = self._config.block_size
        blocks = math.ceil(k.shape[2] / size)
        pairs = q.shape[0] * q.shape[1] * math.ceil(q.shape[2] / size) * blocks
        kept = blocks if dense else max(1, math.ceil((1 - self._config.sparsity) * blocks))
        self._pairs += pairs
        self._kept += pairs * kept / blocks
        self.dense_calls += dense
        self.sparse_calls += not dense
