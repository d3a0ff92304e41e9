"""One place decides for every attention call of a foreign model whether it goes sparse, and counts it with the reason.

In: q, k, v of a call, its layer, a mask. Out: attention of the same shape, from `ba_attention` or exact. An adapter
brings the calls here and knows the library they come from; this file knows none. In a compiled graph the whole decision
is one opaque operator that runs eagerly, so steps and counts stay right there and nothing is compiled again for them.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baatt.attention import ba_attention
from baatt.backend import IMPLS, Workload, choose_backend
from baatt.checks import as_number, check_structure
from baatt.config import BAAttConfig, Policy
from baatt.integrations.calls import HANDLES, SdpaCall, TokenPermutation, Watcher, needs_gradients, routed_attention
from baatt.integrations.counts import Counts, block_pairs
from baatt.integrations.masks import NO_MASK, MaskReader, Structure
from baatt.integrations.progress import DenoisingProgress
from baatt.integrations.reasons import (
    ALL_KEPT,
    BY_POLICY,
    CROSS,
    GRADIENTS,
    ONE_QUERY,
    UNEQUAL,
    fewest_queries,
    too_few,
)  # fmt: skip
from baatt.integrations.reasons import NoSparseAttentionWarning as NoSparseAttentionWarning  # for those who filter it
from baatt.integrations.stand_in import StandIn
from baatt.stages.dense import dense_attention

_numbers = itertools.count()


class Handle(Counts):
    """What `enable` gives: counts, the denoising step, and the way back. A context manager that disables on exit.

    Args:
        config, policy, impl: as `enable`.
        order: how tokens are permuted before they are cut into blocks; None leaves them.

    Attributes:
        is_attached: whether `disable` has not run yet: a stand-in that somebody kept only calls its original then.
        progress: where the denoising step comes from. masks: reads the mask of a call. undo: what `disable` runs.
        read_step: an adapter's: tells `progress` the step, given (args, kwargs) of a forward before it runs, or None.
        callers: modules that call the forward of a root past its hooks, by root.
        hear: an adapter's: takes what went along with a call of a compiled graph and returns the layer, or None.
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
        super().__init__()
        if not isinstance(config, BAAttConfig | None):
            raise TypeError(f"config must be a BAAttConfig or None, got {type(config).__name__}")
        if not isinstance(policy, Policy | None):
            raise TypeError(f"policy must be a Policy or None, got {type(policy).__name__}")
        if impl not in IMPLS:
            raise ValueError(f"impl must be one of {list(IMPLS)}, got {impl!r}")
        if order is not None and not callable(order):
            raise TypeError(f"order must be callable or None, such as VideoTiles(), got {type(order).__name__}")
        self._is_sparse = config is not None
        self.config = config or BAAttConfig(sparsity=0.0)
        self.policy, self.impl, self.order = policy or Policy(), impl, order
        self.progress = DenoisingProgress()
        self._layers = self.policy  # with layers counted from 0, once their number is known
        self.number = next(_numbers)
        HANDLES[self.number] = self
        self.undo = ExitStack()
        self.is_attached = True
        self.callers: dict[Any, list[nn.Module]] = {}
        self.masks = MaskReader()
        self.read_step: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None
        self.hear: Callable[[Sequence[Tensor]], int] | None = None
        self.is_timed = False
        self._watcher: Watcher | None = None

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
        """Put the model back as it was; the counts stay, without the model. Calling it again does nothing."""
        self.is_attached = False
        self.undo.close()
        self.callers, self.read_step = {}, None

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()

    def set_layers(self, count: int) -> None:
        """Say how many layers the model has; a ValueError if the policy names one that it does not have."""
        self._layers, self.layer_count = self.policy.check_layers(count), count

    def config_of(self, layer: int | None) -> BAAttConfig:
        """The method's options in a layer, which may have a sparsity of its own."""
        for one, sparsity in self._layers.layer_sparsity:
            if one == layer:
                return dataclasses.replace(self.config, sparsity=sparsity)
        return self.config

    def override(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of one instance; `disable` puts it back, unless another value has come since."""
        own, absent = vars(owner), object()
        before = own.get(name, absent)
        own[name] = value

        def undo() -> None:
            if own.get(name, absent) is value:
                own.pop(name) if before is absent else own.update({name: before})

        self.undo.callback(undo)

    def before_forward(self, root: nn.Module, hook: Callable[..., Any], *, prepend: bool = False) -> None:
        """Hook every forward of a root, given (root, args, kwargs), also those of a wrapper that go past its hooks."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return hook(root, args, kwargs)

        for module in (root, *self.callers.get(root, ())):
            added = module.register_forward_pre_hook(before, with_kwargs=True, prepend=prepend)
            self.undo.callback(added.remove)

    def replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Override a method by a function that stands in for it as long as the handle is attached, whoever holds it."""
        self.override(owner, name, StandIn(self, function, getattr(owner, name)))

    def count_dense(
        self,
        layer: int | None,
        reason: str,
        q: Tensor | None = None,
        k: Tensor | None = None,
        known: Structure = NO_MASK,
    ) -> None:
        """Count a call that stays dense; in a traced graph, which must not have side effects, nothing is counted.

        Its block pairs are those of q [..., N, D] and k [..., M, D] with a known structure, where they are given.
        """
        if torch.compiler.is_compiling():
            return
        pairs = 0
        if q is not None and k is not None and min(q.ndim, k.ndim) > 2 and not (q.is_nested or k.is_nested):
            config, start = self.config_of(layer), known.query_start or 0
            pairs = block_pairs(config, q.shape[-2], k.shape[-2], known.causal, start)[0] * math.prod(q.shape[:-2])
        self.count(layer, reason, pairs)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int | None,
        key_mask: Tensor | None = None,
        causal: int | None = None,
        query_start: int | None = None,
        query_mask: Tensor | None = None,
        scale: float | None = None,
        is_cross: bool | None = False,
        dense: Callable[[], Tensor] | None = None,
        refusal: str | None = None,
    ) -> Tensor:
        """Attention of one call, sparse or dense.

        Args:
            q: [B, H, N, D]; k, v: [B, G, M, D], M any number of keys; key_mask: [B, M] bool, True = attend, or None.
            layer: its number, or None where the adapter cannot tell.
            causal, query_start, query_mask: as `ba_attention`, but a start must be given with `causal`, and without a
                query mask the queries at places of masked keys are not wanted.
            scale: factor on q.k; None = 1 / sqrt(D).
            is_cross: whether queries and keys belong to different sequences; None: as many queries as keys says no.
            dense: the model's own attention for a call that stays dense; None computes it exactly here, as a compiled
                graph always does.
            refusal: why the call must stay dense, where the caller knows.

        Returns:
            [B, H, N, D].
        """
        is_plain = causal is None and key_mask is None and query_mask is None and scale is None and refusal is None
        reason = self.short_call(q, k, v) if is_plain and is_cross is False else None
        if reason is not None:
            self.count_dense(layer, reason, q, k)
            return dense_attention(q, k, v) if dense is None else dense()
        known = Structure(causal, query_start, key_mask, query_mask, refusal)
        return self._attend(SdpaCall(q, k, v, scale=scale), known, dense, layer, is_cross)

    def sdpa(
        self,
        call: SdpaCall,
        dense: Callable[[], Tensor],
        *,
        layer: int | None = None,
        is_cross: bool | None = None,
        key_mask: Tensor | None = None,
        refusal: str | None = None,
        told: Sequence[Tensor] = (),
    ) -> Tensor:
        """Attention of a call that may be causal and may have any mask.

        A mask is looked at when the call runs: in a compiled graph it goes with the call through one opaque operator.

        Args:
            call: by the arguments of `scaled_dot_product_attention`; dense: the code's own.
            layer, is_cross, refusal: as `attention`.
            key_mask: [B, M] bool, one that the caller has found out and the code does not know: then there is none in
                the call, and dense attention takes it too.
            told: what goes along in a compiled graph, for `hear`.
        """
        refusal = call.refusal() if refusal is None else refusal
        known = Structure(refusal=refusal)
        if refusal is None:
            call = call.under_autocast()
            if call.is_causal:  # as PyTorch has it, the first query stands at the first key
                known = Structure(1, 0)
            elif call.attn_mask is None and key_mask is not None:
                return self._attend(call, Structure(key_mask=key_mask), None, layer, is_cross, told)
        return self._attend(call, known, dense, layer, is_cross, told)

    def in_graph(
        self, call: SdpaCall, known: Structure, layer: int | None, is_cross: bool | None, told: Sequence[Tensor]
    ) -> Tensor:
        """A call of a compiled graph, when the graph runs."""
        if self.hear is not None and told:
            layer = self.hear(told)
        q, k, v, mask = call.query, call.key, call.value, call.attn_mask
        dense = functools.partial(
            F.scaled_dot_product_attention, q, k, v, mask, scale=call.scale, enable_gqa=call.enable_gqa
        )
        return self._attend(call, known, None if mask is None else dense, layer, is_cross)

    def _attend(
        self,
        call: SdpaCall,
        known: Structure,
        dense: Callable[[], Tensor] | None,
        layer: int | None,
        is_cross: bool | None,
        told: Sequence[Tensor] = (),
    ) -> Tensor:
        """A call of which the structure is known, unless it has a mask, with 4 axes."""
        scale = as_number(call.scale)
        q, k, v, mask = call.query, call.key, call.value, call.attn_mask
        call = call.changed(q, k, v, mask, int(scale) if isinstance(scale, bool) else scale)
        is_traced = torch.compiler.is_compiling()
        if known.refusal is None and mask is not None and not is_traced:
            known = self.masks(mask, k.shape[0], k.shape[2])
        refusal = known.refusal
        if refusal is None and needs_gradients(q, k, v, *(x for x in (mask, known.key_mask) if x is not None)):
            refusal = GRADIENTS
        elif refusal is None and v.shape != k.shape:  # before the operator, whose result has the shape of q
            refusal = "values of another shape than keys"
        options: dict[str, Any] = {"causal": known.causal, "query_start": known.query_start, "scale": call.scale}
        if dense is None:
            dense = functools.partial(dense_attention, q, k, v, key_mask=known.key_mask, **options)
        # A decoding step stays dense anyway, and there every node that is opaque costs time.
        if refusal is not None or (
            is_traced and q.shape[2] == 1 and fewest_queries(self.policy.min_queries, q.device.type) > 1
        ):
            self.count_dense(layer, refusal or ONE_QUERY, q, k, known)
            return dense()
        if is_traced:
            given = known.key_mask if mask is None else mask
            place = {"layer": layer, "is_cross": is_cross, "told": list(told), "number": self.number}
            routed: Tensor = routed_attention(q, k, v, given, **options, **place)
            return routed
        started = self._now(q.device)
        out = self._decide(call, known, dense, layer, is_cross)
        self.seconds += self._now(q.device) - started
        return out

    def _now(self, device: torch.device) -> float:
        """Seconds when the work queued so far is done, where calls are timed."""
        if self.is_timed and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() if self.is_timed else 0.0

    def _decide(
        self, call: SdpaCall, known: Structure, dense: Callable[[], Tensor], layer: int | None, is_cross: bool | None
    ) -> Tensor:
        """A call that may go sparse, unless the policy says no."""
        known, k, v = known.cut(call.query, call.key, call.value)
        q, key_mask = call.query, known.key_mask
        is_square = q.shape[2] == k.shape[2]
        cross = CROSS if is_cross else UNEQUAL if is_cross is None and known.causal is None and not is_square else None
        scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
        if self._watcher is not None:
            self._watcher(layer, q, k, v, key_mask, scale, known.causal)
        config = self.config_of(layer)
        # Rows of padding take no part in choosing blocks. They are known where both sides are one sequence.
        query_mask = known.wanted(q.shape[2]) if known.causal is not None or (is_square and not cross) else None
        masks: dict[str, Any] = {"key_mask": key_mask, "query_mask": query_mask}
        structure: dict[str, Any] = {"causal": known.causal, "query_start": known.query_start, **masks}
        refusal = self._refusal(q, k, v, scale, layer, cross, structure) or call.without_values()
        pairs, kept = block_pairs(config, q.shape[2], k.shape[2], known.causal, known.query_start or 0)
        if (
            refusal is None and pairs == kept and self.config.sparsity > 0
        ):  # at 0 the user wants to see the operator run
            refusal = ALL_KEPT if config.sparsity > 0 else f"{BY_POLICY}sparsity 0 of layer {layer}"
        pairs, kept = (number * q.shape[0] * q.shape[1] for number in (pairs, kept))
        self.count(layer, refusal, pairs, kept, (1 - config.sparsity) * pairs)
        if refusal is not None:
            return dense()
        permutation = self.order(q.shape[2], q.device) if self.order is not None and is_square else None
        if permutation is None:
            return ba_attention(q, k, v, config, **structure, scale=call.scale, impl=self.impl)
        masks = {name: None if mask is None else mask[:, permutation] for name, mask in masks.items()}
        q, k, v = (x[:, :, permutation] for x in (q, k, v))
        out = ba_attention(q, k, v, config, **masks, scale=call.scale, impl=self.impl)
        return torch.empty_like(out).index_copy(2, permutation, out)

    def short_call(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """As `short_step`, of one call of self-attention."""
        is_usual = k.shape == v.shape and q.dtype == k.dtype == v.dtype and not needs_gradients(q, k, v)
        return self.short_step(q.shape[2], k.shape[2], q.device) if is_usual else None

    def short_step(self, queries: int, keys: int, device: torch.device) -> str | None:
        """Why a call without any mask has too few queries, or None where that must be looked at more closely.

        A short step waits for the processor, and what `_decide` asks besides takes as long again as all of this.
        """
        policy = self.policy
        if policy.dense_layers or policy.layer_sparsity or policy.dense_steps or policy.min_length:
            return None  # which may be the reason
        if not self._is_sparse or self._watcher is not None or self.is_timed or torch.compiler.is_compiling():
            return None
        return too_few(policy.min_queries, queries, keys, device.type)

    def _refusal(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int | None, cross: str | None,
        structure: dict[str, Any],
    ) -> str | None:  # fmt: skip
        """Why the policy, the config or the device has a call stay dense, or None."""
        policy, queries, keys = self.policy, q.shape[2], k.shape[2]
        if not self._is_sparse:
            return BY_POLICY + "dense attention everywhere"
        if policy.only_self_attention and cross is not None:
            return cross
        if layer in self._layers.dense_layers:
            return f"{BY_POLICY}dense layer {layer}"
        if policy.dense_steps > 0:
            is_first = self.progress.is_among_first(policy.dense_steps)
            if is_first is None:
                return "the denoising step is not known: call handle.at_step(step, total) in the loop"
            if is_first:
                return f"{BY_POLICY}one of the first steps"
        if len({x.dtype for x in (q, k, v)}) > 1:
            return "queries, keys and values of different dtypes"
        if not 0 < scale < math.inf:
            return f"a scale that is not finite and positive, {scale}"
        if keys < policy.min_length:
            return f"{BY_POLICY}fewer keys than min_length={policy.min_length}"
        if (few := too_few(policy.min_queries, queries, keys, q.device.type)) is not None:
            return few
        # Asking for the backend takes longer than all above, and a step of a few queries has no time to spare.
        if not q.is_cpu and self.impl == "auto":
            backend = choose_backend("auto", q.device, Workload(q.dtype, q.shape[3], self.config.block_size, scale))
            if backend.name == "reference":  # which runs, but slower than dense attention
                return f"no kernel for {q.dtype} with D={q.shape[3]} on this device"
        if structure["causal"] is not None and self.order is not None:
            return "an order of tokens, which a causal mask does not allow"
        try:
            check_structure(q, k, self.config, **structure)
        except ValueError as error:
            return str(error)
        return None
