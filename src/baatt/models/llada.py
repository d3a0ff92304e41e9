"""A masked-diffusion language model of the LLaDA architecture: bidirectional, pre-norm, RoPE, SwiGLU, optional GQA.

In: token ids [B, N] and a mask of real tokens [B, N]. Out: logits [B, N, V]. Parameters carry the names of LLaDA's own
checkpoints, so `state_dict()` and a LLaDA folder are the same thing. Attention is a function handed to `forward`, one
for all layers or one per layer; the model knows nothing of sparsity, sampling or files.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from baatt.models.cache import KeyValueCache
from baatt.models.inputs import check_logits, check_mask, check_part
from baatt.stages.dense import AttentionFunction, dense_attention

# What this module implements of the keys that change LLaDA's computation; any other value is refused.
IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "model_type": ("llada",),
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "attention_layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "rope": (True,),
    "alibi": (False, None),
    "multi_query_attention": (False, None),
    "scale_logits": (False, None),
    "input_emb_norm": (False, None),
    "clip_qkv": (None,),
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model, in the field names of LLaDA's config.json.

    Args:
        n_kv_heads: G, heads of keys and values; None means `n_heads`.
        embedding_size: rows of the embedding and width V of the logits, at least `vocab_size`; None means `vocab_size`.
        attention_layer_norm: RMSNorm of the whole projected queries and keys, before the split into heads.
        max_sequence_length: the length the weights were trained for; longer inputs are not refused.
        init_std: standard deviation of freshly drawn weights.

    Raises:
        TypeError, ValueError: a size that is not a positive int, or sizes that do not fit each other.
    """

    d_model: int
    n_heads: int
    n_layers: int
    mlp_hidden_size: int
    vocab_size: int
    mask_token_id: int
    n_kv_heads: int | None = None
    embedding_size: int | None = None
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    attention_layer_norm: bool = False
    include_bias: bool = False
    include_qkv_bias: bool = False
    max_sequence_length: int = 4096
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    init_std: float = 0.02
    block_type: str = "llama"
    layer_norm_type: str = "rms"
    activation_type: str = "silu"

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "n_layers", "mlp_hidden_size", "vocab_size", "max_sequence_length"):
            _check_positive_integer(name, getattr(self, name))
        _check_positive_integer("n_kv_heads", self.kv_heads)
        _check_positive_integer("embedding_size", self.logit_size)
        for name in ("block_type", "layer_norm_type", "activation_type"):
            _check_implemented(name, getattr(self, name))
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model must be a multiple of 2 * n_heads={2 * self.n_heads}, got {self.d_model}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads={self.n_heads}, got {self.kv_heads}")
        if self.logit_size < self.vocab_size:
            raise ValueError(f"embedding_size must be at least vocab_size={self.vocab_size}, got {self.logit_size}")
        if not 0 <= self.mask_token_id < self.logit_size:
            raise ValueError(f"mask_token_id must be in [0, {self.logit_size}), got {self.mask_token_id}")
        for name in ("rope_theta", "rms_norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def head_size(self) -> int:
        """D, channels per head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """G, heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def logit_size(self) -> int:
        """V, rows of the embedding and width of the logits."""
        return self.vocab_size if self.embedding_size is None else self.embedding_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Read the contents of a LLaDA config.json; keys without influence on inference are ignored.

        Raises:
            ValueError: a key is missing, or asks for something that is not implemented.
        """
        for name in IMPLEMENTED.keys() & values.keys():
            _check_implemented(name, values[name])
        if values.get("include_bias") and values.get("bias_for_layer_norm") is None:
            raise ValueError("bias_for_layer_norm must be false when include_bias is true, got None")
        names = [field.name for field in dataclasses.fields(cls)]
        known = {name: values[name] for name in names if values.get(name) is not None}
        if "mlp_hidden_size" not in known and "mlp_ratio" in values and "d_model" in known:
            known["mlp_hidden_size"] = values["mlp_ratio"] * known["d_model"]
        required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
        missing = [name for name in required if name not in known]
        if missing:
            raise ValueError(f"a LLaDA config must have the keys {required}, missing {missing}")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json that LLaDA's own code and `from_dict` both read."""
        fixed = {name: accepted[0] for name, accepted in IMPLEMENTED.items()}
        sizes = {"n_kv_heads": self.kv_heads, "embedding_size": self.logit_size, "rope_full_precision": True}
        return {"architectures": ["LLaDAModelLM"], **fixed, **dataclasses.asdict(self), **sizes}


def _check_positive_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")


def _check_implemented(name: str, value: object) -> None:
    if value not in IMPLEMENTED[name]:
        accepted = " or ".join(repr(choice) for choice in IMPLEMENTED[name])
        raise ValueError(f"{name} must be {accepted} (nothing else is implemented), got {value!r}")


class Rotary(NamedTuple):
    """cos and sin of the RoPE angles, each [B or 1, 1, N, D/2], fp32 (fp64 for an fp64 model)."""

    cos: Tensor
    sin: Tensor


def rotary_tables(positions: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Angles position * theta^(-2t/D) of positions [B or 1, N] and channels t < D/2."""
    channels = torch.arange(0, head_size, 2, device=positions.device, dtype=dtype)
    frequencies = theta ** -(channels / head_size)
    angles = positions[:, None, :, None].to(dtype) * frequencies
    return Rotary(angles.cos(), angles.sin())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn channels (t, t + D/2) of x [B, H, N, D] by the angle of t; computed and returned in the tables' dtype."""
    first, second = x.to(rotary.cos.dtype).chunk(2, dim=-1)
    return torch.cat(
        (first * rotary.cos - second * rotary.sin, second * rotary.cos + first * rotary.sin),
        dim=-1,
    )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, normalised in fp32 and returned to x's dtype first."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    """One pre-norm layer: x + attention, then x + SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden, epsilon = config.d_model, config.mlp_hidden_size, config.rms_norm_eps
        kv_width = config.kv_heads * config.head_size
        bias, qkv_bias = config.include_bias, config.include_bias or config.include_qkv_bias
        self.head_size = config.head_size
        self.attn_norm = RMSNorm(width, epsilon)
        self.q_proj = nn.Linear(width, width, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.q_norm = RMSNorm(width, epsilon) if config.attention_layer_norm else nn.Identity()
        self.k_norm = RMSNorm(kv_width, epsilon) if config.attention_layer_norm else nn.Identity()
        self.attn_out = nn.Linear(width, width, bias=bias)
        self.ff_norm = RMSNorm(width, epsilon)
        self.ff_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.ff_out = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor, rotary: Rotary, attention: AttentionFunction, key_mask: Tensor | None) -> Tensor:
        normed = self.attn_norm(x)
        q, k = self.q_norm(self.q_proj(normed)), self.k_norm(self.k_proj(normed))
        v = self.v_proj(normed)
        q, k, v = (rearrange(y, "B N (H D) -> B H N D", D=self.head_size) for y in (q, k, v))
        # Norms and RoPE may have widened q and k (autocast); attention wants one dtype.
        q, k = rotate(q, rotary).to(v.dtype), rotate(k, rotary).to(v.dtype)
        out = attention(q, k, v, key_mask=key_mask)
        x = x + self.attn_out(rearrange(out, "B H N D -> B N (H D)"))
        normed = self.ff_norm(x)
        return x + cast(Tensor, self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed)))


