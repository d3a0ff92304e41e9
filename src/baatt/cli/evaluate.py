"""Score a model on a benchmark, sparse beside dense attention; a run that was cut goes on where it was.

`baatt evaluate ruler` runs RULER's tasks; `--dial NAME=VALUE,...` spans a grid over any option of the method, the dense
layers and the sampler. Every answer is kept in a folder as it comes. Processes that torchrun or accelerate starts share
the samples; the first of them prints the tables and writes the summary.
"""

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from baatt.assets import shipped_model
from baatt.cli.errors import UsageError
from baatt.cli.options import add_model_options, add_sparse_options, at_least, check_files, lengths, load_model
from baatt.cli.ruler_report import AnswerBar, show_averages, show_length
from baatt.config import PRESETS, BAAttConfig, Policy
from baatt.lab.answers import AnswerStore
from baatt.lab.chat import load_chat_templates
from baatt.lab.describe import layers_name, settings_text
from baatt.lab.loading import check_memory
from baatt.lab.options import add_options, chosen, given, options_of, read_dials, variants
from baatt.lab.plots import draw_accuracy
from baatt.lab.ranks import Ranks, leave_process_group
from baatt.lab.records import load_records, provenance, write_json
from baatt.lab.ruler.cells import RULER_SAMPLER, Cell, check_questions, choose_tasks, make_cells
from baatt.lab.ruler.model import RulerModel, RulerSetup, checksums, weights_of
from baatt.lab.ruler.run import (
    RECALL,
    Work,
    answer_work,
    gather_answers,
    measure_recalls,
    open_work,
    prepare,
    same_everywhere,
)
from baatt.lab.ruler.sources import Sources
from baatt.lab.ruler.summary import STUDY, make_averages, make_records
from baatt.lab.ruler.tasks import check_sources
from baatt.sampling import SamplerConfig

#: Options of the sampler; the others do not make sense where every answer is greedy and ends at its end of text.
SAMPLING = ("gen_length", "block_length", "steps", "threshold", "remasking", "cache")
USUAL_SAMPLER = dataclasses.replace(RULER_SAMPLER, steps=RULER_SAMPLER.gen_length)
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
    ruler.add_argument(
        "--dial", action="append", default=[], metavar="NAME=VALUE,...",
        help="values to try of an option of the method, of the sampler, or of dense_layers (0+1,none); every "
        "combination is run: --dial beta=0,0.5 --dial sort=none,qk",
    )  # fmt: skip
    ruler.add_argument(
        "--recall-samples", type=at_least(0), default=0,
        help="samples of each task on which the attention mass kept in sparse layers is measured (default: 0)",
    )  # fmt: skip
    ruler.add_argument("--batch-size", type=at_least(1), default=1, help="prompts answered together (default: 1)")
    ruler.add_argument(
        "--workers", type=at_least(0), default=0,
        help="processes that draw samples while others are answered (default: 0)",
    )  # fmt: skip
    ruler.add_argument("--json", type=Path, default=Path("ruler.json"), help="the summary (default: ruler.json)")
    ruler.add_argument("--plot", type=Path, metavar="FILE.png", help="picture of accuracy over sparsity")
    ruler.add_argument("--draw", type=Path, metavar="FILE.json", help="only draw a stored file to --plot, run nothing")
    ruler.add_argument(
        "--store", type=Path, metavar="FOLDER",
        help="where answers are kept, of any number of runs (default: ruler.answers beside ruler.json)",
    )  # fmt: skip
    ruler.add_argument(
        "--chat", action="store_true", help="put prompts through the model's chat template, which counts in the length"
    )
    group = ruler.add_argument_group("what the samples are made from")
    add_options(group, Sources, only=SOURCES, defaults=Sources())
    add_options(ruler.add_argument_group("sampler"), SamplerConfig, only=SAMPLING, defaults=USUAL_SAMPLER)
    add_sparse_options(ruler, many={"sparsity": [0.5], "score": None})
    add_model_options(ruler)


def run(arguments: argparse.Namespace) -> None:
    """The chosen benchmark."""
    arguments.evaluate(arguments)


