"""The user's default device and default dtype change nothing: every tensor is made where its inputs are.

The device that the tests set as the default, "meta", has no values: a tensor made there by mistake cannot be used.
"""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import baatt
from baatt import BAAttConfig, ba_attention
from baatt.config import Policy
from baatt.integrations.masks import MaskReader
from baatt.integrations.sdpa import sparse_sdpa
from baatt.integrations.video import VideoTiles
from baatt.kernels import cpu_native
from baatt.lab.likelihood import draw_masks
from baatt.lab.prompts import pad_left
from baatt.models import MaskedDiffusionLM
from baatt.sampling import SamplerConfig, generate
from baatt.scores import SCORES
from tests.test_sampling import make_model, make_prompt

PACKAGE = Path(baatt.__file__).parent
MAKERS = (
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"),
    *("scalar_tensor", "tensor", "zeros"),
)


@pytest.fixture(params=["device", "dtype"])
def unusual(request):
    """Sets another default device or dtype, as a program around the library may."""

    def change() -> None:
        if request.param == "device":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.bfloat16)

    yield change
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def test_every_tensor_names_its_device():
    """But for parameters of modules, which whoever makes the module places."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        parameters = [x for x in ast.walk(tree) if isinstance(x, ast.Call) and ast.unparse(x.func) == "nn.Parameter"]
        placed = {id(x) for call in parameters for x in ast.walk(call)}
        for call in (x for x in ast.walk(tree) if isinstance(x, ast.Call) and id(x) not in placed):
            maker, _, name = ast.unparse(call.func).rpartition(".")
            keywords = {word.arg for word in call.keywords}
            if maker == "torch" and name in MAKERS and not keywords & {"device", None}:
                found.append(f"{path.name}:{call.lineno}")
    assert found == []


@pytest.mark.parametrize("impl", ["reference", "cpu", "gather"])
@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize("causal", [None, 16])
def test_operator(impl, score, causal, unusual, monkeypatch):
    if impl == "gather":
        monkeypatch.setattr(cpu_native, "library", lambda: None)
        impl = "cpu"
    sort = "none" if causal else "qk"
    config = BAAttConfig(block_size=16, segment=64, sparsity=0.5, score=score, sort=sort)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 96, 16, generator=generator) for _ in range(3))
    mask = torch.rand(2, 96, generator=generator) > 0.2
    given = {"causal": causal, "key_mask": mask, "query_mask": mask, "impl": impl}
    for budget in ("row", "head") if score == "clusters" else (config.budget,):
        one = dataclasses.replace(config, budget=budget)
        expected = ba_attention(q, k, v, one, **given)
        unusual()
        assert torch.equal(ba_attention(q, k, v, one, **given), expected)
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_adapters(unusual):
    q, k, v = (torch.randn(1, 2, 128, 16) for _ in range(3))
    mask = torch.ones(128, 128, dtype=torch.bool).tril()[None, None]
    order = VideoTiles((2, 2, 2), grid=(4, 4, 4))
    structure, permutation = MaskReader()(mask, 1, 128), order(70, q.device)

    def attend():
        with sparse_sdpa(BAAttConfig(block_size=16), policy=Policy(min_length=0, min_queries=0)) as handle:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert handle.sparse_calls == 1
        return out

    expected = attend()
    unusual()
    assert torch.equal(attend(), expected)
    assert MaskReader()(mask, 1, 128) == structure
    assert torch.equal(order(70, torch.device("cpu")), permutation)


def test_models_and_samplers(unusual, tmp_path):
    model, prompt = make_model().float(), make_prompt(2, 5)
    model.save_pretrained(tmp_path, dtype=None)
    config = SamplerConfig(steps=4, gen_length=8, block_length=4, temperature=0.5, cfg_scale=1.0, cache="dual")
    expected, rows = generate(model, prompt, None, config).tokens, pad_left([[1], [2, 3]], 0)
    masks = draw_masks(5, 4, torch.Generator().manual_seed(0))
    unusual()
    stored = MaskedDiffusionLM.from_pretrained(tmp_path)
    assert torch.equal(generate(stored, prompt, None, config).tokens, expected)
    assert all(torch.equal(x, y) for x, y in zip(pad_left([[1], [2, 3]], 0), rows, strict=True))
    again = draw_masks(5, 4, torch.Generator("cpu").manual_seed(0))
    assert all(torch.equal(x, y) for x, y in zip(again, masks, strict=True))
