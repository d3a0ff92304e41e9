"""Sizes of launches, in plain Python: Triton's own functions take 5 us a call, and a plan asks twenty times."""


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not less, of a positive number."""
    return 1 << (number - 1).bit_length()
