"""Transformers of diffusers and pipelines around them; a pipeline around a language model goes to that model's adapter.

Every self-attention layer gets a proxy for its processor that says which layer runs. Calls of diffusers' dispatch are
shown to it then, whichever backend they name, and those of SDPA come through `SparseSDPA`: so two pipelines share
nothing, and cross-attention, text encoders and the VAE stay as they are. In a compiled graph the layer goes along as a
tensor, so one graph serves all blocks of `compile_repeated_blocks`; a number, a hook or a context variable would be
part of the graph. `register` makes a backend that any model of diffusers can ask for by name. Does not know ring
attention.
"""

import functools
import inspect
import re
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from baatt.config import BAAttConfig, Policy
from baatt.integrations.diffusers_dispatch import add_backend, find_dispatch, watch, watcher
from baatt.integrations.diffusers_route import DiffusersRoute, Run, parameters, refuse_ring, uncompiled
from baatt.integrations.enable import find_adapter
from baatt.integrations.handle import Handle
from baatt.integrations.progress import by_name
from baatt.integrations.stand_in import itself, refuse_copy

#: Paths of attention over text alone, before it meets the latents: short, and no layer of the denoiser.
TEXT_ONLY = re.compile("text|txt|token_refiner|perceiver")

ITSELF = "called neither diffusers' dispatch nor scaled_dot_product_attention"


def register(
    name: str = "ba_att", config: BAAttConfig | None = None, policy: Policy | None = None, *, impl: str = "auto"
) -> Handle:
    """Make BA-Att a backend of diffusers' attention dispatch, for all models.

    Ask for it by `transformer.set_attention_backend(name)` or `with attention_backend(name)`. Calls that need gradients
    are dense. `handle.disable()` takes the name away; models that still have it compute as with "native". Registering a
    name again replaces the earlier handle.

    Args:
        name: of the backend, in lower case.
        config: the method's options; None = `BAAttConfig()`.
        policy: what stays dense, without layers, which a backend does not know; only `handle.at_step` tells the
            denoising step. Whether queries and keys are one sequence is not known either: with `only_self_attention`
            there must be as many of both. None = `Policy()`.
        impl: as `ba_attention`.

    Returns:
        Handle with the counts of all models that use the name.

    Raises:
        ImportError: diffusers is not installed, or its dispatch is not the one we know.
        TypeError: arguments of a wrong type.
        ValueError: a name that is taken, an unknown `impl`, or a policy that names layers.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    handle = Handle(BAAttConfig() if config is None else config, policy, impl=impl)
    if layers := handle.policy.named_layers:
        raise ValueError(f"policy must name no layers: a backend is not told its layer, got {layers}")
    dispatch = find_dispatch()
    if dispatch is None:
        raise ImportError("register needs diffusers with its attention dispatch, which is missing or another one")
    route = DiffusersRoute(handle, lambda: None)
    add_backend(dispatch, name, route.named(dispatch), handle.undo)
    return handle


def roots(model: Any) -> list[nn.Module]:
    """The transformer, those of a pipeline (Wan 2.2 has two), or the roots of a pipeline's language model.

    A transformer is one with processors in its self-attention layers.

    Raises:
        ValueError: a pipeline that denoises with something else.
    """
    if isinstance(model, nn.Module):
        inner = uncompiled(model)
        module = type(inner).__module__
        is_transformer = not module.startswith("diffusers.") or module.startswith("diffusers.models.transformers.")
        return [model] if is_transformer and _is_a(inner, "ModelMixin") and _layers(model) else []
    if not _is_a(model, "DiffusionPipeline"):
        return []
    language = _language_model(model)
    if language is not None:
        return find_adapter(language)[1]
    found = [getattr(model, name, None) for name in ("transformer", "transformer_2")]
    transformers = [module for module in found if module is not None]
    if not transformers or not all(map(roots, transformers)):
        raise ValueError(
            "model must be a pipeline that denoises with a transformer of diffusers or with a language model, "
            f"got {type(model).__name__} with {[type(module).__name__ for module in transformers] or 'none'}"
        )
    return transformers


def attach(model: Any, handle: Handle) -> int:
    """Put a proxy in the place of every self-attention processor, and our backend where the dispatch is known.

    Raises:
        ValueError: ring attention, two transformers of different depth, or an order that puts the text elsewhere.
    """
    language = None if isinstance(model, nn.Module) else _language_model(model)
    if language is not None:
        layers = find_adapter(language)[0].attach(language, handle)
        # The step is the share of a block's masks that are gone: blocks are loops.
        if getattr(model, "mask_token_id", None) is not None:
            handle.progress.mask_token_id = model.mask_token_id
        return layers
    transformers = roots(model)
    found = [_layers(root) for root in transformers]
    counts = {1 + max(number for number, _ in layers) for layers in found}
    if len(counts) > 1:
        raise ValueError(f"transformer and transformer_2 must have equally many layers, got {sorted(counts)}")
    held = weakref.ref(model)  # the handle and the route know one another, and neither is to keep a model in memory
    route = DiffusersRoute(handle, lambda: getattr(held(), "scheduler", None))
    handle.hear = route.hear
    if crossing := sum(len(_layers(root, is_cross=True)) for root in transformers):
        handle.outside.append(f"{crossing} modules of cross-attention")
    handle.read_step = functools.partial(route.read_step, parameters(transformers[0]))
    route.take_order(transformers[0])
    if (dispatch := find_dispatch()) is not None:
        watch(dispatch, handle.undo)
        route.is_shown = True
    for root in transformers:
        handle.before_forward(root, route.start)
    for number, attention in (layer for layers in found for layer in layers):
        processor: Any = attention.processor
        while isinstance(processor, ProcessorProxy):  # of a handle that is gone
            processor = processor.processor
        refuse_ring(getattr(processor, "_parallel_config", None))
        is_apart = bool(getattr(attention, "is_cross_attention", False))
        kind: Any = type(processor)
        proxy = _proxy_class(kind)(processor, route, torch.tensor(number, device="cpu"), is_apart)
        handle.override(attention, "processor", proxy)
    return counts.pop()


class ProcessorProxy:
    """Calls a processor and says before which layer it is. Attributes are the processor's own, to read and to write."""

    def __init__(self, processor: Any, route: DiffusersRoute, layer: Tensor, is_apart: bool) -> None:
        self.__dict__.update(processor=processor, route=route, layer=layer, is_apart=is_apart)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return refuse_copy() if self.route.handle.is_attached else (itself, (self.processor,))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.processor, name, value)


