"""Weights in 8 bits with a scale for each row, as they are stored where every megabyte is carried along.

In: tensors by name. Out: the same with `NAME.scale` beside each matrix, and back in fp32. A row is what the first axis
counts, so the rows of a convolution are its outputs. Vectors, and tensors of a single row, stay in fp32.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

SCALE = ".scale"


def to_eight_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is stored."""
    stored = {}
    for name, tensor in tensors.items():
        value = tensor.detach().float().cpu()
        if value.dim() > 1 and value.shape[0] > 1:
            scale = (value.flatten(1).abs().amax(dim=1) / 127).clamp(min=1e-12)
            stored[name + SCALE] = scale
            value = (value / _beside(scale, value)).round().to(torch.int8)
        stored[name] = value.contiguous()
    return stored


def from_eight_bits(stored: Mapping[str, Tensor], file: str | Path) -> dict[str, Tensor]:
    """The tensors, in fp32.

    Raises:
        ValueError: a matrix without the scales of its rows, with the file's name.
    """
    found = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.int8:
            scale = stored.get(name + SCALE)
            if scale is None or scale.shape != tensor.shape[:1] or not scale.is_floating_point():
                given = "none" if scale is None else f"{scale.dtype} of shape {list(scale.shape)}"
                wanted = f"{name}{SCALE} with {len(tensor)} numbers"
                raise ValueError(f"{file}: {name} in 8 bits must have {wanted}, got {given}")
            tensor = tensor * _beside(scale, tensor)
        elif stored.get(name.removesuffix(SCALE), tensor).dtype == torch.int8 and name.endswith(SCALE):
            continue
        found[name] = tensor.float()
    return found


def _beside(scale: Tensor, value: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (value.dim() - 1))
