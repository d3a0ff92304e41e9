"""A masked-diffusion language model of the LLaDA architecture: bidirectional, pre-norm, RoPE, SwiGLU, optional GQA.

In: token ids [B, N] and a mask of real tokens [B, N]. Out: logits [B, N, V]. Parameters carry the names of LLaDA's own
checkpoints, so `state_dict()` and a LLaDA folder are the same thing. Attention is a function handed to `forward`, one
for all layers or one per layer; the model knows nothing of sparsity and sampling.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from baatt.models.cache import KeyValueCache
from baatt.models.checkpoint import check_described, read_config, read_tensors, write_checkpoint
from baatt.models.config import ModelConfig
from baatt.models.rope import Rotary, rotary_tables, rotate
from baatt.stages.dense import AttentionFunction, dense_attention

EMBEDDING, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, normalised in fp32 and returned to x's dtype first."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.epsilon).to(x.dtype)


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

    def forward(
        self, x: Tensor, rotary: Rotary, attention: AttentionFunction, key_mask: Tensor | None,
        keep: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:  # fmt: skip
        normed = self.attn_norm(x)
        q, k = self.q_norm(self.q_proj(normed)), self.k_norm(self.k_proj(normed))
        v = self.v_proj(normed)
        q, k, v = (rearrange(y, "B N (H D) -> B H N D", D=self.head_size) for y in (q, k, v))
        # Norms may have widened q and k (autocast); attention wants one dtype.
        q, k = rotate(q, rotary, v.dtype), rotate(k, rotary, v.dtype)
        k, v = (k, v) if keep is None else keep(k, v)
        out = attention(q, k, v, key_mask=key_mask)
        x = x + self.attn_out(rearrange(out, "B H N D -> B N (H D)"))
        normed = self.ff_norm(x)
        return x + cast(Tensor, self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed)))


class Embedding(nn.Embedding):
    """Draws nothing on the meta device, where drawing makes torch import its compiler, for seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Transformer(nn.Module):
    """The parameters of LLaDA's `model.transformer`: wte, blocks, ln_f and, unless tied, ff_out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = Embedding(config.logit_size, config.d_model)
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
        """Load a local LLaDA folder, in evaluation mode.

        The parameters are the tensors read, without a second copy in memory.

        Args:
            path: folder with config.json and model.safetensors, or shards with or without an index.
            dtype: dtype of the parameters; None keeps the stored one.
            device: where the parameters live.

        Raises:
            FileNotFoundError: the folder, its config.json, the weights or a shard is missing.
            ValueError, TypeError: config.json asks for something not implemented, or a file or tensor is broken,
                missing, unexpected or of the wrong shape.
        """
        config = ModelConfig.from_dict(read_config(path))
        check_described(path, layers=config.n_layers, parameters=config.parameters)
        with torch.device("meta"):
            model = cls(config)
        expected = model.state_dict()
        optional = {HEAD: expected[EMBEDDING]} if config.weight_tying else {}
        tensors = read_tensors(path, expected, optional=optional, dtype=dtype, device=device)
        if config.weight_tying and HEAD in tensors and not torch.equal(tensors.pop(HEAD), tensors[EMBEDDING]):
            raise ValueError(f"{path}: {HEAD} must equal {EMBEDDING} when weight_tying is true, got another tensor")
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def save_pretrained(
        self, path: str | Path, *, dtype: torch.dtype | None = torch.bfloat16, max_shard_bytes: int = 16 * 2**20
    ) -> None:
        """Write a LLaDA folder without its tokenizer; arguments and errors as `checkpoint.write_checkpoint`.

        dtype: what weights are stored in; torch.int8 = 8 bits with a scale for each row, which no other library reads.
        """
        config = self.config.to_dict()
        write_checkpoint(path, self.state_dict(), config, dtype=dtype, max_shard_bytes=max_shard_bytes)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights from N(0, init_std^2), projections back to the residual stream scaled by 1/sqrt(2 n_layers)."""
        if self.transformer.wte.weight.is_meta:  # see Embedding
            return
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
        embedding: Callable[[Tensor], Tensor] | None = None,
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
            start: place of the first given token in the sequence that the cache holds. A model that predicts the next
                token must be given the token before those whose logits are wanted.
            embedding: ids [B, n] -> [B, n, d_model] in place of the model's own; None = that one.

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
        _check_inputs(input_ids, attention_mask, logits_from, logits_to, cache, start, config.n_layers)
        if config.predicts == "next" and start > 0 and logits_from == 0:
            raise ValueError("logits_from must be at least 1 where predicts is 'next' and start > 0, got 0")
        key_mask = None if attention_mask is None else attention_mask.bool()
        stop = start + input_ids.shape[1]
        positions = torch.arange(start, stop, device=input_ids.device)[None]
        if key_mask is not None:
            positions = (key_mask.cumsum(dim=1) - 1).clamp(min=0)[:, start:stop]
        dtype = torch.promote_types(transformer.wte.weight.dtype, torch.float32)
        rotary = rotary_tables(positions, config.head_size, config.rope_theta, dtype)
        x = (embedding or transformer.wte)(input_ids)
        for layer, (block, function) in enumerate(zip(transformer.blocks, functions, strict=True)):
            keep = None if cache is None else functools.partial(cache.replace, layer, start)
            x = block(x, rotary, function, key_mask, keep)
        return transformer.head(transformer.ln_f(self.telling(x, logits_from, logits_to)))

    def telling(self, x: Tensor, first: int = 0, stop: int | None = None) -> Tensor:
        """Of states x [B, n, d_model] those that tell tokens [first, stop): each its own, or where the model predicts
        the next token the one before it. The first token of all has none before it and is told by its own."""
        if self.config.predicts == "same":
            return x[:, first:stop]
        stop = x.shape[1] if stop is None else stop
        before = x[:, max(first - 1, 0) : max(stop - 1, 0)]
        return before if first or not stop else torch.cat((x[:, :1], before), dim=1)


