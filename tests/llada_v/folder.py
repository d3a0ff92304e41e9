"""A tiny random LLaDA-V folder with the names, keys and files of the published one, made with transformers' modules."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHARACTERS = ("[unk]", "\n", *"abcdefghijklmnopqrstuvwxyz", *" ./_?")
VOCABULARY = 64
CONFIG: dict[str, object] = {
    "architectures": ["LlavaLLaDAModelLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "image_aspect_ratio": "anyres_max_4",
    "image_grid_pinpoints": "(1x1),...,(6x6)",
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": 2,
    "max_position_embeddings": 16384,
    "mm_hidden_size": 24,
    "mm_newline_position": "grid",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "model/siglip2-so400m-patch14-384",
    "model_type": "llava_llada",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 8192,
    "torch_dtype": "float32",
    "use_cache": False,
    "use_mm_proj": True,
    "vocab_size": VOCABULARY,
    # The published folder does not have it, and the published code fixes so400m's sizes. 5 x 5 patches, as odd as 27.
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "image_size": 42,
        "intermediate_size": 40,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "patch_size": 8,
    },
}
TOWER = "model.vision_tower.vision_tower."


def language_model() -> LlamaForCausalLM:
    """The language part: a Llama by its names and arithmetic, to be used without its causal mask."""
    torch.manual_seed(0)
    names = (
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
        *("rms_norm_eps", "rope_theta", "vocab_size", "tie_word_embeddings"),
    )
    config = LlamaConfig(**{name: CONFIG[name] for name in names}, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.dim() > 1 else 0.1).add_(float(parameter.dim() == 1))
    return model


def vision_model() -> SiglipVisionModel:
    """The tower with its last layer and its pooling head."""
    torch.manual_seed(1)
    return SiglipVisionModel(SiglipVisionConfig(**CONFIG["vision_config"])).eval()


def tower_tensors() -> dict[str, Tensor]:
    """Of the tower alone, under the names of SigLIP's checkpoints."""
    names = vision_model().state_dict()
    return {name if name.startswith("vision_model.") else f"vision_model.{name}": x for name, x in names.items()}


def tensors() -> dict[str, Tensor]:
    """All of a checkpoint: the tower without its last layer and its head, as the published code keeps it."""
    torch.manual_seed(2)
    tower = {name: x for name, x in tower_tensors().items() if ".layers.2." not in name and ".head." not in name}
    width, hidden = CONFIG["hidden_size"], CONFIG["mm_hidden_size"]
    return {
        **language_model().state_dict(),
        **{TOWER + name: x for name, x in tower.items()},
        "model.mm_projector.0.weight": torch.randn(width, hidden) / 5,
        "model.mm_projector.0.bias": torch.randn(width) / 5,
        "model.mm_projector.2.weight": torch.randn(width, width) / 5,
        "model.mm_projector.2.bias": torch.randn(width) / 5,
        "model.image_newline": torch.randn(width),
    }


def tokenizer() -> Tokenizer:
    """One id a character; the special tokens have the first ids."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(list(SPECIAL))
    return made


def write_folder(folder: Path, stored: dict[str, Tensor] | None = None, **changes: object) -> Path:
    """A folder as the hub holds it; a change to `...` leaves a key out."""
    folder.mkdir(exist_ok=True)
    stored = tensors() if stored is None else stored
    save_file({name: x.contiguous().clone() for name, x in stored.items()}, folder / "model.safetensors")
    config = {name: value for name, value in {**CONFIG, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder
