"""`Plan`: everything that was decided about a call, apart from carrying it out.

A plan is data: the visualiser draws one, an ablation edits a field, a kernel's test is fed a random one.
"""

from typing import NamedTuple

from baatt.config import BAAttConfig
from baatt.types import BlockSelection, BlockSummary, Sight, TokenOrder


class Plan(NamedTuple):
    """Everything `attend` needs besides q, k and v."""

    config: BAAttConfig
    scale: float
    query_order: TokenOrder
    key_order: TokenOrder
    query_summary: BlockSummary
    key_summary: BlockSummary
    selection: BlockSelection
    sight: Sight | None = None
