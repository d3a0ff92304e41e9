"""One benchmark and what is rendered from its stored results: the two kinds of entries of registry.py."""

from collections.abc import Callable
from typing import NamedTuple


class Block(NamedTuple):
    """A rendered block: the function that makes it, and of which results.

    Args:
        results: of the case's; none means all of them.
        together: the function takes all results in one call; else it is called for each, and the texts are stacked.
    """

    render: Callable[..., str]
    results: tuple[str, ...] = ()
    together: bool = False


class Case(NamedTuple):
    """One benchmark.

    Args:
        measures: a phrase. command: in today's words; what ran is stored in the result. results: files under
            benchmarks/results/. blocks: by name; a function alone is a block of all results.
    """

    measures: str
    command: str
    results: tuple[str, ...]
    blocks: dict[str, Callable[..., str] | Block] = {}  # noqa: RUF012 (never changed)


def block_of(case: Case, block: Callable[..., str] | Block) -> Block:
    """A block with the results that it is made from."""
    whole = block if isinstance(block, Block) else Block(block)
    return whole._replace(results=whole.results or case.results)
