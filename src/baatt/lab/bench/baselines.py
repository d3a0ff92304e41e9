"""What the operator is compared with: dense attention in three ways, FlexAttention with our own plan, and itself.

In: q, k, v and the plan. Out: a function to be timed, or `RefusedError` with the reason. FlexAttention gets q, k and v
that are sorted already and a block mask that is ready: neither its sorting nor its selection is counted, which favours
it. It is compiled as PyTorch does by default, without autotuning. What begins with `xattention` chooses blocks as
XAttention does, with our kernel for its score, and attends with ours or, over lists that are ready, a peer's kernel.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from baatt.attention import ba_attention, make_plan
from baatt.lab.bench.case import Case, Inputs, RefusedError
from baatt.lab.bench.peers import PEERS, prepare_peer
from baatt.lab.bench.verification import VerificationError, require_verified, verify
from baatt.plan import Plan
from baatt.types import Sight, TokenOrder


class Baseline(NamedTuple):
    """prepare: what is timed, or raises the reason why not; only_half: it needs a GPU and bfloat16 or float16."""

    prepare: Callable[[Inputs, Plan], Callable[[], Any]]
    only_half: bool = False

    def refusal(self, device: str, dtype: torch.dtype) -> str | None:
        """Why it cannot run on a type of device, known without running it; None where nothing speaks against it."""
        if self.only_half and device != "cuda":
            return f"it needs a GPU, got device {device!r}"
        if self.only_half and dtype not in (torch.bfloat16, torch.float16):
            return f"it needs bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
        return None


def prepare_baseline(name: str, inputs: Inputs, plan: Plan) -> Callable[[], Any]:
    """The function of a baseline, which ran once.

    Raises:
        RefusedError: it cannot run, with the reason.
    """
    baseline = BASELINES[name]
    if reason := baseline.refusal(inputs.q.device.type, inputs.q.dtype):
        raise RefusedError(reason)
    try:
        function = baseline.prepare(inputs, plan)
        function()
    except RefusedError:
        raise
    except VerificationError as error:
        raise RefusedError(str(error)) from error
    except Exception as error:  # kernels and compilers raise whatever they like, and that is the reason
        raise RefusedError(f"{type(error).__name__}: {first_line(error)}") from error
    return function


def static_refusals(case: Case) -> dict[str, str]:
    """Baselines that are known not to run, without running anything."""
    reasons = ((name, BASELINES[name].refusal(case.device.type, case.dtype)) for name in case.against)
    return {name: reason for name, reason in reasons if reason is not None}


def first_line(error: Exception) -> str:
    """A message of many lines, shortened to the first that says something."""
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), "no message")


def _prepare_plain_causal(inputs: Inputs, plan: Plan) -> Callable[[], Tensor]:
    if plan.sight is None:
        raise RefusedError("the operator is not causal here")
    return functools.partial(ba_attention, *inputs, plan.config, causal=1, scale=plan.scale)


def _prepare_row_budget(inputs: Inputs, plan: Plan) -> Callable[[], Tensor]:
    if plan.config.budget == "row":
        raise RefusedError("the budget of the operator is that of a row here")
    if plan.sight is not None:
        raise RefusedError("it stands beside the operator without a causal mask alone")
    return functools.partial(ba_attention, *inputs, dataclasses.replace(plan.config, budget="row"), scale=plan.scale)


def sort_tokens(x: Tensor, order: TokenOrder) -> Tensor:
    """x [B, H, N, D] in sorted order, contiguous."""
    return torch.take_along_dim(x, rearrange(order.index, "b h n -> b h n 1"), dim=2)


def _prepare_dense(inputs: Inputs, plan: Plan, *, masked: bool = True) -> Callable[[], Tensor]:
    """masked: it can take a mask [N, N], which blocks of several tokens need."""
    # Grouped heads as they are; the option refuses some backends, so it is given only where it is needed.
    options: dict[str, Any] = {"enable_gqa": True} if inputs.q.shape[1] != inputs.k.shape[1] else {}
    if plan.sight is not None:
        options |= _structure(plan.sight, masked=masked)
    return functools.partial(F.scaled_dot_product_attention, *inputs, scale=plan.scale, **options)


def _structure(sight: Sight, *, masked: bool) -> dict[str, Any]:
    """What `scaled_dot_product_attention` is told of N queries that see as many keys."""
    limit = rearrange(sight.limit[0], "i p -> (i p)")
    places = torch.arange(len(limit), device=limit.device)
    if bool((limit == torch.where(limit > 0, places + 1, 0)).all()):
        return {"is_causal": True}
    if not masked:
        raise RefusedError("it knows no causal blocks of several tokens")
    queries = int((limit > 0).sum())
    return {"attn_mask": places[:queries] < rearrange(limit[:queries], "n -> n 1")}


def _prepare_with(backend: str, inputs: Inputs, plan: Plan) -> Callable[[], Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, backend))(_prepare_dense(inputs, plan, masked=False))


def _prepare_flex(inputs: Inputs, plan: Plan) -> Callable[[], Tensor]:
    if plan.sight is not None:
        raise RefusedError("its mask is made of whole blocks here")
    q = sort_tokens(inputs.q, plan.query_order)
    k, v = (sort_tokens(x, plan.key_order) for x in (inputs.k, inputs.v))
    options = {"block_mask": block_mask(plan, k.shape[2]), "scale": plan.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    # Past its limit of recompilations PyTorch would run the eager version; a whole graph or an error instead.
    torch.compiler.reset()
    return _verified("flex", functools.partial(compile_flex(), q, k, v, **options), inputs, plan)


def _prepare_peer(name: str, inputs: Inputs, plan: Plan) -> Callable[[], Tensor]:
    q = sort_tokens(inputs.q, plan.query_order)
    k, v = (sort_tokens(x, plan.key_order) for x in (inputs.k, inputs.v))
    function = prepare_peer(name, q, k, v, plan)
    return function if name == "fa4-dense" else _verified(name, function, inputs, plan)


def _prepare_xattention(name: str | None, inputs: Inputs, plan: Plan) -> Callable[[], Tensor]:
    """Choose by antidiagonals and attend, at the same sparsity; by a peer over a plan made once: its layout is free."""
    q, k, v = inputs
    if plan.sight is not None:
        raise RefusedError("it is bidirectional here")
    config = dataclasses.replace(plan.config, score="antidiagonal-8", sort="none", budget="row")
    chosen = make_plan(q, k, config, scale=plan.scale)
    if name is None:
        function = functools.partial(ba_attention, q, k, v, config, scale=plan.scale)
        return _verified("xattention", function, inputs, chosen)
    attend_to = _verified(f"xattention-{name}", prepare_peer(name, q, k, v, chosen), inputs, chosen)

    def both() -> Tensor:
        make_plan(q, k, config, scale=plan.scale)
        return attend_to()

    return both


def _verified(name: str, function: Callable[[], Tensor], inputs: Inputs, plan: Plan) -> Callable[[], Tensor]:
    """The function, if it attends to our blocks; it gives the queries in sorted order."""
    out = torch.empty_like(inputs.q)
    out.scatter_(2, rearrange(plan.query_order.index, "b h n -> b h n 1").expand_as(out), function())
    # A baseline that computes something else is none; twice our own limit, for it is not what is judged here.
    require_verified(name, verify(*inputs, plan, out), factor=2)
    return function


def compile_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled for the shapes it will see."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return compiled


def block_mask(plan: Plan, keys: int) -> Any:
    """The kept blocks of a plan as FlexAttention's BlockMask over sorted tokens; every kept block counts in full."""
    from torch.nn.attention.flex_attention import BlockMask

    index, count = plan.selection[:2]
    key_blocks = -(-keys // plan.config.block_size)
    # Lists as long as there are key blocks: PyTorch derives the other direction from a table of that width.
    padded = F.pad(index, (0, key_blocks - index.shape[-1])).contiguous()
    count = count.contiguous()
    return BlockMask.from_kv_blocks(
        torch.zeros_like(count), torch.zeros_like(padded), count, padded, BLOCK_SIZE=plan.config.block_size,
        seq_lengths=(plan.query_order.index.shape[-1], keys),
    )  # fmt: skip


#: name -> dense attention by one of PyTorch's backends, block-sparse attention by its compiler or another library,
#: XAttention's choice and attention over it, or the operator itself with the causal mask of single tokens or with
#: budgets of rows, for what causal blocks of several tokens and budgets of heads cost.
BASELINES: dict[str, Baseline] = {
    "cudnn": Baseline(functools.partial(_prepare_with, "CUDNN_ATTENTION"), only_half=True),
    "flash": Baseline(functools.partial(_prepare_with, "FLASH_ATTENTION"), only_half=True),
    "flex": Baseline(_prepare_flex),
    "dense": Baseline(_prepare_dense),
    **{name: Baseline(functools.partial(_prepare_peer, name), only_half=True) for name in PEERS},
    "xattention": Baseline(functools.partial(_prepare_xattention, None)),
    **{
        f"xattention-{name}": Baseline(functools.partial(_prepare_xattention, name), only_half=True)
        for name in PEERS
        if name != "fa4-dense"
    },
    "causal-1": Baseline(_prepare_plain_causal),
    "budget-row": Baseline(_prepare_row_budget),
}
