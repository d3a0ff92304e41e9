"""Which tokens the later steps of a block evaluate: Fast-dLLM's prefix and dual cache (arXiv 2505.22618).

The first step of every block evaluates the whole sequence and keeps keys and values. A later step evaluates a span of
it against all that is kept, with its own keys and values in their place: those of other tokens are of the first step,
before the block began to fill. In: the block's span and the sequence's length. Out: the span to evaluate.
"""

from collections.abc import Callable
from typing import NamedTuple


class Span(NamedTuple):
    """Tokens [start, stop) of a sequence, prompt included."""

    start: int
    stop: int


def whole_sequence(block: Span, length: int) -> Span:
    """Everything: no cache, exact."""
    return Span(0, length)


def block_and_rest(block: Span, length: int) -> Span:
    """Everything but what comes before the block."""
    return Span(block.start, length)


def block_alone(block: Span, length: int) -> Span:
    """Nothing but the block: its queries lie in the middle of the keys."""
    return block


CACHES: dict[str, Callable[[Span, int], Span]] = {
    "none": whole_sequence,
    "prefix": block_and_rest,
    "dual": block_alone,
}
