"""Score a model on a benchmark, sparse beside dense attention; a run that was cut goes on where it was.

`baatt evaluate ruler` runs RULER's tasks; `--dial NAME=VALUE,...` spans a grid over any option of the method, the dense
layers and the sampler. Every answer is kept in a folder as it comes. Processes that torchrun or accelerate starts share
the samples; the first of them prints the tables and writes the summary.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from baatt.cli import fidelity, video, vision
from baatt.cli.errors import UsageError, resumable
from baatt.cli.options import (
    add_model_options,
    add_sparse_options,
    at_least,
    check_files,
    check_store,
    lengths,
    load_model,
    model_folder,
    read_settings,
    seed,
)
from baatt.cli.ruler_report import answer_bar, show_averages, show_length
from baatt.config import Policy
from baatt.lab.answers import AnswerStore
from baatt.lab.chat import load_chat_templates
from baatt.lab.describe import layers_name, settings_text
from baatt.lab.options import add_options, chosen, variants
from baatt.lab.plots import draw_accuracy
from baatt.lab.ranks import Ranks, leave_process_group
from baatt.lab.records import load_records, provenance, write_json
from baatt.lab.ruler.cells import RULER_SAMPLER, Cell, choose_tasks, make_cells
from baatt.lab.ruler.model import RulerModel, RulerSetup, checksums, weights_of
from baatt.lab.ruler.run import Run, same_everywhere
from baatt.lab.ruler.sources import Sources
from baatt.lab.ruler.summary import STUDY, make_averages, make_records
from baatt.lab.ruler.tasks import check_sources
from baatt.sampling import SamplerConfig

#: Options of the sampler; the others do not make sense where every answer is greedy and ends at its end of text.
SAMPLING = ("gen_length", "block_length", "steps", "threshold", "remasking", "cache")
USUAL_SAMPLER = dataclasses.replace(RULER_SAMPLER, steps=RULER_SAMPLER.gen_length)
SOURCES = ("essay", "squad", "hotpot", "words", "english_words", "sentences")
#: Benchmarks with a file of their own.
OTHERS = {"fidelity": fidelity, "video": video, "vision": vision}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One parser per benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    summary = "RULER's tasks at any length: accuracy beside dense attention, with intervals and paired tests."
    ruler = benchmarks.add_parser("ruler", help=summary, description=summary)
    fidelity.add_arguments(benchmarks.add_parser("fidelity", help=fidelity.SUMMARY, description=fidelity.SUMMARY))
    video.add_arguments(benchmarks.add_parser("video", help=video.SUMMARY, description=video.SUMMARY))
    vision.add_arguments(benchmarks.add_parser("vision", help=vision.SUMMARY, description=vision.SUMMARY))
    add = ruler.add_argument
    add("--tasks", default="all", help="by commas; needles: the eight needle tasks; all: the eleven that need no data "
        "set, and qa_1 and qa_2 where --squad and --hotpot are given (default: all)")  # fmt: skip
    add("--lengths", type=lengths, default=[4096], help="tokens of prompt and answer, by commas (default: 4096)")
    add("--count", type=at_least(1), default=200, help="samples per task and length (default: 200)")
    add("--seed", type=seed, default=42, help="which samples (default: 42)")
    add("--dial", action="append", default=[], metavar="NAME=VALUE,...", help="values to try of an option of the "
        "method, of the sampler, or of dense_layers (0+1,none); every combination is run: --dial keep_first=0,1 "
        "--dial sort=none,qk")  # fmt: skip
    add("--recall-samples", type=at_least(0), default=0, help="samples of each task on which the attention mass kept "
        "in sparse layers is measured (default: 0)")  # fmt: skip
    add("--batch-size", type=at_least(1), default=1, help="prompts answered together (default: 1)")
    add("--workers", type=at_least(0), default=0, help="processes that draw samples while others are answered "
        "(default: 0)")  # fmt: skip
    add("--json", type=Path, default=Path("ruler.json"), help="the summary (default: ruler.json)")
    add("--plot", type=Path, metavar="FILE.png", help="picture of accuracy over sparsity")
    add("--draw", type=Path, metavar="FILE.json", help="only draw a stored file to --plot, run nothing")
    add("--store", type=Path, metavar="FOLDER", help="where answers are kept, of any number of runs (default: "
        "ruler.answers beside ruler.json)")  # fmt: skip
    add("--chat", action="store_true", help="put prompts through the model's chat template, which counts in the length")
    group = ruler.add_argument_group("what the samples are made from")
    add_options(group, Sources, only=SOURCES, defaults=Sources())
    add_options(ruler.add_argument_group("sampler"), SamplerConfig, only=SAMPLING, defaults=USUAL_SAMPLER)
    add_sparse_options(ruler, many={"sparsity": [0.5], "score": None})
    add_model_options(ruler)


def run(arguments: argparse.Namespace) -> None:
    """All answers, then tables and summary; or a picture of a stored file; or the other benchmark."""
    if arguments.benchmark in OTHERS:
        OTHERS[arguments.benchmark].run(arguments)
        return
    if arguments.draw is not None:
        draw_stored(arguments)
        return
    store_folder = check_outputs(arguments)
    sources = chosen(arguments, Sources())
    cells = read_cells(arguments, sources)
    check_sources({cell.task for cell in cells}, sources, arguments.count)
    ranks = Ranks()
    try:
        arguments.device = str(ranks.device(arguments.device))
        made = provenance(arguments.command, torch.device(arguments.device))  # of what is about to run
        model = open_model(arguments, cells, sources, made)
        if model.model.config.eos_token_id is None:  # it writes all it may
            cells = [cell.sampled(stop_at_eos=False) for cell in cells]
        if not same_everywhere(model.setup, cells, arguments.count, ranks):
            raise UsageError("all processes must run the same model with the same options")
        store, numbers = AnswerStore(store_folder, ranks.rank), range(ranks.rank, arguments.count, ranks.size)
        share = Run(model, store, cells, numbers, arguments.workers, arguments.recall_samples)
        try:
            share.prepare()
        except RuntimeError as error:
            raise UsageError(f"--impl {arguments.impl} cannot run this model: {error}") from None
        longest, trained = max(cell.length for cell in cells), model.model.config.max_sequence_length
        if longest > trained and ranks.rank == 0:
            warn(f"The model was made for up to {trained} tokens, --lengths go up to {longest}: what it answers beyond "
                 "says little.")  # fmt: skip
        with (
            resumable(
                lambda: f"{sum(map(len, share.kept()))} of {len(cells) * len(numbers)} answers in {store_folder}",
                arguments.command,
            ),
            answer_bar(share.open(), Console(stderr=True), shown=ranks.rank == 0) as advance,
        ):
            share.answer(advance)
            share.measure_recalls()
        answers = share.gather(ranks)
    finally:
        leave_process_group()
    if answers is None:
        return
    header = make_header(arguments, model, cells) | made | {"processes": ranks.size}
    report(header, make_records(cells, answers), arguments)
    Console(soft_wrap=True).print(f"Summary: {arguments.json}, answers: {store_folder}", highlight=False)


def read_cells(arguments: argparse.Namespace, sources: Sources) -> list[Cell]:
    """The grid: tasks, lengths, and every combination of what several values were given for."""
    try:
        tasks = choose_tasks(arguments.tasks, sources)
    except ValueError as error:
        raise UsageError(f"--tasks: {error}") from None
    configs, policies, values = read_settings(arguments, {SamplerConfig: SAMPLING})
    return make_cells(tasks, arguments.lengths, configs, policies, variants(USUAL_SAMPLER, values[SamplerConfig]))


def open_model(
    arguments: argparse.Namespace, cells: Sequence[Cell], sources: Sources, made: Mapping[str, Any]
) -> RulerModel:
    """The model of --model on this process's device; `load_model` refuses dense layers of any cell."""
    folder = model_folder(arguments)
    layers = dict.fromkeys(layer for cell in cells for layer in cell.dense_layers)
    model, tokenizer = load_model(arguments, Policy(dense_layers=tuple(layers)))
    own = {name: getattr(arguments, name) for name in ("dtype", "seed", "impl", "batch_size", "chat")}
    setup = RulerSetup(checksums(folder), sources=sources, **own)
    return RulerModel(model, tokenizer, setup, load_chat_templates(folder), made)


