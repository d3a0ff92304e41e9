"""Remote code of diffusion language models whose attention layers call `scaled_dot_product_attention`.

Known by the names of their classes. The stack of layers runs inside a `SparseSDPA`, and hooks on the layers tell which
one is running. Masks written out for every query, of padding or of causal blocks, are recognised by their values (see
`MaskReader`); what padded queries get then differs from the model's own, which is 0 or arbitrary. Needs no
transformers.
"""

import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

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

#: What SDAR's code calls for a block over a cache, which no instance can have replaced.
FLASH = "flash_attn_func"


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
    watch = _LayerWatch(handle)
    mode = SparseSDPA(lambda call, dense: handle.sdpa(call, dense, layer=watch.ask(), is_cross=False))
    for number, layer in zip(layer_numbers(layers, "layer_idx"), layers, strict=True):
        handle.undo.callback(layer.register_forward_pre_hook(functools.partial(watch.start, number)).remove)
        handle.undo.callback(layer.register_forward_hook(watch.finish, always_call=True).remove)
    forward = stack.forward

    def inside(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    handle.replace(stack, "forward", inside)
    mask_token_id = getattr(getattr(model, "config", None), "mask_token_id", None)
    handle.read_step = handle.progress.token_reader(stack, mask_token_id)
    return len(layers)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if any(base.__name__ in KNOWN for base in type(module).__mro__)]


class _LayerWatch:
    """Which layer is running, and whether it has called `scaled_dot_product_attention`."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.layer, self.called = Current[int | None](None), Current(False)

    def start(self, number: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.layer.set(number)
        self.called.set(False)

    def ask(self) -> int | None:
        self.called.set(True)
        return self.layer.get()

    def finish(self, module: nn.Module, args: Any, output: Any) -> None:
        layer = self.layer.get()
        self.layer.set(None)
        if not self.called.get() and output is not None:  # a layer that failed has none
            name, code = type(module).__name__, vars(sys.modules[type(module).__module__])
            reason = (
                f"{name} does not call scaled_dot_product_attention: load the model with attn_implementation='sdpa'"
            )
            if any(base.__name__ == "SDARAttention" for base in type(module).__mro__) and FLASH in code:
                reason = f"{name} calls {FLASH} by name"
            self.handle.count_dense(layer, reason)
