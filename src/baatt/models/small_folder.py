"""The folder of a small model of another kind than LLaDA's: its config, a dataclass, and weights in 8 bits."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from baatt.models.checkpoint import read_json
from baatt.models.eight_bits import from_eight_bits, to_eight_bits

CONFIG, WEIGHTS = "config.json", "model.safetensors"
Model = TypeVar("Model", bound=nn.Module)


def write_model(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """A folder with a config, which is a dataclass, and weights in 8 bits."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n", encoding="utf-8")
    partial = folder / f"{WEIGHTS}.partial"  # a run writes its model again and again while others may read it
    save_file(to_eight_bits(tensors), partial)
    partial.replace(folder / WEIGHTS)


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
