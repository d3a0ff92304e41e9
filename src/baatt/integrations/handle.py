"""One place decides for every attention call of a foreign model whether it goes sparse, and counts it with the reason.

In: q, k, v of a call, its layer, a key mask. Out: attention of the same shape, from `ba_attention` or exact. An adapter
brings the calls here and knows the library they come from; this file knows none. In a compiled graph the whole decision
is one opaque operator that runs eagerly, so steps and counts stay right there and nothing is compiled again for them.
"""

import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from baatt.attention import ba_attention
from baatt.backend import Workload, choose_backend
from baatt.config import BAAttConfig, Policy
from baatt.integrations.steps import StepClock
from baatt.stages.dense import dense_attention

#: Length N of a sequence -> permutation [N] int64 that puts its tokens in the order they are cut into blocks, or None.
TokenPermutation = Callable[[int, torch.device], Tensor | None]

#: Is shown every call: layer, q [B, H, N, D], k and v [B, G, M, D], key mask, factor on q.k.
Watcher = Callable[[int | None, Tensor, Tensor, Tensor, Tensor | None, float], None]

#: Reasons that a policy asked for: a forward without a sparse call is no surprise then.
BY_POLICY = "policy: "

_numbers = itertools.count()
_handles: "weakref.WeakValueDictionary[int, Handle]" = weakref.WeakValueDictionary()


class NoSparseAttentionWarning(UserWarning):
    """A model ran and none of its attention was sparse, although the policy asked for nothing dense."""


class LayerCalls(NamedTuple):
    """Calls of one layer: sparse, dense, and the reasons of the dense ones with their number."""

    sparse: int
    dense: int
    reasons: dict[str, int]


