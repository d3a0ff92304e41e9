"""The setting that sorts: keys by norm in segments, blocks scored by their moments, what `BAAttConfig()` once was.

Tests of sorting, of moments and of sorted copies take it; tests of the method as it comes take `BAAttConfig()`.
"""

from typing import Any

from baatt import BAAttConfig


def sorted_config(
    block_size: int = 128, sparsity: float = 0.5, sort: str = "k", segment: int | None = 256, **others: Any
) -> BAAttConfig:
    """Positions and names of `BAAttConfig`."""
    return BAAttConfig(block_size, sparsity, sort, segment, **{"score": "covariance", "keep_first": 0, **others})
