"""Remote code of diffusion language models whose attention layers call `scaled_dot_product_attention`.

Known by the names of their classes. The stack of layers runs inside a `SparseSDPA`, and hooks on the layers tell which
one is running. Masks written out for every query, as Dream and LLaDA-V make them of their padding, are recognised by
their values (see `KeyMaskReader`); what padded queries get then differs from the model's own, which is 0 or arbitrary.
Block-causal masks stay dense. Needs no transformers.
"""

import functools
import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from baatt.integrations.enable import override
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
    "SDARAttention": "SDAR: block-causal",
    "LLaDA2MoeAttention": "LLaDA2: block-causal, additive [1, 1, N, N]",
}


def recognises(model: Any) -> bool:
    """Whether it has attention layers of a class in `KNOWN`."""
    return isinstance(model, nn.Module) and any(map(_is_attention, model.modules()))


def roots(model: nn.Module) -> list[nn.Module]:
    """The stack of layers: samplers of LLaDA-V call it without the model around it."""
    layers = [module for module in model.modules() if _is_attention(module)]
    around = owners(model, layers)
    stacks = [module for module in around if "input_ids" in inspect.signature(module.forward).parameters]
    return [stacks[-1] if stacks else model]


def attach(model: nn.Module, handle: Handle, undo: ExitStack) -> int:
    """Override the forward of the stack, and hook the layers."""
    (stack,) = roots(model)
    layers = [module for module in model.modules() if _is_attention(module)]
    watch = _LayerWatch(handle)
    mode = SparseSDPA(lambda call, dense: handle.sdpa(call, dense, layer=watch.ask(), is_cross=False))
    for number, layer in zip(layer_numbers(layers, "layer_idx"), layers, strict=True):
        undo.callback(layer.register_forward_pre_hook(functools.partial(watch.start, number)).remove)
        undo.callback(layer.register_forward_hook(watch.finish, always_call=True).remove)
    forward = stack.forward

    @functools.wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    undo.callback(override(stack, "forward", inside))
    mask_token_id = getattr(getattr(model, "config", None), "mask_token_id", None)
    handle.read_step = handle.progress.token_reader(stack, mask_token_id)
    return len(layers)


def _is_attention(module: nn.Module) -> bool:
    return any(base.__name__ in KNOWN for base in type(module).__mro__)


class _LayerWatch:
    """Which layer is running, and whether it has called `scaled_dot_product_attention`."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.layer, self.called = Current[int | None](None), False

    def start(self, number: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before an attention layer."""
        self.layer.set(number)
        self.called = False

    def ask(self) -> int | None:
        """The layer of a call."""
        self.called = True
        return self.layer.get()

    def finish(self, module: nn.Module, args: Any, output: Any) -> None:
        """After an attention layer; one that failed has no output."""
        layer = self.layer.get()
        self.layer.set(None)
        if not self.called and output is not None:
            self.handle.count_dense(
                layer,
                f"{type(module).__name__} does not call scaled_dot_product_attention: "
                "load the model with attn_implementation='sdpa'",
            )
