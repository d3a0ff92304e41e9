"""`baatt.enable`: turns BA-Att on in a model of another library, and off again.

Finds the adapter that knows the model, refuses what it cannot do before anything is changed, and leaves no trace on
exit. An adapter is one file with the two functions of `Adapter` and one line in `ADAPTERS`.
"""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast
from weakref import WeakSet

import torch
from torch import nn

from baatt.config import BAAttConfig, Policy
from baatt.integrations.calls import TokenPermutation
from baatt.integrations.handle import Handle
from baatt.integrations.reasons import NOTHING_SEEN, warn_dense
from baatt.integrations.stand_in import refuse_copy

#: File beside this one -> what it attaches to. The first that recognises a model has it.
ADAPTERS: Mapping[str, str] = {
    "masked_diffusion": "baatt.models: MaskedDiffusionLM, and baatt.llada_v: VisualDiffusionLM",
    "diffusers": "diffusers transformers and pipelines: Wan, HunyuanVideo, CogVideoX, LTX, Flux and others",
    "llada": "remote code of the LLaDA family (modeling_llada.py: LLaDA-8B, LLaDA-1.5, UltraLLaDA)",
    "remote_sdpa": "remote code that calls scaled_dot_product_attention "
    "(Dream, DiffuCoder, LLaDA-MoE, LLaDA-V, LLaDA2, SDAR, Fast-dLLM v2)",
    "transformers": "transformers models (4.57 or newer) that use the attention interface "
    "(ModernBERT, EuroBERT, Qwen, Llama, ...)",
}

#: Modules that are attached to now.
_attached: "WeakSet[nn.Module]" = WeakSet()


class Adapter(Protocol):
    """A file of `ADAPTERS`."""

    def roots(self, model: Any) -> list[nn.Module]:
        """The modules whose forward is one evaluation, as the transformers of a pipeline; none if it cannot attach.

        Must not import a library that the model does not come from.
        """

    def attach(self, model: Any, handle: Handle) -> int:
        """Bring the calls of every attention layer to the handle, on this instance only, and push on `handle.undo`.

        Sets `handle.read_step` where the model is told its step. Returns how many layers `Policy.dense_layers` counts.
        """


def enable(
    model: Any,
    config: BAAttConfig | None,
    policy: Policy | None = None,
    *,
    impl: str = "auto",
    order: TokenPermutation | None = None,
    anywhere: bool = False,
) -> Handle:
    """Make a model's self-attention sparse until the handle is disabled.

    `with enable(model, config) as handle: ...` or `handle = enable(model, config)` and later `handle.disable()`. Only
    this model changes; leaving, by an exception too, puts it back as it was. Every call is counted, dense ones with
    their reason, and a forward without any sparse call warns unless just that was asked for.

    Args:
        model: an nn.Module in evaluation mode, also one that torch.compile, DistributedDataParallel or PEFT wrapped, or
            a diffusers pipeline.
        config: the method's options; None leaves every call dense and counts it, for comparison.
        policy: what stays dense; None = `Policy()`, nothing but cross-attention and cached blocks too short to pay.
        impl: as `ba_attention`.
        order: (N, device) -> permutation [N] of the tokens before they are cut into blocks, or None for a length that
            stays as it is; composes with `config.sort`. `baatt.integrations.video.VideoTiles` is one.

        anywhere: also take a model of an unknown class: every `scaled_dot_product_attention` inside it, and
            FlashAttention and FlexAttention that its code imported by name. A known class is attached to as ever.

    Returns:
        Handle, attached.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: a model that no adapter knows, that is attached to already, in training mode, or without the layers
            that the policy names.
    """
    handle = Handle(config, policy, impl=impl, order=order)
    model, callers = unwrapped(model)
    handle.callers = {model: callers}
    adapter, roots = find_adapter(model, anywhere=anywhere)
    modules = [module for root in roots for module in root.modules()]
    if any(module in _attached for module in modules):
        raise ValueError("model must not be attached to already: disable the handle of the earlier enable first")
    if any(root.training for root in roots):
        raise ValueError("model must be in evaluation mode, got training mode: call model.eval() first")
    try:
        handle.set_layers(adapter.attach(model, handle))
    except BaseException:
        handle.disable()
        raise
    for root in roots:
        _watch(root, handle)
    for module in (*modules, *callers):
        handle.override(module, "__reduce_ex__", refuse_copy)
    _attached.update(modules)
    handle.undo.callback(_attached.difference_update, modules)
    return handle


def unwrapped(model: Any) -> tuple[Any, list[nn.Module]]:
    """What is inside wrappers of torch.compile, DDP and PEFT, and the modules that call its forward past its hooks."""
    callers: list[nn.Module] = []
    while isinstance(model, nn.Module):
        inner: Any = getattr(model, "_orig_mod", None)  # whose graphs see the change
        base: Any = getattr(model, "get_base_model", None)
        if inner is None and callable(base):
            inner = base()
            callers += [module for module in model.modules() if getattr(module, "model", None) is inner]
        elif inner is None and list(model.children()) == [getattr(model, "module", None)]:
            inner = model.module
        if inner is None or inner is model:
            break
        model = inner
    return model, callers


def find_adapter(model: Any, *, anywhere: bool = False) -> tuple[Adapter, list[nn.Module]]:
    """The first adapter that can attach to a model, and the model's roots; `anywhere` takes any module.

    Raises:
        TypeError: not a model at all.
        ValueError: none does, with the list of what is known.
    """
    adapters = [cast(Adapter, importlib.import_module(f"baatt.integrations.{name}")) for name in ADAPTERS]
    for adapter in adapters:
        roots = adapter.roots(model)
        if roots:
            return adapter, roots
    if anywhere and isinstance(model, nn.Module):
        return cast(Adapter, importlib.import_module("baatt.integrations.anywhere")), [model]
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module or a diffusers pipeline, got {type(model).__name__}")
    known = "; ".join(ADAPTERS.values())
    inside = (name for name, part in model.named_modules() if name and any(one.roots(part) for one in adapters))
    found = next(inside, None)
    advice = "" if found is None else f", whose part model.{found} is of one: pass that"
    raise ValueError(
        f"model must be of a known kind: {known}; got {type(model).__module__}.{type(model).__name__}{advice}. "
        "enable(model, ..., anywhere=True) takes any class, for every scaled_dot_product_attention inside it"
    )


def _watch(root: nn.Module, handle: Handle) -> None:
    """Around every forward: read the step before; warn after one without a sparse call, once for a reason.

    Loops may call `model.forward`, past all hooks, so the method is replaced. A traced graph has no side effects: there
    nothing is told and nothing is warned of.
    """
    known: set[str] = set()
    forward = root.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        handle.start_forward()
        handle.masks.start_forward()
        if handle.read_step is not None and handle.policy.dense_steps > 0 and not handle.progress.told:
            handle.read_step(args, kwargs)
        try:
            out = forward(*args, **kwargs)
        finally:
            handle.masks.end_forward()
        reasons = handle.unasked()
        if reasons is not None and not (known and reasons <= known):
            known.update(reasons or {NOTHING_SEEN})
            warn_dense(f"{type(root).__name__} ran", reasons)
        return out

    handle.replace(root, "forward", watched)
