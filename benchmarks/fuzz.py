"""Random calls of an implementation against the reference: `make fuzz`, or on a GPU before a release.

In: which implementations, on which device, how many cases or seconds, and a seed. A case is made from the seed and its
number alone, so `--seed S --first N --count 1` makes it again. Shapes, strides, dtypes, masks, structure, scores,
orders and budgets vary, values are large, tiny or equal, and what is masked holds NaN and infinity. Out: how many
agreed, every one that did not with its arguments, and that as JSON. Ends with 1 if any differed.
"""

import argparse
import dataclasses
import json
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from tables import block
from torch import Tensor
from torch.utils._pytree import tree_map_only

from baatt import BAAttConfig, attend, attend_partial, ba_attention, make_plan
from baatt.backend import Workload, choose_backend
from baatt.lab.loading import DTYPES, find_device
from baatt.lab.records import RecordFile, provenance
from baatt.lab.tables import Record
from baatt.plan import Plan
from baatt.scores import SCORES
from baatt.stages.selection import BUDGETS
from baatt.stages.sorting import ORDERS

#: What can stand in the data itself; the rest of a case is finite.
VALUES = ("normal", "normal", "normal", "large", "tiny", "equal", "zero", "one loud channel", "one loud token")
POISON = (float("nan"), float("inf"), float("-inf"), 1e30)
#: Cases in a row that share what kernels are compiled for: a new one takes seconds.
ALIKE = 64
STRIDES = ("contiguous", "heads inside", "sliced", "padded", "one token")


class Case(NamedTuple):
    """One call: tensors, options, and the words that tell what it is."""

    q: Tensor
    k: Tensor
    v: Tensor
    config: BAAttConfig
    options: dict[str, Any]
    words: dict[str, Any]


def make_case(seed: int, number: int, device: torch.device) -> Case:
    """The case of a number, the same on every device."""
    rng, family = random.Random(f"{seed}/{number}"), random.Random(f"{seed}/alike/{number // ALIKE}")
    on_gpu = device.type == "cuda"
    quick = on_gpu and number // ALIKE % 2 == 0  # what Hopper's kernels take
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    dtypes = ["bfloat16", "float16"] + ([] if quick else ["float32"] if on_gpu else ["float32", "float64"])
    groups, repeats, batch = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 1, 2])
    block = family.choice([128] if quick else [16, 32, 64, 128, 128] if on_gpu else [16, 16, 16, 16, 32, 64, 128])
    most = rng.choice([2, 4, 4, 12] if block < 128 or on_gpu else [2, 3]) * block
    keys = rng.choice([1, block, most, rng.randint(1, most), rng.randint(1, most), rng.randint(1, most)])
    queries = rng.choice([keys, keys, keys, 1, rng.randint(1, most)])
    rare = family.choice([1, 8, 32, 80, 96, 100, 256])
    channels = family.choice([64, 128] if quick else [16, 64, 64, 128, 128, rare])
    words: dict[str, Any] = {
        "shape": [batch, groups * repeats, groups, queries, keys, channels], "dtype": family.choice(dtypes),
        "strides": [rng.choice(STRIDES) for _ in "qkv"], "values": [rng.choice(VALUES) for _ in "qkv"],
    }  # fmt: skip
    heads = (groups * repeats, groups, groups)
    shapes = [(batch, count, length, channels) for count, length in zip(heads, (queries, keys, keys), strict=True)]
    tensors = [values(shape, kind, rng, generator) for shape, kind in zip(shapes, words["values"], strict=True)]
    causal = family.random() < 0.4
    options = make_options(rng, generator, batch, queries, keys, causal=causal)
    words |= {name: x if not isinstance(x, Tensor) else "a mask" for name, x in options.items()}
    config = make_config(rng, family, block, causal=causal)
    masks = (options.get("query_mask"), *2 * [options.get("key_mask")])
    laid = [
        strided(poisoned(x, mask, rng).to(DTYPES.get(words["dtype"], torch.float64)).to(device), kind)
        for x, mask, kind in zip(tensors, masks, words["strides"], strict=True)
    ]
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    return Case(*laid, config, moved, words | {"config": dataclasses.asdict(config)})


