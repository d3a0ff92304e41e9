"""From the names a user gives to a device, a dtype and a model, and whether what is asked for fits into memory.

For the command line and the adapters of harnesses alike. Errors begin with the bare name, `device` or `dtype`. What
reads a model is imported when one is read: a machine that only times kernels has neither tokenizers nor safetensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from baatt.assets import shipped_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from baatt.models.config import ModelConfig
    from baatt.models.llada import MaskedDiffusionLM

#: What weights and inputs may be, by name.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str | None) -> torch.device:
    """The device of a name, None is a GPU if there is one; a ValueError where there is no such device."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f'device must be a device such as "cpu" or "cuda:0", got {name!r}') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} needs a GPU that PyTorch can use, and found none")
    try:  # the name of a kind that this PyTorch lacks, of a card that is not there, or of one that computes nothing
        torch.zeros(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one that computes here, got {name!r}: {reason}") from None
    return device


def _fetched() -> Path:
    from baatt.lab.smollm2 import kept_merged

    return kept_merged()


#: Models by name, each with what finds its folder.
MODELS: dict[str, Callable[[], Path]] = {"needle": shipped_model, "smollm2": _fetched}


def find_model(name: str) -> Path:
    """The folder of a name of `MODELS`; anything else is a folder itself, `./smollm2` one that has such a name.

    Raises:
        FileNotFoundError: the model of that name is not here, with the command that brings it.
    """
    return MODELS[name]() if name in MODELS else Path(name)


def load_model(folder: Path, *, dtype: torch.dtype | None, device: torch.device) -> tuple[MaskedDiffusionLM, Tokenizer]:
    """Model and tokenizer of a folder in LLaDA's layout; dtype None keeps the stored one."""
    from baatt.models.checkpoint import load_tokenizer
    from baatt.models.llada import MaskedDiffusionLM

    return MaskedDiffusionLM.from_pretrained(folder, dtype=dtype, device=device), load_tokenizer(folder)


def load_transformers(
    name: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    head: bool = False,
    gguf: str | None = None,
) -> tuple[Any, Tokenizer]:
    """The model, in evaluation mode, and the fast tokenizer of a folder or hub name of transformers.

    Args:
        trust_remote_code: whether the modelling code that the folder brings may run; pickled weights are never read.
        head: whether it is to give logits.
        gguf: name of a GGUF file there that holds weights, config and tokenizer.

    Raises:
        ImportError: transformers is not installed, with the extra that brings it.
        ValueError: the folder has no fast tokenizer, or no head where one is wanted.
    """
    from tokenizers import Tokenizer

    from baatt.models.checkpoint import INDEX_NAME, check_index, without_limits

    try:
        import transformers
    except ImportError:
        raise ImportError(f"{name} needs transformers: pip install 'baatt[transformers]'") from None
    place: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf is not None:
        place["gguf_file"] = gguf
    elif (index := Path(name).expanduser() / INDEX_NAME).is_file():
        check_index(index)
    kind = transformers.AutoModel
    if head:
        kind = getattr(transformers, _class_with_head(transformers.AutoConfig.from_pretrained(name, **place), name))
    model = kind.from_pretrained(name, dtype=dtype, use_safetensors=gguf is None, **place).to(device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **place)
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(fast, Tokenizer):
        raise ValueError(f"{name} must have a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
    return model, without_limits(fast)


def _class_with_head(config: Any, name: str | Path) -> str:
    """Which of transformers' automatic classes gives a folder's model its head; remote code says it itself."""
    kinds = ("AutoModelForCausalLM", "AutoModelForMaskedLM")
    remote = getattr(config, "auto_map", None) or {}
    for kind in (*kinds, "AutoModel"):
        if kind in remote:
            return kind
    named = " ".join(getattr(config, "architectures", None) or ["CausalLM"])  # a GGUF file names none
    for kind, part in zip(kinds, ("CausalLM|LMHead", "MaskedLM"), strict=True):
        if re.search(part, named):
            return kind
    raise ValueError(f"{name} must hold a language model with its head, ...ForCausalLM or ...ForMaskedLM, got {named}")


def find_mask_token(model: Any, tokenizer: Tokenizer, folder: Path | None) -> int | None:
    """The id of the mask, which the model's config or the tokenizer's names; None where neither does."""
    from baatt.lab.chat import load_chat_templates

    found = getattr(model.config, "mask_token_id", None)
    if found is None and folder is not None:
        name = load_chat_templates(folder).special_tokens.get("mask_token")
        found = None if name is None else tokenizer.token_to_id(name)
    if found is not None and (not isinstance(found, int) or isinstance(found, bool)):
        raise TypeError(f"mask_token_id must be an int, got {found!r}")
    return found


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses, of a GPU or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def check_bytes(what: str, needs: str, needed: int, device: torch.device) -> None:
    """Refuse what cannot fit, before anything is allocated, with a ValueError: the estimate and what is free."""
    if needed > (free := free_bytes(device)):
        estimate = f"{needs} about {needed / 2**30:.1f} GiB"
        raise ValueError(f"{what} must fit into memory: {estimate}, {free / 2**30:.1f} GiB are free")


def check_memory(config: ModelConfig, tokens: int, device: torch.device) -> None:
    """Refuse a length whose activations cannot fit, as `check_bytes`."""
    # Widest moment of a layer in fp32: residual, q, k, v, their rotated and sorted copies, both halves of the MLP.
    estimate = 4 * tokens * (10 * config.d_model + 3 * config.mlp_hidden_size)
    check_bytes(f"{tokens} tokens", "one layer needs", estimate, device)
