"""What the stages hand to one another: named tuples of tensors with documented shapes.

Axis legend, used everywhere: B batch, H query heads, G key/value heads, N queries, M keys, D head dim,
P block size, I = ceil(N / P) query blocks, J = ceil(M / P) key blocks, K kept key blocks per query block.
"""

from typing import NamedTuple

from torch import Tensor


class TokenOrder(NamedTuple):
    """Where each token of a sorted sequence came from (E2).

    index: [B, H, N] (queries) or [B, G, M] (keys) int64, a permutation of the tokens: sorted position -> original
        position. Masked tokens stand behind all others, so later stages see a shorter sequence and never a mask.
    length: [B] int64, number of tokens that are not masked.
    """

    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    length: Tensor


class BlockStats(NamedTuple):
    """Per-block moments of sorted tokens (E3), float32 (float64 for float64 input). L is I or J.

    mean: [B, H or G, L, D]; variance: [B, H or G, L, D], per channel, divided by the number of tokens;
    size: [B, L] int64, tokens in each block that are not masked; mean and variance of an empty block are 0.
    """

    mean: Tensor
    variance: Tensor
    size: Tensor


class Arrangement(NamedTuple):
    """Both sides in order and pooled, before anything is scored.

    query_order, key_order: `TokenOrder`; query_stats, key_stats: `BlockStats` of the sorted tokens; sorted_k
    and sorted_v [B, G, M, D]: contiguous copies in sorted order, masked tokens 0, from kernels that make them, else
    None.
    """

    query_order: TokenOrder
    query_stats: BlockStats
    key_order: TokenOrder
    key_stats: BlockStats
    sorted_k: Tensor | None = None
    sorted_v: Tensor | None = None


class BlockSelection(NamedTuple):
    """The kept key blocks of every query block (E7).

    index: [B, H, I, K] int32, ascending in its first `count` entries; the rest repeat the last kept block.
    count: [B, H, I] int32, kept blocks; 0 only where a batch entry has no key at all.
    """

    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    count: Tensor  # type: ignore[assignment]


class Partial(NamedTuple):
    """Attention over a subset of the keys, in the original token order.

    out: [B, H, N, D], softmax-normalised over the subset; lse: [B, H, N] float32 (float64 for float64 input), the
    natural log of the sum of exponentials over the subset, -inf for a row without keys (its `out` is 0).
    """

    out: Tensor
    lse: Tensor
