"""Score a model on a benchmark, sparse beside dense attention; a run that was cut goes on where it was.

`baatt evaluate ruler` runs RULER's tasks. Every answer is kept in a folder as it comes. Processes that torchrun or
accelerate starts share the samples; the first of them prints the tables and writes the summary.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from baatt.analysis.rivals import RIVALS
from baatt.assets import shipped_model
from baatt.cli.errors import UsageError
from baatt.cli.options import (
    add_model_options,
    add_sparse_options,
    at_least,
    check_files,
    lengths,
    load_model,
    names_of,
    read_configs,
    read_preset,
)
from baatt.cli.ruler_tables import AnswerBar, settings_text, show_averages, show_length
from baatt.config import Policy, Preset
from baatt.evaluation.ablation import Cell, make_cells
from baatt.evaluation.chat import load_chat_templates
from baatt.evaluation.retrieval import RETRIEVAL_SAMPLER
from baatt.evaluation.ruler_answers import Respondent, RulerSetup, checksums
from baatt.evaluation.ruler_run import (
    Work,
    answer_work,
    check_questions,
    choose_tasks,
    draw_ahead,
    gather_answers,
    open_work,
    same_everywhere,
)
from baatt.evaluation.ruler_summary import STUDY, make_averages, make_records
from baatt.lab.answers import AnswerStore
from baatt.lab.loading import check_memory
from baatt.lab.options import add_options, chosen
from baatt.lab.ranks import Ranks, leave_process_group
from baatt.lab.records import commit_here, device_name, versions_here
from baatt.lab.ruler.sources import Sources
from baatt.lab.ruler.tasks import check_sources
from baatt.sampling import SamplerConfig

#: RULER is answered greedily: the sampler's options, and where they begin. A task uses what RULER lets it write.
SAMPLER = ("gen_length", "block_length", "steps", "threshold", "remasking", "cache")
USUAL = dataclasses.replace(RETRIEVAL_SAMPLER, steps=RETRIEVAL_SAMPLER.gen_length)
SOURCES = ("essay", "squad", "hotpot", "words", "english_words", "sentences")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One parser per benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    summary = "RULER's tasks at any length: accuracy beside dense attention, with intervals and paired tests."
    ruler = benchmarks.add_parser("ruler", help=summary, description=summary)
    ruler.set_defaults(evaluate=run_ruler)
    ruler.add_argument(
        "--tasks", default="all",
        help="by commas; needles: the eight needle tasks; all: the eleven that need no data set, and qa_1 and qa_2 "
        "where --squad and --hotpot are given (default: all)",
    )  # fmt: skip
    ruler.add_argument(
        "--lengths", type=lengths, default=[4096], help="tokens of prompt and answer, by commas (default: 4096)"
    )
    ruler.add_argument("--count", type=at_least(1), default=200, help="samples per task and length (default: 200)")
    ruler.add_argument("--seed", type=int, default=42, help="which samples (default: 42)")
    ruler.add_argument("--batch-size", type=at_least(1), default=1, help="prompts answered together (default: 1)")
    ruler.add_argument(
        "--workers",
        type=at_least(0),
        default=0,
        help="processes that draw samples while others are answered (default: 0)",
    )
    ruler.add_argument("--json", type=Path, default=Path("ruler.json"), help="the summary (default: ruler.json)")
    ruler.add_argument(
        "--store", type=Path, metavar="FOLDER",
        help="where answers are kept, of any number of runs (default: ruler.answers beside ruler.json)",
    )  # fmt: skip
    add_options(ruler.add_argument_group("samples"), Sources, only=SOURCES, defaults=Sources())
    sampler = ruler.add_argument_group("sampler")
    add_options(sampler, SamplerConfig, only=SAMPLER, defaults=USUAL)
    sampler.add_argument(
        "--chat", action="store_true", help="put prompts through the model's chat template, which counts in the length"
    )
    _add_sparse_options(ruler)
    add_model_options(ruler)


def _add_sparse_options(parser: argparse.ArgumentParser) -> None:
    # Dense attention always comes first, and is what a sparsity of 0 means.
    add_sparse_options(parser, many={"sparsity": (0.5,)}, without=("score",))
    parser.add_argument(
        "--score", type=names_of(RIVALS), default=["covariance"],
        help=f"by commas, of {', '.join(RIVALS)} (default: covariance, the operator's)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """The chosen benchmark."""
    arguments.evaluate(arguments)


def run_ruler(arguments: argparse.Namespace) -> None:
    """All answers, then tables and summary."""
    store_folder = check_outputs(arguments)
    sources, sampler, setting = chosen(arguments, Sources()), chosen(arguments, USUAL), read_preset(arguments)
    cells = read_cells(arguments, sources)
    check_sources({cell.task for cell in cells}, sources)
    check_questions(cells, arguments.count, sources)
    commit = commit_here()  # of what is about to run
    processes = Ranks()
    try:
        arguments.device = str(processes.device(arguments.device))
        respondent = open_respondent(arguments, sources, sampler, setting.policy, commit)
        warn_of_lengths(respondent, cells, processes.rank)
        if not same_everywhere(respondent.setup, cells, arguments.count, processes):
            raise UsageError("all processes must run the same model with the same options")
        store = AnswerStore(store_folder, processes.rank)
        numbers = range(processes.rank, arguments.count, processes.size)
        ask(arguments, open_work(cells, numbers, respondent.setup, store), respondent, store, processes)
        answers = gather_answers(cells, numbers, respondent.setup, store, processes)
    finally:
        leave_process_group()
    if answers is None:
        return
    records = make_records(cells, answers, setting.policy)
    header = make_header(arguments, respondent, setting, commit) | {"processes": processes.size}
    report(header, records, arguments.json)
    Console(soft_wrap=True).print(f"Summary: {arguments.json}, answers: {store_folder}", highlight=False)


def ask(
    arguments: argparse.Namespace,
    works: Sequence[Work],
    respondent: Respondent,
    store: AnswerStore,
    processes: Ranks,
) -> None:
    """Answer what is open, with a bar on the first process.

    Raises:
        UsageError: a length that does not fit into memory, or an implementation that cannot do this model's work.
    """
    if works:  # answers of a larger machine can be counted on a small one
        tokens = respondent.setup.batch_size * max(work.length for work in works)
        check_memory(respondent.model.config, tokens, torch.device(arguments.device))
    for work in works:
        respondent.check(work.task, work.length)
    try:
        for cell in {(cell.config, cell.score): cell for work in works for cell, _ in work.cells}.values():
            respondent.warm_up(cell)
    except RuntimeError as error:
        raise UsageError(f"--impl {arguments.impl} cannot run this model: {error}") from None
    with (
        closing(draw_ahead(works, respondent, arguments.workers)) as drawn,
        AnswerBar(works, Console(stderr=True), shown=processes.rank == 0) as bar,
    ):
        answer_work(works, drawn, respondent, store, bar.advance)


def read_cells(arguments: argparse.Namespace, sources: Sources) -> list[Cell]:
    """Every task at every length, from short to long, with dense attention and every sparse setting.

    Raises:
        UsageError: an unknown task or score, values that are no numbers, a task without its file.
        ValueError: a sparsity outside its range.
    """
    try:
        tasks = choose_tasks(arguments.tasks, sources)
    except ValueError as error:
        raise UsageError(f"--tasks: {error}") from None
    fields = [dataclasses.asdict(config) for config in sorted(read_configs(arguments), key=lambda one: one.sparsity)]
    options = {name: list(dict.fromkeys(one[name] for one in fields)) for name in fields[0] if name != "score"}
    options["sparsity"] = [value for value in options["sparsity"] if value != 0]
    return [
        cell for length in arguments.lengths for cell in make_cells(tasks, [length], options, arguments.score)
    ]  # fmt: skip


def open_respondent(
    arguments: argparse.Namespace, sources: Sources, sampler: SamplerConfig, policy: Policy, commit: str | None
) -> Respondent:
    """The model of --model on this process's device; one without an end-of-text token writes all it may."""
    folder = arguments.model or shipped_model()
    model, tokenizer = load_model(arguments, policy)
    if model.config.eos_token_id is None:
        sampler = dataclasses.replace(sampler, stop_at_eos=False)
    setup = RulerSetup(
        checksums(folder), arguments.dtype, arguments.seed, sources, sampler, policy, arguments.impl,
        arguments.batch_size, arguments.chat,
    )  # fmt: skip
    stamp = {"commit": commit, "device": device_name(torch.device(arguments.device))}
    return Respondent(model, tokenizer, setup, load_chat_templates(folder), stamp)


