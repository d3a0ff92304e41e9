"""Block-sparse attention of other libraries over our lists: FlashAttention-4, cudnn-frontend, FlashInfer and VSA.

In: sorted q [B, H, N, D], k and v [B, G, N, D], and a bidirectional plan. Out: a function to be timed that gives
[B, H, N, D] in sorted order, or `RefusedError`. The packages are optional; each takes the lists in a layout of its own,
which is made beforehand and not timed. The functions that make the layouts run everywhere.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from baatt.lab.bench.case import RefusedError
from baatt.plan import Plan

BLOCK, HALF = 128, 64
#: Key blocks of 64 that FlashInfer's kernel takes at most for a query block.
FLASHINFER_MOST = 64

#: Their kernels, of the CUTLASS DSL, end in illegal memory accesses where a CUDA graph that holds them is replayed.
NO_GRAPH = frozenset({"fa4", "fa4-dense", "cudnn-bsa"})

#: (q, k, v, plan) -> what is timed
Peer = Callable[[Tensor, Tensor, Tensor, Plan], Callable[[], Tensor]]


def half_lists(plan: Plan) -> tuple[Tensor, Tensor]:
    """Lists of key blocks of 64 for query blocks of 64: index [B, H, 2I, 2K] int32 ascending, -1 behind the last."""
    index, count = plan.selection[:2]
    halves = rearrange(torch.stack((2 * index, 2 * index + 1), dim=-1), "b h i k two -> b h i (k two)")
    used = torch.arange(halves.shape[-1], device=index.device) < rearrange(2 * count, "b h i -> b h i 1")
    halves = torch.where(used, halves, -1).int()
    return repeat(halves, "b h i k -> b h (i two) k", two=2).contiguous(), repeat(
        2 * count, "b h i -> b h (i two)", two=2
    )


def half_table(plan: Plan, keys: int) -> Tensor:
    """Which key blocks of 64 a query block of 64 attends to, [B, H, 2I, 2J] bool."""
    index, count = plan.selection[:2]
    blocks = -(-keys // BLOCK)
    used = torch.arange(index.shape[-1], device=index.device) < rearrange(count, "b h i -> b h i 1")
    table = torch.zeros(*count.shape, blocks + 1, dtype=torch.bool, device=index.device)
    table.scatter_(-1, torch.where(used, index, blocks).long(), True)
    return repeat(table[..., :blocks], "b h i j -> b h (i two) (j four)", two=2, four=2)


def flash_lists(plan: Plan) -> dict[str, Any]:
    """FlashAttention-4's: kept blocks are full ones, and no block is masked inside."""
    index, count = plan.selection[:2]
    nothing = torch.zeros_like(count)
    return {
        "mask_block_cnt": nothing, "mask_block_idx": rearrange(nothing, "b h i -> b h i 1"),
        "full_block_cnt": count.int().contiguous(), "full_block_idx": index.int().contiguous(),
        "block_size": (BLOCK, BLOCK),
    }  # fmt: skip


def cudnn_lists(plan: Plan) -> dict[str, Any]:
    """cudnn-frontend's: one number for lists that are equally long, which is its faster way, else one a list."""
    index, count = plan.selection[:2]
    slots = index.shape[-1]
    is_fixed = bool((count == slots).all())
    lengths = {"block_sparse_num": slots} if is_fixed else {"q2k_block_nums": count.int().contiguous()}
    return {"q2k_block_index": index.int().contiguous(), **lengths}


