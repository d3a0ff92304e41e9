"""What the stages hand to one another: named tuples of tensors with documented shapes.

Axis legend, used everywhere: B batch, H query heads, G key/value heads, N queries, M keys, D head dim,
P block size, I = ceil(N / P) query blocks, J = ceil(M / P) key blocks, K kept key blocks per query block.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

#: Kinds of devices that have float64.
FLOAT64_DEVICES = ("cpu", "cuda", "meta")


class TokenOrder(NamedTuple):
    """Where each token of a sorted sequence came from (E2).

    index: [B, H, N] (queries) or [B, G, M] (keys) int64, a permutation of the tokens: sorted position -> original
        position. Masked tokens stand behind all others, so later stages see a shorter sequence and never a mask.
    length: [B] int64, number of tokens that are not masked.
    identity: every token stands where it was and none is masked. Kernels then do not read `index`, so that whoever
        replaces it says so here.
    """

    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    length: Tensor
    identity: bool = False


class Sight(NamedTuple):
    """What the queries of every block may see, where attention is causal: the keys in front of a limit.

    Keys count in their order, the masked ones behind all others. Heads see alike.
    limit: [B, I, P] int32, how many keys each query sees, in the order of the queries; 0 where there is none, or it is
        masked.
    spans: [B, I, 4] int32, in key blocks: those that hold the keys at the place of the first and of the last query
        of the block, how many from the front all its queries see wholly, and how many any of them sees.
    """

    limit: Tensor
    spans: Tensor

    def take(self, blocks: slice) -> "Sight":
        """Of some query blocks."""
        return Sight(self.limit[:, blocks], self.spans[:, blocks])


class BlockStats(NamedTuple):
    """Per-block moments of sorted tokens (E3), float32 (float64 for float64 input). L is I or J.

    mean: [B, H or G, L, D]; variance: [B, H or G, L, D], per channel, divided by the number of tokens;
    size: [B, L] int64, tokens in each block that are not masked; mean and variance of an empty block are 0.
    """

    mean: Tensor
    variance: Tensor
    size: Tensor


class BlockClusters(NamedTuple):
    """Clusters of the tokens of each block (C2), float32 (float64 for float64 input).

    mean: [B, H or G, L, R, D], 0 where a cluster is empty; tokens: [B, H or G, L, R] int64, how many each has;
    size: [B, L] int64, tokens in each block that are not masked.
    """

    mean: Tensor
    tokens: Tensor
    size: Tensor


class BlockTokens(NamedTuple):
    """tokens: [B, H or G, L, P, D], 0 where none is or it is masked; size: [B, L] int64, how many of each are not."""

    tokens: Tensor
    size: Tensor


#: What a score remembers of the blocks of one side: a named tuple of its own. The first field is a tensor [B, H or G,
#: L, ...], `size` [B, L] int64 counts the tokens of each block that are not masked; other tensors have their blocks on
#: the third axis. `BlockStats` is one.
BlockSummary = Any


class ScoreOptions(Protocol):
    """What a score may read of the `BAAttConfig`."""

    @property
    def block_size(self) -> int: ...

    @property
    def beta(self) -> float: ...

    @property
    def representatives(self) -> int: ...

    @property
    def refinements(self) -> int: ...

    @property
    def peak(self) -> bool: ...


class Score(NamedTuple):
    """How pairs of blocks are scored.

    summarise: (x [B, H, N, D] in the original order, its `TokenOrder`, `ScoreOptions`) -> `BlockSummary`.
    compare: (summary of i query blocks, summary of all J key blocks, `ScoreOptions`, scale: the factor on q.k, `Sight`
        of the query blocks or None: all see all) -> [B, H, i, J], larger = kept sooner. A softmax over keys leaves out
        those beyond sight; what stands at key blocks that no query of a block sees does not matter.
    options: fields of `BAAttConfig` that change the scores, besides those that cut the blocks.
    logits: the scores mean the same in every row only after a softmax over the key blocks (E6); without it they are
        shares, or something else that one threshold may cut through all rows of a head.
    """

    summarise: Callable[[Tensor, TokenOrder, ScoreOptions], BlockSummary]
    compare: Callable[[BlockSummary, BlockSummary, ScoreOptions, float, Sight | None], Tensor]
    options: tuple[str, ...] = ()
    logits: bool = False


def take_blocks(summary: BlockSummary, blocks: slice) -> BlockSummary:
    """The summary of some blocks."""
    tensors = {name: x for name, x in summary._asdict().items() if isinstance(x, Tensor)}
    return summary._replace(
        **{name: x[:, blocks] if name == "size" else x[:, :, blocks] for name, x in tensors.items()}
    )


def take_heads(summary: BlockSummary, heads: slice) -> BlockSummary:
    """The summary of some heads; an axis of one is shared by all of them."""
    tensors = {name: x for name, x in summary._asdict().items() if isinstance(x, Tensor) and name != "size"}
    return summary._replace(**{name: x if x.shape[1] == 1 else x[:, heads] for name, x in tensors.items()})


def slabs_of_heads(
    queries: BlockSummary, keys: BlockSummary, pairs: int
) -> Iterator[tuple[slice, BlockSummary, BlockSummary]]:
    """Query heads and the summaries of both sides for them: as many as have up to `pairs` block pairs, at least one.

    A slab has whole groups of query heads, or a part of one that divides it: in both, heads and key heads fit.
    """
    heads, groups = queries[0].shape[1], keys[0].shape[1]
    repeats, most = heads // groups, max(1, pairs // (queries.size.shape[1] * keys.size.shape[1]))
    step = most // repeats * repeats or max(part for part in range(1, most + 1) if repeats % part == 0)
    for first in range(0, heads, step):
        last = min(first + step, heads)
        of_keys = slice(first // repeats, -(-last // repeats))
        yield slice(first, last), take_heads(queries, slice(first, last)), take_heads(keys, of_keys)


class SortedBlocks(NamedTuple):
    """Both sides in order and summarised, before anything is compared.

    query_order, key_order: `TokenOrder`; query_summary, key_summary: `BlockSummary` of the sorted tokens; sorted_k
    and sorted_v [B, G, M, D]: k and v themselves where the order of keys is the identity, else contiguous copies in
    sorted order, masked tokens 0, where they fell out on the way, else None.
    """

    query_order: TokenOrder
    query_summary: BlockSummary
    key_order: TokenOrder
    key_summary: BlockSummary
    sorted_k: Tensor | None = None
    sorted_v: Tensor | None = None


class BlockSelection(NamedTuple):
    """The kept key blocks of every query block (E7).

    index: [B, H, I, K] int32, ascending in its first `count` entries; the rest repeat the last kept block.
    count: [B, H, I] int32, kept blocks; 0 only where a batch entry has no key at all, or no query of a block sees one.
    uneven: whether rows may keep different numbers of blocks, as where attention is causal; kernels plan with it.
    """

    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    count: Tensor  # type: ignore[assignment]
    uneven: bool = False


def kept_blocks(sparsity: float, key_blocks: int) -> int:
    """K = max(1, ceil((1 - sparsity) * J)) (E7)."""
    return max(1, math.ceil((1 - sparsity) * key_blocks))


def as_float(value: float) -> float:
    """The number as a float; infinite where it is an int that no float holds."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that may be without it, such as MPS and XPU."""
    return torch.float64 if device.type in FLOAT64_DEVICES else torch.float32


def norms(x: Tensor) -> Tensor:
    """L2 norms [B, H, N] of tokens [B, H, N, D], in float32 at least.

    PyTorch adds up channels that are not side by side in another order, in which near ties may change places.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm


class Partial(NamedTuple):
    """Attention over a subset of the keys, in the original token order.

    out: [B, H, N, D], softmax-normalised over the subset; lse: [B, H, N] float32 (float64 for float64 input), the
    natural log of the sum of exponentials over the subset, -inf for a row without keys (its `out` is 0).
    """

    out: Tensor
    lse: Tensor
