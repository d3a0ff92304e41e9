"""The processes of a training run: gradients averaged, clock and stage those of the first.

In: what torchrun has put into the environment. Out: a `Team`, of one process where there is none. Knows no model.
"""

import os

import torch
from torch import Tensor


class Team:
    """The processes that torchrun has started, or this one alone."""

    def __init__(self, device: str) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if device == "cuda" and self.size > 1:
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(self.device)
        if self.size > 1:
            torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")

    def average_gradients(self, parameters: list[Tensor]) -> None:
        """Replace every gradient by its mean over the processes; all of them in one message."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        joined = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(joined)
        parts = (joined / self.size).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def agree(self, values: list[float]) -> list[float]:
        """The numbers of the first process, in all."""
        if self.size == 1:
            return values
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(shared, 0)
        return shared.tolist()

    def add_up(self, counts: Tensor) -> Tensor:
        """Sums over the processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(counts)
        return counts

    def leave(self) -> None:
        if self.size > 1:
            torch.distributed.destroy_process_group()
