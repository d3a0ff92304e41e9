"""Tiny models of the transformer classes that diffusers exports, for classes.py.

In: a name of `names()`. Out: a random model and one evaluation of it, over about a hundred tokens. Configs and inputs
are in classes_diffusers.json, most of them those of diffusers' own tests with more tokens; what cannot be written as
shapes and numbers is in `FINISH`. A class without an entry is listed with the reason in `MISSING`.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from classes import Built
from torch import Tensor

ENTRIES: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

#: Class -> why it has no entry.
MISSING = {
    "RFD4ProteinaTransformer": "it is given features of proteins that its own preprocessor makes",
    "SanaWMTransformer3DModel": "it is given camera rays that its own pipeline makes",
}


def names() -> list[str]:
    """Every transformer of diffusers, by its class."""
    mixin = importlib.import_module("diffusers").ModelMixin
    found = vars(library()).items()
    return sorted(name for name, kind in found if isinstance(kind, type) and issubclass(kind, mixin))


def library() -> Any:
    """diffusers' module of transformers."""
    return importlib.import_module("diffusers.models.transformers")


def build(name: str, **changes: Any) -> Built:
    """A class of `names()`; `changes` of its inputs.

    Raises:
        NotImplementedError: with the reason.
    """
    if name not in ENTRIES:
        raise NotImplementedError(MISSING.get(name, "no tiny configuration is known"))
    entry = ENTRIES[name]
    torch.manual_seed(0)
    model = getattr(library(), name)(**entry["config"]).eval()
    inputs = {key: decoded(value) for key, value in entry["inputs"].items()}

    def run() -> Tensor:
        torch.manual_seed(0)
        given = FINISH[name](inputs) if name in FINISH else inputs
        with torch.no_grad():
            return first_tensor(model(**given | changes))

    return Built(model, run)


def decoded(value: Any) -> Any:
    """A value of an entry: a tensor is {"randn": shape}, {"full": shape, "value"} or {"tensor": numbers}."""
    if isinstance(value, list):
        return [decoded(one) for one in value]
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {key: decoded(one) for key, one in value["dict"].items()}
    if "randn" in value:
        return torch.randn(value["randn"])
    dtype = getattr(torch, value["dtype"])
    if "full" in value:
        return torch.full(value["full"], value["value"], dtype=dtype)
    return torch.tensor(value["tensor"], dtype=dtype)


def first_tensor(output: Any) -> Tensor:
    """The sample of an output, whatever it is wrapped in."""
    while not isinstance(output, Tensor):
        values = output.to_tuple() if hasattr(output, "to_tuple") else output
        output = next(value for value in values if value is not None)
    return output


def _with_cache(inputs: dict[str, Any]) -> dict[str, Any]:
    module = importlib.import_module("diffusers.models.transformers.transformer_wan_animate_2")
    return inputs | {"kv_cache": module.WanAnimate2KVCache(2)}


def _in_tuples(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"img_shapes": [tuple(shape) for shape in inputs["img_shapes"]]}


#: Class -> makes inputs that an entry cannot hold, anew for every evaluation.
FINISH: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "WanAnimate2Transformer3DModel": _with_cache,
    "NucleusMoEImageTransformer2DModel": _in_tuples,
    "QwenImageTransformer2DModel": _in_tuples,
    "OmniGenTransformer2DModel": lambda inputs: inputs | {"input_image_sizes": {0: [[0, 16]]}},
}
