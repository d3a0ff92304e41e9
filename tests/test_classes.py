"""The table of model classes: what is measured of one, and that one which fails ends nothing but itself."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import classes
import classes_diffusers


def measured(name, build=None, seconds=60):
    return classes.measure_apart("diffusers", name, build or classes_diffusers.build, seconds)


@pytest.mark.parametrize(
    ("name", "sparse"), [("WanTransformer3DModel", 2), ("FluxTransformer2DModel", 2), ("SD3Transformer2DModel", 4)]
)
def test_a_class_that_goes_sparse(name, sparse):
    one = measured(name)
    assert (one["sparse"], one["dense"], one["restored"], one["note"]) == (sparse, {}, True, "")
    assert one["equal_at_0"] < 1e-5
    assert classes.is_right(one)


def test_what_fails_says_why():
    def hangs(name):
        time.sleep(60)

    def dies(name):
        os._exit(1)

    def unknown(name):
        return torch.nn.Linear(2, 2).eval(), lambda: torch.ones(1)

    def missing(name):
        raise KeyError(name)

    assert measured("A", hangs, 0.2)["note"] == "not done after 0.2 seconds"
    assert measured("A", dies)["note"] == "its process died"
    assert measured("A", missing)["note"] == "not built: KeyError: 'A'"
    one = measured("A", unknown)
    assert (one["note"], one["sparse"], one["restored"]) == ("anywhere=True", 0, True)


def test_every_class_is_listed():
    names = classes_diffusers.names()
    assert len(names) > 60
    assert {"WanTransformer3DModel", "HunyuanDiT2DModel"} <= set(names)
