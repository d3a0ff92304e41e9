"""What the tests of every kernel share: uninitialised memory that is not right by luck, and a faster interpreter."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import substitutes


@pytest.fixture(scope="session", autouse=True)
def faster_interpreter() -> Iterator[None]:
    """What the interpreter makes again and again is made once."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        for substitute in substitutes(interpreter):
            patch.setattr(*substitute)
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
