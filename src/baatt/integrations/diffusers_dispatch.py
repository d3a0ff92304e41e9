"""diffusers' attention dispatch: every call of it is shown while somebody watches, and a name of ours is a backend.

In: calls of a registered backend, whichever a processor asked for. Out: what the watcher of the processor that runs in
this thread makes of them; all other calls go on as they are. The functions in diffusers' registry are what we stand in
for: so a processor keeps the backend that it has, needs or hard-codes. Knows no handle and no layer.
"""

import functools
import importlib
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from baatt.integrations.sdpa import Current

#: What diffusers keeps its backends in.
TABLES = ("_backends", "_constraints", "_supported_arg_names")

#: What is shown the calls of this thread, given the backend's function and the arguments by name; or None.
watcher: Current[Callable[..., Any] | None] = Current(None)

_lock = threading.Lock()
_watching = 0
#: Backends that we named, which stay the same objects: models may still hold one when its name is gone.
_named: dict[str, Any] = {}


def find_dispatch() -> Any:
    """diffusers' module, or None where it is not built as we know it."""
    try:
        dispatch: Any = importlib.import_module("diffusers.models.attention_dispatch")
    except ImportError:
        return None
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    names = ("AttentionBackendName", "dispatch_attention_fn", "_templated_context_parallel_attention")
    is_known = (
        all(hasattr(dispatch, name) for name in names)
        and all(isinstance(getattr(registry, table, None), dict) for table in TABLES)
        and isinstance(getattr(registry, "_supports_context_parallel", None), set)
    )
    return dispatch if is_known else None


def watch(dispatch: Any, undo: ExitStack) -> None:
    """Have all calls shown to `watcher` until `undo` runs."""
    global _watching
    with _lock:
        _watching += 1
        backends = dispatch._AttentionBackendRegistry._backends
        native = backends[dispatch.AttentionBackendName.NATIVE]
        for name, function in list(backends.items()) if _watching == 1 else ():
            # Under our own name calls may be sparse: what a watcher wants dense would not be.
            backends[name] = _shown(function, native if name in _named.values() else function)
    undo.callback(_unwatch, dispatch)


def _unwatch(dispatch: Any) -> None:
    global _watching
    with _lock:
        _watching -= 1
        backends = dispatch._AttentionBackendRegistry._backends
        for name, function in list(backends.items()) if not _watching else ():
            backends[name] = getattr(function, "baatt_original", function)


@functools.cache
def _shown(function: Callable[..., Any], dense: Callable[..., Any]) -> Callable[..., Any]:
    """Always the same for a function, so that graphs compiled before stay good."""

    def shown(**given: Any) -> Any:
        watching = watcher.get()
        return function(**given) if watching is None else watching(dense, **given)

    shown.baatt_original = function  # type: ignore[attr-defined]
    return shown


def add_backend(dispatch: Any, name: str, function: Callable[..., Any], undo: ExitStack) -> None:
    """Make a function a backend by a name, until `undo` runs; models that hold it compute as "native" then.

    Raises:
        ValueError: a name that diffusers or somebody else uses.
    """
    names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
    if name != name.lower() or not name.isidentifier() or (name in names._value2member_map_ and name not in _named):
        raise ValueError(f"name must be a lower-case word that no backend of diffusers has, got {name!r}")
    if name not in _named:
        member = str.__new__(names, name)
        member._name_, member._value_, member.__objclass__ = name.upper(), name, names
        _named[name] = member
    member = _named[name]
    names._member_map_[member._name_] = names._value2member_map_[name] = member
    registry.register(member, supports_context_parallel=True)(function)
    undo.callback(_remove_backend, dispatch, member, function)


def _remove_backend(dispatch: Any, member: Any, function: Callable[..., Any]) -> None:
    names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
    if getattr(registry._backends[member], "baatt_original", registry._backends[member]) is not function:
        return  # registered anew
    registry.register(member)(registry._backends[names.NATIVE])
    del names._member_map_[member._name_], names._value2member_map_[member._value_]
    registry._supports_context_parallel.discard(member._value_)
    if registry._active_backend is member:
        registry.set_active_backend(names.NATIVE)
