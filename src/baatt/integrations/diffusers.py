"""Transformers of diffusers and pipelines around them; a pipeline around a language model goes to that model's adapter.

Every self-attention layer gets a proxy for its processor that says which layer runs. The call then arrives as a
backend of diffusers' dispatch, or through `SparseSDPA` from processors that call SDPA themselves (CogVideoX, SD3) and
where the dispatch has changed. The backend is a member of diffusers' closed enum, one a handle, which no list shows: so
two pipelines share nothing, and cross-attention, text encoders and the VAE stay as they are. In a compiled graph the
layer goes along as a tensor, so one graph serves all blocks of `compile_repeated_blocks`; a number, a hook or a context
variable would be part of the graph. Does not know ring attention.
"""

import functools
import re
from typing import Any

import torch
from torch import Tensor, nn

from baatt.integrations.diffusers_route import DiffusersRoute, parameters, uncompiled
from baatt.integrations.enable import find_adapter
from baatt.integrations.handle import Handle, itself, refuse_copy

#: Paths of attention over text alone, before it meets the latents: short, and no layer of the denoiser.
TEXT_ONLY = re.compile("text|txt|token_refiner|perceiver")


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
    route = DiffusersRoute(handle, lambda: getattr(model, "scheduler", None))
    handle.hear = route.hear
    handle.read_step = functools.partial(route.read_step, parameters(transformers[0]))
    route.take_order(transformers[0])
    route.register()
    for root in transformers:
        handle.before_forward(root, route.start)
    formers: dict[int, Any] = {}  # backends by id of the processor: layers may share one
    for number, attention in (layer for layers in found for layer in layers):
        processor: Any = attention.processor
        while isinstance(processor, ProcessorProxy):  # of a handle that is gone
            processor = processor.processor
        _refuse_ring(processor)
        if id(processor) not in formers:
            formers[id(processor)] = getattr(processor, "_attention_backend", None)
            if route.member is not None and hasattr(processor, "_attention_backend"):
                handle.override(processor, "_attention_backend", route.member)
        kind: Any = type(processor)
        proxy = _proxy_class(kind)(processor, route, torch.tensor(number, device="cpu"), formers[id(processor)])
        handle.override(attention, "processor", proxy)
    return counts.pop()


class ProcessorProxy:
    """Calls a processor and says before which layer it is. Attributes are the processor's own, to read and to write."""

    def __init__(self, processor: Any, route: DiffusersRoute, layer: Tensor, former: Any) -> None:
        self.__dict__.update(processor=processor, route=route, layer=layer, former=former)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return refuse_copy() if self.route.handle.is_attached else (itself, (self.processor,))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.processor, name, value)


@functools.cache
def _proxy_class(kind: type) -> type[ProcessorProxy]:
    """The proxy of a class of processors, with the signature of its call: attention layers drop other arguments."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        processor, route = self.processor, self.route
        if not route.handle.is_attached:  # somebody kept it and has put it back
            return processor(*args, **kwargs)
        _refuse_ring(processor)
        route.layer.set(self.layer)
        route.former.set(self.former)
        try:
            if route.member is not None and hasattr(processor, "_attention_backend"):
                return processor(*args, **kwargs)
            with route.mode:
                return processor(*args, **kwargs)
        finally:
            route.layer.set(None)

    return type(f"Proxy{kind.__name__}", (ProcessorProxy,), {"__call__": functools.wraps(kind.__call__)(call)})


def _refuse_ring(processor: Any) -> None:
    config = getattr(getattr(processor, "_parallel_config", None), "context_parallel_config", None)
    degree = 1 if config is None else config.ring_degree
    if degree > 1:
        raise ValueError(
            "ring_degree must be 1: blocks are selected from all keys of a head, which no process of a ring has; "
            f"use ulysses_degree, got ring_degree={degree}"
        )


def _layers(root: nn.Module) -> list[tuple[int, nn.Module]]:
    """Self-attention modules in order, with the number of the block that they stand in."""
    numbers: dict[str, int] = {}
    found = []
    for name, module in root.named_modules():
        block = re.match(r".*\.\d+(?=\.)", name)
        if block is None or TEXT_ONLY.search(name) or not callable(getattr(module, "processor", None)):
            continue
        if not _is_cross(module, name.rpartition(".")[2]):
            found.append((numbers.setdefault(block[0], len(numbers)), module))
    return found


def _is_cross(module: nn.Module, name: str) -> bool:
    """Whether it attends to another sequence: it says so, or its name does by diffusers' custom."""
    told = getattr(module, "is_cross_attention", None)
    return bool(told) if told is not None else "cross" in name or "_to_" in name or name.endswith("attn2")


def _language_model(pipeline: Any) -> nn.Module | None:
    """The model of a pipeline that has no transformer of diffusers."""
    model = getattr(pipeline, "model", None)
    has_transformer = getattr(pipeline, "transformer", None) is not None
    return model if isinstance(model, nn.Module) and not has_transformer else None


def _is_a(model: Any, name: str) -> bool:
    return any(base.__name__ == name and base.__module__.startswith("diffusers.") for base in type(model).__mro__)
