"""Candidates take turns, and the ceilings are what a clock says."""

import time

import pytest
import torch

from baatt.lab.bench import timing

CPU = torch.device("cpu")


def test_candidates_take_turns(monkeypatch):
    monkeypatch.setattr(timing, "ENOUGH_MS", 0.0)
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.median_times(functions, CPU)
    rounds = "".join(calls[9:])
    assert len(rounds) == 3 * timing.ROUNDS
    rounds = [rounds[i : i + 3] for i in range(0, len(rounds), 3)]
    assert all(set(one) == set("abc") for one in rounds)
    assert len(set(rounds)) > 1
    assert set(times) == set("abc")


def test_the_median_is_in_milliseconds(monkeypatch):
    monkeypatch.setattr(timing, "ENOUGH_MS", 0.0)
    assert 4.9 < timing.median_times({"nap": lambda: time.sleep(0.005)}, CPU)["nap"] < 50


def test_ceilings_are_plausible(monkeypatch):
    monkeypatch.setitem(timing.MATRIX_SIZES, "cpu", (256, 128))
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 2**24)
    assert 1e-4 < timing.matrix_peak_tflops(CPU, torch.float32) < 100
    assert 1e8 < timing.memory_bandwidth(CPU) < 1e13


def test_peak_memory_is_what_a_call_held():
    found = timing.peak_bytes(lambda: torch.ones(2**24).sum(), CPU)
    if found is None:
        pytest.skip("not Linux with glibc")
    assert 60 * 2**20 < found < 120 * 2**20
