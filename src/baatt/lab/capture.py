"""Queries, keys and values of a model's attention layers, recorded on a real input and kept in one safetensors file.

In: tensors, or the attention functions of a model to be recorded. Out: a `Capture`. Every command of `baatt analyze`
reads such a file, ours or one that another program wrote: `LAYOUT` says what it holds.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from baatt.lab.records import written_at_once

FORMAT = "baatt-capture-1"
#: What a file to be analysed holds; help, errors and docs/analyze.md say it in these words.
LAYOUT = (
    "tensors q [B, H, N, D], k and v [B, G, M, D] after RoPE, H % G == 0; of several layers layers.0.q, layers.0.k and "
    "so on; metadata scale where it is not 1 / sqrt(D)"
)
_NAME = re.compile(r"(?:layers\.(\d+)\.)?([qkv])")


class Heads(NamedTuple):
    """One layer: q [B, H, N, D]; k, v [B, G, M, D], as attention gets them."""

    q: Tensor
    k: Tensor
    v: Tensor

    def widened(self) -> "Heads":
        """At least float32, so that what is measured is the selection and not the rounding."""
        return Heads(*(x.to(torch.promote_types(x.dtype, torch.float32)) for x in self))

    def to(self, device: torch.device) -> "Heads":
        """The same on a device."""
        return Heads(*(x.to(device) for x in self))


class Capture(NamedTuple):
    """layers: by number; scale: factor on q.k; about: where it comes from, free text by name."""

    layers: Mapping[int, Heads]
    scale: float
    about: Mapping[str, str]


class Recorder:
    """Keeps what the first call of every wanted layer gets.

    `with baatt.enable(model, config) as handle: handle.watch(recorder.keep); model(...)`.

    Args:
        layers: numbers of the wanted ones; None keeps all.
    """

    def __init__(self, layers: Collection[int] | None = None) -> None:
        self.wanted = None if layers is None else set(layers)
        self.found: dict[int, Heads] = {}
        self.scale: float | None = None

    def keep(
        self,
        layer: int | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        causal: int | None = None,
    ) -> None:
        """Keep a call of a wanted layer that has none yet.

        Raises:
            ValueError: keys are masked or attention is causal, which a capture cannot hold, or the layer is not known.
        """
        if causal is not None:
            raise ValueError(f"attention must be bidirectional in a capture, got causal={causal}")
        if layer is None:
            raise ValueError("layer must be known to be recorded, got None")
        if layer in self.found or (self.wanted is not None and layer not in self.wanted):
            return
        if key_mask is not None and not bool(key_mask.all()):
            raise ValueError("key_mask must be all True in a capture: record one text without padding")
        self.scale = scale
        self.found[layer] = Heads(*(x.detach().to("cpu", copy=True).contiguous() for x in (q, k, v)))


def save_capture(recorded: Capture, path: Path) -> None:
    """Write the file; a reader never sees half of one."""
    layers = [(f"layers.{layer}", heads._asdict()) for layer, heads in recorded.layers.items()]
    tensors = {f"{layer}.{name}": x.contiguous() for layer, heads in layers for name, x in heads.items()}
    metadata = {"format": FORMAT, "scale": repr(recorded.scale), "about": json.dumps(dict(recorded.about))}
    with written_at_once(path) as partial:
        save_file(tensors, partial, metadata)


def load_capture(path: Path, layers: Sequence[int] | None = None) -> Capture:
    """Read a file of `LAYOUT`, or only some layers of it. Plain q, k and v are layer 0.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, or lacks a layer, or its tensors do not fit one another.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder, not a file" if path.is_dir() else f"no such file: {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = _names(path, file.keys())
            if missing := sorted(set(layers or ()) - names.keys()):
                raise ValueError(f"{path} holds layers {list(names)}, asked for {missing}")
            chosen = list(names) if layers is None else list(dict.fromkeys(layers))
            found = {layer: Heads(*(file.get_tensor(names[layer][name]) for name in "qkv")) for layer in chosen}
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file with {LAYOUT}: {error}") from None
    for layer, heads in found.items():
        _check_heads(f"{path}, layer {layer}", heads)
    default = next(iter(found.values())).q.shape[-1] ** -0.5
    about = {"model": path.name}  # what a page is titled by where the file does not say
    try:
        scale = float(metadata.get("scale", default))
        about |= json.loads(metadata.get("about", "{}"))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} must have a number as the metadata scale and JSON as about: {error}") from None
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{path} must have a positive number as the metadata scale, got {scale}")
    return Capture(found, scale, about)


def _names(path: Path, there: Collection[str]) -> dict[int, dict[str, str]]:
    """Layer -> q, k, v -> name of the tensor."""
    found: dict[int, dict[str, str]] = {}
    for name in there:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{path} must hold {LAYOUT}; got the tensor {name!r}")
        of_layer = found.setdefault(int(match[1] or 0), {})
        if match[2] in of_layer:
            raise ValueError(f"{path} must hold every tensor once, got {name!r} and {of_layer[match[2]]!r}")
        of_layer[match[2]] = name
    if not found:
        raise ValueError(f"{path} must hold {LAYOUT}; got no tensor")
    for layer, of_layer in found.items():
        if missing := [name for name in "qkv" if name not in of_layer]:
            raise ValueError(f"{path} must hold {LAYOUT}; layer {layer} lacks {' and '.join(missing)}")
    return dict(sorted(found.items()))


def _check_heads(place: str, heads: Heads) -> None:
    """Refuse tensors that attention could not take."""
    q, k, v = heads
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or 0 in (*q.shape, *k.shape) or q.shape[1] % k.shape[1]:
        needed = f"{place}: q must be [B, H, N, D], k and v [B, G, M, D], none of them 0, H % G == 0"
        raise ValueError(f"{needed}, got {', '.join(str(tuple(x.shape)) for x in heads)}")
    for name, x in heads._asdict().items():
        if not x.is_floating_point():
            raise ValueError(f"{place}: {name} must hold floating point numbers, got {x.dtype}")
        if not bool(x.isfinite().all()):
            raise ValueError(f"{place}: {name} must be finite, got NaN or infinity")