def make_config(rng: random.Random, family: random.Random, block: int, *, causal: bool) -> BAAttConfig:
    """Random options of the method, those that a causal call may have."""
    return BAAttConfig(
        block_size=block,
        sparsity=rng.choice([0.0, 0.5, 0.9, rng.random() * 0.999]),
        sort="none" if causal else family.choice(list(ORDERS)),
        segment=rng.choice([None, block, 4 * block]),
        score=family.choice(["clusters", "clusters", "covariance", *SCORES]),
        beta=rng.choice([0.0, 0.125, 0.5]),
        keep_first=rng.choice([0, 1, 1, 3]),
        budget=family.choice(list(BUDGETS)),
    )


def make_options(
    rng: random.Random, generator: torch.Generator, batch: int, queries: int, keys: int, *, causal: bool
) -> dict[str, Any]:
    """Masks, structure and scale."""
    options: dict[str, Any] = {}
    if causal:
        options["causal"] = rng.choice([1, 1, 7, 16, 32, 128, 10**6])
        if queries > keys or rng.random() < 0.5:
            options["query_start"] = rng.choice([0, max(0, keys - queries), rng.randint(0, 2 * keys)])
    for name, length in (("key_mask", keys), ("query_mask", queries)):
        if rng.random() < 0.35:
            options[name] = make_mask(rng, generator, batch, length)
    if rng.random() < 0.3:
        options["scale"] = rng.choice([1e-3, 0.3, 1.0, 4.0])
    return options


def make_mask(rng: random.Random, generator: torch.Generator, batch: int, length: int) -> Tensor:
    """[B, length] bool: padding, holes, everything or nothing."""
    kind = rng.choice(["right", "left", "holes", "few", "all", "none of one"])
    shown = torch.ones(batch, length, dtype=torch.bool)
    for row in shown:
        size = rng.randint(0, length)
        if kind == "right":
            row[size:] = False
        elif kind == "left":
            row[:size] = False
    if kind in ("holes", "few"):
        shown = torch.rand(batch, length, generator=generator) < (0.8 if kind == "holes" else 0.05)
    if kind == "none of one":
        shown[rng.randrange(batch)] = False
    return shown


