"""What `measure_layers` says of inputs whose answer is known."""

import pytest
import torch

from baatt.lab.capture import Capture, Heads
from baatt.lab.layers import measure_layers
from tests.settings import sorted_config

TOKENS, CHANNELS = 256, 16


def measure(q, k, **dials):
    capture = Capture({3: Heads(q, k, k)}, CHANNELS**-0.5, {})
    (record,) = measure_layers(capture, [sorted_config(block_size=16, **dials)])
    return record


def test_uniform_attention_spreads_over_nine_tenths_of_the_blocks():
    q, k = torch.zeros(1, 2, TOKENS, CHANNELS), torch.ones(1, 1, TOKENS, CHANNELS)
    found = measure(q + 1, k, sort="none", segment=None)
    assert found["layer"] == 3
    assert found["key_norm_variation"] == pytest.approx(0, abs=1e-6)
    assert found["key_radius"] == pytest.approx(0, abs=1e-5)
    assert found["blocks_for_most"] == 15 / 16  # 14 blocks hold 0.875
    assert found["on_diagonal"] == pytest.approx((14 * 3 + 2 * 2) / 16 / 16, abs=1e-5)


def test_sorting_parts_neighbours():
    # Blocks of neighbours that attend to one another, with norms that have nothing to do with place.
    generator = torch.Generator().manual_seed(0)
    blocks = torch.nn.functional.one_hot(torch.arange(TOKENS) // 16, CHANNELS).float()
    norms = 20 + 10 * torch.rand(TOKENS, 1, generator=generator)
    x = (blocks * norms)[None, None]
    unsorted, by_norm = (measure(x, x, sort=sort, segment=None) for sort in ("none", "qk"))
    assert unsorted["on_diagonal"] > 0.99
    assert by_norm["on_diagonal"] < 0.5
    assert unsorted["blocks_for_most"] == 1 / 16
    assert by_norm["blocks_for_most"] > 2 / 16
    assert unsorted["key_norm_variation"] == by_norm["key_norm_variation"]
    assert unsorted["key_radius"] < by_norm["key_radius"]


def test_sorting_narrows_blocks_where_only_norms_differ():
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(TOKENS, 1, generator=generator) * torch.ones(CHANNELS))[None, None]
    assert (
        measure(x, x, sort="k", segment=None)["key_radius"]
        < 0.2 * measure(x, x, sort="none", segment=None)["key_radius"]
    )