class Transformer(nn.Module):
    """The parameters of LLaDA's `model.transformer`: wte, blocks, ln_f and, unless tied, ff_out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.logit_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_out = None
        if not config.weight_tying:
            self.ff_out = nn.Linear(config.d_model, config.logit_size, bias=config.include_bias)

    def head(self, x: Tensor) -> Tensor:
        """Logits [B, N, V] of normed x [B, N, d_model]."""
        return F.linear(x, self.wte.weight) if self.ff_out is None else cast(Tensor, self.ff_out(x))


class MaskedDiffusionLM(nn.Module):
    """LLaDA: every token sees every token; the logits at a mask token are the model's guess of what it hides."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"transformer": Transformer(config)})
        self.reset_parameters()

    @property
    def transformer(self) -> Transformer:
        """The module LLaDA calls `model.transformer`."""
        return cast(Transformer, self.model["transformer"])

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> "MaskedDiffusionLM":
        """Load a local LLaDA folder; see `baatt.models.checkpoint.from_pretrained`."""
        from baatt.models.checkpoint import from_pretrained  # that module imports this one

        return from_pretrained(path, dtype=dtype, device=device)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights from N(0, init_std^2), projections back to the residual stream scaled by 1/sqrt(2 n_layers)."""
        for name, parameter in self.named_parameters():
            residual = name.endswith(("attn_out.weight", "ff_out.weight")) and ".blocks." in name
            scale = (2 * self.config.n_layers) ** -0.5 if residual else 1.0
            if parameter.dim() == 2:
                parameter.normal_(std=self.config.init_std * scale)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attention: AttentionFunction | Sequence[AttentionFunction] = dense_attention,
        logits_from: int = 0,
        logits_to: int | None = None,
        cache: KeyValueCache | None = None,
        start: int = 0,
    ) -> Tensor:
        """Logits of the given tokens from `logits_from` to `logits_to`.

        Args:
            input_ids: [B, n] int64: the whole sequence, n = N; or, of a sequence that `cache` holds, any n tokens in a
                row.
            attention_mask: [B, N] bool or 0/1 ints, of the whole sequence, True = real token. Positions count real
                tokens only, so padding on either side does not change the logits of real tokens; those of padding mean
                nothing.
            attention: one function for all layers, or one per layer.
            logits_from, logits_to: first token whose logits are wanted, and the one after the last, counted among the
                given ones; None = n.
            cache: an empty one takes the keys and values of all layers. One that holds a sequence gets those of the
                given tokens in place of its own, and the given tokens attend to all of it. None keeps nothing.
            start: place of the first given token in the sequence that the cache holds.

        Returns:
            [B, logits_to - logits_from, V].

        Raises:
            TypeError, ValueError: a wrong dtype, shape, number of attention functions, `logits_from` or `logits_to`;
                tokens that do not fit the cache, or a cache while gradients are recorded.
        """
        config, transformer = self.config, self.transformer
        functions = [attention] * config.n_layers if callable(attention) else attention
        if len(functions) != config.n_layers:
            raise ValueError(f"attention must hold {config.n_layers} functions, one per layer, got {len(functions)}")
        check_part(input_ids, cache, start, config.n_layers)
        check_mask(attention_mask, input_ids, cache)
        check_logits(logits_from, logits_to, input_ids.shape[1])
        key_mask = None if attention_mask is None else attention_mask.bool()
        positions = _positions(key_mask, start, input_ids)
        if cache is not None:
            functions = [
                functools.partial(_attend_cached, cache, start, *numbered) for numbered in enumerate(functions)
            ]
        dtype = torch.promote_types(transformer.wte.weight.dtype, torch.float32)
        rotary = rotary_tables(positions, config.head_size, config.rope_theta, dtype)
        x = transformer.wte(input_ids)
        for block, function in zip(transformer.blocks, functions, strict=True):
            x = block(x, rotary, function, key_mask)
        return transformer.head(transformer.ln_f(x[:, logits_from:logits_to]))


def _positions(key_mask: Tensor | None, start: int, input_ids: Tensor) -> Tensor:
    """Of every given token [B or 1, n]: how many real tokens of its sequence come before it."""
    stop = start + input_ids.shape[1]
    if key_mask is None:
        return torch.arange(start, stop, device=input_ids.device)[None]
    return (key_mask.cumsum(dim=1) - 1).clamp(min=0)[:, start:stop]


def _attend_cached(
    cache: KeyValueCache, start: int, layer: int, attention: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, /, *,
    key_mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention of a layer to everything that the cache holds, with k and v in their place."""
    return attention(q, *cache.replace(layer, start, k, v), key_mask=key_mask)