def _flash_4(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Callable[[], Tensor]:
    cute = _package("flash_attn.cute", "flash-attn-4")
    sparsity = _package("flash_attn.cute.block_sparsity", "flash-attn-4")
    return _of_flash_4(cute, q, k, v, plan, block_sparse_tensors=sparsity.BlockSparseTensorsTorch(**flash_lists(plan)))


def _flash_4_dense(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Callable[[], Tensor]:
    return _of_flash_4(_package("flash_attn.cute", "flash-attn-4"), q, k, v, plan)


def _of_flash_4(cute: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, **lists: Any) -> Callable[[], Tensor]:
    sides = (rearrange(x, "b h n d -> b n h d").contiguous() for x in (q, k, v))
    call = functools.partial(cute.flash_attn_func, *sides, softmax_scale=plan.scale, **lists)

    def function() -> Tensor:
        out: Tensor = call()[0]  # the log-sum-exp comes second
        return rearrange(out, "b n h d -> b h n d")

    return function


def _cudnn(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Callable[[], Tensor]:
    api = _package("cudnn.block_sparse_attention.api", "nvidia-cudnn-frontend")
    # Of itself it would take blocks of 64 on Hopper.
    options = {"sparse_block_size": BLOCK, "softmax_scale": plan.scale, "layout": "bhsd", **cudnn_lists(plan)}
    call = functools.partial(api.block_sparse_attention_forward, q, k, v, **options)

    def function() -> Tensor:
        out: Tensor = call()["o_tensor"]
        return out

    return function


def _flashinfer(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Callable[[], Tensor]:
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        raise RefusedError(f"it takes B 1 and as many heads of keys as of queries, got B {q.shape[0]}, H {q.shape[1]}")
    if 2 * int(plan.selection.count.max()) > FLASHINFER_MOST:
        longest = 2 * int(plan.selection.count.max())
        raise RefusedError(f"it takes at most {FLASHINFER_MOST} key blocks of {HALF} a query block, got {longest}")
    sparse = _package("flashinfer.sparse", "flashinfer-python")
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=q.device)
    wrapper = sparse.VariableBlockSparseAttentionWrapper(workspace, backend="cake")
    table = half_table(plan, k.shape[2])[0]
    rows, columns = (torch.full(table[..., 0].shape, HALF, dtype=torch.int32, device=q.device),
                     torch.full(table[:, 0].shape, HALF, dtype=torch.int32, device=q.device))  # fmt: skip
    heads, _, channels = q.shape[1:]
    wrapper.plan(table, rows, columns, heads, heads, channels, sm_scale=plan.scale, q_data_type=q.dtype)
    call = functools.partial(wrapper.run, *(x[0].contiguous() for x in (q, k, v)))
    return lambda: rearrange(call(), "h n d -> 1 h n d")


def _vsa(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Callable[[], Tensor]:
    kernel = _package("vsa_cuda", "vsa").block_sparse_fwd
    index, count = half_lists(plan)
    sizes = torch.full((k.shape[2] // HALF,), HALF, dtype=torch.int32, device=q.device)
    # Its lists are as long as there are key blocks.
    full = index.new_full((*index.shape[:3], len(sizes)), -1)
    full[..., : index.shape[-1]] = index
    call = functools.partial(kernel, q, k, v, full, count.int().contiguous(), sizes)

    def function() -> Tensor:
        out: Tensor = call()[0]
        return out

    return function


def _package(module: str, package: str) -> Any:
    """An optional package, or the reason why it is not there."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # compiled parts fail as they like
        reason = next((line.strip()[:150] for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RefusedError(f"it needs the package {package}: {reason}") from error


def prepare_peer(name: str, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Callable[[], Tensor]:
    """The function of a peer over sorted tensors.

    Raises:
        RefusedError: what all of them refuse, or this one does.
    """
    if plan.sight is not None:
        raise RefusedError("its lists hold whole blocks here")
    if plan.config.block_size != BLOCK or q.shape[2] % BLOCK or k.shape[2] % BLOCK:
        raise RefusedError(
            f"it takes whole blocks of {BLOCK} tokens here, got {q.shape[2]} in blocks of {plan.config.block_size}"
        )
    return PEERS[name](q.contiguous(), k.contiguous(), v.contiguous(), plan)


#: name -> block-sparse attention of another library; `fa4-dense` keeps every block
PEERS: dict[str, Peer] = {
    "fa4": _flash_4,
    "fa4-dense": _flash_4_dense,
    "cudnn-bsa": _cudnn,
    "flashinfer": _flashinfer,
    "vsa": _vsa,
}
