"""Attention functions that a model's code imported by name: FlashAttention's, and FlexAttention.

While a forward runs, stand-ins take their places in the globals of the code; in other threads, and in traced code, they
call the function itself. In: the arguments, by the names of the function's own parameters. Out: what it returns. What
cannot be read (windows, softcaps, packed sequences, other functions) is counted dense with the reason.
"""

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from baatt.integrations.calls import SdpaCall
from baatt.integrations.handle import Handle

#: Given the name, the function and the arguments of a call, computes it.
Route = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

#: Entries of a mask that is written out to be read, a byte each.
LARGEST_MASK = 2**30


class Read(NamedTuple):
    """A call [B, H, N, D]. query_start: where the first query of a causal call stands. back: to the caller's layout."""

    call: SdpaCall
    query_start: int | None
    back: Callable[[Tensor], Tensor]


def _flash(given: dict[str, Any]) -> Read | str:
    """FlashAttention: q [B, N, H, D], k and v [B, M, G, D]; `causal` has the last query at the last key."""
    q, k, v = (given.pop(name) for name in ("q", "k", "v"))
    scale, is_causal = given.pop("softmax_scale", None), bool(given.pop("causal", False))
    given.pop("deterministic", None)
    window = given.pop("window_size", None) or (-1, -1)
    if any(side is not None and side >= 0 for side in window):
        return "a window"
    other = next((name for name, value in given.items() if isinstance(value, Tensor) or value), None)
    if other is not None:
        return f"its argument {other}"
    if q.ndim != 4:
        return f"tensors with {q.ndim} axes"
    queries, keys = q.shape[1], k.shape[1]
    if is_causal and queries > keys:
        return "a causal flag with more queries than keys"
    q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (q, k, v))
    call = SdpaCall(q, k, v, scale=scale, enable_gqa=True)
    start = keys - queries if is_causal else None
    return Read(call, start, lambda out: rearrange(out, "b h n d -> b n h d").contiguous())


def _flash_varlen(given: dict[str, Any]) -> Read | str:
    """FlashAttention over sequences in one tensor [tokens, H, D]; of a single one it is the same as `_flash`."""
    for side in "qk":
        offsets, longest = given.pop(f"cu_seqlens_{side}"), given.pop(f"max_seqlen_{side}")
        if len(offsets) != 2 or int(longest) != given[side].shape[0]:
            return "several sequences in one"
    found = _flash(given | {name: given[name][None] for name in ("q", "k", "v")})
    return found if isinstance(found, str) else found._replace(back=lambda out: rearrange(out, "1 h n d -> n h d"))


def _flex(given: dict[str, Any]) -> Read | str:
    """FlexAttention: [B, H, N, D] already; its mask is a function, which is written out to be read."""
    q, k, v = (given.pop(name) for name in ("query", "key", "value"))
    scale, grouped, block_mask = given.pop("scale", None), given.pop("enable_gqa", False), given.pop("block_mask", None)
    given.pop("kernel_options", None)
    other = next((name for name, value in given.items() if value is not None and value is not False), None)
    if other is not None:
        return f"its argument {other}"
    mask = None
    if block_mask is not None:
        batch, heads = block_mask.shape[:2]
        if batch * heads * q.shape[2] * k.shape[2] > LARGEST_MASK:
            return "a mask too large to be written out"
        mask = _written_out(block_mask, batch, heads, q.shape[2], k.shape[2], q.device)
    return Read(SdpaCall(q, k, v, mask, scale=scale, enable_gqa=bool(grouped)), None, lambda out: out)


#: Name of a function -> how its arguments are read; None: not at all.
KNOWN: Mapping[str, Callable[[dict[str, Any]], Read | str] | None] = {
    "flash_attn_func": _flash,
    "flash_attn_varlen_func": _flash_varlen,
    "flex_attention": _flex,
    **dict.fromkeys(
        (
            "flash_attn_qkvpacked_func",
            "flash_attn_kvpacked_func",
            "flash_attn_varlen_qkvpacked_func",
            "flash_attn_with_kvcache",
            "_flash_attention_forward",
            "memory_efficient_attention",
            "sageattn",
        )
    ),
}


