"""Language and video models that attend causally, block-causally or both ways, each run as its users run it.

In: a name of `CLIENTS`. Out: a tiny random model and a run of its own loop. test_clients.py compares the runs,
`benchmarks/clients.py` makes the table of docs/integrations.md from them.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from torch import Tensor, nn

from tests.integrations.block_models import FastDLLM, SDARForCausalLM, block_causal
from tests.integrations.stubs import MASK, DreamModel, LLaDAModelLM, denoise

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
PROMPT = 90


class Client(NamedTuple):
    """attends: in words; code: whose code runs; model: to enable; run: its loop, () -> tokens or latents."""

    attends: str
    code: str
    model: Any
    run: Callable[[], Tensor]


def prompt(batch: int = 1, length: int = PROMPT) -> Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(1))


def left_padded(length: int = PROMPT) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :17] = 0
    return mask


def decoder(name: str, attends: str = "causal", *, static: bool = False, **changes: Any) -> Client:
    """A decoder of transformers under `generate`, two prompts of which one is padded on the left."""
    kind = getattr(transformers, f"{name}ForCausalLM")
    model = kind(kind.config_class(**SIZES, **changes)).eval()
    options = {"attention_mask": left_padded(), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    options |= {"cache_implementation": "static" if static else "dynamic", "disable_compile": True}
    return Client(attends, "transformers", model, lambda: model.generate(prompt(2), **options))


class LLaDA2MoeAttention(nn.Module):
    """Takes its function from the interface, with `is_causal` False and an additive mask of its caller."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.num_key_value_groups = config, layer_idx, False, 2
        self.query_key_value, self.dense = nn.Linear(32, 64), nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, (8, 8)).transpose(1, 2).split([4, 2, 2], dim=1)
        function = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return self.dense(
            function(self, q, k, v, mask, dropout=0.0, scaling=8**-0.5, sliding_window=None)[0].flatten(2)
        )


class LLaDA2Config(transformers.PretrainedConfig):
    model_type = "llada2_double"
    num_attention_heads, hidden_size, num_hidden_layers, vocab_size, mask_token_id = 4, 32, 2, 64, MASK


