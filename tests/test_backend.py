"""From `impl` to functions: what runs, what refuses, what `auto` says."""

import logging
import sys
import types

import pytest
import torch

from baatt import backend
from baatt.backend import IMPLS, choose_backend, describe
from baatt.kernels import cpu, cpu_native, cpu_orders, cpu_scores
from baatt.scores import antidiagonal, clusters, covariance
from baatt.stages import sorting, sparse


def test_explicit_choices_are_what_they_say():
    for name, twin, attention in (
        ("reference", backend._itself, sparse.sparse_attention),
        ("cpu", backend.cpu_twin, cpu.sparse_attention),
    ):
        chosen = choose_backend(name, torch.device("cpu"))
        assert (chosen.name, chosen.sparse_attention) == (name, attention)
        assert chosen.sort_blocks.args == chosen.choose_blocks.args == (twin,)


def test_plans_are_eager_where_c_does_not_go(monkeypatch):
    functions = (sorting.by_norm, covariance.summarise, clusters.compare, antidiagonal.compare)
    if cpu_native.library() is not None:
        twins = [backend.cpu_twin(function, torch.float32) for function in functions]
        moments, shares = cpu_scores.summarise_moments, cpu_scores.compare_clusters
        assert twins == [cpu_orders.by_norm, moments, shares, antidiagonal.compare]
    assert all(backend.cpu_twin(function, torch.float64) is function for function in functions)
    monkeypatch.setattr(cpu_native, "library", lambda: None)
    assert all(backend.cpu_twin(function, torch.float32) is function for function in functions)


def test_clusters_are_portable_where_those_of_hopper_break(monkeypatch):
    room, calls = types.ModuleType("baatt.kernels.hopper_clusters"), []

    def breaks(*args):
        calls.append(args)
        raise error

    room.compare = breaks
    monkeypatch.setitem(sys.modules, room.__name__, room)
    error = AttributeError("at 21:8:\nno attribute 'thread_barrier'")
    run = backend._or_portable("compare", lambda *args: ("portable", *args))
    with pytest.warns(RuntimeWarning, match="do not run here: AttributeError: no attribute 'thread_barrier'$"):
        assert run(1, 2) == ("portable", 1, 2)
    assert run(3) == ("portable", 3)
    assert calls == [(1, 2)]
    # Too little memory, or what breaks the portable kernels too, is none of that.
    error = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError):
        backend._or_portable("compare", lambda *args: pytest.fail("not asked for"))(1)
    error = RuntimeError("a device is lost")

    def lost(*args):
        raise RuntimeError("lost here too")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="lost here too"):
            backend._or_portable("compare", lost)(1)
    room.compare = lambda *args: ("hopper", *args)
    assert backend._or_portable("compare", lost)(1) == ("hopper", 1)


def test_every_impl_says_why_it_cannot_run():
    with pytest.raises(
        RuntimeError, match=r"^impl='cpu' cannot run: it needs tensors on the CPU, got device 'cuda:1'$"
    ):
        choose_backend("cpu", torch.device("cuda:1"))
    for impl in ("triton", "hopper"):
        with pytest.raises(
            RuntimeError, match=rf"^impl='{impl}' cannot run: it needs tensors on a GPU, got device 'cpu'$"
        ):
            choose_backend(impl, torch.device("cpu"))


@pytest.mark.parametrize(("device", "name"), [("cpu", "cpu"), ("cuda", "reference"), ("mps", "reference")])
def test_auto_logs_its_choice_once(device, name, caplog, monkeypatch):
    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.INFO, logger="baatt"):
        assert [choose_backend("auto", torch.device(device)).name for _ in range(3)] == [name] * 3
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"impl='auto' chose '{name}' for device type '{device}': ")


def test_describe_covers_every_impl():
    entries = describe()
    assert tuple(entry.impl for entry in entries) == IMPLS
    assert all(entry.reason for entry in entries)
    for entry in entries[1:]:
        if entry.available:
            choose_backend(entry.impl, torch.device("cpu"))
        else:
            with pytest.raises(RuntimeError):
                choose_backend(entry.impl, torch.device("cpu"))
