"""What `measure_keys` says of inputs whose answer is known."""

import pytest
import torch

from baatt.config import BAAttConfig
from baatt.lab.capture import Capture, Heads
from baatt.lab.keys import correlation, measure_keys, received_attention
from baatt.stages.dense import dense_attention

TOKENS, CHANNELS = 700, 16


def measure(q, k):
    (record,) = measure_keys(Capture({3: Heads(q, k, k)}, CHANNELS**-0.5, {}), [BAAttConfig(block_size=64)])
    return record


def test_what_keys_get_is_the_mean_of_the_rows_of_attention():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, TOKENS, CHANNELS, generator=generator)
    k = torch.randn(1, 2, 90, CHANNELS, generator=generator)
    ones = torch.eye(90).expand(1, 2, 90, 90)  # values that tell the keys apart
    expected = dense_attention(q, k, ones, scale=0.5).mean(dim=2)
    assert torch.allclose(received_attention(q, k, 0.5), expected, atol=1e-6)


def test_uniform_attention_has_no_sink():
    q, k = torch.zeros(1, 4, TOKENS, CHANNELS), torch.ones(1, 2, TOKENS, CHANNELS)
    found = measure(q, k)
    assert (found["layer"], found["block_size"]) == (3, 64)
    assert found["on_heaviest"] == pytest.approx(1 / TOKENS)
    assert found["on_first_block"] == pytest.approx(64 / TOKENS)
    assert found["on_few"] == pytest.approx(7 / TOKENS)
    assert found["key_norm_variation"] == pytest.approx(0, abs=1e-6)
    assert found["norm_correlation"] == 0


def test_a_short_key_that_all_look_at_is_a_sink_of_its_heads():
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(1, 2, TOKENS, CHANNELS, generator=generator)
    k[..., 0] = 0
    k = torch.nn.functional.normalize(k, dim=-1)
    k[:, :1, 7] = 0.5 * torch.eye(CHANNELS)[0]  # of the first group alone
    q = 80 * torch.eye(CHANNELS)[0].expand(1, 4, TOKENS, CHANNELS)
    found = measure(q, k)
    assert found["heaviest_key"] == 7
    assert found["heads_on_heaviest"] == 0.5
    assert found["on_heaviest"] > 0.4
    assert found["on_first_block"] > 0.4
    assert found["heaviest_norm"] == pytest.approx(0.75, abs=0.01)
    assert found["norm_correlation"] < -0.4  # -1 in the heads of the sink, 0 in the others


def test_correlation_is_that_of_numpy_and_0_of_a_constant():
    x, y = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(2))
    x[2] = 1
    expected = torch.stack([*(torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(x[:2], y, strict=False))])
    assert torch.allclose(correlation(x, y)[:2], expected, atol=1e-6)
    assert correlation(x, y)[2] == 0