@functools.cache
def _proxy_class(kind: type) -> type[ProcessorProxy]:
    """The proxy of a class of processors, with the signature of its call: attention layers drop other arguments."""
    names = list(inspect.signature(kind.__call__).parameters)[1:]
    code = getattr(getattr(kind.__call__, "__code__", None), "co_names", ())
    # A mode makes traced code larger, and PyTorch cannot trace everything under one.
    calls_sdpa = "dispatch_attention_fn" not in code or "scaled_dot_product_attention" in code

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        processor, route = self.processor, self.route
        if not route.handle.is_attached:  # somebody kept it and has put it back
            return processor(*args, **kwargs)
        refuse_ring(getattr(processor, "_parallel_config", None))
        given = by_name(names, args, kwargs)
        others = given.get("encoder_hidden_states")
        if others is given.get("hidden_states") or not isinstance(others, Tensor):
            others = None
        run = Run(self.layer, None if others is None else others.shape[1], self.is_apart, [])
        former = watcher.get()
        route.run.set(run)
        watcher.set(route.dispatched)
        try:
            if torch.compiler.is_compiling() and route.is_shown and not calls_sdpa:
                return processor(*args, **kwargs)
            with route.mode:
                out = processor(*args, **kwargs)
        finally:
            route.run.set(None)
            watcher.set(former)
        if not run.arrived:
            route.handle.count_dense(int(self.layer), f"{kind.__name__} {ITSELF}")
        return out

    return type(f"Proxy{kind.__name__}", (ProcessorProxy,), {"__call__": functools.wraps(kind.__call__)(call)})


def _layers(root: nn.Module, *, is_cross: bool = False) -> list[tuple[int, nn.Module]]:
    """Self-attention modules in order, or those of cross-attention, with the number of the block that they stand in."""
    numbers: dict[str, int] = {}
    found = []
    for name, module in root.named_modules():
        block = re.match(r".*\.\d+(?=\.)", name)
        if block is None or TEXT_ONLY.search(name) or not callable(getattr(module, "processor", None)):
            continue
        if _is_cross(module, name.rpartition(".")[2]) == is_cross:
            found.append((numbers.setdefault(block[0], len(numbers)), module))
    return found


def _is_cross(module: nn.Module, name: str) -> bool:
    """Whether it attends to another sequence: it says so, or its name does by diffusers' custom."""
    told = getattr(module, "is_cross_attention", None)
    if told and "self" in name:  # it is given its own sequence for the other one
        return False
    return bool(told) if told is not None else "cross" in name or "_to_" in name or name.endswith("attn2")


def _language_model(pipeline: Any) -> nn.Module | None:
    """The model of a pipeline that has no transformer of diffusers."""
    model = getattr(pipeline, "model", None)
    has_transformer = getattr(pipeline, "transformer", None) is not None
    return model if isinstance(model, nn.Module) and not has_transformer else None


def _is_a(model: Any, name: str) -> bool:
    return any(base.__name__ == name and base.__module__.startswith("diffusers.") for base in type(model).__mro__)
