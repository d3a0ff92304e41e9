"""`baatt evaluate vision`: questions about photos and clips, answered by a small model with sparse and dense attention.

Prints a row for each setting, with the averages of both kinds of questions, and writes records like those of RULER.
Every answer is kept in a folder as it comes.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from baatt.assets import VISION, shipped_vision_model
from baatt.cli.errors import UsageError, resumable
from baatt.cli.options import (
    add_model_options,
    add_sparse_options,
    at_least,
    check_files,
    check_store,
    names_of,
    read_place,
    read_settings,
    seed,
)
from baatt.cli.ruler_report import against_dense, answer_bar, score, setting_names
from baatt.lab import loading
from baatt.lab.answers import AnswerStore
from baatt.lab.records import provenance, write_json
from baatt.lab.ruler.cells import Cell, make_cells
from baatt.lab.ruler.model import checksums, weights_of
from baatt.lab.ruler.run import Run
from baatt.lab.ruler.summary import make_averages, make_records, setting_of
from baatt.lab.tables import Table, percent
from baatt.lab.vision.media import PIXELS, read
from baatt.lab.vision.model import VisionModel
from baatt.lab.vision.scenes import CLIP_TASKS, PHOTO_TASKS, TASKS
from baatt.lab.vision.study import VISION_SAMPLER, VisionReader, VisionSetup, lengths_of

SUMMARY = "Questions about real photos and clips with signs planted in them: accuracy beside dense attention."
KINDS = {"photos": [*PHOTO_TASKS], "clips": [*CLIP_TASKS]}
Record = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the evaluation."""
    add = parser.add_argument
    add("--tasks", type=names_of(TASKS, {"all": [*TASKS], **KINDS}), default=[*TASKS], help="by commas, of "
        f"{', '.join(TASKS)}; photos or clips: all of that kind (default: all)")  # fmt: skip
    add("--frames", type=frames, default=[48], help="of a clip, by commas, 4 to 72 (default: 48)")
    add("--count", type=at_least(1), default=20, help="questions per task and length (default: 20, an hour of a CPU)")
    add("--seed", type=seed, default=42, help="which questions (default: 42)")
    add("--dial", action="append", default=[], metavar="NAME=VALUE,...", help="values to try of an option of the "
        "method or of dense_layers (0+1,none); every combination is run: --dial beta=0,0.5,2")  # fmt: skip
    add("--recall-samples", type=at_least(0), default=0, help="questions of each task on which the attention mass kept "
        "in sparse layers is measured (default: 0)")  # fmt: skip
    add("--batch-size", type=at_least(1), default=1, help="questions answered together (default: 1)")
    add("--json", type=Path, default=Path("vision.json"), help="the summary (default: vision.json)")
    add("--store", type=Path, metavar="FOLDER", help="where answers are kept, of any number of runs (default: "
        "vision.answers beside vision.json)")  # fmt: skip
    add_sparse_options(parser, many={"sparsity": [0.5], "score": None})
    add_model_options(parser, folder="that training/vision/understanding.py wrote")


def frames(text: str) -> list[int]:
    """Numbers by commas, each once."""
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers by commas, got {text!r}") from None


def run(arguments: argparse.Namespace) -> None:
    """All answers, then summary and table."""
    check_files(arguments, "json")
    folder: Path = arguments.store or arguments.json.with_suffix(".answers")
    check_store(folder)
    device = read_place(arguments)
    made = provenance(arguments.command, device)
    source = arguments.model or shipped_vision_model(VISION)
    model = VisionModel.load(source).to(device, loading.DTYPES[arguments.dtype])
    try:
        clips = read(source / PIXELS)
    except ImportError as error:
        raise UsageError(str(error)) from None
    own = {name: getattr(arguments, name) for name in ("dtype", "seed", "impl", "batch_size")}
    setup = VisionSetup(checksums(source), **own)
    cells = read_cells(arguments, model)
    share = Run(VisionReader(model, clips, setup, made), AnswerStore(folder), cells, range(arguments.count),
                recalls=arguments.recall_samples)  # fmt: skip
    try:
        share.prepare()
    except RuntimeError as error:
        raise UsageError(f"--impl {arguments.impl} cannot run this model: {error}") from None
    with (
        resumable(lambda: f"{sum(map(len, share.kept()))} answers in {folder}", arguments.command),
        answer_bar(share.open(), Console(stderr=True), shown=True) as advance,
    ):
        share.answer(advance)
        share.measure_recalls()
    records = make_records(cells, share.kept(), "vision")
    averages = {kind: make_averages(found) for kind, found in of_kinds(records).items()}
    header = {
        "study": "vision", **made, "model": source.name, "weights": weights_of(setup.files), "count": arguments.count,
        "pixels": [clip.name for clip in clips], **own, "sampler": dataclasses.asdict(VISION_SAMPLER),
        "frames": arguments.frames, "tokens_of_a_frame": model.config.tokens(1),
    }  # fmt: skip
    write_json(header | {"averages": averages, "records": records}, arguments.json, indent=None)
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table(records, averages, source.name).rich(), highlight=False)
    console.print(f"Summary: {arguments.json}, answers: {folder}", soft_wrap=True, highlight=False)


def read_cells(arguments: argparse.Namespace, model: VisionModel) -> list[Cell]:
    """The grid: tasks, lengths, and every combination of what several values were given for."""
    configs, policies, _ = read_settings(arguments, {})
    for policy in policies:
        try:
            policy.check_layers(model.config.layers)
        except ValueError as error:
            raise UsageError(str(error).replace("policy.dense_layers", "--dense-layers")) from None
    return [
        cell
        for task in arguments.tasks
        for cell in make_cells([task], lengths_of(model, task, arguments.frames), configs, policies, [VISION_SAMPLER])
    ]


def of_kinds(records: list[Record]) -> dict[str, list[Record]]:
    """The records about photos and about clips, of those that there are."""
    found = {kind: [one for one in records if one["task"] in tasks] for kind, tasks in KINDS.items()}
    return {kind: some for kind, some in found.items() if some}


def table(records: list[Record], averages: dict[str, list[Record]], model: str) -> Table:
    """A row for each setting: of all tasks of a kind at each length, then of every task."""
    settings = next(iter(averages.values()))
    names = {json.dumps(setting_of(one)): name for name, one in zip(setting_names(settings), settings, strict=True)}
    whole = [
        {"task": f"all about {kind}", **setting_of(one), **at}
        for kind, found in averages.items() for one in found for at in one["by_length"]
    ]  # fmt: skip
    rows = [
        (one["task"], str(one["length"]), names[json.dumps(setting_of(one))], score(one),
         against_dense(one) if one["config"] else "", percent(one["sparsity_achieved"], 1) if number >= 0 else "")
        for number, one in enumerate([*whole, *records], -len(whole))
    ]  # fmt: skip
    columns = ("questions", "tokens", "setting", "right, %", "against dense", "block pairs skipped")
    caption = "[95 % interval]; a setting is named by the share of key blocks that its sparse layers skip."
    return Table(columns, rows, caption, f"{model}, questions a task: {records[0]['n']}", parted=len(whole))
