"""A model and its tokenizer from a transformers folder or hub name, for the command line."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer


def load_transformers(
    name: str | Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> tuple[Any, Tokenizer]:
    """`AutoModel` and the fast tokenizer of a folder.

    Args:
        name: local folder or hub name.
        trust_remote_code: whether the modelling code that the folder brings may run.

    Returns:
        The model in evaluation mode, and its tokenizer as `tokenizers` has it.

    Raises:
        ImportError: transformers is not installed, with the extra that brings it.
        ValueError: the folder has no fast tokenizer.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise ImportError(f"{name} needs transformers: pip install 'baatt[transformers]'") from None
    model = AutoModel.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(fast, Tokenizer):
        raise ValueError(f"{name} must have a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
    return model, fast