class LLaDA2MoeModelLM(transformers.PreTrainedModel):
    config_class, _supports_sdpa = LLaDA2Config, True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.layers = nn.ModuleList(LLaDA2MoeAttention(config, layer) for layer in range(2))
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x, attention_mask)
        return self.head(x)

    @torch.no_grad()
    def generate(self, ids: Tensor, blocks: int = 3, size: int = 32, steps: int = 4) -> Tensor:
        """Every step is a pass over all blocks so far, with a slice of one mask of logarithms."""
        first = ids.shape[1] // size
        length = (first + blocks) * size
        mask = block_causal(length, size).float().log()[None, None]
        tokens = torch.full((1, length), MASK)
        tokens[:, : ids.shape[1]] = ids
        for end in range((first + 1) * size, length + 1, size):
            window = mask[:, :, :end, :end]
            for _ in range(steps):
                hidden = tokens[:, end - size : end] == MASK
                chosen = hidden & (hidden.cumsum(dim=1) <= size // steps)
                best = self(tokens[:, :end], window)[:, -size:, :60].argmax(dim=-1)
                tokens[:, end - size : end] = torch.where(chosen, best, tokens[:, end - size : end])
        return tokens


def llada2() -> Client:
    model = LLaDA2MoeModelLM(LLaDA2Config()).eval()
    return Client("blocks of 32, additive mask", "double of its code", model, lambda: model.generate(prompt()))


class A2DQwen3(transformers.Qwen3ForCausalLM):
    """The dLLM library's: a causal class that is given masks of four axes, which transformers passes on as they are."""


def a2d_model() -> A2DQwen3:
    return A2DQwen3(transformers.Qwen3Config(**SIZES)).eval()


def mdlm() -> Client:
    """Masked diffusion: an additive mask [B, 1, N, N] of zeros, of a class whose layers say that they are causal."""
    model = a2d_model()
    wrapped = lambda tokens, attention_mask: model(tokens, attention_mask=torch.zeros(1, 1, *tokens.shape[1:] * 2))  # noqa: E731
    return Client("both ways, additive mask of zeros", "transformers", model, lambda: denoise_all(wrapped))


def bd3lm() -> Client:
    """Block diffusion: a prefix pass with a bool mask, padding by padding, then blocks over its cache."""
    model, size = a2d_model(), 32
    wanted = left_padded(96).bool()

    @torch.no_grad()
    def run() -> Tensor:
        tokens, real = torch.where(wanted, prompt(2, 96), 0), wanted
        for _ in range(2):
            square = real[:, None, :, None] & real[:, None, None, :]
            places = (real.cumsum(dim=1) - 1).clamp(min=0)
            mask = block_causal(tokens.shape[1], size) & square
            cache = model(tokens, attention_mask=mask, position_ids=places, use_cache=True).past_key_values
            real = torch.cat((real, torch.ones(2, size, dtype=torch.bool)), dim=1)
            block, later = torch.full((2, size), MASK), (real.cumsum(dim=1) - 1)[:, -size:]
            for _ in range(4):
                options = {"attention_mask": real[:, None, None].expand(-1, -1, size, -1), "position_ids": later}
                logits = model(block, past_key_values=copy.deepcopy(cache), **options).logits[..., :60]
                hidden = block == MASK
                chosen = hidden & (hidden.cumsum(dim=1) <= size // 4)
                block = torch.where(chosen, logits.argmax(dim=-1), block)
            tokens = torch.cat((tokens, block), dim=1)
        return tokens

    return Client("blocks of 32 and padding, bool mask", "transformers, double of its sampler", model, run)


def denoise_all(model: Any) -> Tensor:
    with torch.no_grad():
        return denoise(lambda tokens, attention_mask: model(tokens, attention_mask), prompt(), 32, 4)


def block_model(kind: type, size: int, attends: str) -> Client:
    model = kind(size).eval()
    return Client(attends, "double of its code", model, lambda: model.generate(prompt(), 4, 2))


def masked_model(kind: Callable[[], Any]) -> Client:
    model = kind().eval()
    return Client("both ways", "double of its code", model, lambda: denoise_all(model))


def diffusion_gemma() -> Client:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}
    text = {**SIZES, **layers, "eos_token_id": None, "global_head_dim": 16, "num_global_key_value_heads": 1}
    text |= {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8}
    vision = {"model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16}
    tokens = {"canvas_length": 20, "image_token_id": 61, "boi_token_id": 62, "eoi_token_id": MASK}
    config = transformers.DiffusionGemmaConfig(text_config=text, vision_config=vision, **tokens)
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    for x in model.parameters():
        if x.std() == 0:
            nn.init.normal_(x, std=0.3)

    def run() -> Tensor:
        torch.manual_seed(3)
        options = {"attention_mask": left_padded(), "max_new_tokens": 40, "max_denoising_steps": 2}
        made = model.generate(prompt(2), **options)
        return getattr(made, "sequences", made)

    return Client("causal encoder with windows in one layer of two, canvas both ways", "transformers", model, run)


def skyreels() -> Client:
    """Diffusion forcing: every frame has a noise level of its own, and blocks of 2 frames see those before."""
    model = diffusers.SkyReelsV2Transformer3DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 16},
        **{"freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32, "num_frame_per_block": 2},
    ).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 6, 10, 14, generator=generator),
        "timestep": torch.tensor([[100, 100, 500, 500, 900, 900]]),
        "encoder_hidden_states": torch.randn(1, 6, 16, generator=generator),
    }

    def run() -> Tensor:
        with torch.no_grad():
            return model(**inputs, enable_diffusion_forcing=True, return_dict=False)[0]

    return Client("blocks of 2 frames, bool mask", "diffusers", model, run)


#: Every client by its name.
CLIENTS: dict[str, Callable[[], Client]] = {
    "Llama, SmolLM2": lambda: decoder("Llama"),
    "Qwen2": lambda: decoder("Qwen2"),
    "Qwen3, static cache": lambda: decoder("Qwen3", static=True),
    "Gemma3": lambda: decoder(
        "Gemma3", "causal, a window in one layer of two", sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "LLaDA2": llada2,
    "SDAR": lambda: block_model(SDARForCausalLM, 4, "blocks of 4, bool mask"),
    "Fast-dLLM v2": lambda: block_model(FastDLLM, 32, "blocks of 32, bool mask of two axes"),
    "A2D": mdlm,
    "BD3LM": bd3lm,
    "DiffusionGemma": diffusion_gemma,
    "SkyReels-V2 diffusion forcing": skyreels,
    "LLaDA": lambda: masked_model(LLaDAModelLM),
    "Dream": lambda: masked_model(DreamModel),
}  # fmt: skip


def build(name: str) -> Client:
    torch.manual_seed(0)
    return CLIENTS[name]()
