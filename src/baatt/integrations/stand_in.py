"""What stands in the place of a method while a handle is attached, and what is told to those who copy a model then."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn, Protocol


class Attached(Protocol):
    """A handle: `is_attached` until it is disabled."""

    is_attached: bool


def refuse_copy(*_: object) -> NoReturn:
    """`__reduce_ex__` of what is attached to: a copy would compute with the weights of the original."""
    raise TypeError("model must not be copied or pickled while baatt is attached to it: call handle.disable() first")


def itself(x: Any) -> Any:
    """What a copy of a stand-in is made of."""
    return x


class StandIn:
    """Calls a function for the original as long as a handle is attached; a copy made later is one of the original."""

    __slots__ = ("__dict__", "function", "handle", "original")  # other wrappers take over what is in __dict__

    def __init__(self, handle: Attached, function: Callable[..., Any], original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.handle, self.function, self.original = handle, function, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.function if self.handle.is_attached else self.original)(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return refuse_copy() if self.handle.is_attached else (itself, (self.original,))
