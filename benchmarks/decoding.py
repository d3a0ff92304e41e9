"""Tokens per second and accuracy of decoding: caches x dense or sparse attention x confidence threshold, on needles.

`python benchmarks/decoding.py --json FILE` checks every setting on the first batch, then asks the runner of
`baatt evaluate ruler` for the batches of all settings in random order. Checked: one step a block gives the same tokens
with and without a cache; no mask token and no unused id is left; every position was filled. Writes after every batch.
"""

import argparse
import dataclasses
import functools
import itertools
import random
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tables import block, crossed

from baatt.assets import shipped_model
from baatt.config import BAAttConfig, Policy
from baatt.lab.answers import AnswerStore
from baatt.lab.describe import layers_name, order_name
from baatt.lab.records import provenance, write_json
from baatt.lab.ruler.cells import Cell
from baatt.lab.ruler.model import RulerAnswer, RulerModel, RulerSetup
from baatt.lab.ruler.run import Run
from baatt.lab.ruler.sample import RulerSample
from baatt.lab.statistics import wilson_interval
from baatt.lab.tables import Record, percent
from baatt.models import MaskedDiffusionLM
from baatt.models.checkpoint import load_tokenizer
from baatt.sampling import CACHES, SamplerConfig, SampleResult

ATTENTIONS = ("dense", "sparse")


def make_cells(arguments: argparse.Namespace, length: int) -> list[Cell]:
    """Every combination of cache, attention and threshold."""
    kinds = {"dense": (None, Policy()), "sparse": read_sparse(arguments)}
    return [
        Cell(arguments.task, length, *kinds[kind], read_sampler(arguments)).sampled(cache=cache, threshold=threshold)
        for cache, kind, threshold in itertools.product(arguments.caches, arguments.attention, arguments.thresholds)
    ]


def read_sampler(arguments: argparse.Namespace) -> SamplerConfig:
    """The sampler of all settings, without cache and threshold."""
    steps = arguments.gen_length if arguments.steps is None else arguments.steps
    return SamplerConfig(steps=steps, gen_length=arguments.gen_length, block_length=arguments.block_length)


def read_sparse(arguments: argparse.Namespace) -> tuple[BAAttConfig, Policy]:
    """Sparse attention as it comes."""
    return BAAttConfig(sparsity=arguments.sparsity), Policy(min_queries=arguments.min_queries)


def check(result: SampleResult, model: MaskedDiffusionLM) -> None:
    """Raises RuntimeError for tokens that no decoder may leave."""
    config, tokens = model.config, result.tokens
    if bool((tokens == config.mask_token_id).any()) or bool((tokens >= config.vocab_size).any()):
        raise RuntimeError("a mask token or an unused id is left in the result")
    if bool((result.unmasked_at < 0).any()):
        raise RuntimeError("a position was never filled")


def verify_and_warm_up(asked: RulerModel, cells: Sequence[Cell], samples: Sequence[RulerSample]) -> None:
    """Check every setting on one batch, with one step a block and with two, and as it is timed; raises RuntimeError."""
    ids, mask = asked.prompts(samples)
    for cell in cells:
        blocks = cell.sampler.blocks
        result, _ = asked.generate(cell.sampled(steps=blocks), ids, mask)
        exact, _ = asked.generate(cell.sampled(steps=blocks, cache="none"), ids, mask)
        check(result, asked.model)
        if not torch.equal(result.tokens, exact.tokens):
            raise RuntimeError(f"{cell}: one step a block must give the tokens of decoding without a cache")
        for checked in (cell.sampled(steps=2 * blocks), cell):
            check(asked.generate(checked, ids, mask)[0], asked.model)


def make_records(
    cells: Sequence[Cell], answers: Sequence[Sequence[RulerAnswer]], batch_size: int
) -> list[dict[str, Any]]:
    """What is stored of every setting that has answers.

    agreed: answers with the text of the same setting without a cache. filled: positions; text_tokens: those before the
    end of text. speedup: over the slowest kind, no cache, dense and without threshold.
    """
    found = {cell: some for cell, some in zip(cells, answers, strict=True) if some}
    seconds = {cell: sum(one.seconds for one in some) for cell, some in found.items()}
    rates = {cell: sum(one.tokens for one in some) / seconds[cell] for cell, some in found.items()}
    records = []
    for cell, some in found.items():
        uncached = found.get(cell.sampled(cache="none"))
        slowest = rates.get(Cell(cell.task, cell.length, sampler=cell.sampled(cache="none", threshold=None).sampler))
        right, text_tokens = sum(one.whole == 1 for one in some), sum(one.text_tokens for one in some)
        batches = [one for one in some if one.number % batch_size == 0]  # all answers of one name its evaluations
        cached = sum(one.cached_evaluations for one in batches)
        records.append({
            "task": cell.task, "length": cell.length, "cache": cell.sampler.cache,
            "attention": "dense" if cell.config is None else "sparse", "threshold": cell.sampler.threshold,
            "samples": len(some), "right": right,
            "agreed": uncached and sum(a.text == b.text for a, b in zip(some, uncached, strict=False)),
            "filled": sum(one.tokens for one in some), "text_tokens": text_tokens,
            "full_evaluations": sum(one.evaluations for one in batches) - cached, "cached_evaluations": cached,
            "seconds": seconds[cell], "accuracy": right / len(some), "interval": wilson_interval(right, len(some)),
            "tokens_per_second": rates[cell], "text_tokens_per_second": text_tokens / seconds[cell],
            "speedup": slowest and rates[cell] / slowest,
        })  # fmt: skip
    return records


