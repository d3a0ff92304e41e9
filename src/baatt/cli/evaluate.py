"""Score a model on a benchmark, sparse beside dense attention; a run that was cut goes on where it was.

`baatt evaluate ruler` runs RULER's tasks. Every answer is kept in a folder as it comes. Processes that torchrun or
accelerate starts share the samples; the first of them prints the tables and writes the summary.
"""

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from baatt.analysis.reports import commit_here, device_name, versions_here
from baatt.analysis.rivals import RIVALS, rival_attention
from baatt.assets import shipped_model
from baatt.backend import IMPLS
from baatt.cli.dials import add_dial_options
from baatt.cli.errors import UsageError
from baatt.cli.options import (
    PRESETS,
    Setting,
    add_model_options,
    check_folders,
    check_memory,
    load_model,
    read_layers,
    read_setting,
)
from baatt.cli.ruler_tables import AnswerBar, settings_text, show_averages, show_length
from baatt.config import Policy
from baatt.evaluation.ablation import Cell, make_cells
from baatt.evaluation.chat import load_chat_templates
from baatt.evaluation.retrieval import RETRIEVAL_SAMPLER
from baatt.evaluation.ruler_answers import Respondent, RulerSetup, checksums, replace_sparse
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
from baatt.lab.ranks import Ranks, leave_process_group
from baatt.lab.ruler.sources import SENTENCES, Sources
from baatt.lab.ruler.tasks import check_sources
from baatt.lab.ruler.words import POOLS
from baatt.sampling import CACHES, REMASKING, SamplerConfig, WrapAttention


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
    ruler.add_argument("--lengths", default="4096", help="tokens of prompt and answer, by commas (default: 4096)")
    ruler.add_argument("--count", type=int, default=200, help="samples per task and length (default: 200)")
    ruler.add_argument("--seed", type=int, default=42, help="which samples (default: 42)")
    ruler.add_argument("--batch-size", type=int, default=1, help="prompts answered together (default: 1)")
    ruler.add_argument(
        "--workers", type=int, default=0, help="processes that draw samples while others are answered (default: 0)"
    )
    ruler.add_argument("--json", type=Path, default=Path("ruler.json"), help="the summary (default: ruler.json)")
    ruler.add_argument(
        "--store", type=Path, metavar="FOLDER",
        help="where answers are kept, of any number of runs (default: ruler.answers beside ruler.json)",
    )  # fmt: skip
    _add_source_options(ruler)
    _add_sampler_options(ruler)
    _add_sparse_options(ruler)
    add_model_options(ruler)


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the samples are made from")
    group.add_argument(
        "--essay", type=Path, help="RULER's PaulGrahamEssays.json, a text file or a folder of them (default: our text)"
    )
    group.add_argument("--squad", type=Path, metavar="FILE", help="SQuAD's dev-v2.0.json, for qa_1")
    group.add_argument("--hotpot", type=Path, metavar="FILE", help="hotpot_dev_distractor_v1.json, for qa_2")
    group.add_argument(
        "--words", choices=list(POOLS), default="heldout",
        help="words of keys and lists; heldout: unseen by the shipped model; wonderwords: RULER's (default: heldout)",
    )  # fmt: skip
    group.add_argument("--english-words", type=Path, metavar="FILE", help="RULER's english_words.json, for long lists")
    group.add_argument(
        "--sentences", choices=list(SENTENCES), default="regex", help="how essays are cut (default: regex)"
    )


