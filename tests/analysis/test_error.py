"""Errors of an output against dense attention."""

import pytest
import torch

from baatt.analysis.error import output_error


def test_errors():
    dense = torch.tensor([[[[3.0, 4.0], [0.0, 0.0]]]])
    assert output_error(dense, dense) == pytest.approx((0, 0, 1))
    found = torch.tensor([[[[3.0, -4.0], [0.0, 0.0]]]])
    assert output_error(found, dense) == pytest.approx((8 / 7, 8 / 5, (-7 / 25 + 1) / 2))
    with pytest.raises(ValueError, match="found must have the shape"):
        output_error(found[..., :1], dense)
    with pytest.raises(ValueError, match="must not be zero everywhere"):
        output_error(found, torch.zeros_like(dense))
