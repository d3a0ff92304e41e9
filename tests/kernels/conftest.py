"""What the tests of every kernel share: uninitialised memory that is not right by luck, and a faster interpreter."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session", autouse=True)
def interpreter_that_prepares_once_a_launch() -> Iterator[None]:
    """Triton's interpreter prepares its language at every call of a helper again: 40 % of the time of these tests."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    prepare, launch, prepared = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def prepare_once(function: Any) -> Any:
        if function.__module__ in prepared:
            return interpreter._LangPatchScope()
        prepared.add(function.__module__)
        return prepare(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.clear()
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty and its kin return with NaN (integers: an id far outside of any tensor)."""

    def poisoned(function: Any) -> Any:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            x: Tensor = function(*args, **kwargs)
            if x.dtype == torch.bool:
                return x.fill_(True)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
