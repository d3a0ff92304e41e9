"""Any module, of a class that nobody knows: every `scaled_dot_product_attention` inside it, and FlashAttention by name.

For forks on their first day, `enable(model, config, anywhere=True)`. Layers are the entries of the outermost lists of
modules, in their order; what runs outside them has no number. Whether queries and keys are one sequence is told by
their numbers and by causal structure alone.
"""

from torch import nn

from baatt.integrations import by_name
from baatt.integrations.handle import Handle
from baatt.integrations.llada import owners
from baatt.integrations.remote_sdpa import LayerWatch


def roots(model: object) -> list[nn.Module]:
    """The module itself."""
    return [model] if isinstance(model, nn.Module) else []


def attach(model: nn.Module, handle: Handle) -> int:
    """Surround the module, and those inside that hold all layers, which loops may call without it."""
    layers = _layers(model)
    watch = LayerWatch(handle, is_cross=None)
    for number, layer in enumerate(layers):
        watch.follow(number, layer)
    code = by_name.code_of(model)
    for module in dict.fromkeys([model, *(owners(model, layers) if layers else [])]):
        watch.surround(module, code)
    mask_token_id = getattr(getattr(model, "config", None), "mask_token_id", None)
    handle.read_step = handle.progress.token_reader(model, mask_token_id)
    return len(layers)


def _layers(module: nn.Module) -> list[nn.Module]:
    """Entries of lists, or of sequences of one class, that lie in no other one."""
    parts = list(module.children())
    kinds = {type(part) for part in parts}
    is_stack = isinstance(module, nn.Sequential) and len(kinds) == 1 and all(map(_has_parts, parts))
    if isinstance(module, nn.ModuleList) or is_stack:
        return [part for part in dict.fromkeys(parts) if _has_parts(part)]
    return list(dict.fromkeys(layer for part in parts for layer in _layers(part)))


def _has_parts(module: nn.Module) -> bool:
    return next(module.children(), None) is not None
