"""The masked-diffusion language model of this project and its files; see `llada.py` and `checkpoint.py`."""

from baatt.models.checkpoint import load_tokenizer
from baatt.models.config import ModelConfig
from baatt.models.llada import MaskedDiffusionLM

__all__ = ["MaskedDiffusionLM", "ModelConfig", "load_tokenizer"]