def run_ruler(arguments: argparse.Namespace) -> None:
    """All answers, then tables and summary; or a picture of a stored file."""
    if arguments.draw is not None:
        draw_stored(arguments)
        return
    store_folder = check_outputs(arguments)
    sources = chosen(arguments, Sources())
    cells = read_cells(arguments, sources)
    check_sources({cell.task for cell in cells}, sources)
    check_questions({cell.task for cell in cells}, arguments.count, sources)
    ranks = Ranks()
    try:
        arguments.device = str(ranks.device(arguments.device))
        made = provenance(arguments.command, torch.device(arguments.device))  # of what is about to run
        model = open_model(arguments, cells, sources, made)
        if model.model.config.eos_token_id is None:  # it writes all it may
            cells = [cell._replace(sampler=dataclasses.replace(cell.sampler, stop_at_eos=False)) for cell in cells]
        warn_of_length(model, cells, ranks.rank)
        if not same_everywhere(model.setup, cells, arguments.count, ranks):
            raise UsageError("all processes must run the same model with the same options")
        store = AnswerStore(store_folder, ranks.rank)
        numbers = range(ranks.rank, arguments.count, ranks.size)
        ask(arguments, cells, numbers, model, store, ranks)
        answers = gather_answers(cells, numbers, model.setup, store, ranks, arguments.recall_samples)
    finally:
        leave_process_group()
    if answers is None:
        return
    header = make_header(arguments, model, cells) | made | {"processes": ranks.size}
    report(header, make_records(cells, answers), arguments)
    Console(soft_wrap=True).print(f"Summary: {arguments.json}, answers: {store_folder}", highlight=False)


def read_cells(arguments: argparse.Namespace, sources: Sources) -> list[Cell]:
    """The grid: tasks, lengths, and every combination of what several values were given for.

    Raises:
        UsageError: an unknown task.
        TypeError, ValueError: a value that an option does not take.
    """
    try:
        tasks = choose_tasks(arguments.tasks, sources)
    except ValueError as error:
        raise UsageError(f"--tasks: {error}") from None
    preset, dials = PRESETS[arguments.preset], split_dials(arguments.dial)
    values = given(arguments, BAAttConfig) | dials[BAAttConfig]
    sparsities = sorted({value for value in values.pop("sparsity") if value != 0})  # 0 is dense attention, there anyway
    configs = [one for config in variants(preset.config, values) for one in variants(config, {"sparsity": sparsities})]
    policies = variants(preset.policy, given(arguments, Policy) | dials[Policy])
    samplers = variants(USUAL_SAMPLER, given(arguments, SamplerConfig) | dials[SamplerConfig])
    return make_cells(tasks, arguments.lengths, configs, policies, samplers)


def split_dials(texts: Sequence[str]) -> dict[type, dict[str, list[Any]]]:
    """The values of --dial by the dataclass that has the option.

    Raises:
        UsageError: an unknown option.
        ValueError: as `read_dials`.
    """
    known: dict[type, Sequence[str]] = {
        BAAttConfig: list(options_of(BAAttConfig)), Policy: ["dense_layers"], SamplerConfig: SAMPLING
    }  # fmt: skip
    parts: dict[type, list[str]] = {cls: [] for cls in known}
    for text in texts:
        name = text.partition("=")[0]
        owner = next((cls for cls, names in known.items() if name in names), None)
        if owner is None:
            names = ", ".join(name for names in known.values() for name in names)
            raise UsageError(f"--dial must be NAME=VALUE,... once for each of {names}, got {text!r}")
        parts[owner].append(text)
    return {cls: read_dials(found, cls) for cls, found in parts.items()}


def open_model(
    arguments: argparse.Namespace, cells: Sequence[Cell], sources: Sources, made: Mapping[str, Any]
) -> RulerModel:
    """The model of --model on this process's device.

    Raises:
        UsageError: as `load_model`, for the dense layers of any cell.
    """
    folder = arguments.model or shipped_model()
    layers = dict.fromkeys(layer for cell in cells for layer in cell.dense_layers)
    model, tokenizer = load_model(arguments, Policy(dense_layers=tuple(layers)))
    setup = RulerSetup(
        checksums(folder), arguments.dtype, arguments.seed, sources, arguments.impl, arguments.batch_size,
        arguments.chat,
    )  # fmt: skip
    stamp = {name: made[name] for name in ("commit", "device")}
    return RulerModel(model, tokenizer, setup, load_chat_templates(folder), stamp)


def ask(
    arguments: argparse.Namespace,
    cells: Sequence[Cell],
    numbers: Sequence[int],
    model: RulerModel,
    store: AnswerStore,
    ranks: Ranks,
) -> None:
    """Answer and measure what is open, with a bar on the first process.

    Raises:
        UsageError: an implementation that cannot do this model's work.
        ValueError: a length that does not fit into memory.
    """
    works = open_work(cells, numbers, model.setup, store)
    sparse = [cell for cell in cells if cell.config is not None]
    some = [number for number in numbers if number < arguments.recall_samples]
    recalls = open_work(sparse, some, model.setup, store, RECALL)
    refuse_what_cannot_run(arguments, works, model)
    with AnswerBar(works, Console(stderr=True), shown=ranks.rank == 0) as bar:
        answer_work(works, model, store, workers=arguments.workers, watch=bar.advance)
    measure_recalls(recalls, model, store, arguments.workers)


