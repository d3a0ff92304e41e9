"""The operator under torch.compile: one graph, the same values, the same refusals."""

import pytest
import torch

from baatt import BAAttConfig, ba_attention
from baatt.operators import attention


def inputs(tokens=70):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, tokens, 32, generator=generator)
    k, v = (torch.randn(2, 2, tokens, 32, generator=generator) for _ in range(2))
    return q, k, v, torch.rand(2, tokens, generator=generator) > 0.2


def test_full_graph_gives_the_same_values():
    q, k, v, mask = inputs()

    def function(q, k, v, mask):
        config = BAAttConfig(block_size=16, segment=64, sparsity=0.6)  # made while it is traced
        return ba_attention(q * 1.0, k, v, config, key_mask=mask) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v, mask), function(q, k, v, mask))


def test_registration_is_sound():
    q, k, v, mask = inputs(33)
    arguments = (q, k, v, 4, None, mask, mask, None, "cpu", *BAAttConfig(16, 0.5).values)
    torch.library.opcheck(attention, arguments)


def test_refusals_pass_through():
    q, k, v, _ = inputs(33)
    with pytest.raises(ValueError, match="value must have the shape of key"):
        attention(q, k, v[:, :, :5], None, None, None, None, None, "auto", *BAAttConfig(16, 0.5, "qk", 32).values)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"causal": True}, "causal must be an int or None, got True"),
        ({"causal": 1, "query_start": True}, "query_start must be an int or None, got True"),
        ({"scale": True}, "scale must be a number or None, got bool"),
        ({"config": None}, "config must be a BAAttConfig, got NoneType"),
    ],
)
def test_a_graph_refuses_what_is_refused_outside(options, text):
    q, k, v, _ = inputs(33)
    compiled = torch.compile(lambda q, k, v: ba_attention(q, k, v, **options), backend="eager")
    with pytest.raises(TypeError, match=text):
        compiled(q, k, v)