def values(shape: tuple[int, ...], kind: str, rng: random.Random, generator: torch.Generator) -> Tensor:
    """Finite numbers that every dtype holds."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "large":
        return x * 100
    if kind == "tiny":
        return x * 1e-4
    if kind == "equal":
        return x[:, :, :1].expand(shape).clone()
    if kind == "zero":
        return x * 0
    if kind == "one loud channel":
        x[..., rng.randrange(shape[3])] *= 50
    elif kind == "one loud token":
        x[:, :, rng.randrange(shape[2])] *= 50
    return x


def poisoned(x: Tensor, mask: Tensor | None, rng: random.Random) -> Tensor:
    """x [B, H, N, D] with what must not be read where it is masked."""
    return x if mask is None else x.masked_fill(~mask[:, None, :, None], rng.choice(POISON))


def strided(x: Tensor, kind: str) -> Tensor:
    """The same values [B, H, N, D] laid out otherwise."""
    if kind == "heads inside":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "sliced":
        return torch.stack([torch.full_like(x, torch.nan), x], dim=3)[:, :, :, 1]
    if kind == "padded":
        return torch.cat([x, torch.full_like(x, torch.nan)], dim=3)[..., : x.shape[3]]
    alike = x[:, :, :1]  # unless it is masked, and so poisoned
    return alike.expand(x.shape) if kind == "one token" and bool((alike.abs() < 1e6).all()) else x


class Outcome(NamedTuple):
    """What differs, or None; and how many of the kept block pairs the reference keeps too."""

    fault: str | None
    shared: int = 0
    kept: int = 0


def check(case: Case, impl: str) -> Outcome:
    """The implementation by its own plan, which must keep what the reference keeps but for near ties.

    The reference runs on the processor, wherever the implementation does: one more witness, and each process has its
    own core there, while all share one GPU.
    """
    plan = make_plan(*case[:2], case.config, **case.options, impl=impl)
    actual = ba_attention(*case[:3], case.config, **case.options, impl=impl)
    case, plan, actual = tree_map_only(Tensor, Tensor.cpu, (case, plan, actual))
    q, k, _, config, options, _ = case
    wanted = make_plan(q, k, config, **options, impl="reference")
    index, count = plan.selection[:2]
    if config.budget == "row" and not torch.equal(count, wanted.selection.count):
        return Outcome("another number of blocks than the reference")
    listed = torch.arange(index.shape[-1]) < count[..., None]
    if bool((listed & ((index < 0) | (index >= -(-k.shape[2] // config.block_size)))).any()):
        return Outcome("a block that does not exist")
    both, kept = (kept_pairs(*x.selection[:2], k.shape[2] // config.block_size + 1) for x in (plan, wanted))
    if int(both.sum()) != int(count.sum()):
        return Outcome("a block twice")
    return Outcome(wrong_result(case, plan, actual), int((both & kept).sum()), int(kept.sum()))


def kept_pairs(index: Tensor, count: Tensor, blocks: int) -> Tensor:
    """[B, H, I, J] bool."""
    listed = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    found = torch.zeros(*index.shape[:-1], blocks + 1, dtype=torch.bool, device=index.device)
    return found.scatter_(-1, torch.where(listed, index, blocks).long(), True)[..., :blocks]


def wrong_result(case: Case, plan: Plan, actual: Tensor) -> str | None:
    """What differs from attention over the plan in float64, beyond twice eager PyTorch's error and one rounding."""
    q, k, v, _, options, _ = case
    exact = attend(q.double(), k.double(), v.double(), plan, impl="reference")
    eager_dtype = torch.float32 if q.dtype == torch.float64 else q.dtype
    eager = attend(q.to(eager_dtype), k.to(eager_dtype), v.to(eager_dtype), plan, impl="reference")
    rows = torch.ones_like(exact[:, :1, :, :1], dtype=torch.bool)
    if (mask := options.get("query_mask")) is not None:
        rows = rows & mask[:, None, :, None]
    exact, eager, actual = (x.double().masked_fill(~rows, 0) for x in (exact, eager, actual))
    if not bool(torch.isfinite(actual).all()):
        return "not finite where the reference is" if bool(torch.isfinite(exact).all()) else None
    epsilon, eager_epsilon = torch.finfo(q.dtype).eps, torch.finfo(eager_dtype).eps
    limit = 2 * float((eager - exact).abs().max()) * epsilon / eager_epsilon + epsilon * float(exact.abs().max())
    # Scores and sums over keys are rounded in any order, which eager PyTorch may not feel where all are alike.
    masks = options.get("query_mask"), *2 * [options.get("key_mask")]
    seen = [
        x.double() if m is None else x.double().masked_fill(~m[:, None, :, None], 0)
        for x, m in zip(case[:3], masks, strict=True)
    ]
    score = plan.scale * float(seen[0].norm(dim=-1).max() * seen[1].norm(dim=-1).max())
    sums = 2 * min(epsilon, torch.finfo(torch.float32).eps) * (score + k.shape[2] ** 0.5) * float(seen[2].abs().max())
    limit += sums * (2 if q.dtype == torch.float64 else 1)  # which is what the exact result is computed in, too
    error = float((actual - exact).abs().max())
    if error > limit and epsilon > torch.finfo(torch.float32).eps:
        limit += 6 * float((rounded_weights(q, k, v, plan) * epsilon).masked_fill(~rows, 0).max())
    return None if error <= limit else f"error {error:.3g} beyond {limit:.3g}"


