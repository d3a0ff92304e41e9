"""Sparse attention over a sequence that is spread over processes: `torchrun --nproc-per-node 2 examples/ulysses.py`.

One GPU a process where there are enough, else gloo on the CPU. Every process holds a part of the tokens; 1001 of them
do not divide, so they are padded and the padding is masked.
"""

import os
from functools import partial

import torch
import torch.distributed as dist

from baatt import BAAttConfig, ba_attention
from baatt.distributed import ulysses_attention

if "RANK" not in os.environ:
    raise SystemExit("run it as: torchrun --nproc-per-node 2 examples/ulysses.py")
rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)

# One layer of 8 query heads and 2 key heads, the same on every process, so that there is something to compare with.
tokens = 1001
length = -(-tokens // size) * size
generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, heads, length, 64, generator=generator).to(device, torch.bfloat16) for heads in (8, 2, 2))
mask = (torch.arange(length, device=device) < tokens)[None]

attention = partial(ba_attention, config=BAAttConfig(block_size=64, sparsity=0.5))
mine = [x.chunk(size, dim=2)[rank] for x in (q, k, v)]
out = ulysses_attention(attention, *mine, key_mask=mask.chunk(size, dim=1)[rank])

difference = (out - attention(q, k, v, key_mask=mask).chunk(size, dim=2)[rank]).abs().max()
dist.all_reduce(difference, dist.ReduceOp.MAX)
if rank == 0:
    print(f"{size} processes on {device.type}, largest difference to one process: {float(difference)}")
dist.destroy_process_group()
