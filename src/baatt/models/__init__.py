"""The masked-diffusion language model of this project and its files; see `llada.py` and `checkpoint.py`."""

from baatt.models.checkpoint import from_pretrained, load_tokenizer, save_pretrained
from baatt.models.config import ModelConfig
from baatt.models.llada import MaskedDiffusionLM

__all__ = [
    "MaskedDiffusionLM",
    "ModelConfig",
    "from_pretrained",
    "load_tokenizer",
    "save_pretrained",
]