def warn_of_lengths(respondent: Respondent, cells: Sequence[Cell], rank: int) -> None:
    """Warn of lengths that the model was not trained for."""
    config = respondent.model.config
    longest = max(cell.length for cell in cells)
    if longest > config.max_sequence_length and rank == 0:
        Console(stderr=True, soft_wrap=True).print(
            f"[yellow]The model was made for up to {config.max_sequence_length} tokens, --lengths go up to {longest}: "
            "what it answers beyond says little.[/yellow]"
        )  # fmt: skip


def check_outputs(arguments: argparse.Namespace) -> Path:
    """Refuse counts and places that cannot be, before anything is read; returns the folder of the answers.

    Raises:
        UsageError: a number too small, or a place that cannot be written.
    """
    check_files(arguments, "json")
    folder: Path = arguments.store or arguments.json.with_suffix(".answers")
    nearest = next(one for one in (folder, *folder.parents) if one.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"--store must lie in a folder that can be written, {nearest} is none")
    return folder


def make_header(
    arguments: argparse.Namespace, respondent: Respondent, setting: Preset, commit: str | None
) -> dict[str, Any]:
    """How to repeat the run, and what it depends on."""
    setup, device = respondent.setup, torch.device(arguments.device)
    return {
        "study": STUDY, "command": arguments.command, "commit": commit, "device": device_name(device),
        "versions": versions_here(device), "model": arguments.model.name if arguments.model else "needle-18m",
        "weights": " ".join(sum_ for name, sum_ in setup.files.items() if name.endswith(".safetensors")),
        "max_sequence_length": respondent.model.config.max_sequence_length, "dtype": setup.dtype, "seed": setup.seed,
        "count": arguments.count, "batch_size": setup.batch_size, "impl": setup.impl, "chat": setup.chat,
        "sampler": dataclasses.asdict(setup.sampler), "dense_layers": list(setting.policy.dense_layers),
        "sources": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(setup.sources).items()
        },
    }  # fmt: skip


def report(header: dict[str, Any], records: list[dict[str, Any]], path: Path) -> None:
    """Print the tables and write the summary; a reader never sees half a file."""
    averages = make_averages(records)
    # What is piped into a file is not folded at 80 columns.
    console = Console(width=None if Console().is_terminal else 200)
    console.print(settings_text(header, records), highlight=False, soft_wrap=True)
    for length in dict.fromkeys(one["length"] for one in records):
        console.print(show_length(header, records, averages, length), highlight=False)
    console.print(show_averages(averages), highlight=False)
    sparse = [one for one in records if one["config"]]
    if sparse and not any(one["sparsity_achieved"] for one in sparse):
        Console(stderr=True, soft_wrap=True).print(
            "[yellow]No attention call skipped a block: --dense-layers keep every layer dense, or the lengths have too "
            "few blocks of --block-size.[/yellow]"
        )  # fmt: skip
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(header | {"averages": averages, "records": records}) + "\n", encoding="utf-8")
    partial.replace(path)
