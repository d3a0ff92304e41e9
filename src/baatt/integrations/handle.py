"""One place decides for every attention call of a foreign model whether it goes sparse, and counts it with the reason.

In: q, k, v of a call, its layer, a key mask. Out: attention of the same shape, from `ba_attention` or exact. An adapter
brings the calls here and knows the library they come from; this file knows none. In a compiled graph the whole decision
is one opaque operator that runs eagerly, so steps and counts stay right there and nothing is compiled again for them.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from baatt.attention import ba_attention
from baatt.backend import IMPLS, Workload, choose_backend
from baatt.config import BAAttConfig, Policy
from baatt.integrations.progress import DenoisingProgress
from baatt.integrations.routed import SdpaCall, into_graph, take_number
from baatt.stages.dense import dense_attention

#: Length N of a sequence -> permutation [N] int64 that puts its tokens in the order they are cut into blocks, or None.
TokenPermutation = Callable[[int, torch.device], Tensor | None]

#: Is shown every call: layer, q [B, H, N, D], k and v [B, G, M, D], key mask, factor on q.k.
Watcher = Callable[[int | None, Tensor, Tensor, Tensor, Tensor | None, float], None]

#: Reasons that a policy asked for: a forward without a sparse call is no surprise then.
BY_POLICY = "policy: "
GRADIENTS = "gradients are asked for: call the model under torch.no_grad()"


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

    Attributes:
        progress: where the denoising step comes from. layer_count: layers of the model, once they are known.
        is_timed: whether `seconds` sums the time of all calls, for which every call waits for the device.

    Raises:
        TypeError, ValueError: arguments of a wrong type, or an unknown `impl`.
    """

    def __init__(
        self,
        config: BAAttConfig | None,
        policy: Policy | None = None,
        *,
        impl: str = "auto",
        order: TokenPermutation | None = None,
    ) -> None:
        check_setting(config, policy, impl)
        self._is_sparse = config is not None
        self.config = config or BAAttConfig(sparsity=0.0)
        self.policy, self.impl, self.order = policy or Policy(), impl, order
        self.progress = DenoisingProgress()
        self.layer_count: int | None = None
        self._dense_layers = frozenset(self.policy.dense_layers)
        self.number = take_number(self)
        self._sparse: Counter[int | None] = Counter()
        self._dense: dict[int | None, Counter[str]] = {}
        self._pairs = self._kept_pairs = 0.0
        self.is_timed, self.seconds = False, 0.0
        self._undo: Callable[[], None] | None = None
        self._watcher: Watcher | None = None

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
        self._pairs = self._kept_pairs = self.seconds = 0.0

    def at_step(self, step: int, total: int) -> None:
        """Say which denoising step is about to run, from 0; for loops whose model is not told itself.

        Raises:
            ValueError: a step outside [0, total).
        """
        self.progress.set(step, total)

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

    def set_layers(self, count: int) -> None:
        """Say how many layers the model has.

        Raises:
            ValueError: the policy names a layer that it does not have.
        """
        self._dense_layers, self.layer_count = self.policy.check_layers(count), count

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
        refusal = None
        if needs_gradients(q, k, v):
            refusal = GRADIENTS
        elif v.shape != k.shape:  # before the operator, whose result has the shape of q
            refusal = "values of another shape than keys"
        if refusal is not None:
            self.count_dense(layer, refusal)
            return dense_attention(q, k, v, key_mask=key_mask, scale=scale) if dense is None else dense()
        if torch.compiler.is_compiling():
            return into_graph(self.number, SdpaCall(q, k, v, key_mask, scale=scale), layer, is_cross)
        if not self.is_timed:
            return self._route(q, k, v, key_mask, scale, layer, is_cross, dense)
        _wait(q.device)
        started = time.perf_counter()
        out = self._route(q, k, v, key_mask, scale, layer, is_cross, dense)
        _wait(q.device)
        self.seconds += time.perf_counter() - started
        return out

    def decide(self, call: SdpaCall, layer: int | None, is_cross: bool | None, told: Sequence[Tensor]) -> Tensor:
        """A call of a compiled graph, with a key mask, when the graph runs."""
        return self._route(*call[:4], call.scale, layer, is_cross)

    def _route(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        scale: float | None,
        layer: int | None,
        is_cross: bool | None,
        dense: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """`attention` outside of a traced graph."""
        is_cross = q.shape[2] != k.shape[2] if is_cross is None else is_cross
        if self._watcher is not None:
            self._watcher(layer, q, k, v, key_mask, q.shape[3] ** -0.5 if scale is None else scale)
        config, refusal = self.config, self._refusal(q, k, v, scale, layer, is_cross)
        blocks = math.ceil(k.shape[2] / config.block_size)
        pairs = q.shape[0] * q.shape[1] * math.ceil(q.shape[2] / config.block_size) * blocks
        self._pairs += pairs
        if refusal is not None:
            self._kept_pairs += pairs
            self.count_dense(layer, refusal)
            return dense_attention(q, k, v, key_mask=key_mask, scale=scale) if dense is None else dense()
        self._kept_pairs += pairs * config.kept_blocks(blocks) / blocks
        self._sparse[layer] += 1
        # Rows of padding take no part in choosing blocks. They are known where both sides are one sequence.
        is_whole = not is_cross and q.shape[2] == k.shape[2]
        masks = {"key_mask": key_mask, "query_mask": key_mask if is_whole else None}
        permutation = None
        if self.order is not None and q.shape[2] == k.shape[2]:
            permutation = self.order(q.shape[2], q.device)
        if permutation is None:
            return ba_attention(q, k, v, config, **masks, scale=scale, impl=self.impl)
        masks = {name: None if mask is None else mask[:, permutation] for name, mask in masks.items()}
        q, k, v = (x[:, :, permutation] for x in (q, k, v))
        permuted = ba_attention(q, k, v, config, **masks, scale=scale, impl=self.impl)
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
        if not self._is_sparse:
            return BY_POLICY + "dense attention everywhere"
        if policy.only_self_attention and is_cross:
            return BY_POLICY + "cross-attention"
        if layer is not None and layer in self._dense_layers:
            return f"{BY_POLICY}dense layer {layer}"
        if policy.dense_steps > 0:
            is_first = self.progress.is_among_first(policy.dense_steps)
            if is_first is None:
                return "the denoising step is not known: call handle.at_step(step, total) in the loop"
            if is_first:
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


def check_setting(config: BAAttConfig | None, policy: Policy | None, impl: str) -> None:
    """Raises TypeError or ValueError for options, a policy or an implementation that are none."""
    if not isinstance(config, BAAttConfig | None):
        raise TypeError(f"config must be a BAAttConfig or None, got {type(config).__name__}")
    if not isinstance(policy, Policy | None):
        raise TypeError(f"policy must be a Policy or None, got {type(policy).__name__}")
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {list(IMPLS)}, got {impl!r}")


def needs_gradients(*tensors: Tensor) -> bool:
    """Whether a result is to be differentiated, which the sparse operator cannot."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
