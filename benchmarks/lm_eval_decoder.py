"""RULER's needles in lm-evaluation-harness on a decoder: the harness's model `hf`, with `baatt.enable` around its run.

Needs `lm_eval[ruler]`. The two tasks make their text themselves; RULER's other needles, but niah_multikey_3, fetch
essays. The harness knows them by 4096 tokens and more, and takes any length.
"""

import argparse
import dataclasses
import shlex
import sys
import tempfile
from pathlib import Path

import torch
from tables import block

import baatt
from baatt import BAAttConfig
from baatt.lab.records import RecordFile, installed_version, provenance
from baatt.lab.statistics import score_interval
from baatt.lab.tables import Record, interval, percent

TASKS, ANSWER = ["niah_single_1", "niah_multikey_2"], 16  # tokens of an answer; the harness gives 128


def table(record: Record) -> str:
    """A row per setting: the score of each task, and what was sparse."""
    rows = []
    for one in record["records"]:
        scores = [f"{interval(sum(x) / len(x), *score_interval(x))}, {len(x)} samples" for x in one["scores"].values()]
        dense = "; ".join(f"{count}: {reason}" for reason, count in one["reasons"].items())
        setting = percent(one["config"]["sparsity"], 0) if one["config"] else "dense"
        rows.append([setting, *scores, percent(one["skipped"], 1), str(one["sparse"]), dense])
    caption = (
        f"{record['model']} in float32, samples of at most {record['length']} tokens as the harness makes them, greedy "
        f"answers of at most {ANSWER}, no chat template. Numbers found in percent, Wilson's 95 % intervals; share of "
        "block pairs skipped over all calls, each decoded token being a call of one query block."
    )
    header = ("sparsity", *TASKS, "block pairs skipped", "sparse calls", "dense calls, and why")
    return block(record, header, rows, caption)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or name of a decoder of transformers")
    parser.add_argument("--gguf", help="GGUF file there that holds it")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--count", type=int, default=8, help="samples of a task")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    place = {"gguf_file": options.gguf} if options.gguf else {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, **place).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model, **place)
    command = shlex.join(["python", "benchmarks/lm_eval_decoder.py", *(sys.argv[1:] if argv is None else argv)])
    about = {"study": "lm_eval_decoder", "model": Path(options.gguf or options.model).stem, "length": options.length}
    report = RecordFile(options.json, about | provenance(command, device))
    report.header["versions"] |= {name: installed_version(name) for name in ("transformers", "lm_eval")}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)  # the tasks measure their text with a tokenizer that has a name
        asked = {"tokenizer": folder, "max_seq_lengths": [options.length]}
        for config in (None, BAAttConfig(sparsity=options.sparsity)):
            lm = HFLM(pretrained=model, tokenizer=tokenizer)
            with baatt.enable(model, config) as handle:
                found = simple_evaluate(
                    lm, tasks=TASKS, limit=options.count, gen_kwargs={"max_gen_toks": ANSWER}, metadata=asked
                )
            sys.stdout.write(f"{config}\n{handle.report()}\n")
            report.add({
                "config": dataclasses.asdict(config) if config else {},
                "scores": {task: [one[str(options.length)] for one in found["samples"][task]] for task in TASKS},
                "sparse": handle.sparse_calls, "skipped": handle.sparsity, "reasons": handle.reasons,
            })  # fmt: skip
    sys.stdout.write(f"{table(report.content)}\n")


if __name__ == "__main__":
    main()
