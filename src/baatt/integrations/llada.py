"""Remote code of the LLaDA family, whose blocks compute attention in a method `_scaled_dot_product_attention`.

The method is overridden on the blocks of this instance. LLaDA's own code hands it no mask, so padding is attended to;
here the `attention_mask` of the forward under way comes back as a key mask, unless the policy says no. A fork that
hands its mask to the method keeps that one. Needs no transformers, whose versions this code is particular about.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from baatt.integrations.calls import SdpaCall
from baatt.integrations.handle import Handle
from baatt.integrations.masks import DIFFERS, NO_MASK, Structure
from baatt.integrations.progress import by_name
from baatt.integrations.sdpa import Current

METHOD = "_scaled_dot_product_attention"

#: Parameters that tell LLaDA's method from others of that name.
PARAMETERS = ("q", "k", "v", "attn_mask", "dropout_p", "is_causal")

#: LLaDA's, where a config does not say.
MASK_TOKEN_ID = 126336


def roots(model: Any) -> list[nn.Module]:
    """The outermost module that is given tokens, if it has blocks with LLaDA's method."""
    blocks = [module for module in model.modules() if _is_block(module)] if isinstance(model, nn.Module) else []
    if not blocks:
        return []
    around = [one for one in owners(model, blocks) if "input_ids" in inspect.signature(one.forward).parameters]
    return [around[0] if around else model]


def attach(model: nn.Module, handle: Handle) -> int:
    """Override the method on every block, and `forward` where the padding mask passes."""
    blocks = [module for module in model.modules() if _is_block(module)]
    given = Current[Tensor | None](None)
    for layer, block in zip(layer_numbers(blocks, "layer_id"), blocks, strict=True):
        handle.replace(block, METHOD, _routed(handle, given, layer, getattr(block, METHOD)))
    for module in owners(model, blocks) if handle.policy.recover_padding else []:
        if "attention_mask" in inspect.signature(module.forward).parameters:
            handle.replace(module, "forward", _remembering(given, module.forward))
    (root,) = roots(model)
    mask_token_id = getattr(getattr(root, "config", None), "mask_token_id", None)
    handle.read_step = handle.progress.token_reader(root, MASK_TOKEN_ID if mask_token_id is None else mask_token_id)
    return len(blocks)


def owners(model: nn.Module, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules with a forward in which all the given ones lie, the model first, the innermost last."""
    wanted = set(modules)
    around = [module for module in model.modules() if wanted <= set(module.modules())]
    return [module for module in around if type(module).forward is not nn.Module.forward]


def layer_numbers(modules: list[nn.Module], attribute: str) -> list[int]:
    """The layers of modules by an attribute of theirs, or by their order if those are not 0, 1, ... in some order."""
    order = list(range(len(modules)))
    numbers: list[Any] = [getattr(module, attribute, None) for module in modules]
    return numbers if set(numbers) == set(order) else order


def _is_block(module: nn.Module) -> bool:
    method = getattr(module, METHOD, None)
    return callable(method) and set(PARAMETERS) <= set(inspect.signature(method).parameters)


def _routed(
    handle: Handle, given: Current[Tensor | None], layer: int, native: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **others: Any,
    ) -> Tensor:
        dense = functools.partial(
            native, q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **others
        )
        unknown = [name for name, value in others.items() if value is not None]
        padding, mask = NO_MASK, given.get()
        if attn_mask is None and mask is not None:  # blocks may be on several devices
            padding = handle.masks(mask.to(q.device), k.shape[0], k.shape[2])
        if unknown or is_causal:  # LLaDA's own code does not heed the flag
            padding = Structure(refusal=f"arguments {unknown or ['is_causal']}")
        elif padding.causal is not None:
            padding = Structure(refusal=DIFFERS)
        return handle.sdpa(
            SdpaCall(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa=True), dense, layer=layer, is_cross=False,
            key_mask=padding.key_mask, refusal=padding.refusal,
        )  # fmt: skip

    return attention


def _remembering(given: Current[Tensor | None], forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that holds the padding mask it is given while it runs, unless it sees that nothing is padded."""
    names = list(inspect.signature(forward).parameters)

    def remembering(*args: Any, **kwargs: Any) -> Any:
        mask = by_name(names, args, kwargs).get("attention_mask")
        if not isinstance(mask, Tensor):
            return forward(*args, **kwargs)
        if mask.ndim == 2 or not mask.is_floating_point():
            mask = mask != 0  # as LLaDA reads it
        outer, is_seen = given.get(), mask.dtype == torch.bool and not torch.compiler.is_compiling()
        given.set(None if is_seen and bool(mask.all()) else mask)
        try:
            return forward(*args, **kwargs)
        finally:
            given.set(outer)

    return remembering
