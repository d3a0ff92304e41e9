"""Weights in 8 bits with a scale for each row, as they are stored where every megabyte is carried along.

In: tensors by name. Out: the same with `NAME.scale` beside each matrix, and back in fp32; or a folder of a small model,
its config beside them. A row is what the first axis counts, so the rows of a convolution are its outputs. Vectors, and
tensors of a single row, stay in fp32.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from baatt.models.checkpoint import read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
Model = TypeVar("Model", bound=nn.Module)


def write_model(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """A folder with a config, which is a dataclass, and weights in 8 bits."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n", encoding="utf-8")
    save_file(to_eight_bits(tensors), folder / WEIGHTS)


def read_model(folder: Path, kind: str, make: Callable[[dict[str, Any]], Model]) -> Model:
    """The model of a folder, in fp32 and in evaluation mode.

    Args:
        kind: a phrase, for errors. make: the model with the fields of its config, in which lists are tuples.

    Raises:
        FileNotFoundError: no such model.
        ValueError: files that hold something else.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} must hold {kind} ({CONFIG}, {WEIGHTS}), and does not")
    try:
        values = read_json(folder / CONFIG)
        model = make({name: tuple(one) if isinstance(one, list) else one for name, one in values.items()})
        model.load_state_dict(from_eight_bits(load_file(folder / WEIGHTS), folder / WEIGHTS))
    except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} must hold {kind}, got {error}") from None
    return model.eval()


def to_eight_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is stored."""
    stored = {}
    for name, tensor in tensors.items():
        value = tensor.detach().float().cpu()
        if value.dim() > 1 and value.shape[0] > 1:
            scale = (value.flatten(1).abs().amax(dim=1) / 127).clamp(min=1e-12)
            stored[f"{name}.scale"] = scale
            value = (value / _beside(scale, value)).round().to(torch.int8)
        stored[name] = value.contiguous()
    return stored


def from_eight_bits(stored: Mapping[str, Tensor], file: str | Path) -> dict[str, Tensor]:
    """The tensors, in fp32.

    Raises:
        ValueError: a matrix without its scales, with the file's name.
    """
    found = {}
    for name, tensor in stored.items():
        if name.endswith(".scale"):
            continue
        if tensor.dtype == torch.int8:
            if f"{name}.scale" not in stored:
                raise ValueError(f"{file}: {name} in 8 bits must have {name}.scale, and has not")
            tensor = tensor * _beside(stored[f"{name}.scale"], tensor)
        found[name] = tensor.float()
    return found


def _beside(scale: Tensor, value: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (value.dim() - 1))
