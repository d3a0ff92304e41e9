"""Our own masked-diffusion models, whose forward takes the attention of every layer as an argument.

A forward that asks for nothing, or for dense attention, gets the handle's; other functions that it is given stay.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from baatt.integrations.counts import block_pairs
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
        functions = [asked] * layers if callable(asked) else list(asked)
        mine = [layer for layer, one in enumerate(functions) if one is dense_attention]
        chosen = of_short_step(args, kwargs, mine) or routed
        for layer in mine:
            functions[layer] = chosen[layer]
        return args, {**kwargs, "attention": functions}

    def of_short_step(args: Any, kwargs: dict[str, Any], mine: Sequence[int]) -> list[AttentionFunction] | None:
        """Dense attention for a pass over so small a part of a cached sequence that nothing can be sparse, or None.

        Its calls are counted together by the first, as every microsecond of a layer's is one of a step, which takes
        longer on the processor than on the GPU.
        """
        tokens, cache = args[0] if args else kwargs.get("input_ids"), kwargs.get("cache")
        if (
            not (mine and isinstance(tokens, Tensor))
            or cache is None
            or cache.length is None
            or torch.is_grad_enabled()
        ):
            return None
        reason = handle.short_step(tokens.shape[-1], cache.length, tokens.device)
        if reason is None:
            return None
        pairs, _ = block_pairs(handle.config, tokens.shape[-1], cache.length, None, 0)
        pairs *= len(tokens) * model.config.n_heads

        def first(q: Tensor, k: Tensor, v: Tensor, /, *, key_mask: Tensor | None) -> Tensor:
            handle.count_short_step(mine, reason, pairs)
            return dense_attention(q, k, v, key_mask=key_mask)

        functions: list[AttentionFunction] = [dense_attention] * layers
        functions[mine[0]] = first
        return functions

    handle.before_forward(model, choose)
    handle.read_step = handle.progress.token_reader(model, model.config.mask_token_id)
    return layers
