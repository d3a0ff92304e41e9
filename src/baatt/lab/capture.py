"""Queries, keys and values of a model's attention layers, recorded on a real input and kept in one safetensors file.

In: tensors, or the attention functions of a model to be recorded. Out: a `Capture`. Every command of `baatt analyze`
reads such a file, so that another model is analysed by writing one: tensors `layers.<n>.q` [B, H, N, D],
`layers.<n>.k` and `layers.<n>.v` [B, G, M, D] after RoPE, metadata `format` = `FORMAT` and, where it is not
1 / sqrt(D), `scale`.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from baatt.lab.records import written_at_once

FORMAT = "baatt-capture-1"


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
    """Read a file, or only some layers of it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no capture, or lacks a layer, or its tensors do not fit one another.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} must have the metadata format={FORMAT}, got {metadata.get('format')!r}")
            there = sorted({int(name.split(".")[1]) for name in names})
            if missing := sorted(set(layers or ()) - set(there)):
                raise ValueError(f"{path} holds layers {there}, asked for {missing}")
            chosen = there if layers is None else layers
            found = {layer: Heads(*(file.get_tensor(f"layers.{layer}.{name}") for name in "qkv")) for layer in chosen}
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file with q, k and v of every layer: {error}") from None
    for layer, heads in found.items():
        q, k, v = heads
        fits = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
        if not fits or q.shape[1] % k.shape[1]:
            needed = f"{path}, layer {layer}: q must be [B, H, N, D], k and v [B, G, M, D], H % G == 0"
            raise ValueError(f"{needed}, got {', '.join(str(tuple(x.shape)) for x in heads)}")
    default = next(iter(found.values())).q.shape[-1] ** -0.5
    return Capture(found, float(metadata.get("scale", default)), json.loads(metadata.get("about", "{}")))
