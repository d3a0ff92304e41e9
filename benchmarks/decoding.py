"""Tokens per second and accuracy of decoding: caches x dense or sparse attention x confidence threshold, on needles.

`python benchmarks/decoding.py --json FILE` draws samples of a needle task, checks every setting, then lets all of them
answer every batch in turns, in random order, and keeps sums. Checked: one step a block gives the same tokens with and
without a cache; no mask token and no unused id is left; every position was filled. Writes the file after every batch.
"""

import argparse
import dataclasses
import functools
import itertools
import random
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tables import block, crossed
from tokenizers import Tokenizer
from torch import Tensor

from baatt import BAAttConfig, Policy
from baatt.assets import shipped_model
from baatt.integrations.enable import enable
from baatt.lab.describe import layers_name, order_name
from baatt.lab.prompts import answer_text, pad_left
from baatt.lab.records import provenance, write_json
from baatt.lab.ruler.scoring import whole_share
from baatt.lab.ruler.tasks import draw_samples
from baatt.lab.statistics import wilson_interval
from baatt.lab.tables import Record, percent
from baatt.models import MaskedDiffusionLM
from baatt.models.checkpoint import load_tokenizer
from baatt.sampling import CACHES, SamplerConfig, SampleResult, generate

ATTENTIONS = ("dense", "sparse")


class Setting(NamedTuple):
    """One way to decode."""

    cache: str
    attention: str
    threshold: float | None


class Bench(NamedTuple):
    """What all settings share."""

    model: MaskedDiffusionLM
    tokenizer: Tokenizer
    sampler: SamplerConfig
    sparse: BAAttConfig
    policy: Policy
    impl: str

    def decode(self, setting: Setting, ids: Tensor, mask: Tensor, **changes: Any) -> SampleResult:
        """One batch; `changes` of the sampler."""
        sampler = dataclasses.replace(self.sampler, cache=setting.cache, threshold=setting.threshold, **changes)
        sparse = self.sparse if setting.attention == "sparse" else None
        with enable(self.model, sparse, self.policy, impl=self.impl) as handle:
            return generate(self.model, ids, mask, sampler, on_step=handle.at_step)


@dataclasses.dataclass
class Sums:
    """What a setting has done so far.

    agreed: rows with the tokens of the same setting without a cache. filled: positions; text_tokens: those before the
    first end-of-text token.
    """

    samples: int = 0
    right: int = 0
    agreed: int = 0
    filled: int = 0
    text_tokens: int = 0
    full_evaluations: int = 0
    cached_evaluations: int = 0
    seconds: float = 0.0

    def add(self, result: SampleResult, right: int, end: int | None, uncached: SampleResult | None) -> None:
        """One batch, of which `right` answers are right."""
        self.samples += len(result.tokens)
        self.right += right
        if uncached is not None:
            self.agreed += int((result.tokens == uncached.tokens).all(dim=1).sum())
        self.filled += result.filled
        rows = result.tokens.tolist()
        self.text_tokens += sum(row.index(end) if end in row else len(row) for row in rows)
        self.full_evaluations += result.full_evaluations
        self.cached_evaluations += result.cached_evaluations
        self.seconds += result.seconds


def check(result: SampleResult, model: MaskedDiffusionLM) -> None:
    """Raises RuntimeError for tokens that no decoder may leave."""
    config, tokens = model.config, result.tokens
    if bool((tokens == config.mask_token_id).any()) or bool((tokens >= config.vocab_size).any()):
        raise RuntimeError("a mask token or an unused id is left in the result")
    if bool((result.unmasked_at < 0).any()):
        raise RuntimeError("a position was never filled")


def verify_and_warm_up(bench: Bench, settings: Sequence[Setting], ids: Tensor, mask: Tensor) -> None:
    """Check every setting on one batch, with one step a block and with two; raises RuntimeError."""
    blocks = bench.sampler.blocks
    for setting in settings:
        result = bench.decode(setting, ids, mask, steps=blocks)
        exact = bench.decode(setting._replace(cache="none"), ids, mask, steps=blocks)
        check(result, bench.model)
        if not torch.equal(result.tokens, exact.tokens):
            raise RuntimeError(f"{setting}: one step a block must give the tokens of decoding without a cache")
        check(bench.decode(setting, ids, mask, steps=2 * blocks), bench.model)