def warn(text: str) -> None:
    """A line in yellow on stderr."""
    Console(stderr=True, soft_wrap=True).print(f"[yellow]{text}[/yellow]")


def check_outputs(arguments: argparse.Namespace) -> Path:
    """Refuse places that cannot be written, before anything is read; returns the folder of the answers."""
    check_files(arguments, "json", pictures=("plot",))
    folder: Path = arguments.store or arguments.json.with_suffix(".answers")
    check_store(folder)
    return folder


def make_header(arguments: argparse.Namespace, model: RulerModel, cells: Sequence[Cell]) -> dict[str, Any]:
    """What a run depends on. Of dense layers and sampler the first ones; records say where others are tried."""
    setup = dataclasses.asdict(model.setup)
    sources = {name: str(one) if isinstance(one, Path) else one for name, one in setup.pop("sources").items()}
    return {
        "study": STUDY, "model": model_folder(arguments).name,
        "weights": weights_of(setup.pop("files")), "max_sequence_length": model.model.config.max_sequence_length,
        "count": arguments.count, **setup, "sampler": dataclasses.asdict(cells[0].sampler),
        "dense_layers": next((cell.dense_layers for cell in cells if cell.config is not None), []), "sources": sources,
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
        warn("No attention call skipped a block: --dense-layers keep every layer dense, or the lengths have too few "
             "blocks of --block-size.")  # fmt: skip
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