def _check_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, logits_from: int, logits_to: int | None,
    cache: KeyValueCache | None, start: int, layers: int,
) -> None:  # fmt: skip
    """Refuse what `MaskedDiffusionLM.forward` does not compute, by shapes and dtypes only: no wait for the device."""
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise ValueError(f"input_ids must be [B, N] int64, got {tuple(input_ids.shape)} {input_ids.dtype}")
    batch, tokens = input_ids.shape
    length = None if cache is None else cache.length
    if cache is not None and torch.is_grad_enabled():
        raise ValueError("cache must be None while gradients are recorded: call the model under torch.no_grad()")
    if length is None and start != 0:
        empty = "without a cache" if cache is None else "for an empty cache, which a whole sequence fills"
        raise ValueError(f"start must be 0 {empty}, got {start}")
    if cache is not None and length is not None:
        held = len(cache.layers)
        if held != layers:
            raise ValueError(f"cache must hold {layers} layers, got {held}: the pass that filled it failed")
        if batch != cache.batch:
            raise ValueError(f"input_ids must have B={cache.batch} rows as the cache, got {batch}")
        if tokens > length:
            raise ValueError(f"input_ids must have at most N={length} tokens as the cache, got {tokens}")
        if not 0 <= start <= length - tokens:
            raise ValueError(f"start must be in [0, {length - tokens}] for {tokens} of N={length} tokens, got {start}")
    if attention_mask is not None:
        whose, expected = ("input_ids", tokens) if length is None else ("the cached sequence", length)
        shape = tuple(attention_mask.shape)
        if shape != (batch, expected):
            raise ValueError(f"attention_mask must have the shape of {whose} {(batch, expected)}, got {shape}")
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            raise TypeError(f"attention_mask must be bool or integer, got {attention_mask.dtype}")
    if not 0 <= logits_from <= tokens:
        raise ValueError(f"logits_from must be in [0, N={tokens}], got {logits_from}")
    if logits_to is not None and not logits_from <= logits_to <= tokens:
        raise ValueError(f"logits_to must be in [logits_from={logits_from}, N={tokens}] or None, got {logits_to}")
