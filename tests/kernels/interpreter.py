"""What Triton's interpreter makes again at every operation, made once: less than half of the time of these tests.

Each function stands in for one of the interpreter and returns what that returns; no operation of a kernel is touched.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Substitute = tuple[object, str, Callable[..., Any]]


def substitutes(interpreter: Any) -> list[Substitute]:
    """Of the module `triton.runtime.interpreter`: owner, name and what stands in."""
    core = interpreter.tl.core
    return [
        *_prepared_once_a_launch(interpreter),
        (interpreter, "_get_np_dtype", _dtypes_by_name(interpreter._get_np_dtype)),
        (interpreter.ReduceOps, "apply_impl", _exclusive_or_of_arrays(interpreter)),
        (core.block_type, "__init__", _types_by_shape(core.block_type.__init__)),
        (core.tensor, "__init__", _tensors_by_type(core.tensor.__init__)),
    ]


def _prepared_once_a_launch(interpreter: Any) -> list[Substitute]:
    """The language is prepared for a module at its first function of a launch, not at every call of a helper."""
    prepare, launch, prepared = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def prepare_once(function: Any) -> Any:
        if function.__module__ in prepared:
            return interpreter._LangPatchScope()
        prepared.add(function.__module__)
        return prepare(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.clear()
        return launch(self, *args, **kwargs)

    return [(interpreter, "_patch_lang", prepare_once), (interpreter.GridExecutor, "__call__", launch_anew)]


def _dtypes_by_name(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    found: dict[str, Any] = {}

    def find_once(kind: Any) -> Any:
        if kind.name not in found:
            found[kind.name] = find(kind)
        return found[kind.name]

    return find_once


def _exclusive_or_of_arrays(interpreter: Any) -> Callable[..., Any]:
    """`tl.sort` takes exclusive ors, which the interpreter makes a pair of numbers at a time."""
    reduce = interpreter.ReduceOps.apply_impl

    def apply(self: Any, parts: Any) -> Any:
        if self.combine_fn is not interpreter.tl.standard._xor_combine:
            return reduce(self, parts)
        reduced = np.bitwise_xor.reduce(parts[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(reduced, parts[0].dtype)

    return apply


def _types_by_shape(make: Callable[..., None]) -> Callable[..., None]:
    made: dict[Any, dict[str, Any]] = {}

    def make_once(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in made:
            make(self, element_ty, shape)
            made[key] = dict(vars(self))
        vars(self).update(made[key])

    return make_once


def _tensors_by_type(make: Callable[..., None]) -> Callable[..., None]:
    known: dict[str, dict[str, Any]] = {}

    def make_from_known(self: Any, handle: Any, type: Any) -> None:
        if type.name not in known:
            make(self, handle, type)
            known[type.name] = {name: getattr(self, name) for name in ("dtype", "shape", "numel")}
        vars(self).update(known[type.name], handle=handle, type=type)

    return make_from_known
