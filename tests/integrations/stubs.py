"""Tiny stand-ins for remote code: the call structure that the adapters rely on, with arithmetic of our own.

`LLaDAModelLM` calls its inner model by `.forward`, and its blocks hand no mask to `_scaled_dot_product_attention`.
`DreamModel` makes bool [B, 1, N, N] of a padding mask. `LLaDAVModelLM` always adds a mask with a row for every query
and has a sampler that calls the stack without the model. `SDARModel` is block-causal.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

MASK = 63
WIDTH, HEADS, SIZE = 32, 4, 8


class Config(NamedTuple):
    n_layers: int = 3
    kv_heads: int = HEADS
    mask_token_id: int | None = MASK
    flash_attention: bool = False


DEFAULT = Config()


class Output(NamedTuple):
    logits: Tensor
    past_key_values: list[tuple[Tensor, Tensor]] | None = None


def split(x: Tensor) -> Tensor:
    return rearrange(x, "B N (H D) -> B H N D", D=SIZE)


def merge(x: Tensor) -> Tensor:
    return rearrange(x, "B H N D -> B N (H D)")


def positions(length: int, device: torch.device | None = None) -> Tensor:
    angles = torch.arange(length, device=device)[:, None] * torch.logspace(0, -2, WIDTH // 2, device=device)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


# LLaDA: modeling_llada.py


class LLaDABlock(nn.Module):
    def __init__(self, config: Config, layer_id: int, hands_mask: bool) -> None:
        super().__init__()
        self.layer_id, self.config, self.hands_mask = layer_id, config, hands_mask
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, config.kv_heads * SIZE) for _ in range(2))
        self.attn_out, self.ff = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.native_calls = 0

    def _scaled_dot_product_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            self.native_calls += 1
        groups = q.size(1) // k.size(1)
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=False)

    def attention(self, q, k, v, attention_bias=None, layer_past=None, use_cache=False, replace_position=None):
        q, k, v = split(q), split(k), split(v)
        if layer_past is not None and replace_position is None:
            k, v = (torch.cat((past, new), dim=2) for past, new in zip(layer_past, (k, v), strict=True))
        elif layer_past is not None:
            for past, new in zip(layer_past, (k, v), strict=True):
                past[:, :, replace_position[0].nonzero()[:, 0]] = new
            k, v = layer_past
        mask = attention_bias if self.hands_mask else None
        out = self._scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)
        return self.attn_out(merge(out)), (k, v) if use_cache else None

    def forward(self, x, attention_bias=None, layer_past=None, use_cache=False, replace_position=None):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        out, present = self.attention(q, k, v, attention_bias, layer_past, use_cache, replace_position)
        x = x + out
        return x + self.ff(F.silu(x)), present


class LLaDAModel(nn.Module):
    def __init__(self, config: Config, hands_mask: bool) -> None:
        super().__init__()
        self.config = config
        blocks = [LLaDABlock(config, i, hands_mask) for i in range(config.n_layers)]
        parts = {"wte": nn.Embedding(64, WIDTH), "blocks": nn.ModuleList(blocks), "ff_out": nn.Linear(WIDTH, 64)}
        self.transformer = nn.ModuleDict(parts)

    def forward(
        self,
        input_ids,
        input_embeddings=None,
        attention_mask=None,
        attention_bias=None,
        past_key_values=None,
        use_cache=False,
        replace_position=None,
    ):
        x = self.transformer["wte"](input_ids) if input_embeddings is None else input_embeddings
        start = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        at = positions(start + x.shape[1], x.device)
        x = x + (at[start:] if replace_position is None else at[:start][replace_position[0].bool()])
        if attention_mask is not None and attention_mask.ndim == 2:
            barred = (1.0 - attention_mask.float())[:, None, None, :] * torch.finfo(torch.float32).min
            attention_bias = torch.zeros(1, 1, x.shape[1], 1) + barred
        presents = []
        for index, block in enumerate(self.transformer["blocks"]):
            past = None if past_key_values is None else past_key_values[index]
            x, present = block(x, attention_bias, past, use_cache, replace_position)
            presents.append(present)
        return Output(self.transformer["ff_out"](x), presents if use_cache else None)


class LLaDAModelLM(nn.Module):
    def __init__(self, config: Config = DEFAULT, hands_mask: bool = False) -> None:
        super().__init__()
        self.config = config
        self.model = LLaDAModel(config, hands_mask)

    @property
    def blocks(self) -> Any:
        return self.model.transformer["blocks"]

    def forward(
        self,
        input_ids=None,
        inputs_embeds=None,
        attention_mask=None,
        attention_bias=None,
        past_key_values=None,
        use_cache=None,
        replace_position=None,
    ):
        return self.model.forward(
            input_ids=input_ids,
            input_embeddings=inputs_embeds,
            attention_mask=attention_mask,
            attention_bias=attention_bias,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            replace_position=replace_position,
        )


# Dream: modeling_dream.py; LLaDA-V: its own modeling_llada.py; SDAR


class Attention(nn.Module):
    def __init__(self, config: Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.config = layer_idx, config
        self.q_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, config.kv_heads * SIZE) for _ in range(2))

    def project(self, x: Tensor) -> list[Tensor]:
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        return [q, *(y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))]

    def forward(self, hidden_states, attention_mask=None):
        """Eager: no call of scaled_dot_product_attention."""
        q, k, v = self.project(hidden_states)
        scores = q @ k.transpose(2, 3) / math.sqrt(SIZE)
        if isinstance(attention_mask, Tensor):
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        return self.o_proj(merge(scores.softmax(dim=-1) @ v))


class SdpaForward:
    def forward(self, hidden_states, attention_mask=None):
        q, k, v = self.project(hidden_states)
        if isinstance(attention_mask, Tensor):
            attention_mask = attention_mask[:, :, :, : k.shape[2]]
        mask = attention_mask if isinstance(attention_mask, Tensor) else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)
        return self.o_proj(merge(out))


class DreamAttention(Attention):
    pass


class DreamSdpaAttention(SdpaForward, DreamAttention):
    pass


class LLaDAAttention(Attention):
    pass


class LLaDASdpaAttention(SdpaForward, LLaDAAttention):
    pass


class LLaDAMoESdpaAttention(SdpaForward, Attention):
    pass


class SDARAttention(SdpaForward, Attention):
    pass


class Layer(nn.Module):
    def __init__(self, self_attn: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = self_attn, nn.Linear(WIDTH, WIDTH)

    def forward(self, x, attention_mask=None):
        x = x + self.self_attn(x, attention_mask=attention_mask)
        return x + self.mlp(F.silu(x))


class Stack(nn.Module):
    def __init__(self, config: Config, attention: type[Attention]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Layer(attention(config, i)) for i in range(config.n_layers))

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x + positions(x.shape[1], x.device)
        mask = self.make_mask(attention_mask, x)
        for layer in self.layers:
            x = layer(x, attention_mask=mask)
        return x

    def make_mask(self, attention_mask, x):
        return attention_mask


class DreamModel(nn.Module):
    stack: type[Stack] = Stack

    def __init__(self, config: Config = DEFAULT, attention: type[Attention] = DreamSdpaAttention) -> None:
        super().__init__()
        self.config = config
        self.model = self.stack(config, attention)
        self.lm_head = nn.Linear(WIDTH, 64)

    def forward(self, input_ids=None, attention_mask="full"):
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            real = attention_mask.bool()
            attention_mask = real[:, None, None, :] & real[:, None, :, None]
        return Output(self.lm_head(self.model(input_ids=input_ids, attention_mask=attention_mask)))


class AdditiveStack(Stack):
    def make_mask(self, attention_mask, x):
        mask = torch.zeros(x.shape[0], 1, x.shape[1], x.shape[1], dtype=x.dtype)
        if attention_mask is not None:
            mask = mask.masked_fill(attention_mask[:, None, None, :].eq(0), torch.finfo(x.dtype).min)
        return mask


class LLaDAVModelLM(DreamModel):
    stack = AdditiveStack

    def __init__(self, config: Config = DEFAULT, attention: type[Attention] = LLaDASdpaAttention) -> None:
        super().__init__(config, attention)

    def forward(self, input_ids=None, attention_mask=None):
        return Output(self.lm_head(self.model(input_ids=input_ids, attention_mask=attention_mask)))

    def generate_with_embeds(self, inputs_embeds):
        return self.lm_head(self.model(inputs_embeds=inputs_embeds))


class BlockCausalStack(Stack):
    def make_mask(self, attention_mask, x):
        block = torch.arange(x.shape[1]) // 16
        return (block[:, None] >= block)[None, None]


class SDARModel(DreamModel):
    stack = BlockCausalStack

    def __init__(self, config: Config = DEFAULT) -> None:
        super().__init__(config, SDARAttention)


def denoise(
    model: Any, prompt: Tensor, new: int, steps: int, *, guided: bool = False, mask: Tensor | None = None
) -> Tensor:
    """The loop of a masked language model's sampler: every step uncovers `new // steps` tokens, the left ones first."""
    tokens = torch.cat((prompt, torch.full((prompt.shape[0], new), MASK)), dim=1)
    for _ in range(steps):
        batch = tokens
        if guided:
            unconditional = tokens.clone()
            unconditional[:, : prompt.shape[1]] = MASK
            batch = torch.cat((tokens, unconditional))
        logits = model(batch, attention_mask=mask).logits[: prompt.shape[0], :, :60]
        hidden = tokens == MASK
        chosen = hidden & (hidden.cumsum(dim=1) <= new // steps)
        tokens = torch.where(chosen, logits.argmax(dim=-1), tokens)
    return tokens
