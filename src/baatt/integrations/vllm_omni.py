"""vLLM-Omni's plugin for sparse attention: the callable that its `SPARSE_ATTN` dispatcher finds by entry point.

In: query, key, value [B, N, H, D] and one flat dict that holds the plugin's settings, the state of the denoising loop
and the mask. Out: [B, N, H, D]. Attention between sequences of different lengths and masks without a structure that
the operator knows stay dense and exact; every dense call is counted with its reason. Imports nothing of vLLM. A call
does not tell its layer, so there are no dense layers here.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from baatt.config import BAAttConfig, Policy
from baatt.integrations.handle import Handle
from baatt.integrations.masks import Structure
from baatt.integrations.progress import DenoisingProgress

CONFIG_KEYS = tuple(field.name for field in dataclasses.fields(BAAttConfig))
POLICY_KEYS = ("dense_steps", "min_length", "min_queries", "only_self_attention")
#: What the engine puts into the dict beside the settings: read are the step, the mask, the length and the packing.
ENGINE_KEYS = (
    *("denoise_step_idx", "total_denoise_steps", "latent_shape", "patch_size", "total_latent_frames"),
    *("patches_per_frame", "attn_mask", "attention_mask", "kv_cache_dtype", "valid_kv_length"),
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "npu_attn_varlen", "laser_input_scale"),
)


class SparseAttention:
    """The callable, with the counts of its calls by settings.

    capabilities: what the dispatcher may hand over instead of refusing.
    """

    capabilities: Mapping[str, bool] = {"supports_attention_mask": True}

    def __init__(self) -> None:
        self._handles: dict[tuple[Any, ...], Handle] = {}

    # The dict is read in Python and changes at every step, so a compiled model breaks its graph around the call.
    @torch.compiler.disable(recursive=True)  # type: ignore[no-untyped-call, untyped-decorator]
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: Mapping[str, Any],
        is_causal: bool = False,
        softmax_scale: float | None = None,
    ) -> Tensor:
        """Attention of one call.

        Args:
            query: [B, N, H, D]; key, value: [B, M, G, D] with H a multiple of G.
            params: the fields of `BAAttConfig`, the policy's in `POLICY_KEYS` and `impl`, as far as they differ from
                the defaults; `attn_mask` (or `attention_mask`): [B, M], True or not 0 = attend, or [B or 1, .., .., M]
                bool or additive; `denoise_step_idx` and `total_denoise_steps`: numbers or a tensor of one per sample,
                of which the least advanced counts; `valid_kv_length`: keys from there on are padding; `cu_seqlens_q`
                and `cu_seqlens_k`: where packed sequences begin and end. Other keys of the engine are left alone.
            is_causal: queries and keys begin at the same token.
            softmax_scale: factor on q.k; None = 1 / sqrt(D).

        Returns:
            [B, N, H, D].

        Raises:
            TypeError, ValueError: tensors of other axes, a setting that is unknown or out of range, a mask of another
                number of axes, or `full_attn_spans`, which this plugin does not announce.
        """
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.ndim != 4:
                raise ValueError(f"{name} must have shape [B, N, H, D], got {tuple(x.shape)}")
        q, k, v = (rearrange(x, "B N H D -> B H N D") for x in (query, key, value))
        handle = self.handle(params)
        if handle.policy.dense_steps > 0:
            read_progress(handle.progress, params)
        mask = read_mask(params, q, k)
        found = handle.masks(mask, k.shape[0], k.shape[2])
        if is_causal and found.refusal is None:
            both = Structure(refusal="a causal flag beside a causal mask")
            found = found._replace(causal=1, query_start=0) if found.causal is None else both
        dense = functools.partial(_dense, q, k, v, mask, is_causal, softmax_scale)
        out = handle.attention(
            q, k, v, layer=None, **found._asdict(), scale=softmax_scale, is_cross=None,
            dense=None if found.refusal is None else dense,
        )  # fmt: skip
        return rearrange(out, "B H N D -> B N H D")

    def statistics(self) -> list[Handle]:
        """One handle for every settings that were asked for, with counts, reasons, `report()` and `reset()`."""
        return list(self._handles.values())

    def handle(self, params: Mapping[str, Any]) -> Handle:
        """The handle of the settings in the dict.

        A number, text or bool under a name that neither this plugin nor the engine knows is a mistyped setting; any
        other value is state that a model hands to its attention and must be left alone.

        Raises:
            TypeError, ValueError: an unknown setting, or a value that does not fit.
        """
        known = (*CONFIG_KEYS, *POLICY_KEYS, "impl")
        if "full_attn_spans" in params:
            raise ValueError(
                "full_attn_spans must not be given: this plugin does not announce supports_full_attn_spans"
            )
        for name, value in params.items():
            if name not in known and name not in ENGINE_KEYS and isinstance(value, bool | int | float | str):
                raise ValueError(f"params must hold settings among {', '.join(known)}, got {name}={value!r}")
        config = BAAttConfig(**{name: params[name] for name in CONFIG_KEYS if name in params})
        policy = Policy(**{name: params[name] for name in POLICY_KEYS if name in params})
        key = config, policy, params.get("impl", "auto")
        if key not in self._handles:
            self._handles[key] = Handle(config, policy, impl=key[2])
        return self._handles[key]


def read_mask(params: Mapping[str, Any], q: Tensor, k: Tensor) -> Tensor | None:
    """What a call may see, [B or 1, .., .., M]: its mask, without keys behind `valid_kv_length` and other sequences.

    Raises:
        ValueError: a mask of another number of axes, or one side of a packing.
    """
    mask: Tensor | None = params.get("attn_mask", params.get("attention_mask"))
    if mask is not None and mask.ndim == 2:  # to the engine's own backends one of tokens, whatever its dtype
        mask = rearrange(mask.bool(), "B M -> B 1 1 M")
    if mask is not None and mask.ndim != 4:
        raise ValueError(f"attn_mask must have shape [B, M] or [B, H, N, M], got {tuple(mask.shape)}")
    visible = []
    length, keys = params.get("valid_kv_length"), torch.arange(k.shape[2], device=k.device)
    if length is not None and length < k.shape[2]:
        visible.append(rearrange(keys < length, "M -> 1 1 1 M"))
    query_ends, key_ends = params.get("cu_seqlens_q"), params.get("cu_seqlens_k")
    if (query_ends is None) != (key_ends is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together")
    if query_ends is not None and key_ends is not None and len(query_ends) > 2:
        queries = torch.arange(q.shape[2], device=q.device)
        rows = torch.bucketize(queries, query_ends.to(queries), right=True)
        columns = torch.bucketize(keys, key_ends.to(keys), right=True)
        visible.append(rearrange(rows, "N -> 1 1 N 1") == rearrange(columns, "M -> 1 1 1 M"))
    for part in visible:
        is_bool = mask is None or mask.dtype == torch.bool
        mask = part if mask is None else mask & part if is_bool else mask.masked_fill(~part, -torch.inf)
    return mask


def read_progress(progress: DenoisingProgress, params: Mapping[str, Any]) -> None:
    """Tell how far the loop of this thread is, by its least advanced sample; nothing where the engine does not say."""
    names = ("denoise_step_idx", "total_denoise_steps")
    if any(name not in params for name in names):
        progress.forget()
        return
    steps, totals = (torch.as_tensor(params[name], device="cpu").flatten().tolist() for name in names)
    step, total = min(zip(steps, totals, strict=True), key=lambda pair: pair[0] / pair[1])
    progress.set(int(step), int(total))


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """Exact attention as PyTorch does it; a causal mask and another one together make one mask."""
    if causal and mask is not None:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -torch.inf)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


#: What the entry point names. Its handles count the calls of this process.
attention = SparseAttention()
