"""Remote code of diffusion language models whose attention layers call `scaled_dot_product_attention`.

Known by the names of their classes. The stack of layers runs inside a `SparseSDPA`, and hooks on the layers tell which
one is running. Masks written out for every query, of padding or of causal blocks, are recognised by their values (see
`MaskReader`); what padded queries get then differs from the model's own, which is 0 or arbitrary. Needs no
transformers.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from baatt.integrations import by_name
from baatt.integrations.calls import SdpaCall
from baatt.integrations.handle import Handle
from baatt.integrations.llada import layer_numbers, owners
from baatt.integrations.sdpa import Current, SparseSDPA

#: Class of attention layers, with all that inherit from it -> whose it is and what masks it is given.
KNOWN: Mapping[str, str] = {
    "DreamAttention": "Dream, DiffuCoder; without SDPA",
    "DreamSdpaAttention": "Dream, DiffuCoder: no mask, or bool [B, 1, N, N], padding by padding",
    "LLaDAAttention": "LLaDA-V; without SDPA",
    "LLaDASdpaAttention": "LLaDA-V: always an additive mask [B, 1, N, N], all rows equal",
    "LLaDAMoEAttention": "LLaDA-MoE; without SDPA",
    "LLaDAMoESdpaAttention": "LLaDA-MoE: no mask, or one with 4 axes",
    "SDARAttention": "SDAR: block-causal, bool [1, N, M]; FlashAttention by name where a mask hides nothing",
    "LLaDA2MoeAttention": "LLaDA2: block-causal, additive [1, 1, N, N]",
    "Fast_dLLM_QwenAttention": "Fast-dLLM v2: block-causal, bool [N, M]",
}


def roots(model: Any) -> list[nn.Module]:
    """The stack of the layers of a class in `KNOWN`: samplers of LLaDA-V call it without the model around it."""
    layers = _layers(model) if isinstance(model, nn.Module) else []
    if not layers:
        return []
    stacks = [one for one in owners(model, layers) if "input_ids" in inspect.signature(one.forward).parameters]
    return [stacks[-1] if stacks else model]


def attach(model: nn.Module, handle: Handle) -> int:
    """Override the forward of the stack, and hook the layers."""
    (stack,) = roots(model)
    layers = _layers(model)
    watch = LayerWatch(handle, is_cross=False)
    for number, layer in zip(layer_numbers(layers, "layer_idx"), layers, strict=True):
        watch.follow(number, layer)
        handle.undo.callback(layer.register_forward_hook(functools.partial(_find_silent, watch, number)).remove)
    watch.surround(stack, by_name.code_of(model))
    mask_token_id = getattr(getattr(model, "config", None), "mask_token_id", None)
    handle.read_step = handle.progress.token_reader(stack, mask_token_id)
    return len(layers)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if any(base.__name__ in KNOWN for base in type(module).__mro__)]


def _find_silent(watch: "LayerWatch", number: int, layer: nn.Module, args: Any, output: Any) -> None:
    """Count a layer that ran without a call."""
    if watch.called.get():
        return
    name, code = type(layer).__name__, vars(sys.modules[type(layer).__module__])
    reason = f"{name} does not call scaled_dot_product_attention"
    if f"{name.removesuffix('Attention')}SdpaAttention" in code:
        reason += ": load the model with attn_implementation='sdpa'"
    watch.handle.count_dense(number, reason)


class LayerWatch:
    """Brings the calls inside a module to a handle, and knows which layer is running and whether it has made one."""

    def __init__(self, handle: Handle, is_cross: bool | None) -> None:
        self.handle, self.is_cross = handle, is_cross
        self.layer, self.called, self.entered = Current[int | None](None), Current(False), Current(False)
        self.mode = SparseSDPA(self.sdpa)

    def follow(self, number: int, layer: nn.Module) -> None:
        """Know when a layer runs."""

        def start(module: nn.Module, args: Any) -> None:
            self.layer.set(number)
            self.called.set(False)

        def finish(module: nn.Module, args: Any, output: Any) -> None:
            self.layer.set(None)

        self.handle.undo.callback(layer.register_forward_pre_hook(start).remove)
        self.handle.undo.callback(layer.register_forward_hook(finish, always_call=True).remove)

    def surround(self, module: nn.Module, code: list[Any]) -> None:
        """Take the calls of every forward of a module, also those by name in its code."""
        forward = module.forward

        def inside(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                with self.mode:
                    return forward(*args, **kwargs)
            if self.entered.get():  # from a module around this one
                return forward(*args, **kwargs)
            self.entered.set(True)
            try:
                with self.mode, by_name.intercepted(code, self.by_name):
                    return forward(*args, **kwargs)
            finally:
                self.entered.set(False)

        self.handle.replace(module, "forward", inside)

    def sdpa(self, call: SdpaCall, dense: Callable[[], Tensor]) -> Tensor:
        self.called.set(True)
        return self.handle.sdpa(call, dense, layer=self.layer.get(), is_cross=self.is_cross)

    def by_name(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.called.set(True)
        return by_name.compute(self.handle, self.layer.get(), self.is_cross, name, function, args, kwargs)
