"""The processes that torchrun or `accelerate launch` has started, one model each: rank, device and what they exchange.

In: the environment that the launcher sets; this is the one place that reads it. A single process exchanges nothing.
Knows nothing of models.
"""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from baatt.lab.loading import find_device

#: Ranks of an evaluation finish hours apart when some have the long documents; ten minutes, the default, would end it.
PATIENCE = timedelta(days=2)


class Ranks:
    """This process among those of the run; joins a process group if the launcher has started more than one.

    Args:
        backend: through which they exchange. What an evaluation exchanges is small, so it goes through the CPUs (gloo)
            whatever the models run on; gradients go through "nccl".
    """

    def __init__(self, backend: str = "gloo") -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank, self._local_rank = 0, int(os.environ.get("LOCAL_RANK", "0"))
        self._group: dist.ProcessGroup | None = None
        patience = PATIENCE if backend == "gloo" else None
        if self.size == 1:
            return
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=patience)
        elif dist.get_backend() != backend:
            self._group = dist.new_group(backend=backend, timeout=patience)
        self.rank = dist.get_rank()

    def device(self, name: str | None) -> torch.device:
        """The device of this process.

        Args:
            name: what was asked for; None takes a GPU if there is one. With several processes a GPU is the one of this
                process's local rank, whatever its number.

        Raises:
            ValueError: no device of that name, or no GPU where one is named.
        """
        device = find_device(name)
        if device.type == "cuda" and self.size > 1:
            device = torch.device("cuda", self._local_rank)
            torch.cuda.set_device(device)
        return device

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape, joined along the first axis; numbers become a row."""
        if self.size == 1:
            return tensor
        row = (tensor[None] if tensor.dim() == 0 else tensor).cpu().contiguous()
        parts = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(parts, row, group=self._group)
        return torch.cat(parts).to(tensor.device)

    def gather_object(self, item: Any, destination: int = 0) -> list[Any] | None:
        """What every rank has, on one of them; None on the others."""
        if self.size == 1:
            return [item]
        items = [None] * self.size if self.rank == destination else None
        dist.gather_object(item, items, dst=destination, group=self._group)
        return items

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier(group=self._group)


def leave_process_group() -> None:
    """End the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
