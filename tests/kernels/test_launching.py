"""Sizes of launches are what Triton's own functions give."""

import pytest

from baatt.kernels import launching


def test_they_are_triton_s():
    triton = pytest.importorskip("triton")
    for number in [*range(1, 40), 1023, 1024, 1025, 2**31 - 1, 2**31 + 1]:
        assert launching.next_power_of_2(number) == triton.next_power_of_2(number)
        for divisor in (1, 3, 16, 128):
            assert launching.cdiv(number, divisor) == triton.cdiv(number, divisor)
    assert launching.cdiv(0, 16) == 0
