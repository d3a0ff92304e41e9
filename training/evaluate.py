"""Measures a checkpoint on RULER's needle tasks with held-out words and text, dense and sparse: the model card's table.

In: a checkpoint folder. Out: one JSON file with a record per setting, length and task: sample count, share of samples
with every value right, Wilson interval. Answers are kept beside it: a call that was cut goes on where it stopped.
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from baatt.config import PRESETS, BAAttConfig, Policy
from baatt.lab.answers import AnswerStore
from baatt.lab.options import read_options
from baatt.lab.records import RecordFile, provenance
from baatt.lab.ruler.cells import RULER_SAMPLER, Cell, choose_tasks
from baatt.lab.ruler.model import RulerAnswer, RulerModel, RulerSetup, checksums, weights_of
from baatt.lab.ruler.run import Run
from baatt.lab.ruler.sources import Sources
from baatt.lab.statistics import wilson_interval
from baatt.models import MaskedDiffusionLM
from baatt.models.checkpoint import load_tokenizer


def read_setting(name: str) -> tuple[BAAttConfig | None, Policy]:
    """A setting from its name: "dense", a preset, or options like "sort=none,block_size=32,dense_layers=0+1"."""
    if name == "dense":
        return None, Policy()
    if name in PRESETS:
        return PRESETS[name]
    values = dict(part.split("=", 1) for part in name.split(","))
    layers = {"dense_layers": values.pop("dense_layers")} if "dense_layers" in values else {}
    return read_options(BAAttConfig, values, "--settings"), read_options(Policy, layers, "--settings")


def make_record(setting: str, cell: Cell, answers: Sequence[RulerAnswer]) -> dict[str, Any]:
    """What is stored of a setting at a task and length."""
    right, count = sum(one.score == 1 for one in answers), len(answers)
    low, high = wilson_interval(right, count)
    return {
        "setting": setting, "config": cell.options or None, "policy": dataclasses.asdict(cell.policy),
        "task": cell.task, "length": cell.length, "n": count, "accuracy": right / count, "ci_low": low, "ci_high": high,
        "values_found": sum(one.score for one in answers) / count,
        "trained_format": sum(bool(one.exact) for one in answers) / count,
        "seconds_per_sample": sum(one.seconds for one in answers) / count,
    }  # fmt: skip


def measure(arguments: argparse.Namespace) -> None:
    """All records of one call, stored after each one."""
    model = MaskedDiffusionLM.from_pretrained(arguments.model, device=arguments.device, dtype=arguments.dtype)
    tokenizer, dtype = load_tokenizer(arguments.model), str(next(model.parameters()).dtype)
    setup = RulerSetup(checksums(arguments.model), dtype, arguments.seed, impl=arguments.impl)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    made = provenance(shlex.join(["python", *sys.argv]), torch.device(arguments.device))
    file = RecordFile(arguments.json, {
        "study": "needle accuracy of the shipped model", **made, "model": str(arguments.model),
        "weights": weights_of(setup.files), "dtype": dtype, "sampler": dataclasses.asdict(RULER_SAMPLER),
        "seed": arguments.seed,
    })  # fmt: skip
    store, numbers = AnswerStore(arguments.json.with_suffix(".answers")), range(arguments.count)
    for name in arguments.settings:
        config, policy = read_setting(name)
        for length in arguments.lengths:
            batched = dataclasses.replace(setup, batch_size=max(1, arguments.batch_tokens // length))
            asked = RulerModel(model, tokenizer, batched, made=made)
            cells = [Cell(task, length, config, policy) for task in choose_tasks(arguments.tasks, Sources())]
            run = Run(asked, store, cells, numbers, arguments.workers)
            run.answer()
            for cell, found in zip(cells, run.kept(), strict=True):
                file.add(make_record(name, cell, found))
                last = file.records[-1]
                wrong = [(one.text, one.values) for one in found if one.score < 1][:2]
                print(
                    name, cell.task, length, last["accuracy"], f"{last['seconds_per_sample']:.2f} s", wrong, flush=True
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("src/baatt/assets/needle-18m"))
    parser.add_argument("--tasks", default="needles")
    parser.add_argument(
        "--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[512, 1024, 2048, 4096]
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--settings", nargs="+", default=["dense"], help='e.g. dense paper "sparsity=0.7"')
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--batch-tokens", type=int, default=262144)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True)
    measure(parser.parse_args(argv))


if __name__ == "__main__":
    main()
