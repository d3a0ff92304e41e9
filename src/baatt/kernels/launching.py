"""What every launch shares: which arguments are mere sizes, and sizes of grids in plain Python.

Triton's own functions for the latter take 5 us a call, and a plan asks twenty times.
"""

#: Arguments of kernels that count something, for `do_not_specialize`: else Triton compiles a kernel once more for each
#: of them that is 1 or a multiple of 16, dozens of times as lengths change from call to call. Strides are not among
#: them: of rows that begin at multiples of 16 bytes it loads 16 bytes at a time. Steps are strides in a known unit.
SIZES = (
    "all_heads", "capacity", "causal", "digit", "first_block", "first_head", "first_tile", "groups", "head_tiles",
    "heads", "k_step_batch", "k_step_head", "key_blocks", "key_order_batch", "key_order_head", "key_programs",
    "key_segment", "key_tokens", "keys", "last_tile", "order_batch", "order_head", "queries", "query_blocks",
    "query_order_batch", "query_order_head", "query_programs", "query_segment", "query_start", "query_tokens",
    "repeats", "rows", "runs", "slab_blocks", "slab_rows", "slots", "start", "steps", "stride_spans", "tiles",
    "tokens", "v_step_batch", "v_step_head", "window",
)  # fmt: skip


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not less, of a positive number."""
    return 1 << (number - 1).bit_length()
