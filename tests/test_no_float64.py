"""Devices without float64, such as MPS and XPU, played by the CPU: the same blocks are kept without it."""

import dataclasses

import pytest
import torch

from baatt import BAAttConfig, ba_attention, make_plan, types
from baatt.config import Policy
from baatt.integrations.handle import Handle
from baatt.lab.recall import output_error
from baatt.lab.statistics import pearson
from baatt.sampling import SamplerConfig, generate
from baatt.scores import SCORES
from tests.test_sampling import make_model, make_prompt


@pytest.fixture
def narrow(monkeypatch):
    """From its call on, no tensor can be made float64."""

    def refuse(*_: object) -> None:
        raise TypeError("this device has no float64")

    def start() -> None:
        monkeypatch.setattr(types, "FLOAT64_DEVICES", ())
        monkeypatch.setattr(torch.Tensor, "double", refuse)

    return start


@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize("causal", [None, 16])
def test_operator(narrow, score, causal):
    q, k, v = torch.randn(3, 2, 2, 200, 16).unbind()
    mask = torch.rand(2, 200) > 0.3
    config = BAAttConfig(block_size=16, segment=64, sort="none" if causal else "qk", score=score)
    given = {"causal": causal, "key_mask": mask, "impl": "reference"}
    configs = [dataclasses.replace(config, sparsity=sparsity) for sparsity in (0.0, 0.3, 0.5, 0.7, 0.75, 0.9, 0.99)]
    plans = [make_plan(q, k, one, **given) for one in configs]
    expected = ba_attention(q, k, v, config, **given)
    narrow()
    for one, plan in zip(configs, plans, strict=True):
        actual = make_plan(q, k, one, **given).selection
        assert torch.equal(actual.count, plan.selection.count)
        assert torch.equal(actual.index, plan.selection.index)
    assert torch.equal(ba_attention(q, k, v, config, **given), expected)


def test_sampler_and_measures(narrow):
    model, prompt = make_model().float(), make_prompt(2, 5)
    config = SamplerConfig(steps=4, gen_length=8, block_length=4, cfg_scale=1.0)
    one, other = torch.randn(2, 1, 2, 8, 4).unbind()
    expected = generate(model, prompt, None, config).tokens, output_error(one, other), pearson(one, other)
    narrow()
    assert torch.equal(generate(model, prompt, None, config).tokens, expected[0])
    assert output_error(one, other) == pytest.approx(expected[1])
    assert pearson(one, other) == pytest.approx(expected[2])


def test_calls_on_devices_without_kernels_stay_dense():
    """The reference would run there, but slower than dense attention."""
    q, k, v = torch.empty(3, 1, 2, 256, 16, device="meta").unbind()
    handle = Handle(BAAttConfig(block_size=16), Policy(min_length=0, min_queries=0))
    assert handle.attention(q, k, v, layer=None).is_meta
    assert (handle.sparse_calls, handle.dense_calls) == (0, 1)
    assert "no kernel for torch.float32 with D=16 on this device" in str(handle.reasons)
