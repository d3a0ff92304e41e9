"""Tiny models of the transformer classes that diffusers exports, for classes.py.

In: a name of `names()`. Out: a random model and one evaluation of it, over about a hundred tokens.
"""

import importlib

import torch
from classes import Built

#: Class -> its builder in tests/integrations/diffusers_models.py.
BUILDERS = {
    "WanTransformer3DModel": "wan",
    "HunyuanVideoTransformer3DModel": "hunyuan",
    "CogVideoXTransformer3DModel": "cogvideox",
    "LTXVideoTransformer3DModel": "ltx",
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "QwenImageTransformer2DModel": "qwenimage",
}


def names() -> list[str]:
    """Every transformer of diffusers, by its class."""
    library = importlib.import_module("diffusers.models.transformers")
    mixin = importlib.import_module("diffusers").ModelMixin
    return [name for name, kind in vars(library).items() if isinstance(kind, type) and issubclass(kind, mixin)]


def build(name: str) -> Built:
    """A class of `names()`.

    Raises:
        NotImplementedError: with the reason.
    """
    if name not in BUILDERS:
        raise NotImplementedError("no tiny configuration is known")
    case = importlib.import_module("tests.integrations.diffusers_models").build(BUILDERS[name])
    return Built(case.model, lambda: torch.as_tensor(case.run()))