def compute(
    handle: Handle,
    layer: int | None,
    is_cross: bool | None,
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A call by name: sparse or dense by the handle, or the function itself where the call cannot be read."""
    reader = KNOWN[name]
    if reader is None:
        found: Read | str = "whose arguments baatt does not read"
    else:
        try:
            given = inspect.signature(getattr(function, "_torchdynamo_orig_callable", function)).bind(*args, **kwargs)
            found = reader(dict(given.arguments))
        except (TypeError, ValueError, KeyError) as error:  # not the function that we know by this name
            found = f"with other arguments, {error}"
    if isinstance(found, str):
        handle.count_dense(layer, f"{name} called by name, {found}")
        return function(*args, **kwargs)
    call, start, back = found

    def dense() -> Tensor:
        out: Tensor = function(*args, **kwargs)
        return out if name == "flex_attention" else rearrange(out[None] if out.ndim == 3 else out, "b n h d -> b h n d")

    if start is None:
        return back(handle.sdpa(call, dense, layer=layer, is_cross=is_cross))
    refusal = call.refusal()
    out = handle.attention(
        *call[:3], layer=layer, causal=1, query_start=start, scale=call.scale, is_cross=is_cross, dense=dense,
        refusal=refusal,
    )  # fmt: skip
    return back(out)


class _Current(threading.local):
    """The route of the forward of this thread."""

    route: Route | None = None


_current = _Current()
_lock = threading.Lock()
#: By globals and name: how many forwards need the stand-in, the function itself and the stand-in. One for good, so that
#: code that was compiled with it does not meet another one at every forward.
_places: dict[tuple[str, str], tuple[int, Any, Callable[..., Any]]] = {}


def code_of(model: nn.Module) -> list[ModuleType]:
    """The Python modules of a model's classes, with all files of remote code."""
    names = {type(module).__module__ for module in model.modules()}
    folders = tuple(name.rpartition(".")[0] + "." for name in names if name.startswith("transformers_modules."))
    names |= {name for name in list(sys.modules) if folders and name.startswith(folders)}
    return [sys.modules[name] for name in sorted(names) if name in sys.modules and not name.startswith("torch.")]


@contextmanager
def intercepted(code: Iterable[ModuleType], route: Route) -> Iterator[None]:
    """Send the calls by name in some code, made in this thread inside the context, to a route."""
    places = [(module, key, name) for module in code for key, name in _named(module).items()]
    with _lock:
        for module, key, name in places:
            users, original, stand_in = _places.get((module.__name__, key), (0, None, None))
            if not users and original is not vars(module)[key]:
                original = vars(module)[key]
                stand_in = _stand_in(name, original)
            _places[module.__name__, key] = users + 1, original, stand_in  # type: ignore[assignment]
            vars(module)[key] = stand_in
    outer, _current.route = _current.route, route
    try:
        yield
    finally:
        _current.route = outer
        with _lock:
            for module, key, _ in places:
                users, original, stand_in = _places[module.__name__, key]
                _places[module.__name__, key] = users - 1, original, stand_in
                if users == 1 and vars(module).get(key) is stand_in:
                    vars(module)[key] = original


def _named(module: ModuleType) -> dict[str, str]:
    """Keys of a module's globals that hold a known function, compiled or renamed, with its name."""
    found = {}
    for key, value in list(vars(module).items()):
        function = getattr(value, "_torchdynamo_orig_callable", value)
        name = key if key in KNOWN else str(getattr(function, "__name__", ""))
        if callable(value) and not inspect.isclass(value) and name in KNOWN:
            found[key] = name
    return found


def _stand_in(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        route = None if torch.compiler.is_compiling() else _current.route
        if route is None:
            return function(*args, **kwargs)
        _current.route = None  # what the function itself calls is not the model's
        try:
            return route(name, function, args, kwargs)
        finally:
            _current.route = route

    return stand_in


#: Masks by their `BlockMask`, as long as that lives: all layers share it.
_written: "weakref.WeakKeyDictionary[Any, Tensor]" = weakref.WeakKeyDictionary()


def _written_out(block_mask: Any, batch: int, heads: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """The mask [B or 1, H or 1, N, M] of a `BlockMask`."""
    known = _written.get(block_mask)
    if known is not None and known.shape[2:] == (queries, keys):
        return known
    flex: Any = sys.modules["torch.nn.attention.flex_attention"]
    mask: Tensor = flex.create_mask(block_mask.mask_mod, batch, heads, queries, keys, device=device)
    _written[block_mask] = mask
    return mask
