"""Measures the accuracy of a checkpoint on RULER's needle tasks with held-out words and text, dense and sparse.

In: a checkpoint folder. Out: one JSON file with a record per task, length and setting: sample count, share of samples
with every value right, Wilson interval. The model card's table is made from it.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from baatt.config import BAAttConfig, Policy
from baatt.evaluation.retrieval import RETRIEVAL_SAMPLER, SamplePool, answer
from baatt.lab.records import provenance
from baatt.lab.ruler.niah import NIAH_TASKS
from baatt.lab.ruler.sample import RulerSample
from baatt.lab.statistics import wilson_interval
from baatt.models import MaskedDiffusionLM
from baatt.models.checkpoint import load_tokenizer


def setting(name: str) -> tuple[BAAttConfig | None, Policy]:
    """A setting from its name: "dense", or dials like "sort=none,block_size=32,dense_layers=0+1"."""
    if name == "dense":
        return None, Policy()
    dials: dict[str, Any] = {}
    layers: tuple[int, ...] = ()
    for part in name.split(","):
        key, value = part.split("=")
        if key == "dense_layers":
            layers = tuple(int(layer) for layer in value.split("+"))
        elif key in ("sort", "score"):
            dials[key] = value
        else:
            dials[key] = None if value == "none" else float(value) if key in ("sparsity", "beta") else int(value)
    return BAAttConfig(**dials), Policy(dense_layers=layers)


def load_samples(
    arguments: argparse.Namespace, places: list[tuple[str, int]], tokenizer: Tokenizer
) -> list[list[RulerSample]]:
    """The samples of every task and length, drawn in parallel, or read from the file an earlier call kept them in."""
    kept = arguments.samples
    if kept is not None and kept.exists():
        stored = json.loads(kept.read_text())
        if (stored["count"], stored["seed"]) != (arguments.count, arguments.seed):
            raise ValueError(f"{kept} holds samples of another --count or --seed: {stored['count']}, {stored['seed']}")
        stored = stored["samples"]
        return [[RulerSample(*sample) for sample in stored[f"{task}/{length}"]] for task, length in places]
    with SamplePool(places, arguments.count, tokenizer, seed=arguments.seed, workers=arguments.workers) as pool:
        drawn = [pool.samples(*place) for place in places]
    if kept is not None:
        samples = {f"{task}/{length}": found for (task, length), found in zip(places, drawn, strict=True)}
        kept.write_text(json.dumps({"count": arguments.count, "seed": arguments.seed, "samples": samples}))
    return drawn


def measure(arguments: argparse.Namespace) -> None:
    """All records of one call, stored after each one."""
    tasks = list(NIAH_TASKS) if arguments.tasks == "all" else arguments.tasks.split(",")
    lengths = [int(length) for length in arguments.lengths.split(",")]
    model = MaskedDiffusionLM.from_pretrained(arguments.model, device=arguments.device, dtype=arguments.dtype)
    tokenizer = load_tokenizer(arguments.model)
    places = [(task, length) for length in lengths for task in tasks]
    drawn = load_samples(arguments, places, tokenizer)
    records: list[dict[str, Any]] = []
    result = {
        "study": "needle accuracy of the shipped model",
        **provenance(shlex.join(["python", *sys.argv]), torch.device(arguments.device)),
        "model": arguments.model, "weights": fingerprint(Path(arguments.model)), "dtype": str(model_dtype(model)),
        "sampler": vars(RETRIEVAL_SAMPLER), "seed": arguments.seed, "records": records,
    }  # fmt: skip
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.settings:
        sparse, policy = setting(name)
        for (task, length), samples in zip(places, drawn, strict=True):
            started = time.monotonic()
            batch = max(1, arguments.batch_tokens // length)
            answers = answer(
                model, tokenizer, samples, sparse=sparse, policy=policy, impl=arguments.impl, batch_size=batch
            )  # fmt: skip
            right = sum(one.exact for one in answers)
            low, high = wilson_interval(right, len(answers))
            records.append({
                "setting": name, "config": None if sparse is None else vars(sparse), "policy": vars(policy),
                "task": task, "length": length, "n": len(answers), "accuracy": right / len(answers),
                "ci_low": low, "ci_high": high, "values_found": sum(one.share for one in answers) / len(answers),
                "trained_format": sum(one.text == one.sample.answer for one in answers) / len(answers),
                "seconds_per_sample": (time.monotonic() - started) / len(answers),
            })  # fmt: skip
            wrong = [(one.text, one.sample.answer) for one in answers if not one.exact][:2]
            print(
                name,
                task,
                length,
                f"{right}/{len(answers)}",
                f"{records[-1]['seconds_per_sample']:.2f} s",
                wrong,
                flush=True,
            )
            arguments.json.write_text(json.dumps(result, indent=1, default=str))


def model_dtype(model: MaskedDiffusionLM) -> torch.dtype:
    """The dtype the model runs in."""
    return next(model.parameters()).dtype


def fingerprint(folder: Path) -> str:
    """The beginning of every weight file's checksum, to tie a record to a checkpoint."""
    files = sorted(str(path) for path in folder.glob("*.safetensors"))
    sums = subprocess.run(["sha256sum", *files], capture_output=True, text=True, check=True).stdout
    return " ".join(line.split()[0][:16] for line in sums.splitlines())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="src/baatt/assets/needle-18m")
    parser.add_argument("--tasks", default="all")
    parser.add_argument("--lengths", default="512,1024,2048,4096")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--settings", nargs="+", default=["dense"], help='e.g. dense "sort=none,sparsity=0.5"')
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--batch-tokens", type=int, default=262144)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=Path, help="file that keeps the drawn samples for later calls")
    parser.add_argument("--json", type=Path, required=True)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
