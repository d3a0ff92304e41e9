"""Tiny random models of several kinds in folders, with the shipped tokenizer."""

from pathlib import Path

import torch

from baatt.assets import shipped_model
from baatt.models import MaskedDiffusionLM, ModelConfig
from baatt.models.checkpoint import load_tokenizer

MASK = 1


def llada_folder(folder: Path, layers: int = 3, **changes: object) -> Path:
    """Of LLaDA's layout; weights large enough that attention is not uniform."""
    torch.manual_seed(0)
    sizes = {
        "d_model": 32, "n_heads": 2, "n_layers": layers, "mlp_hidden_size": 48, "vocab_size": 4096,
        "mask_token_id": MASK, "max_sequence_length": 2048, "init_std": 0.3, **changes,
    }  # fmt: skip
    MaskedDiffusionLM(ModelConfig(**sizes)).save_pretrained(folder, dtype=torch.float32)
    load_tokenizer(shipped_model()).save(str(folder / "tokenizer.json"))
    return folder


def transformers_folder(folder: Path, kind: str, **changes: object) -> Path:
    """A class of transformers with a head; `is_causal=False` makes a decoder see later tokens."""
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    config = cls.config_class(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=2048, initializer_range=0.3, pad_token_id=0, bos_token_id=0, eos_token_id=0, **changes,
    )  # fmt: skip
    cls(config).save_pretrained(folder)
    tokenizer = load_tokenizer(shipped_model())
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token=tokenizer.id_to_token(MASK)
    ).save_pretrained(folder)
    return folder
