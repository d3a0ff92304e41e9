"""Our own masked-diffusion models, whose forward takes the attention of every layer as an argument.

A forward that asks for nothing, or for dense attention, gets the handle's; other functions that it is given stay.
"""

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from baatt.integrations.handle import Handle
from baatt.models.llada import MaskedDiffusionLM
from baatt.stages.dense import AttentionFunction, dense_attention


def roots(model: Any) -> list[nn.Module]:
    """The `MaskedDiffusionLM`: the model, or what it holds as `language`, as LLaDA-V does."""
    language = getattr(model, "language", model)
    return [language] if isinstance(language, MaskedDiffusionLM) else []


def attach(model: Any, handle: Handle) -> int:
    """Put the handle in place of dense attention at every forward of the language model."""
    (model,) = roots(model)
    layers: int = model.config.n_layers
    routed = [functools.partial(handle.attention, layer=layer) for layer in range(layers)]

    def choose(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        asked: AttentionFunction | Sequence[AttentionFunction] = kwargs.get("attention", dense_attention)
        functions = [asked] * layers if callable(asked) else asked
        chosen = [routed[layer] if one is dense_attention else one for layer, one in enumerate(functions)]
        return args, {**kwargs, "attention": chosen}

    handle.before_forward(model, choose)
    handle.read_step = handle.progress.token_reader(model, model.config.mask_token_id)
    return layers
