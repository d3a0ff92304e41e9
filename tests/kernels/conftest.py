"""What the tests of every kernel share: uninitialised memory that is not right by luck, and a faster interpreter."""

import ctypes
import functools
import importlib.util
import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from baatt.kernels import cpu_native
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
def fresh_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C files are built again at the next call; what was built before comes back after the test."""
    monkeypatch.setattr(cpu_native, "_library", functools.cache(cpu_native._library.__wrapped__))


@functools.cache
def built_for(machine: str) -> ctypes.CDLL | None:
    """The C files for an instruction set, built once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_native, "CPU_FLAGS", ((f"-march={machine}",),))
        return cpu_native._library.__wrapped__()


@pytest.fixture(params=["x86-64", "haswell"])
def narrower_vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of 4 and 8 lanes, which this machine may not choose by itself."""
    if platform.machine() != "x86_64" or "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("names x86 instruction sets and needs AVX2")
    if cpu_native.find_compiler() is None:
        pytest.skip("no C compiler on this machine")
    library = built_for(request.param)
    assert library is not None
    monkeypatch.setattr(cpu_native, "_library", lambda: library)


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