def rounded_weights(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """What rounding every weight to a machine epsilon of 1 does to the output, as a standard deviation [B, H, N, D].

    A product in half precision takes weights relative to the largest, each rounded its own way; eager PyTorch divides
    them by their sum first, and then all weights of a flat row are rounded the same way, which says nothing of others.
    """
    q, k, v = (x.double() for x in (q, k, v))
    once = attend_partial(q, k, v, plan, impl="reference")
    twice = attend_partial(q, k, v.square(), plan._replace(scale=2 * plan.scale), impl="reference")
    squares = rearrange((twice.lse - 2 * once.lse).exp(), "b h n -> b h n 1")  # the sum of the squared weights
    return (squares * twice.out).nan_to_num().sqrt() / 12**0.5


class Share(NamedTuple):
    """What one process found: counts by implementation, and the cases that were wrong."""

    tally: dict[str, Counter[str]]
    wrong: list[dict[str, Any]]


def run_share(arguments: argparse.Namespace, part: int) -> Share:
    """The part's share of the cases, those alike in one process, until there are enough or time is up."""
    device, ends = find_device(arguments.device), time.monotonic() + arguments.seconds
    if device.type == "cpu" or arguments.processes > 1:  # calls this small are slower on several threads
        torch.set_num_threads(1)
    share = Share({impl: Counter() for impl in arguments.impl}, [])
    for number in range(arguments.first, arguments.first + arguments.count):
        if time.monotonic() >= ends:
            break
        if number // ALIKE % arguments.processes != part:
            continue
        case = make_case(arguments.seed, number, device)
        for impl in arguments.impl:
            try_case(case, impl, {"seed": arguments.seed, "number": number}, share)
    return share


def try_case(case: Case, impl: str, again: dict[str, int], share: Share) -> None:
    """Adds to the share what an implementation makes of a case, which `again` makes again."""
    q, config, counts = case.q, case.config, share.tally[impl]
    scale = case.options.get("scale") or q.shape[3] ** -0.5
    try:
        choose_backend(impl, q.device, Workload(q.dtype, q.shape[3], config.block_size, scale))
    except (RuntimeError, ValueError):
        counts["refused"] += 1
        return
    try:
        outcome = check(case, impl)
    except Exception as error:
        outcome = Outcome(f"{type(error).__name__}: {error}")
    counts.update(cases=1, wrong=int(outcome.fault is not None), shared=outcome.shared, kept=outcome.kept)
    counts[f"other pairs, {config.score}"] += outcome.kept - outcome.shared
    if outcome.fault is not None:
        share.wrong.append({"impl": impl, **again, "fault": outcome.fault, **case.words})
        sys.stdout.write(f"WRONG {json.dumps(share.wrong[-1])}\n")
        sys.stdout.flush()


def run(arguments: argparse.Namespace, report: RecordFile) -> int:
    """All cases, in as many processes as asked; how many were wrong."""
    if arguments.processes == 1:
        shares = [run_share(arguments, 0)]
    else:
        with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
            shares = list(pool.map(partial(run_share, arguments), range(arguments.processes)))
    for wrong in (one for share in shares for one in share.wrong):
        report.add({"kind": "wrong", **wrong})
    for impl in arguments.impl:
        counts: Counter[str] = sum((share.tally[impl] for share in shares), Counter())
        whole = {name: counts[name] for name in ("cases", "wrong", "refused", "shared", "kept")}
        others = {
            name.split(", ")[1]: count for name, count in counts.items() if name.startswith("other pairs") and count
        }
        start = {"kind": "whole", "impl": impl, "seed": arguments.seed, "first": arguments.first}
        report.add({**start, **whole, "other_pairs": others})
        same = counts["shared"] / max(1, counts["kept"])
        sys.stdout.write(f"{impl}: {counts['cases']} cases, {counts['wrong']} wrong, {counts['refused']} refused, ")
        sys.stdout.write(f"{same:.2%} of block pairs as the reference; seed {arguments.seed}\n")
    return sum(len(share.wrong) for share in shares)


def table(record: Record) -> str:
    """Markdown: a row for each implementation."""
    rows = [
        [
            f"`{one['impl']}`",
            f"{one['cases']:,}",
            f"{one['wrong']:,}",
            f"{one['refused']:,}",
            f"{one['shared'] / max(1, one['kept']):.2%}",
        ]
        for one in record["records"]
        if one["kind"] == "whole"
    ]
    seeds = {one["seed"] for one in record["records"] if one["kind"] == "whole"}
    caption = (
        "Cases that ran and were compared with float64 attention over the same plan; those that differ; those that the "
        "implementation refuses by its requirements; share of the kept block pairs that the reference keeps too, which "
        "runs on the processor and rounds scores that are nearly equal its own way. "
        f"Seed {', '.join(map(str, sorted(seeds)))}."
    )
    header = ("implementation", "cases", "wrong", "refused", "same pairs")
    return block(record, header, rows, caption)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impl", nargs="+", default=["cpu"], help="implementations (default: cpu)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--count", type=int, default=10**9, help="cases at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="time at most (default: 60)")
    parser.add_argument("--seed", type=int, default=None, help="(default: a random one, which is printed)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: 0)")
    parser.add_argument("--processes", type=int, default=1, help="that share the cases (default: 1)")
    parser.add_argument("--json", type=Path, help="where seeds, counts and wrong cases are stored")
    arguments = parser.parse_args(argv)
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(2**31)
    sys.stdout.write(f"seed {arguments.seed}: --seed {arguments.seed} --first N --count 1 makes case N again\n")
    sys.stdout.flush()
    device = find_device(arguments.device)
    command = shlex.join(["python", "benchmarks/fuzz.py", *(sys.argv[1:] if argv is None else argv)])
    report = RecordFile(arguments.json, {"study": "random cases", **provenance(command, device)})
    return 1 if run(arguments, report) else 0


if __name__ == "__main__":
    sys.exit(main())
