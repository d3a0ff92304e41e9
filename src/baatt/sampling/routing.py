"""The one place that decides which layers attend densely or sparsely at a denoising step.

In: the method's dials, the policy, the step, how many queries and keys its attention has. Out: a function per layer.
"""

import functools

from torch import Tensor

from baatt.attention import ba_attention
from baatt.config import BAAttConfig, Policy
from baatt.stages.dense import AttentionFunction, dense_attention


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, /, *, key_mask: Tensor | None, config: BAAttConfig, impl: str
) -> Tensor:
    """`ba_attention` of a layer; rows of padding take no part in choosing blocks where all tokens are queries."""
    query_mask = key_mask if q.shape[2] == k.shape[2] else None
    return ba_attention(q, k, v, config, key_mask=key_mask, query_mask=query_mask, impl=impl)


def layer_attention(
    sparse: BAAttConfig | None,
    policy: Policy,
    *,
    layers: int,
    step: int,
    total_steps: int,
    length: int,
    impl: str,
    queries: int | None = None,
) -> list[AttentionFunction]:
    """The attention function of every layer at one denoising step.

    Args:
        sparse: dials of BA-Att; None keeps everything dense.
        policy: what stays dense nevertheless.
        layers: number of layers. step: from 0, of `total_steps`. length: tokens of prompt and generation together.
        impl: as `ba_attention`.
        queries: tokens that are evaluated, fewer than `length` where the others are cached; None = all.

    Raises:
        ValueError: `policy.dense_layers` names a layer the model does not have.
    """
    for layer in policy.dense_layers:
        if not -layers <= layer < layers:
            raise ValueError(f"policy.dense_layers must lie in [{-layers}, {layers}) for {layers} layers, got {layer}")
    few = queries is not None and queries < length and queries < policy.min_queries
    if sparse is None or step < policy.dense_steps * total_steps or length < policy.min_length or few:
        return [dense_attention] * layers
    dense_layers = {layer % layers for layer in policy.dense_layers}
    approximate = functools.partial(sparse_attention, config=sparse, impl=impl)
    return [dense_attention if layer in dense_layers else approximate for layer in range(layers)]