def _add_sampler_options(parser: argparse.ArgumentParser) -> None:
    group, usual = parser.add_argument_group("sampler"), RETRIEVAL_SAMPLER
    group.add_argument(
        "--gen-length", type=int, default=usual.gen_length,
        help=f"most tokens to generate; a task uses what RULER lets it write (default: {usual.gen_length})",
    )  # fmt: skip
    group.add_argument(
        "--block-length", type=int, default=usual.block_length,
        help=f"tokens denoised together (default: {usual.block_length})",
    )  # fmt: skip
    group.add_argument(
        "--steps", type=int, default=usual.gen_length,
        help="denoising steps of --gen-length tokens, with a threshold the most that are taken; shorter answers take "
        f"their share (default: {usual.gen_length}, at least a token a step)",
    )  # fmt: skip
    group.add_argument(
        "--threshold", type=_read_threshold, default=usual.threshold,
        help=f'fill every position surer than this at once, or "none" (default: {usual.threshold})',
    )  # fmt: skip
    group.add_argument(
        "--remasking", choices=list(REMASKING), default=usual.remasking,
        help=f"which positions of a block are filled first (default: {usual.remasking})",
    )  # fmt: skip
    group.add_argument(
        "--cache", choices=list(CACHES), default=usual.cache, help="keys and values reused in a block (default: none)"
    )
    group.add_argument(
        "--chat", action="store_true", help="put prompts through the model's chat template, which counts in the length"
    )


def _add_sparse_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sparse attention")
    group.add_argument(
        "--sparsity", default="0.5",
        help="shares of key blocks skipped per query block, by commas; dense attention always comes first, and is what "
        "0 means (default: 0.5)",
    )  # fmt: skip
    group.add_argument(
        "--score", default="covariance", help=f"by commas, of {', '.join(RIVALS)} (default: covariance, the operator's)"
    )
    group.add_argument(
        "--preset", choices=list(PRESETS), default="safe", help="the dials below, together (default: safe)"
    )
    add_dial_options(group)
    group.add_argument("--dense-layers", type=read_layers, help='layers that stay dense, e.g. "0,1,-1" or "none"')
    group.add_argument("--impl", choices=IMPLS, default="auto", help="implementation (default: auto)")


def run(arguments: argparse.Namespace) -> None:
    """The chosen benchmark."""
    arguments.evaluate(arguments)


def run_ruler(arguments: argparse.Namespace) -> None:
    """All answers, then tables and summary."""
    store_folder = check_outputs(arguments)
    sources, sampler, setting = read_sources(arguments), read_sampler(arguments), read_dials(arguments)
    cells = read_cells(arguments, setting, sources)
    check_sources({cell.task for cell in cells}, sources)
    check_questions(cells, arguments.count, sources)
    commit = commit_here()  # of what is about to run
    processes = Ranks()
    try:
        arguments.device = str(processes.device(arguments.device))
        respondent = open_respondent(arguments, sources, sampler, setting.policy, commit)
        check_model(respondent, cells, processes.rank)
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

    def replacement(cell: Cell) -> WrapAttention | None:
        if cell.config is None or cell.score == "covariance":
            return None
        return functools.partial(replace_sparse, rival_attention(cell.score, cell.config, arguments.impl))

    if works:  # answers of a larger machine can be counted on a small one
        tokens = respondent.setup.batch_size * max(work.length for work in works)
        check_memory(respondent.model.config, tokens, arguments.device)
    for work in works:
        respondent.check(work.task, work.length)
    try:
        for cell in {(cell.config, cell.score): cell for work in works for cell, _ in work.cells}.values():
            respondent.warm_up(cell, replacement(cell))
    except RuntimeError as error:
        raise UsageError(f"--impl {arguments.impl} cannot run this model: {error}") from None
    with (
        closing(draw_ahead(works, respondent, arguments.workers)) as drawn,
        AnswerBar(works, Console(stderr=True), shown=processes.rank == 0) as bar,
    ):
        answer_work(works, drawn, respondent, store, replacement, bar.advance)