def measure(
    asked: RulerModel, cells: Sequence[Cell], arguments: argparse.Namespace, report: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The records of one length; the file is written after every batch."""
    run = Run(asked, AnswerStore(None), cells, range(arguments.count))
    first = min(arguments.batch_size, arguments.count)
    verify_and_warm_up(asked, cells, asked.draw(cells[0].task, cells[0].length, first))

    def records() -> list[dict[str, Any]]:
        return make_records(cells, run.kept(), arguments.batch_size)

    def keep(cell: Cell, count: int) -> None:
        write_json({**report, "records": [*report["records"], *records()]}, arguments.json)

    run.answer(keep, random.Random(arguments.seed))
    return records()


def summary(one: dict[str, Any]) -> str:
    """A line of print."""
    speedup = "" if one["speedup"] is None else f", {one['speedup']:.2f}x"
    return (
        f"{one['length']} {one['cache']} {one['attention']} threshold {one['threshold']}: "
        f"{one['tokens_per_second']:.2f} tokens/s{speedup}, {one['right']}/{one['samples']} right"
    )


def read_thresholds(text: str) -> list[float | None]:
    """`none,0.9`; a type for argparse."""
    return [None if part == "none" else float(part) for part in text.split(",")]


def read_names(choices: Sequence[str], text: str) -> list[str]:
    """Names by commas; a type for argparse once `choices` is given."""
    names = text.split(",")
    if not set(names) <= set(choices):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(choices)}, got {text!r}")
    return names


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--task", default="niah_multikey_2")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[1024])
    parser.add_argument("--count", type=int, default=8, help="samples of each length")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--caches", type=functools.partial(read_names, list(CACHES)), default=list(CACHES))
    parser.add_argument("--attention", type=functools.partial(read_names, ATTENTIONS), default=list(ATTENTIONS))
    parser.add_argument("--thresholds", type=read_thresholds, default=[None, 0.9])
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--steps", type=int, help="of the whole generation (default: one a token)")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--min-queries", type=int, default=Policy().min_queries)
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--model", type=Path, default=shipped_model())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def table(record: Record) -> str:
    """Markdown of a stored file: a row per cache, a column per attention and threshold."""

    def column(one: Record) -> str:
        threshold = "fixed steps" if one["threshold"] is None else f"threshold {one['threshold']:g}"
        return f"{one['attention']}, {threshold}"

    header, rows = crossed(
        record["records"],
        ("cache",),
        lambda one: (one["cache"],),
        column,
        lambda one: f"{one['tokens_per_second']:.0f} ({one['right']}/{one['samples']})",
    )
    first, sampler, sparse = record["records"][0], record["sampler"], record["sparse"]
    caption = (
        f"Tokens per second (answers right as whole words) on `{first['task']}` at {first['length']} tokens: "
        f"{sampler['gen_length']} tokens in blocks of {sampler['block_length']}, {sampler['steps']} steps without a "
        f"threshold, batches of {record['batch_size']}, `{record['model']}` in {record['dtype']}. Sparse: "
        f"{percent(sparse['sparsity'])}, {order_name(sparse)}, layers that stay dense: "
        f"{layers_name(record['policy']['dense_layers'])}."
    )
    return block(record, header, rows, caption)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = read_arguments(argv)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    command = shlex.join(["python", "benchmarks/decoding.py", *(sys.argv[1:] if argv is None else argv)])
    report = {"study": "decoding", **provenance(command, device)}
    model = MaskedDiffusionLM.from_pretrained(arguments.model, dtype=dtype, device=device)
    setup = RulerSetup(seed=arguments.seed, impl=arguments.impl, batch_size=arguments.batch_size)
    asked = RulerModel(model, load_tokenizer(arguments.model), setup)
    config, policy = read_sparse(arguments)
    report |= {
        "model": arguments.model.name, "dtype": str(dtype).removeprefix("torch."), "batch_size": arguments.batch_size,
        "sampler": dataclasses.asdict(read_sampler(arguments)), "sparse": dataclasses.asdict(config),
        "policy": dataclasses.asdict(policy), "records": [],
    }  # fmt: skip
    for length in arguments.lengths:
        records = measure(asked, make_cells(arguments, length), arguments, report)
        report["records"] += records
        sys.stdout.write("".join(f"{summary(one)}\n" for one in records))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
