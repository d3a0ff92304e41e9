"""What the ranks of a training run share: gradients averaged, clock and stage those of the first.

In: `baatt.lab.ranks.Ranks`, of one process where torchrun has started no others. Knows no model.
"""

import torch
from torch import Tensor

from baatt.lab.ranks import Ranks


def average_gradients(ranks: Ranks, parameters: list[Tensor]) -> None:
    """Replace every gradient by its mean over the ranks; all of them in one message."""
    if ranks.size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(joined)
    parts = (joined / ranks.size).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def agree(ranks: Ranks, values: list[float], device: torch.device) -> list[float]:
    """The numbers of the first rank, in all."""
    if ranks.size == 1:
        return values
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.broadcast(shared, 0)
    return shared.tolist()


def add_up(ranks: Ranks, counts: Tensor) -> Tensor:
    """Sums over the ranks, in place."""
    if ranks.size > 1:
        torch.distributed.all_reduce(counts)
    return counts