def read_cells(arguments: argparse.Namespace, setting: Setting, sources: Sources) -> list[Cell]:
    """Every task at every length, from short to long, with dense attention and every sparse setting.

    Raises:
        UsageError: an unknown task or score, values that are no numbers, a task without its file.
        ValueError: a sparsity outside its range.
    """
    try:
        tasks = choose_tasks(arguments.tasks, sources)
    except ValueError as error:
        raise UsageError(f"--tasks: {error}") from None
    lengths = [int(length) for length in _read_numbers("--lengths", arguments.lengths, int)]
    if min(lengths) < 1:
        raise UsageError(f"--lengths must be positive, got {arguments.lengths}")
    scores = list(dict.fromkeys(arguments.score.split(",")))
    if unknown := [name for name in scores if name not in RIVALS]:
        raise UsageError(f"--score must be of {','.join(RIVALS)}, got {','.join(unknown)}")
    dials = {name: [value] for name, value in dataclasses.asdict(setting.config).items() if name != "score"}
    dials["sparsity"] = [value for value in _read_numbers("--sparsity", arguments.sparsity, float) if value != 0]
    return [cell for length in lengths for cell in make_cells(tasks, [length], dials, scores)]


def read_dials(arguments: argparse.Namespace) -> Setting:
    """The preset with the dials that were given; the sparsity comes from the cells."""
    return read_setting(argparse.Namespace(**vars(arguments) | {"sparsity": None}))


def read_sources(arguments: argparse.Namespace) -> Sources:
    """What the samples are made from."""
    return Sources(
        words=arguments.words, english_words=arguments.english_words, essay=arguments.essay,
        sentences=arguments.sentences, squad=arguments.squad, hotpot=arguments.hotpot,
    )  # fmt: skip


def read_sampler(arguments: argparse.Namespace) -> SamplerConfig:
    """RULER is answered greedily: the dials that have an option, the rest as for the shipped model."""
    names = ("steps", "gen_length", "block_length", "threshold", "remasking", "cache")
    return dataclasses.replace(RETRIEVAL_SAMPLER, **{name: getattr(arguments, name) for name in names})


def open_respondent(
    arguments: argparse.Namespace, sources: Sources, sampler: SamplerConfig, policy: Policy, commit: str | None
) -> Respondent:
    """The model of --model on this process's device; one without an end-of-text token writes all it may."""
    folder = arguments.model or shipped_model()
    model, tokenizer = load_model(arguments)
    if model.config.eos_token_id is None:
        sampler = dataclasses.replace(sampler, stop_at_eos=False)
    setup = RulerSetup(
        checksums(folder), arguments.dtype, arguments.seed, sources, sampler, policy, arguments.impl,
        arguments.batch_size, arguments.chat,
    )  # fmt: skip
    stamp = {"commit": commit, "device": device_name(torch.device(arguments.device))}
    return Respondent(model, tokenizer, setup, load_chat_templates(folder), stamp)


def check_model(respondent: Respondent, cells: Sequence[Cell], rank: int) -> None:
    """Refuse what does not fit the model; warn of lengths it was not trained for.

    Raises:
        UsageError: layers that it does not have.
    """
    config, layers = respondent.model.config, respondent.setup.policy.dense_layers
    if any(not -config.n_layers <= layer < config.n_layers for layer in layers):
        raise UsageError(
            f"--dense-layers must be numbers from {-config.n_layers} to {config.n_layers - 1}, got {layers}"
        )
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
    for name, least in (("count", 1), ("batch_size", 1), ("workers", 0)):
        if getattr(arguments, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    check_folders(arguments.json)
    if arguments.json.is_dir():
        raise UsageError(f"--json must be a file, {arguments.json} is a folder")
    folder: Path = arguments.store or arguments.json.with_suffix(".answers")
    for name, path in (("--json", arguments.json.parent), ("--store", folder)):
        nearest = next(one for one in (path, *path.parents) if one.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UsageError(f"{name} must lie in a folder that can be written, {nearest} is none")
    return folder


def make_header(
    arguments: argparse.Namespace, respondent: Respondent, setting: Setting, commit: str | None
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


def _read_numbers(option: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    """Numbers by commas, each once, from small to large."""
    try:
        return sorted({kind(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f'{option} must be numbers by commas, got "{text}"') from None


def _read_threshold(text: str) -> float | None:
    """A type for argparse."""
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be a probability or "none", got {text!r}') from None
