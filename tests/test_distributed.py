"""Ulysses attention of 2 and 4 processes (gloo) against one process, its errors on every process, and the example."""

import functools
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from baatt import BAAttConfig, ba_attention
from baatt.distributed import ulysses_attention
from tests.processes import run_ranks, run_script

ROOT = Path(__file__).resolve().parents[1]
HEADS, CHANNELS = 8, 16


class Case(NamedTuple):
    """One call; `queries` and `keys` are those of one process."""

    groups: int = 8
    sparsity: float = 0.5
    dtype: torch.dtype = torch.float32
    masked: bool = False
    queries: int = 35
    keys: int = 35
    heads: int = HEADS
    batch: int = 2
    causal: int | None = None

    def config(self) -> BAAttConfig:
        return BAAttConfig(block_size=16, sparsity=self.sparsity)

    def inputs(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of all processes together, in the memory of [B, N, H, D]."""
        generator = torch.Generator().manual_seed(0)
        sizes = [(self.queries, self.heads), (self.keys, self.groups), (self.keys, self.groups)]
        q, k, v = (
            torch.randn(self.batch, size * length, heads, CHANNELS, generator=generator).to(self.dtype).transpose(1, 2)
            for length, heads in sizes
        )
        mask = torch.rand(self.batch, size * self.keys, generator=generator) > 0.3 if self.masked else None
        return q, k, v, mask


CASES = {
    **{
        f"G{groups}-{sparsity:g}-{str(dtype).removeprefix('torch.')}{'-masked' if masked else ''}": Case(
            groups, sparsity, dtype, masked
        )
        for groups in (8, 4, 2, 1)
        for sparsity in (0.0, 0.5)
        for dtype in (torch.float32, torch.bfloat16)
        for masked in (False, True)
    },
    "cross": Case(queries=7, keys=50, groups=2, masked=True),
    "one token": Case(queries=1, keys=1, batch=1),
    "uneven groups": Case(heads=12, groups=6),
    "causal": Case(causal=1, groups=2),
    "causal with padding": Case(causal=1, masked=True),
    "blocks": Case(causal=8, sparsity=0.0, groups=4),
    "the last queries": Case(causal=4, queries=20, masked=True),
}


def local(x: Tensor | None, rank: int, size: int, axis: int) -> Tensor | None:
    return None if x is None else x.chunk(size, dim=axis)[rank]


def parts(case: Case, rank: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v, mask = case.inputs(size)
    return *(local(x, rank, size, 2) for x in (q, k, v)), local(mask, rank, size, 1)


def misfits(rank: int, size: int) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Arguments that must raise on every process; where they differ, only the last one's are odd."""
    q, k, v, mask = parts(Case(masked=True), rank, size)
    odd = rank == size - 1
    few = parts(Case(heads=size + 1, groups=1), rank, size)
    return {
        "heads": few,
        "shorter": (q[:, :, :-1], k[:, :, :-1], v[:, :, :-1], mask[:, :-1]) if odd else (q, k, v, mask),
        "fewer queries": (q[:, :, :-1], k, v, mask) if odd else (q, k, v, mask),
        "no mask": (q, k, v, None) if odd else (q, k, v, mask),
        "dtype": (q.half(), k.half(), v.half(), mask) if odd else (q, k, v, mask),
        "local": (q, k, v[:, :4], mask) if odd else (q, k, v, mask),
        "mask": (q, k, v, mask[:, :-1]),
        "mixed": (q, k.double(), v, mask),
        "axes": (q[0], k, v, mask),
        "keys": (q, k[:, :3], v[:, :3], mask),
        "gradients": (q.clone().requires_grad_(), k, v, mask),
    }


def worker(rank: int, size: int, folder: Path) -> None:
    """Runs all cases and stores what came out."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=30)
    )
    found: dict[str, Tensor] = {}
    errors: dict[str, str] = {}
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def observed(q: Tensor, k: Tensor, v: Tensor, *, config: BAAttConfig, name: str, **options: Any) -> Tensor:
        shapes[name] = [tuple(x.shape) for x in (q, k, v)]
        return ba_attention(q, k, v, config, **options)

    for name, case in CASES.items():
        q, k, v, mask = parts(case, rank, size)
        fn = functools.partial(observed, config=case.config(), name=name)
        found[name] = ulysses_attention(fn, q, k, v, key_mask=mask, causal=case.causal)
    fn = functools.partial(ba_attention, config=Case().config())
    for name, (q, k, v, mask) in misfits(rank, size).items():
        with pytest.raises(ValueError, match=r".") as caught:
            ulysses_attention(fn, q, k, v, key_mask=mask)
        errors[name] = str(caught.value)
    with pytest.raises(ValueError, match=r".") as caught:
        ulysses_attention(fn, *parts(Case(), rank, size)[:3], causal=1 if rank else None)
    errors["causal"] = str(caught.value)
    with pytest.raises(ValueError, match=r".") as caught:
        ulysses_attention(lambda q, k, v, key_mask: q[:, :1, :3], *parts(Case(), rank, size)[:3])
    errors["fn"] = str(caught.value)
    # Groups of neighbours, each with a sequence of its own.
    groups = [dist.new_group([first, first + 1]) for first in range(0, size, 2)]
    case = Case(groups=1)
    mine = parts(case._replace(batch=1 + rank // 2), rank % 2, 2)
    found["group"] = ulysses_attention(fn, *mine[:3], groups[rank // 2])
    if size > 2:
        with pytest.raises(RuntimeError, match="group must hold the calling process") as caught:
            ulysses_attention(fn, *mine[:3], groups[1 - rank // 2])
    torch.save({"found": found, "errors": errors, "shapes": shapes}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    """(number of processes, what each of them stored)."""
    folder = tmp_path_factory.mktemp("processes")
    run_ranks(worker, request.param, folder, size=request.param)
    return request.param, [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_result_of_one_process(run, name):
    size, stored = run
    case = CASES[name]
    q, k, v, mask = case.inputs(size)
    expected = ba_attention(q, k, v, case.config(), key_mask=mask, causal=case.causal)
    actual = torch.cat([one["found"][name] for one in stored], dim=2)
    assert actual.dtype == case.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("name", "copies"),
    [("G8-0.5-float32", 1), ("G4-0.5-float32", 1), ("G2-0.5-float32", 2), ("G1-0.5-float32", 4), ("uneven groups", 2)],
)
def test_keys_are_repeated_only_as_far_as_needed(run, name, copies):
    size, stored = run
    case = CASES[name]
    for one in stored:
        q, k, v = one["shapes"][name]
        assert q == (2, case.heads // size, size * 35, CHANNELS)
        needed = copies if size == 4 else {"G1-0.5-float32": 2}.get(name, 1)
        assert k == v == (2, needed * case.groups // size, size * 35, CHANNELS)


def messages(run, name: str) -> list[str]:
    return [one["errors"][name] for one in run[1]]


def test_heads_that_do_not_divide_raise_everywhere(run):
    size, _ = run
    expected = f"q must have a number of heads that the w={size} processes divide, got H={size + 1}"
    assert messages(run, "heads") == [expected] * size


def test_parts_that_differ_raise_everywhere(run):
    size, _ = run
    lengths = ", ".join(["35"] * (size - 1) + ["34"])
    dtypes = ", ".join(["torch.float32"] * (size - 1) + ["torch.float16"])
    hint = ": pad the sequence and mask the padding"
    same = f"must be the same on all {size} processes, got"
    expected = {
        "shorter": f"length n of q {same} {lengths} by rank{hint}",
        "fewer queries": f"length n of q {same} {lengths} by rank{hint}",
        "no mask": f"number of key masks {same} {', '.join(['1'] * (size - 1) + ['0'])} by rank",
        "dtype": f"dtype {same} {dtypes} by rank",
        "causal": f"causal {same} {', '.join(['0'] + ['1'] * (size - 1))} by rank",
    }
    for name, message in expected.items():
        assert messages(run, name) == [message] * size


def test_a_misfit_on_one_process_raises_everywhere(run):
    size, _ = run
    *others, last = messages(run, "local")
    assert last == "v must have the shape of k (2, 8, 35, 16), got (2, 4, 35, 16)"
    assert others == [
        f"the tensors of all processes must fit one another, those of ranks [{size - 1}] of the group do not"
    ] * (size - 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mask", "key_mask must be bool [B, m] = (2, 35), got torch.bool (2, 34)"),
        ("axes", "q must have shape [B, H, n, D] without an empty axis, got (8, 35, 16)"),
        ("keys", "k must have shape [B=2, G, m, D=16] with G dividing H=8, got (2, 3, 35, 16)"),
        ("gradients", "q must not require gradients, got requires_grad=True: call it under torch.no_grad()"),
    ],
)
def test_misfits_are_named(run, name, message):
    assert messages(run, name) == [message] * run[0]


def test_other_errors_are_named(run):
    size, _ = run
    assert all(
        "k must have a dtype of" in message and "got torch.float64" in message for message in messages(run, "mixed")
    )
    got = f"(2, {8 // size}, {35 * size}, 16), got (2, 1, 3, 16)"
    assert messages(run, "fn") == [f"fn must return [B, H/w, w n, D] like its q {got}"] * size


def test_a_group_of_some_processes(run):
    size, stored = run
    for first in range(0, size, 2):
        case = Case(groups=1, batch=1 + first // 2)
        q, k, v, _ = case.inputs(2)
        actual = torch.cat([one["found"]["group"] for one in stored[first : first + 2]], dim=2)
        assert torch.equal(actual, ba_attention(q, k, v, case.config()))


def test_without_a_process_group():
    q, k, v, _ = Case().inputs(1)
    with pytest.raises(RuntimeError, match=r"must be initialised: start the script with torchrun and call torch\.dist"):
        ulysses_attention(ba_attention, q, k, v)


def test_one_process_calls_the_function_directly():
    q, k, v, mask = Case(masked=True).inputs(1)
    fn = functools.partial(ba_attention, config=Case().config())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert torch.equal(ulysses_attention(fn, q, k, v, key_mask=mask), fn(q, k, v, key_mask=mask))
        with pytest.raises(TypeError, match=r"v must be a torch\.Tensor, got NoneType"):
            ulysses_attention(fn, q, k, None)
    finally:
        dist.destroy_process_group()


def test_the_example_agrees():
    out, _ = run_script("examples/ulysses.py", folder=ROOT)
    device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    limit = 0.0 if device == "cpu" else 0.02
    text, _, difference = out.strip().rpartition(" ")
    assert text == f"2 processes on {device}, largest difference to one process:"
    assert float(difference) <= limit