class Handle:
    """What `enable` gives: counts, the denoising step, and the way back. A context manager that disables on exit.

    Args:
        config, policy, impl: as `enable`.
        order: how tokens are permuted before they are cut into blocks; None leaves them.
        clock: where the denoising step comes from.
    """

    def __init__(
        self,
        config: BAAttConfig,
        policy: Policy,
        *,
        impl: str = "auto",
        order: TokenPermutation | None = None,
        clock: StepClock | None = None,
    ) -> None:
        self.config, self.policy, self.impl, self.order = config, policy, impl, order
        self.clock = StepClock() if clock is None else clock
        self.layer_count: int | None = None
        self.number = next(_numbers)
        self._sparse: Counter[int | None] = Counter()
        self._dense: dict[int | None, Counter[str]] = {}
        self._pairs = self._kept_pairs = 0.0
        self._undo: Callable[[], None] | None = None
        self._watcher: Watcher | None = None
        _handles[self.number] = self

    # What a user reads.

    @property
    def sparse_calls(self) -> int:
        """Attention calls that went sparse."""
        return sum(self._sparse.values())

    @property
    def dense_calls(self) -> int:
        """Attention calls that came here and stayed dense."""
        return sum(self.reasons.values())

    @property
    def reasons(self) -> dict[str, int]:
        """Why calls stayed dense, with their number."""
        return dict(sum(self._dense.values(), Counter()))

    @property
    def layers(self) -> dict[int | None, LayerCalls]:
        """Counts by layer; None holds calls of which the layer is not known."""
        numbers = sorted({*self._sparse, *self._dense}, key=lambda layer: -1 if layer is None else layer)
        return {
            layer: LayerCalls(
                self._sparse[layer],
                sum(self._dense.get(layer, Counter()).values()),
                dict(self._dense.get(layer, Counter())),
            )
            for layer in numbers
        }

    @property
    def sparsity(self) -> float:
        """Achieved share of block pairs skipped, over all calls that came here; a dense call skips none.

        Counts every key block of a call, padding included.
        """
        return 1 - self._kept_pairs / self._pairs if self._pairs else 0.0

    def report(self) -> str:
        """The counts in a few lines."""
        lines = [
            f"{self.sparse_calls} sparse and {self.dense_calls} dense attention calls, "
            f"{100 * self.sparsity:.1f} % of block pairs skipped"
        ]
        lines += [f"  {count} dense: {reason}" for reason, count in sorted(self.reasons.items())]
        return "\n".join(lines)

    def reset(self) -> None:
        """Start counting anew."""
        self._sparse.clear()
        self._dense.clear()
        self._pairs = self._kept_pairs = 0.0

    def at_step(self, step: int, total: int) -> None:
        """Say which denoising step is about to run, from 0; for loops whose model is not told itself.

        Raises:
            ValueError: a step outside [0, total).
        """
        self.clock.set(step, total)

    def watch(self, watcher: Watcher | None) -> None:
        """Show every call, before it is decided, to a function that must not change its tensors; None ends it."""
        self._watcher = watcher

    def disable(self) -> None:
        """Put the model back as it was; the counts stay. Calling it again does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()

    # What an adapter calls.

    def on_disable(self, undo: Callable[[], None]) -> None:
        """What `disable` runs."""
        self._undo = undo

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int | None,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        is_cross: bool | None = False,
        dense: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Attention of one call, sparse or dense.

        Args:
            q: [B, H, N, D]; k, v: [B, G, M, D], M any number of keys; key_mask: [B, M] bool, True = attend, or None.
            layer: its number, or None where the adapter cannot tell.
            scale: factor on q.k; None = 1 / sqrt(D).
            is_cross: whether queries and keys belong to different sequences; None: as many queries as keys says no.
            dense: the model's own attention for a call that stays dense; None computes it exactly here, as a compiled
                graph always does.

        Returns:
            [B, H, N, D].
        """
        if needs_gradients(q, k, v):
            self.count_dense(layer, "gradients are asked for: call the model under torch.no_grad()")
            return dense_attention(q, k, v, key_mask=key_mask, scale=scale) if dense is None else dense()
        if v.shape != k.shape:  # before the operator, whose result has the shape of q
            self.count_dense(layer, "values of another shape than keys")
            return dense_attention(q, k, v, key_mask=key_mask, scale=scale) if dense is None else dense()
        is_cross = q.shape[2] != k.shape[2] if is_cross is None else is_cross
        if torch.compiler.is_compiling():
            routed: Tensor = torch.ops.baatt.routed_attention(
                q, k, v, key_mask, scale, -1 if layer is None else layer, is_cross, self.number
            )
            return routed
        return self.route(q, k, v, key_mask, scale, layer, is_cross, dense)

    def route(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        scale: float | None,
        layer: int | None,
        is_cross: bool,
        dense: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """`attention` outside of a traced graph."""
        if self._watcher is not None:
            self._watcher(layer, q, k, v, key_mask, q.shape[3] ** -0.5 if scale is None else scale)
        refusal = self._refusal(q, k, v, scale, layer, is_cross)
        blocks = math.ceil(k.shape[2] / self.config.block_size)
        pairs = q.shape[0] * q.shape[1] * math.ceil(q.shape[2] / self.config.block_size) * blocks
        self._pairs += pairs
        if refusal is not None:
            self._kept_pairs += pairs
            self.count_dense(layer, refusal)
            return dense_attention(q, k, v, key_mask=key_mask, scale=scale) if dense is None else dense()
        self._kept_pairs += pairs * max(1, math.ceil((1 - self.config.sparsity) * blocks)) / blocks
        self._sparse[layer] += 1
        # Rows of padding take no part in choosing blocks. They are known where both sides are one sequence.
        is_whole = not is_cross and q.shape[2] == k.shape[2]
        masks = {"key_mask": key_mask, "query_mask": key_mask if is_whole else None}
        permutation = None
        if self.order is not None and q.shape[2] == k.shape[2]:
            permutation = self.order(q.shape[2], q.device)
        if permutation is None:
            return ba_attention(q, k, v, self.config, **masks, scale=scale, impl=self.impl)
        masks = {name: None if mask is None else mask[:, permutation] for name, mask in masks.items()}
        q, k, v = (x[:, :, permutation] for x in (q, k, v))
        permuted = ba_attention(q, k, v, self.config, **masks, scale=scale, impl=self.impl)
        out = torch.empty_like(permuted)
        out[:, :, permutation] = permuted
        return out

    def count_dense(self, layer: int | None, reason: str) -> None:
        """Count a call that stays dense; in a traced graph, which must not have side effects, nothing is counted."""
        if not torch.compiler.is_compiling():
            self._dense.setdefault(layer, Counter())[reason] += 1

    def _refusal(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, layer: int | None, is_cross: bool
    ) -> str | None:
        """Why a call stays dense, or None."""
        scale = q.shape[3] ** -0.5 if scale is None else scale
        policy, queries, keys = self.policy, q.shape[2], k.shape[2]
        if policy.only_self_attention and is_cross:
            return BY_POLICY + "cross-attention"
        if layer is not None and layer in self._dense_layers():
            return f"{BY_POLICY}dense layer {layer}"
        if policy.dense_steps > 0:
            if self.clock.share is None:
                return "the denoising step is not known: call handle.at_step(step, total) in the loop"
            if self.clock.share < policy.dense_steps:
                return f"{BY_POLICY}one of the first steps"
        if len({x.dtype for x in (q, k, v)}) > 1:
            return "queries, keys and values of different dtypes"
        if q.is_cuda and self.impl == "auto":
            backend = choose_backend("auto", q.device, Workload(q.dtype, q.shape[3], self.config.block_size, scale))
            if backend.name == "reference":  # which runs, but slower than dense attention
                return f"no kernel for {q.dtype} with D={q.shape[3]} on this device"
        if keys < policy.min_length:
            return f"{BY_POLICY}fewer keys than min_length={policy.min_length}"
        if queries < keys and queries < policy.min_queries:
            return f"{BY_POLICY}fewer queries than min_queries={policy.min_queries}, of more keys"
        return None

    def _dense_layers(self) -> set[int]:
        """Layers that stay dense, negative numbers resolved."""
        count = self.layer_count
        return {layer if count is None else layer % count for layer in self.policy.dense_layers}


def needs_gradients(*tensors: Tensor) -> bool:
    """Whether a result is to be differentiated, which the sparse operator cannot."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


# A CUDA graph would replay the decision of the call that was captured, so the compiler leaves this node out of them.
_TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


@torch.library.custom_op("baatt::routed_attention", mutates_args=(), tags=_TAGS)
def _routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float | None,
    layer: int,
    is_cross: bool,
    handle: int,
) -> Tensor:
    """`Handle.route` as one node of a compiled graph; layer -1: not known."""
    found = _handles[handle].route(q, k, v, key_mask, scale, None if layer < 0 else layer, is_cross)
    return found.contiguous()


@_routed.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float | None,
    layer: int,
    is_cross: bool,
    handle: int,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
