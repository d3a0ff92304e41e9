"""How far an attention output is from dense attention: relative L1, relative L2, cosine, of one layer.

In: two outputs of one shape. Out: an `OutputError`. Screens only: what counts is the accuracy on a task.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class OutputError(NamedTuple):
    """relative_l1: sum |x - y| / sum |y|; relative_l2: of the norms; cosine: mean over the rows, 1 = same direction."""

    relative_l1: float
    relative_l2: float
    cosine: float


def output_error(found: Tensor, dense: Tensor) -> OutputError:
    """Error of `found` against `dense`, both [B, H, N, D].

    Raises:
        ValueError: different shapes, or a dense output of zeros only.
    """
    if found.shape != dense.shape:
        raise ValueError(f"found must have the shape of dense, {tuple(dense.shape)}, got {tuple(found.shape)}")
    found, dense = found.double(), dense.double()
    if not dense.any():
        raise ValueError("dense must not be zero everywhere")
    apart = found - dense
    # A row of zeros has no direction; where both are zero they agree.
    cosine = torch.nn.functional.cosine_similarity(found, dense, dim=-1)
    cosine = torch.where(~found.any(-1) & ~dense.any(-1), 1.0, cosine)
    return OutputError(
        float(apart.abs().sum() / dense.abs().sum()), float(apart.norm() / dense.norm()), float(cosine.mean())
    )