def refuse_what_cannot_run(arguments: argparse.Namespace, works: Sequence[Work], model: RulerModel) -> None:
    """As `ask` raises; answers of a larger machine can be counted on a small one."""
    if works:
        tokens = model.setup.batch_size * max(work.length for work in works)
        check_memory(model.model.config, tokens, model.device)
    try:
        prepare(works, model)
    except RuntimeError as error:
        raise UsageError(f"--impl {arguments.impl} cannot run this model: {error}") from None


def warn_of_length(model: RulerModel, cells: Sequence[Cell], rank: int) -> None:
    """Say that the model was not trained for a length."""
    longest, trained = max(cell.length for cell in cells), model.model.config.max_sequence_length
    if longest > trained and rank == 0:
        Console(stderr=True, soft_wrap=True).print(
            f"[yellow]The model was made for up to {trained} tokens, --lengths go up to {longest}: what it answers "
            "beyond says little.[/yellow]"
        )  # fmt: skip


def check_outputs(arguments: argparse.Namespace) -> Path:
    """Refuse places that cannot be written, before anything is read; returns the folder of the answers.

    Raises:
        UsageError: such a place.
    """
    check_files(arguments, "json", pictures=("plot",))
    folder: Path = arguments.store or arguments.json.with_suffix(".answers")
    nearest = next(one for one in (folder, *folder.parents) if one.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"--store must lie in a folder that can be written, {nearest} is none")
    return folder


def make_header(arguments: argparse.Namespace, model: RulerModel, cells: Sequence[Cell]) -> dict[str, Any]:
    """What a run depends on. Of dense layers and sampler the first ones; records say where others are tried."""
    setup = model.setup
    return {
        "study": STUDY, "model": arguments.model.name if arguments.model else "needle-18m",
        "weights": weights_of(setup.files), "max_sequence_length": model.model.config.max_sequence_length,
        "dtype": setup.dtype, "seed": setup.seed, "count": arguments.count, "batch_size": setup.batch_size,
        "impl": setup.impl, "chat": setup.chat, "sampler": dataclasses.asdict(cells[0].sampler),
        "dense_layers": next((cell.dense_layers for cell in cells if cell.config is not None), []),
        "sources": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(setup.sources).items()
        },
    }  # fmt: skip


def report(header: dict[str, Any], records: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the tables, write the summary, draw the picture."""
    averages = make_averages(records)
    # What is piped into a file is not folded at 80 columns.
    console = Console(width=None if Console().is_terminal else 200)
    console.print(settings_text(header, records), highlight=False, soft_wrap=True)
    for length in dict.fromkeys(one["length"] for one in records):
        console.print(show_length(header, records, averages, length).rich(), highlight=False)
    console.print(show_averages(averages).rich(), highlight=False)
    sparse = [one for one in records if one["config"]]
    if sparse and not any(one["sparsity_achieved"] for one in sparse):
        Console(stderr=True, soft_wrap=True).print(
            "[yellow]No attention call skipped a block: --dense-layers keep every layer dense, or the lengths have too "
            "few blocks of --block-size.[/yellow]"
        )  # fmt: skip
    write_json(header | {"averages": averages, "records": records}, arguments.json, indent=None)
    if arguments.plot is not None:
        draw(header, records, arguments.plot)


def draw_stored(arguments: argparse.Namespace) -> None:
    """The picture of `--draw`."""
    if arguments.plot is None:
        raise UsageError("--draw needs --plot FILE.png")
    check_files(arguments, pictures=("plot",))
    made_by = "baatt evaluate ruler"
    stored = load_records(arguments.draw, ("records", "model", "count", "dense_layers"), made_by)
    try:
        draw(stored, stored["records"], arguments.plot)
    except (KeyError, TypeError) as error:
        raise UsageError(f"--draw {arguments.draw} must be a file of {made_by}, got {error!r}") from None


def draw(header: Mapping[str, Any], records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy over sparsity."""
    layers = layers_name(header["dense_layers"])
    draw_accuracy(records, f"{header['model']}, {header['count']} samples a cell, dense layers: {layers}", path)
    Console().print(f"Picture: {path}", soft_wrap=True)
