"""The error budget every comparison of a kernel uses (rule 14 of docs/design.md): no hand-tuned tolerance anywhere."""

import numpy
import torch
from torch import Tensor


def eager_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute the eager result in: there is nothing more exact than float64 to judge eager float64 by."""
    return torch.float32 if dtype == torch.float64 else dtype


def assert_within_budget(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The error of `actual` is at most twice that of eager PyTorch in the same dtype, plus one rounding.

    Args:
        actual: what the code under test computed.
        eager: plain PyTorch in `eager_dtype(actual.dtype)`; for float64 its error counts scaled to float64's rounding.
        exact: float64, computed from the same inputs.
    """
    assert actual.shape == exact.shape == eager.shape
    assert eager.dtype == eager_dtype(actual.dtype)
    assert exact.dtype == torch.float64
    assert torch.isfinite(exact).all()
    assert torch.isfinite(actual).all(), "not finite where the exact result is"
    epsilon = torch.finfo(actual.dtype).eps
    eager_error = (eager.double() - exact).abs().max() * epsilon / torch.finfo(eager.dtype).eps
    limit = 2 * eager_error + epsilon * exact.abs().max()
    error = (actual.double() - exact).abs().max()
    assert error <= limit, f"error {error:.3e} exceeds the budget {limit:.3e}"


def assert_float64_within_budget(
    actual: Tensor, eager: Tensor, exact: "numpy.typing.NDArray[numpy.longdouble]"
) -> None:
    """The same budget for float64, against something more exact: x86's 80-bit numbers of the same shape."""
    assert actual.dtype == eager.dtype == torch.float64
    assert actual.shape == exact.shape == eager.shape
    assert torch.isfinite(actual).all()
    epsilon = torch.finfo(torch.float64).eps
    error, eager_error = (float(abs(x.numpy().astype(numpy.longdouble) - exact).max()) for x in (actual, eager))
    limit = 2 * eager_error + epsilon * float(abs(exact).max())
    assert error <= limit, f"error {error:.3e} exceeds the budget {limit:.3e}"
