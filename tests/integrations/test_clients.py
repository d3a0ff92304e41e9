"""Every client under its own loop: sparse where its structure allows, equal to dense when all blocks are kept."""

import warnings

import pytest
import torch

import baatt
from baatt import BAAttConfig, Policy
from baatt.integrations.handle import NoSparseAttentionWarning

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("diffusers")
from tests.integrations.clients import CLIENTS, build

ALL_BLOCKS = BAAttConfig(block_size=16, sparsity=0.0)
HALF = BAAttConfig(block_size=16, sparsity=0.5)
ROWS = "a decoding step of one query"
FEW = "too few queries over more keys to be worth it"
WINDOW = "a sliding window"
#: Client -> sparse calls of its run, and why the others are dense.
EXPECTED = {
    "Llama, SmolLM2": (2, {ROWS: 14}),
    "Qwen2": (2, {ROWS: 14}),
    "Qwen3, static cache": (2, {ROWS: 14}),
    "Gemma3": (1, {ROWS: 14, WINDOW: 1}),
    "LLaDA2": (2 * 3 * 4, {}),
    "SDAR": (3, {FEW: 3 * 4 * 3}),
    "Fast-dLLM v2": (3, {FEW: 3 * 4 * 3}),
    "A2D": (2 * 4, {}),
    "BD3LM": (2 * 2, {FEW: 2 * 2 * 4}),
    "DiffusionGemma": (1, {FEW: 9, WINDOW: 2}),
    "SkyReels-V2 diffusion forcing": (2, {}),
    "LLaDA": (3 * 4, {}),
    "Dream": (3 * 4, {}),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_a_run_of_each_client(name):
    client = build(name)
    dense = client.run()
    with baatt.enable(client.model, ALL_BLOCKS) as handle, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoSparseAttentionWarning)
        torch.testing.assert_close(client.run(), dense)
    assert (handle.sparse_calls, handle.reasons) == EXPECTED[name]
    told = [str(one.message) for one in caught if one.category is NoSparseAttentionWarning]
    assert len(told) == (FEW in handle.reasons)  # once for all the passes of a block over its cache
    assert all(FEW in text for text in told)
    assert handle.sparsity == 0
    with baatt.enable(client.model, HALF) as handle:
        client.run()
    assert handle.sparsity > 0
    assert torch.equal(client.run(), dense)


@pytest.mark.parametrize("name", ["BD3LM", "Fast-dLLM v2", "DiffusionGemma", "SDAR"])
def test_blocks_over_a_cache_may_be_sparse_too(name):
    client = build(name)
    dense = client.run()
    with baatt.enable(client.model, ALL_BLOCKS, Policy(min_queries=0)) as handle:
        torch.testing.assert_close(client.run(), dense)
    sparse, reasons = EXPECTED[name]
    assert handle.sparse_calls == sparse + reasons[FEW]


def test_an_order_of_tiles_does_not_go_with_frames_that_look_back():
    client = build("SkyReels-V2 diffusion forcing")
    dense = client.run()
    order = baatt.integrations.video.VideoTiles()
    reason = "an order of tokens, which a causal mask does not allow"
    with baatt.enable(client.model, HALF, order=order) as handle, pytest.warns(NoSparseAttentionWarning, match=reason):
        assert torch.equal(client.run(), dense)
    assert handle.reasons == {reason: 2}
