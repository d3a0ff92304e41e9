"""Tiny stand-ins for block-diffusion language models: how their code calls attention, with arithmetic of our own.

`SDARForCausalLM` makes a bool mask anew in every layer and calls FlashAttention by name where it hides nothing.
`FastDLLM` hands a mask with two axes to transformers' SDPA function, whatever implementation the config names. Both
prefill a prompt block-causally and then denoise block by block over a cache.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.integrations.stubs import DEFAULT, MASK, SIZE, WIDTH, Config, Layer, Output, merge, positions, split


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, softmax_scale: float = 1.0) -> Tensor:
    """As FlashAttention has it: [B, N, H, D], grouped heads; what it calls is out of a function mode's sight."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    weights = torch.einsum("bnhd, bmhd -> bhnm", q, k) * softmax_scale
    return torch.einsum("bhnm, bmhd -> bnhd", weights.softmax(dim=-1), v)


def block_causal(length: int, size: int) -> Tensor:
    blocks = torch.arange(length) // size
    return blocks[:, None] >= blocks


class CachedAttention(nn.Module):
    """Projections with grouped heads, over a cache that a pass may read without adding to it."""

    def __init__(self, config: Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.num_key_value_groups, self.is_causal = layer_idx, 4 // config.kv_heads, True
        self.q_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, config.kv_heads * SIZE) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None, cache: dict[int, Any] | None, store: bool) -> Tensor:
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        if cache is not None and self.layer_idx in cache:
            k, v = (torch.cat(both, dim=2) for both in zip(cache[self.layer_idx], (k, v), strict=True))
        if cache is not None and store:
            cache[self.layer_idx] = k, v
        return self.o_proj(self.attend(q, k, v, mask))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError


class SDARAttention(CachedAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        mask = mask.bool()
        if torch.all(mask):
            return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=SIZE**-0.5).flatten(2)
        out = F.scaled_dot_product_attention(
            query=q, key=k, value=v, attn_mask=mask, is_causal=False, scale=SIZE**-0.5, enable_gqa=True
        )
        return merge(out)


class Fast_dLLM_QwenAttention(CachedAttention):  # noqa: N801  (the name by which it is known)
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return function(self, q, k, v, mask, is_causal=False, dropout=0.0, scaling=SIZE**-0.5)[0].flatten(2)


class BlockStack(nn.Module):
    def __init__(self, attention: type[CachedAttention], config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Layer(attention(config, layer)) for layer in range(config.n_layers))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: dict[int, Any] | None, store: bool
    ) -> Tensor:
        start = cache[0][0].shape[2] if cache else 0
        x = self.embed_tokens(input_ids) + positions(start + input_ids.shape[1])[start:]
        for layer in self.layers:
            x = x + layer.self_attn(x, attention_mask, cache, store)
            x = x + layer.mlp(F.silu(x))
        return x


class BlockModel(nn.Module):
    """size: tokens of a block."""

    attention: type[CachedAttention]

    def __init__(self, size: int, config: Config = DEFAULT) -> None:
        super().__init__()
        self.size, self.config = size, config
        self.model = BlockStack(self.attention, config)
        self.lm_head = nn.Linear(WIDTH, 64)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: dict[int, Any] | None = None,
        store_kv: bool = False,
    ) -> Output:
        return Output(self.lm_head(self.model(input_ids, attention_mask, past_key_values, store_kv)))

    def mask(self, rows: slice, columns: slice, length: int) -> Tensor:
        """Of a part of the sequence."""
        return block_causal(length, self.size)[rows, columns]

    @torch.no_grad()
    def generate(self, prompt: Tensor, blocks: int, steps: int) -> Tensor:
        """Prefill the whole blocks of a prompt, then denoise the others one by one, `steps` passes each."""
        size, first = self.size, prompt.shape[1] // self.size
        length = (first + blocks) * size
        tokens = torch.full((prompt.shape[0], length), MASK)
        tokens[:, : prompt.shape[1]] = prompt
        cache: dict[int, Any] = {}
        prefix = slice(0, first * size)
        self(tokens[:, prefix], self.mask(prefix, prefix, length), cache, store_kv=True)
        for block in range(first, first + blocks):
            rows = slice(block * size, (block + 1) * size)
            mask = self.mask(rows, slice(0, rows.stop), length)
            for _ in range(steps):
                now = tokens[:, rows]
                logits = self(now, mask, cache).logits[..., :60]
                hidden = now == MASK
                chosen = hidden & (hidden.cumsum(dim=1) <= -(-size // steps))
                tokens[:, rows] = torch.where(chosen, logits.argmax(dim=-1), now)
            self(tokens[:, rows], mask, cache, store_kv=True)
        return tokens


class SDARForCausalLM(BlockModel):
    attention = SDARAttention

    def mask(self, rows: slice, columns: slice, length: int) -> Tensor:
        return super().mask(rows, columns, length).float()[None]


class FastDLLM(BlockModel):
    attention = Fast_dLLM_QwenAttention