def measure(
    bench: Bench, settings: Sequence[Setting], task: str, length: int, count: int, batch_size: int, seed: int
) -> Iterator[list[dict[str, Any]]]:
    """The records of a length after every batch."""
    device, config = next(bench.model.parameters()).device, bench.model.config
    samples = draw_samples(task, length, count, bench.tokenizer, seed=seed)
    encoded = [row.ids for row in bench.tokenizer.encode_batch([one.prompt + one.answer_prefix for one in samples])]
    shuffle, sums = random.Random(seed), {setting: Sums() for setting in settings}
    for first in range(0, count, batch_size):
        batch = samples[first : first + batch_size]
        ids, mask = (x.to(device) for x in pad_left(encoded[first : first + batch_size], config.pad_token_id or 0))
        if first == 0:
            verify_and_warm_up(bench, settings, ids, mask)
        results = {one: bench.decode(one, ids, mask) for one in shuffle.sample(list(settings), len(settings))}
        for setting, result in results.items():
            check(result, bench.model)
            texts = [answer_text(bench.tokenizer, row, {config.eos_token_id}) for row in result.tokens.tolist()]
            right = sum(whole_share(text, one.values) == 1 for text, one in zip(texts, batch, strict=True))
            sums[setting].add(result, right, config.eos_token_id, results.get(setting._replace(cache="none")))
        yield [record(setting, one, task, length, sums) for setting, one in sums.items()]


def record(setting: Setting, one: Sums, task: str, length: int, sums: dict[Setting, Sums]) -> dict[str, Any]:
    """What is stored of a setting. speedup: over the slowest kind, no cache, dense and without threshold."""
    rate = one.filled / one.seconds
    slowest = sums.get(Setting("none", "dense", None))
    return {
        "task": task, "length": length, **setting._asdict(), **dataclasses.asdict(one),
        "agreed": one.agreed if setting._replace(cache="none") in sums else None,
        "accuracy": one.right / one.samples, "interval": wilson_interval(one.right, one.samples),
        "tokens_per_second": rate, "text_tokens_per_second": one.text_tokens / one.seconds,
        "speedup": None if slowest is None else rate / (slowest.filled / slowest.seconds),
    }  # fmt: skip


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
    steps = arguments.gen_length if arguments.steps is None else arguments.steps
    bench = Bench(
        MaskedDiffusionLM.from_pretrained(arguments.model, dtype=dtype, device=device),
        load_tokenizer(arguments.model),
        SamplerConfig(steps=steps, gen_length=arguments.gen_length, block_length=arguments.block_length),
        BAAttConfig(sparsity=arguments.sparsity),
        Policy(dense_layers=(0, 1), min_queries=arguments.min_queries),  # the preset `safe` of the command line
        arguments.impl,
    )
    settings = [Setting(*one) for one in itertools.product(arguments.caches, arguments.attention, arguments.thresholds)]
    command = shlex.join(["python", "benchmarks/decoding.py", *(sys.argv[1:] if argv is None else argv)])
    report: dict[str, Any] = {
        "study": "decoding", **provenance(command, device),
        "model": arguments.model.name, "dtype": str(dtype).removeprefix("torch."), "batch_size": arguments.batch_size,
        "sampler": dataclasses.asdict(bench.sampler), "sparse": dataclasses.asdict(bench.sparse),
        "policy": dataclasses.asdict(bench.policy), "records": [],
    }  # fmt: skip
    for length in arguments.lengths:
        before, records = report["records"], []
        options = (arguments.task, length, arguments.count, arguments.batch_size, arguments.seed)
        for records in measure(bench, settings, *options):
            write_json(report | {"records": [*before, *records]}, arguments.json)
        report["records"] = [*before, *records]
        sys.stdout.write("".join(f"{summary(one)}\n" for one in records))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
