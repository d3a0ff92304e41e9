"""`baatt.enable`: turns BA-Att on in a model of another library, and off again.

Finds the adapter that knows the model, refuses what it cannot do before anything is changed, and leaves no trace on
exit. An adapter is one file with the three functions of `Adapter` and one line in `ADAPTERS`.
"""

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from baatt.config import BAAttConfig, Policy
from baatt.integrations.handle import BY_POLICY, Handle, NoSparseAttentionWarning, TokenPermutation

#: File beside this one -> what it attaches to. The first that recognises a model has it.
ADAPTERS: Mapping[str, str] = {
    "masked_diffusion": "baatt.models: MaskedDiffusionLM, and baatt.llada_v: VisualDiffusionLM",
    "diffusers": "diffusers transformers and pipelines: Wan, HunyuanVideo, CogVideoX, LTX, Flux and others",
    "llada": "remote code of the LLaDA family (modeling_llada.py: LLaDA-8B, LLaDA-1.5, UltraLLaDA)",
    "remote_sdpa": "remote code that calls scaled_dot_product_attention (Dream, DiffuCoder, LLaDA-MoE, LLaDA-V, SDAR)",
    "transformers": "transformers models that use the attention interface (ModernBERT, EuroBERT, Qwen, Llama, ...)",
}

#: Modules that are attached to now.
_attached: "WeakKeyDictionary[nn.Module, Handle]" = WeakKeyDictionary()


class Attachment(NamedTuple):
    """What an adapter did.

    layers: how many, which `Policy.dense_layers` counts. undo: puts everything back. read_step: given (args, kwargs) of
    a forward of a root before it runs, tells `handle.progress` the denoising step; None where the model is not told it.
    """

    layers: int
    undo: Callable[[], None]
    read_step: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None


class Adapter(Protocol):
    """A file of `ADAPTERS`."""

    def recognises(self, model: Any) -> bool:
        """Whether it can attach to the model; must not import a library that the model does not come from."""

    def roots(self, model: Any) -> list[nn.Module]:
        """The modules whose forward is one evaluation: the model itself, or the transformers of a pipeline."""

    def attach(self, model: Any, handle: Handle) -> Attachment:
        """Bring the calls of every attention layer to `handle.attention`, on this instance only."""


def enable(
    model: Any,
    config: BAAttConfig | None,
    policy: Policy | None = None,
    *,
    impl: str = "auto",
    order: TokenPermutation | None = None,
) -> Handle:
    """Make a model's self-attention sparse until the handle is disabled.

    `with enable(model, config) as handle: ...` or `handle = enable(model, config)` and later `handle.disable()`. Only
    this model changes; leaving, by an exception too, puts it back as it was. Every call is counted, dense ones with
    their reason, and a forward without any sparse call that the policy did not ask for warns.

    Args:
        model: an nn.Module in evaluation mode, or a diffusers pipeline.
        config: the method's options; None leaves every call dense and counts it, for comparison.
        policy: what stays dense; None = `Policy()`, nothing but cross-attention and short cached blocks.
        impl: as `ba_attention`.
        order: (N, device) -> permutation [N] of the tokens before they are cut into blocks, or None for a length that
            stays as it is; composes with `config.sort`. `baatt.integrations.video.VideoTiles` is one.

    Returns:
        Handle, attached.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: a model that no adapter knows, that is attached to already, in training mode, or without the layers
            that the policy names.
    """
    handle = Handle(config, policy, impl=impl, order=order)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped: its graphs see the change
    adapter = find_adapter(model)
    roots = adapter.roots(model)
    modules = [module for root in roots for module in root.modules()]
    if any(module in _attached for module in modules):
        raise ValueError("model must not be attached to already: disable the handle of the earlier enable first")
    if any(root.training for root in roots):
        raise ValueError("model must be in evaluation mode, got training mode: call model.eval() first")
    attachment = adapter.attach(model, handle)
    try:
        handle.set_layers(attachment.layers)
    except ValueError:
        attachment.undo()
        raise
    watches = [_Watch(root, handle, attachment) for root in roots]
    _attached.update(dict.fromkeys(modules, handle))

    def undo() -> None:
        for module in modules:
            _attached.pop(module, None)
        for watch in watches:
            watch.remove()
        attachment.undo()

    handle.on_disable(undo)
    return handle


def find_adapter(model: Any) -> Adapter:
    """The module of the adapter that recognises a model.

    Raises:
        TypeError: not a model at all.
        ValueError: none does, with the list of what is known.
    """
    for name in ADAPTERS:
        adapter = cast(Adapter, importlib.import_module(f"baatt.integrations.{name}"))
        if adapter.recognises(model):
            return adapter
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module or a diffusers pipeline, got {type(model).__name__}")
    known = "; ".join(ADAPTERS.values())
    raise ValueError(
        f"model must be of a known kind: {known}; got {type(model).__module__}.{type(model).__name__}. "
        "baatt.integrations.sdpa.sparse_sdpa(config) works with any code that calls scaled_dot_product_attention"
    )


class _Watch:
    """Hooks around every forward of a model: tells the adapter before, and warns after one without a sparse call."""

    def __init__(self, root: nn.Module, handle: Handle, attachment: Attachment) -> None:
        self.handle, self.read_step = handle, attachment.read_step
        self.before = (0, 0)
        self.warned = False
        self.hooks = [
            root.register_forward_pre_hook(self.start, with_kwargs=True, prepend=True),
            root.register_forward_hook(self.finish),
        ]

    def start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward. A traced graph has no side effects, so there nothing is told and nothing is warned of."""
        if torch.compiler.is_compiling():
            return
        self.before = self.handle.sparse_calls, sum(self.policy_calls().values())
        if self.read_step is not None and self.handle.policy.dense_steps > 0 and not self.handle.progress.told:
            self.read_step(args, kwargs)

    def finish(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a forward."""
        if torch.compiler.is_compiling() or self.warned:
            return
        sparse, asked_for = self.before
        if self.handle.sparse_calls > sparse or sum(self.policy_calls().values()) > asked_for:
            return
        self.warned = True
        reasons = "; ".join(self.handle.reasons) or "the model never called its attention through baatt"
        warnings.warn(
            f"{type(module).__name__} ran without a single sparse attention call: {reasons}",
            NoSparseAttentionWarning,
            stacklevel=3,
        )

    def policy_calls(self) -> dict[str, int]:
        """Dense calls that the policy asked for."""
        return {reason: count for reason, count in self.handle.reasons.items() if reason.startswith(BY_POLICY)}

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self.hooks:
            hook.remove()
