"""Tiny models of every architecture that transformers' AutoModel knows, for classes.py.

In: a name of `names()`. Out: a random model and one evaluation of it. The default config of a class is shrunk by the
names of its numbers, in nested configs too; tokens or pixels are its input. A class that needs more than that, or stays
large, is listed with what it answered.
"""

import importlib
import inspect
from typing import Any

import torch
from classes import Built
from torch import Tensor

WIDTH, TOKENS, LARGEST = 32, 96, 30_000_000
#: Number of a config -> its tiny value.
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "hidden_dim"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "projection_dim", "emb_dim", "out_hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "n_inner", "ffn_hidden_size", "ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "mlp_dim", "feed_forward_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "moe_intermediate_size", "rotary_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim",), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 512),
    **{"vocab_size": 99, "sliding_window": 32, "image_size": 96, "patch_size": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}


def auto() -> Any:
    """transformers' lists."""
    return importlib.import_module("transformers.models.auto.modeling_auto")


def names() -> list[str]:
    """Architectures by the type of their config."""
    return sorted(auto().MODEL_MAPPING_NAMES)


def build(name: str) -> Built:
    """An architecture of `names()`.

    Raises:
        NotImplementedError: with the reason.
    """
    kind = importlib.import_module("transformers").CONFIG_MAPPING[name]
    config = kind(**shrunk(kind().to_dict()))
    classes = auto().MODEL_MAPPING[kind]
    model_class = classes[0] if isinstance(classes, tuple) else classes
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise NotImplementedError(f"its shrunk default config still has {size:,} parameters")
    torch.manual_seed(0)
    model = model_class(config).eval()
    given = inputs(model)

    def run() -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return model(**given)[0]

    return Built(model, run)


def shrunk(default: dict[str, Any]) -> dict[str, Any]:
    """What differs from a default config, and from those inside it."""
    found: dict[str, Any] = {}
    for key, value in default.items():
        if key in SIZES and isinstance(value, int) and not isinstance(value, bool):
            found[key] = min(value, SIZES[key]) if key != "vocab_size" else SIZES[key]
        elif key.endswith("_token_id") and isinstance(value, int):
            found[key] = min(value, 98)
        elif key in ("layer_types", "mlp_layer_types") and isinstance(value, list) and value:
            found[key] = [value[0], value[-1]]
        elif isinstance(value, dict) and "model_type" in value:
            found[key] = shrunk(value)
    return found


def inputs(model: Any) -> dict[str, Tensor]:
    """Tokens or pixels, by what the model says is its input.

    Raises:
        NotImplementedError: another input.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 90, (1, TOKENS), generator=generator)
    wanted, parameters = model.main_input_name, inspect.signature(model.forward).parameters
    if wanted == "pixel_values":
        config = getattr(model.config, "vision_config", model.config)
        size, channels = getattr(config, "image_size", 96), getattr(config, "num_channels", 3)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        given = {"pixel_values": torch.randn(1, channels, height, width, generator=generator)}
        return given | ({"input_ids": tokens} if "input_ids" in parameters else {})
    if wanted != "input_ids":
        raise NotImplementedError(f"its input is {wanted}")
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if "decoder_input_ids" in parameters else {})
