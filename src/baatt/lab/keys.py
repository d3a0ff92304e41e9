"""What single keys get: how far their norms differ, and which share of the attention goes to a few of them.

In: a `Capture` and configs, of which only the block size is read. Out: a record per layer, ready for JSON: the key that
gets most, which is a sink where most heads share it, the few keys behind it, and whether a key's norm says how much it
gets, which sorting by norm lives on. Knows nothing of orders and scores.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from baatt.config import BAAttConfig
from baatt.lab.capture import Capture

#: Queries whose attention is in memory at once: 72 MiB for nine heads and 4096 keys in float32.
SLAB_ROWS = 512
#: Share of the keys that counts as a few.
FEW = 0.01
#: What float32 makes of equal numbers.
ROUNDING = 1e-6


def measure_keys(
    capture: Capture, configs: Sequence[BAAttConfig], progress: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Norms of keys and attention of single keys, for every layer and block size; means over heads.

    Returns:
        Records: layer and block size; key_norm_variation: standard deviation of the norms over their mean;
        on_first_block, on_heaviest, on_few: share of the attention, mean over queries, that goes to the first block of
        keys, to the key that gets most in a head, and to the hundredth of the keys that get most; heaviest_key: place
        of the key that gets most over all heads; heads_on_heaviest: share of the heads in which no other gets more;
        heaviest_norm: its norm over the mean norm; norm_correlation: Pearson's R of a key's norm with the logarithm of
        what it gets.
    """
    records = []
    for (layer, heads), config in itertools.product(capture.layers.items(), configs):
        q, k, _ = heads.widened()
        received, norms = received_attention(q, k, capture.scale), k.norm(dim=-1)
        mean = norms.mean(dim=-1)
        few = max(1, round(FEW * k.shape[2]))
        of_heads = repeat(norms, "B G M -> B (G r) M", r=q.shape[1] // k.shape[1])
        heaviest = received.mean(dim=(0, 1)).argmax()
        numbers = {
            "key_norm_variation": (norms.std(dim=-1) / mean).mean(),
            "on_first_block": received[..., : config.block_size].sum(dim=-1).mean(),
            "on_heaviest": received.amax(dim=-1).mean(),
            "on_few": received.topk(few, dim=-1).values.sum(dim=-1).mean(),
            "heads_on_heaviest": (received.argmax(dim=-1) == heaviest).float().mean(),
            "heaviest_norm": (norms[..., heaviest] / mean).mean(),
            "norm_correlation": correlation(of_heads, received.clamp(min=torch.finfo(q.dtype).tiny).log()).mean(),
        }
        about = {"layer": layer, "block_size": config.block_size, "heaviest_key": int(heaviest)}
        records.append(about | {name: float(value) for name, value in numbers.items()})
        progress()
    return records


def received_attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention that every key gets, mean over all queries, [B, H, M]; sums to 1 over the keys.

    Args:
        q: [B, H, N, D]; k: [B, G, M, D]; scale: factor on q.k.
    """
    keys = repeat(k, "B G M D -> B (G r) M D", r=q.shape[1] // k.shape[1])
    total = q.new_zeros(keys.shape[:3])
    for first in range(0, q.shape[2], SLAB_ROWS):
        logits = scale * q[:, :, first : first + SLAB_ROWS] @ keys.mT
        total += torch.softmax(logits, dim=-1).sum(dim=2)
    return total / q.shape[2]


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's R over the last axis; 0 where one side varies by no more than rounding."""
    first, second = (side - side.mean(dim=-1, keepdim=True) for side in (x, y))
    found = torch.cosine_similarity(first, second, dim=-1)
    for side, apart in ((x, first), (y, second)):
        found = torch.where(apart.norm(dim=-1) > ROUNDING * side.norm(dim=-1), found, 0)
    return found
