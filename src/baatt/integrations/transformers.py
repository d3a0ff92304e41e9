"""Models of transformers (>= 4.57) whose attention goes through its attention interface.

`register` adds an attention implementation that any model can ask for by name; `baatt.enable` attaches to one model.
Both register a pair, the attention function and the mask function: without the second transformers drops the padding
mask. What is not plain bidirectional attention stays with transformers' own SDPA function, with a reason. As with
`attn_implementation="sdpa"` no attention weights are returned. Does not know continuous batching.
"""

import importlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from baatt.config import BAAttConfig, Policy
from baatt.integrations.calls import SdpaCall
from baatt.integrations.handle import Handle

#: Parts of a name that transformers reads a meaning into.
SPECIAL_NAMES = ("flash", "sdpa", "flex_attention", "eager", "paged|", "/")

#: Implementation of the models that `enable` attached to.
_ENABLED_NAME = "ba_att_enabled"
#: Attribute of their modules, a `_Place`.
_MARK = "_baatt_place"


class _Place(NamedTuple):
    """Where an attention module stands: number of its handle, layer, whether keys come from another sequence."""

    handle: int
    layer: int | None
    is_cross: bool


_registered: dict[str, Handle] = {}
_enabled: dict[int, Handle] = {}
#: By id: config, the implementation it named before ours, and the handles that need ours. Models may share a config.
_changed: dict[int, tuple[Any, str | None, set[int]]] = {}


def register(
    name: str = "ba_att", config: BAAttConfig | None = None, policy: Policy | None = None, *, impl: str = "auto"
) -> Handle:
    """Register BA-Att as an attention implementation of transformers: attention and mask function, for all models.

    Ask for it by `from_pretrained(..., attn_implementation=name)` or `model.set_attn_implementation(name)`. Calls that
    need gradients or dropout are dense and exact, so a model may train with it. `handle.disable()` takes both functions
    away again; models that still ask for the name then fail. Registering a name again replaces the earlier functions.

    Args:
        name: of the implementation.
        config: the method's options; None = `BAAttConfig()`.
        policy: what stays dense; layers go by the number that their modules hold, and only `handle.at_step` tells the
            denoising step. None = `Policy()`.
        impl: as `ba_attention`.

    Returns:
        Handle with the counts of all models that use the name.

    Raises:
        ImportError: transformers is not installed.
        TypeError: arguments of a wrong type.
        ValueError: a name that means something to transformers or is registered by somebody else, an unknown `impl`, or
            a layer counted from the last, which is another one in every model.
    """
    handle = Handle(BAAttConfig() if config is None else config, policy, impl=impl)
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if not name or name == _ENABLED_NAME or any(part in name for part in SPECIAL_NAMES):
        parts = ", ".join(map(repr, SPECIAL_NAMES))
        raise ValueError(f"name must not be empty, {_ENABLED_NAME!r} or contain one of {parts}, got {name!r}")
    layers = handle.policy.named_layers
    if any(layer < 0 for layer in layers):
        raise ValueError(f"policy must not count layers from the last one here, got {layers}")
    if name not in _registered and any(name in mapping for mapping in _registries()):
        raise ValueError(f"name must not be registered by somebody else, got {name!r}")
    _add(name, _Pair(lambda module: (handle, _Place(handle.number, _layer_of(module), _is_cross(module)))))
    _registered[name] = handle

    def undo() -> None:
        if _registered.get(name) is handle:
            del _registered[name]
            _remove(name)

    handle.undo.callback(undo)
    return handle


def roots(model: Any) -> list[nn.Module]:
    """The model, if its attention goes through the attention interface of transformers."""
    library = sys.modules.get("transformers.modeling_utils")
    return [model] if library is not None and isinstance(model, library.PreTrainedModel) and _follows(model) else []


def attach(model: Any, handle: Handle) -> int:
    """Let the configs of the model, and of its parts that use the interface, name our implementation.

    Raises:
        ValueError: a model that cannot run with `attn_implementation="sdpa"`, which dense calls need, or a config that
            sorts tokens, for a model of which all layers are causal.
    """
    if not model._supports_sdpa:
        raise ValueError(
            f"model must support attn_implementation='sdpa', which dense calls use, got {type(model).__name__}, "
            "whose attention has something (sinks, softcapping) that sdpa has not"
        )
    sort = handle.config.sort
    if sort != "none" and _is_causal(model):
        raise ValueError(
            f"config.sort must be 'none' for {type(model).__name__}, whose layers are causal, got {sort!r}"
        )
    number = handle.number
    configs = _interface_configs(model)
    places = _places(model, number)
    # It stays: a copy of a config may name it later, and for a module without a place it is sdpa.
    if _ENABLED_NAME not in _registries()[0]:
        _add(_ENABLED_NAME, _Pair(_find_enabled))
    _enabled[number] = handle
    handle.undo.callback(_detach, number)
    for config in configs:
        _changed.setdefault(id(config), (config, config._attn_implementation_internal, set()))[2].add(number)
        config._attn_implementation_internal = _ENABLED_NAME
    for module, place in places:  # not `setattr`, which a compiled module hands on to the one inside it
        handle.override(module, _MARK, place)
    handle.read_step = handle.progress.token_reader(model, getattr(model.config, "mask_token_id", None))
    text = getattr(model.config, "text_config", None) or model.config
    count = getattr(text, "num_hidden_layers", None)
    return count if isinstance(count, int) else 1 + max((place.layer or 0 for _, place in places), default=0)


