"""A model of any supported library that reads one text densely while a recorder watches its attention.

Folders in LLaDA's layout are loaded by us; every other folder by transformers, whose models `baatt.enable` knows.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from baatt.cli.errors import UsageError
from baatt.cli.options import load_model, read_device
from baatt.config import BAAttConfig, Policy
from baatt.integrations.enable import enable
from baatt.integrations.loading import load_transformers
from baatt.lab.capture import Recorder
from baatt.lab.loading import DTYPES, check_memory
from baatt.models.llada import MaskedDiffusionLM

#: No sequence is as long, so that every call stays dense: a capture shows what the model itself computes.
NEVER_SPARSE = Policy(min_length=2**62)


class Reader:
    """layers: how many; tokenizer: of `tokenizers`."""

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._handle = enable(model, BAAttConfig(), NEVER_SPARSE)
        self.layers = self._handle.layer_count or 0

    def read(self, ids: Tensor, recorder: Recorder) -> None:
        """Evaluate the model once on ids [1, N]; the recorder is shown every attention call."""
        if isinstance(self.model, MaskedDiffusionLM):
            check_memory(self.model.config, ids.shape[1], ids.device)
        with self._handle as handle, torch.inference_mode():
            handle.watch(recorder.keep)
            self.model(ids)

    def reasons(self) -> str:
        """Why calls never came here."""
        return "; ".join(self._handle.reasons)


def open_reader(arguments: argparse.Namespace) -> Reader:
    """The reader of --model.

    Raises:
        UsageError: transformers is needed and missing.
        ValueError: a model of no known kind, or without a fast tokenizer.
    """
    if arguments.model is None or _is_llada(arguments.model):
        return Reader(*load_model(arguments))
    try:
        model, tokenizer = load_transformers(
            arguments.model, dtype=DTYPES[arguments.dtype], device=read_device(arguments.device),
            trust_remote_code=arguments.trust_remote_code,
        )  # fmt: skip
    except ImportError as error:
        raise UsageError(f"--model is not in LLaDA's layout: {error}") from None
    return Reader(model, tokenizer)


def _is_llada(folder: Path) -> bool:
    """By its config.json; a folder without one is left to our loader, which says what is missing."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return not isinstance(config, dict) or config.get("model_type") == "llada"
