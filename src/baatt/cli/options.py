"""Options that several verbs share: which model, how sparse, and which of two measured settings.

A preset names dials and policy together; single options change one dial of it.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from baatt import config
from baatt.assets import shipped_model
from baatt.backend import IMPLS, choose_backend
from baatt.cli.dials import DTYPES, add_dial_options, changed_dials, free_bytes
from baatt.cli.errors import UsageError
from baatt.config import BAAttConfig, Policy
from baatt.models.checkpoint import load_tokenizer
from baatt.models.config import ModelConfig
from baatt.models.llada import MaskedDiffusionLM


class Setting(NamedTuple):
    """What of a model is sparse, and how."""

    config: BAAttConfig
    policy: Policy

    def describe(self) -> str:
        """One line with every dial."""
        dials = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(self.config).items())
        dense = ", ".join(map(str, self.policy.dense_layers)) or "none"
        return f"{dials}; dense layers: {dense}"


PRESETS = {name: Setting(*preset) for name, preset in config.PRESETS.items()}


def add_sparse_options(parser: argparse.ArgumentParser) -> None:
    """--preset and one option per dial."""
    group = parser.add_argument_group("sparse attention")
    group.add_argument(
        "--preset", choices=list(PRESETS), default="safe",
        help="safe: keys sorted by norm in segments of 256, layers 0 and 1 dense; paper: queries and keys sorted in "
        "segments of 1024, every layer sparse (default: safe)",
    )  # fmt: skip
    group.add_argument("--sparsity", type=float, help="share of key blocks skipped per query block, in [0, 1)")
    add_dial_options(group)
    group.add_argument("--dense-layers", type=read_layers, help='layers that stay dense, e.g. "0,1,-1" or "none"')
    group.add_argument("--impl", choices=IMPLS, default="auto", help="implementation (default: auto)")


def read_setting(arguments: argparse.Namespace) -> Setting:
    """The preset with the dials that were given."""
    preset = PRESETS[arguments.preset]
    changed = changed_dials(arguments)
    if arguments.sparsity is not None:
        changed["sparsity"] = arguments.sparsity
    policy = preset.policy
    if arguments.dense_layers is not None:
        policy = dataclasses.replace(policy, dense_layers=arguments.dense_layers)
    return Setting(dataclasses.replace(preset.config, **changed), policy)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --device, --dtype."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", type=Path, help="folder in LLaDA's layout (default: the model shipped with baatt)")
    group.add_argument("--device", default="cpu", help='where to run, e.g. "cpu" or "cuda" (default: cpu)')
    group.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the weights (default: float32)")


def read_device(text: str) -> torch.device:
    """What --device names.

    Raises:
        UsageError: no such device.
    """
    try:
        device = torch.device(text)
    except RuntimeError:
        raise UsageError(f'--device must be a device such as "cpu" or "cuda", got {text!r}') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda needs a GPU that PyTorch can use, and found none")
    return device


def load_model(arguments: argparse.Namespace) -> tuple[MaskedDiffusionLM, Tokenizer]:
    """Model and tokenizer of the chosen folder, on the chosen device."""
    folder = arguments.model or shipped_model()
    device = read_device(arguments.device)
    try:
        choose_backend(arguments.impl, device)
    except RuntimeError as error:
        raise UsageError(f"--impl {arguments.impl} is refused: {error}") from None
    model = MaskedDiffusionLM.from_pretrained(folder, dtype=DTYPES[arguments.dtype], device=device)
    return model, load_tokenizer(folder)


def check_memory(config: ModelConfig, tokens: int, device: str) -> None:
    """Refuse a length whose activations cannot fit, before anything is allocated.

    Raises:
        UsageError: with the estimate and what is free.
    """
    # Widest moment of a layer in fp32: residual, q, k, v, their rotated and sorted copies, both halves of the MLP.
    estimate = 4 * tokens * (10 * config.d_model + 3 * config.mlp_hidden_size)
    free = free_bytes(torch.device(device))
    if estimate > free:
        raise UsageError(
            f"{tokens} tokens must fit into memory: one layer needs about {estimate / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free"
        )


def check_folders(*paths: Path | None) -> None:
    """Refuse a file that could not be written before a minute is spent on it.

    Raises:
        UsageError: no such folder.
    """
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path} must lie in an existing folder, {path.parent} is none")


def read_layers(text: str) -> tuple[int, ...]:
    """`none`, or numbers of layers by commas; a type for argparse."""
    if text == "none":
        return ()
    try:
        return tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be layer numbers like "0,1,-1" or "none", got {text!r}') from None