def _detach(number: int) -> None:
    """Give the configs that no other handle needs back what they named before, unless they name another one now."""
    for key, (config, former, users) in list(_changed.items()):
        users.discard(number)
        if not users:
            if config._attn_implementation_internal == _ENABLED_NAME:
                config._attn_implementation_internal = former
            del _changed[key]
    del _enabled[number]


class _Call(NamedTuple):
    """Arguments of the attention interface: q [B, H, N, D], k and v [B, G, M, D], a mask, and what else is named."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    options: dict[str, Any]

    @property
    def is_causal(self) -> bool:
        """Whether queries see the keys before them only, unless a mask says otherwise."""
        told = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True)) if told is None else told


class _Pair:
    """The attention function and the mask function of one name.

    Args:
        find: module -> its handle and place, or None for a module that no handle is attached to.
    """

    def __init__(self, find: Callable[[nn.Module], tuple[Handle, _Place] | None]) -> None:
        self.find = find
        # Looked up now: a traced function must not import.
        masking, sdpa = _library("masking_utils"), _library("integrations.sdpa_attention")
        self.sdpa: Callable[..., tuple[Tensor, None]] = sdpa.sdpa_attention_forward
        self.sdpa_mask: Callable[..., Tensor | None] = masking.sdpa_mask
        # Without it, before 5, no mask is known to be plain bidirectional.
        self.bidirectional = getattr(masking, "bidirectional_mask_function", None)

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """What the attention interface calls: q [B, H, N, D], k and v [B, G, M, D] -> (output [B, N, H, D], None).

        The mask is of `mask` or a user's own, options are dropout, scaling, is_causal, softcap and more. Raises
        ValueError for attention sinks, which sdpa would leave out silently.
        """
        if options.get("s_aux") is not None or options.get("sinks") is not None:
            raise ValueError(f"module must have no attention sinks, got {type(module).__name__} with sinks")
        call = _Call(module, query, key, value, attention_mask, options)
        found = self.find(module)
        if found is None:
            return self.dense(call), None
        handle, place = found
        refusal = _refusal(call)
        # A decoding step waits for the processor, and needs no mask to be looked at.
        is_lone = query.shape[2] == 1 and refusal is None and not place.is_cross
        if is_lone and (reason := handle.short_call(query, key, value)) is not None:
            handle.count_dense(place.layer, reason, query, key)
            return self.dense(call), None
        # As transformers has it: a mask says all, and without one a lone query sees all.
        is_causal = call.is_causal and attention_mask is None and query.shape[2] > 1
        asked = SdpaCall(query, key, value, attention_mask, 0.0, is_causal, options.get("scaling"), enable_gqa=True)
        out = handle.sdpa(
            asked, lambda: self.dense(call).transpose(1, 2), layer=place.layer, is_cross=place.is_cross,
            refusal=refusal,
        )  # fmt: skip
        return rearrange(out, "b h n d -> b n h d").contiguous(), None

    def dense(self, call: _Call) -> Tensor:
        """Exact attention [B, N, H, D], transformers' own where it can."""
        if call.options.get("softcap") is not None:
            return _softcapped(call)
        # Some versions refuse arguments that others lack, given as None too.
        options = {name: x for name, x in call.options.items() if x is not None}
        return self.sdpa(call.module, call.q, call.k, call.v, call.mask, **options)[0]

    def mask(
        self,
        *,
        kv_length: int,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor | None:
        """The mask of the keys from `kv_offset` on, given padding [B, any length] bool, behind whose end keys are none.

        A key mask [B, 1, 1, M] bool or None where that says it all, else sdpa's. Four axes, so that models which
        reshape their masks or join them find what they expect; one row, so that it takes O(M) memory.
        """
        # `use_vmap`: the caller mixed in a pattern of its own. `allow_is_bidirectional_skip=False`: it needs all rows.
        plain = self.bidirectional is not None and mask_function is self.bidirectional
        if not plain or options.get("use_vmap", False) or not options.get("allow_is_bidirectional_skip", True):
            if mask_function is not None:
                options["mask_function"] = mask_function
            return self.sdpa_mask(kv_length=kv_length, kv_offset=kv_offset, attention_mask=attention_mask, **options)
        if attention_mask is None:
            return None
        end = kv_offset + kv_length
        padded = F.pad(attention_mask.bool(), (0, max(0, end - attention_mask.shape[-1])))[:, kv_offset:end]
        # A graph must not depend on values.
        in_graph = torch.compiler.is_compiling() or torch._C._is_tracing()
        in_graph = in_graph or (padded.is_cuda and torch.cuda.is_current_stream_capturing())
        return None if not in_graph and bool(padded.all()) else rearrange(padded, "b m -> b 1 1 m")


def _refusal(call: _Call) -> str | None:
    """Which part of a call the operator has not, or None."""
    for name, reason in (("softcap", "softcap"), ("position_bias", "position bias"), ("cache", "a paged cache")):
        if call.options.get(name) is not None:
            return reason
    is_written_out = call.mask is not None and call.mask.ndim == 4 and call.mask.shape[2] > 1
    if torch.compiler.is_compiling() and is_written_out and call.options.get("sliding_window") is not None:
        return "a sliding window"  # whose values a graph cannot look at: it would for nothing when it runs
    return "dropout in training" if call.options.get("dropout", 0.0) > 0 and call.module.training else None


def _softcapped(call: _Call) -> Tensor:
    """Attention with softcap * tanh(scores / softcap) for scores, which SDPA has not: [B, N, H, D]."""
    softcap, scale = call.options["softcap"], call.options.get("scaling")
    k, v = (repeat(x, "b g m d -> b (g r) m d", r=call.q.shape[1] // x.shape[1]) for x in (call.k, call.v))
    scores = call.q @ k.transpose(2, 3) * (k.shape[3] ** -0.5 if scale is None else scale)
    scores, mask = softcap * torch.tanh(scores / softcap), call.mask
    if mask is None and call.is_causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    weights = F.dropout(weights, call.options.get("dropout", 0.0), training=call.module.training)
    return (weights @ v).transpose(1, 2).contiguous()


def _find_enabled(module: nn.Module) -> tuple[Handle, _Place] | None:
    """Handle and place of a marked module. Models may share a config, so others come here too."""
    place = getattr(module, _MARK, None)
    return (_enabled[place.handle], place) if isinstance(place, _Place) and place.handle in _enabled else None


def _follows(model: Any) -> bool:
    """Whether a class of transformers takes its attention function from the interface."""
    # LLaDA2's remote code does, in words that transformers' own test does not know.
    if any(kind.__name__.startswith("LLaDA2") for kind in type(model).__mro__):
        return True
    test = getattr(type(model), "_can_set_attn_implementation", None)
    return test is not None and bool(test())


def _is_causal(model: Any) -> bool:
    """Whether all attention of a model is known to be causal: other code may give its layers masks of its own."""
    base = _library("modeling_utils").PreTrainedModel
    parts = [module for module in model.modules() if isinstance(module, base)]
    flags = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    is_native = all(type(part).__module__.startswith("transformers.models.") for part in parts)
    return is_native and bool(flags) and all(flags) and all(getattr(part.config, "is_causal", True) for part in parts)


def _interface_configs(model: Any) -> list[Any]:
    """Configs of the model and of its parts that follow the interface; towers that do not keep theirs."""
    base = _library("modeling_utils").PreTrainedModel
    found: dict[int, Any] = {}
    barred: set[int] = set()

    def visit(module: nn.Module, follows: bool) -> None:
        if isinstance(module, base):
            follows = module._supports_sdpa and _follows(module)
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
            if not follows:
                barred.add(id(config))
        for child in module.children():
            visit(child, follows)

    visit(model, False)
    return [config for key, config in found.items() if key not in barred]


def _places(model: nn.Module, number: int) -> list[tuple[nn.Module, _Place]]:
    """Every module with its place: any of them may turn out to call the interface."""
    named = list(model.named_modules())
    numbered = any(_layer_of(module) is not None for _, module in named)
    places = []
    for name, module in named:
        # Vision models do not tell their modules the layer: there the path does, as in encoder.layers.3.attention.
        integers = [] if numbered else re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
        layer = int(integers[-1]) if integers else _layer_of(module)
        places.append((module, _Place(number, layer, _is_cross(module, name))))
    return places


def _layer_of(module: nn.Module) -> int | None:
    layer = getattr(module, "layer_idx", None)
    return layer if isinstance(layer, int) else None


def _is_cross(module: nn.Module, name: str = "") -> bool:
    """Whether a module attends to another sequence: the class or the path says so, or it is a decoder's other half."""
    if re.search("cross|encoder_attn|encdec", f"{type(module).__name__} {name.rpartition('.')[2]}", re.IGNORECASE):
        return True
    return bool(getattr(module, "is_decoder", False)) and not getattr(module, "is_causal", True)


def _library(part: str) -> Any:
    try:
        return importlib.import_module(f"transformers.{part}")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError("transformers is not installed: pip install 'baatt[transformers]'") from error


def _registries() -> list[dict[str, Callable[..., Any]]]:
    """What transformers keeps its attention and its mask functions in; it has no way to take one away."""
    try:
        interfaces = _library("modeling_utils").AttentionInterface, _library("masking_utils").AttentionMaskInterface
    except (AttributeError, ModuleNotFoundError):
        version = _library("utils").__version__
        raise ImportError(f"transformers must be 4.57 or newer for its own models, got {version}") from None
    return [interface._global_mapping for interface in interfaces]


def _add(name: str, pair: _Pair) -> None:
    attention, masks = _registries()
    attention[name], masks[name] = pair.attention, pair.mask


def _remove(name: str) -> None:
    for mapping in _registries():
        mapping.pop(name, None)
