"""Try every combination of some dials on a task: accuracy beside dense attention, attention mass kept.

`--dial beta=0,0.5,2 --dial sort=none,qk` spans the grid. Every cell answers the same held-out samples; a run that was
cut goes on with its file. Scores other than the operator's own are put in place of its selection, at the same budget.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer

from baatt.analysis.rivals import RIVALS
from baatt.cli.errors import UsageError
from baatt.cli.options import (
    add_model_options,
    add_sparse_options,
    at_least,
    check_files,
    lengths,
    load_model,
    names_of,
    read_preset,
)
from baatt.config import BAAttConfig, Policy
from baatt.evaluation.ablation import Cell, Store, make_cells, run_grid
from baatt.evaluation.retrieval import Answer, SamplePool, answer
from baatt.lab.capture import Recorder
from baatt.lab.describe import score_name
from baatt.lab.loading import check_memory
from baatt.lab.options import read_dials
from baatt.lab.plots import draw_accuracy
from baatt.lab.recall import measure_recall
from baatt.lab.records import commit_here, device_name, versions_here
from baatt.lab.ruler.niah import NIAH_TASKS
from baatt.lab.ruler.sample import RulerSample
from baatt.lab.ruler.tasks import OFFLINE_TASKS
from baatt.models.llada import MaskedDiffusionLM
from baatt.stages.dense import dense_attention


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Grid, samples, model, output."""
    parser.add_argument(
        "--dial", action="append", default=[], metavar="NAME=VALUE,...",
        help=f"values of an option, such as beta=0,0.5 or segment=256,whole; score also of {', '.join(RIVALS)}",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", default="niah_multikey_1", help="RULER tasks, by commas, or all: the eight needle tasks"
    )
    parser.add_argument(
        "--lengths", type=lengths, default=[1024], help="tokens of document and answer, by commas (default: 1024)"
    )
    parser.add_argument("--count", type=at_least(1), default=20, help="samples per cell (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="which samples (default: 0)")
    parser.add_argument("--batch-size", type=at_least(1), default=1, help="prompts answered together (default: 1)")
    parser.add_argument(
        "--recall-samples", type=at_least(0), default=1, help="samples whose attention mass is measured"
    )
    parser.add_argument(
        "--workers",
        type=at_least(0),
        default=0,
        help="processes that draw samples, about 70 ms each at 4096 tokens (default: 0)",
    )
    parser.add_argument("--json", type=Path, default=Path("ablation.json"), help="records (default: ablation.json)")
    parser.add_argument("--plot", type=Path, help="picture, a PNG")
    parser.add_argument("--draw", type=Path, metavar="FILE.json", help="only draw a stored file to --plot, run nothing")
    add_sparse_options(parser, without=("score",))
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """The whole grid, or a picture of a stored one."""
    if arguments.draw is not None:
        draw_stored(arguments)
        return
    cells, policy = read_cells(arguments), read_preset(arguments).policy
    check_files(arguments, "json", pictures=("plot",))
    commit = commit_here()  # of what is about to run
    model, tokenizer = load_model(arguments, policy)
    device = torch.device(arguments.device)
    check_memory(model.config, arguments.batch_size * max(cell.length for cell in cells), device)
    header = {
        "study": "ablation", "command": arguments.command, "commit": commit, "device": device_name(device),
        "versions": versions_here(device), "model": arguments.model.name if arguments.model else "needle-18m",
        "dtype": arguments.dtype, "seed": arguments.seed, "count": arguments.count,
        "dense_layers": list(policy.dense_layers),
    }  # fmt: skip
    store = Store(arguments.json, header, ("model", "dtype", "seed", "count", "dense_layers"))
    waiting = [(cell.task, cell.length) for cell in cells if store.find(cell) is None]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        SamplePool(waiting, arguments.count, tokenizer, seed=arguments.seed, workers=arguments.workers) as pool,
        Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
        ) as bar,
    ):
        task = bar.add_task("cells", total=len(cells))

        def ask(cell: Cell) -> list[Answer]:
            return answer(
                model, tokenizer, pool.samples(cell.task, cell.length), sparse=cell.sparse, policy=policy,
                impl=arguments.impl, batch_size=arguments.batch_size,
            )  # fmt: skip

        def measure(cell: Cell) -> Mapping[str, Any]:
            some = pool.samples(cell.task, cell.length)[: arguments.recall_samples]
            return {"recall_mean": None, "recall_p5": None} if cell.config is None else recall(
                model, tokenizer, some, cell, policy
            )  # fmt: skip

        records = run_grid(cells, store, ask, measure, lambda _: bar.advance(task))
    console = Console()
    for table in show(records):
        console.print(table)
    console.print(f"Records: {arguments.json}", soft_wrap=True)
    if arguments.plot is not None:
        draw(header, records, arguments.plot)


def draw_stored(arguments: argparse.Namespace) -> None:
    """The picture of `--draw`."""
    if arguments.plot is None:
        raise UsageError("--draw needs --plot FILE.png")
    check_files(arguments, pictures=("plot",))
    try:
        stored = json.loads(arguments.draw.read_text(encoding="utf-8"))
        draw(stored, stored["records"], arguments.plot)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--draw {arguments.draw} must be a file of baatt ablate, got {error!r}") from None


def draw(header: Mapping[str, Any], records: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over sparsity."""
    dense = ", ".join(map(str, header["dense_layers"])) or "none"
    draw_accuracy(records, f"{header['model']}, {header['count']} samples a cell, dense layers: {dense}", path)
    Console().print(f"Picture: {path}", soft_wrap=True)


def read_cells(arguments: argparse.Namespace) -> list[Cell]:
    """The grid.

    Raises:
        UsageError: an unknown task, dial or score.
        TypeError, ValueError: a value that a dial does not take.
    """
    tasks = list(NIAH_TASKS) if arguments.tasks == "all" else arguments.tasks.split(",")
    if unknown := [name for name in tasks if name not in OFFLINE_TASKS]:
        raise UsageError(f"--tasks must be of {','.join(OFFLINE_TASKS)}, got {','.join(unknown)}")
    fields = {name: [value] for name, value in dataclasses.asdict(read_preset(arguments).config).items()}
    scores = [text.removeprefix("score=") for text in arguments.dial if text.startswith("score=")]
    fields |= read_dials([text for text in arguments.dial if not text.startswith("score=")], BAAttConfig)
    try:
        chosen = names_of(RIVALS)(",".join(scores) or fields["score"][0])
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--dial score {error}") from None
    del fields["score"]
    return make_cells(tasks, arguments.lengths, fields, chosen)


def recall(
    model: MaskedDiffusionLM, tokenizer: Tokenizer, samples: list[RulerSample], cell: Cell, policy: Policy
) -> Mapping[str, Any]:
    """Attention mass kept in the sparse layers while a dense model reads the samples; None without samples."""
    layers, config = model.config.n_layers, cell.config
    dense = {layer % layers for layer in policy.dense_layers}
    sparse = [layer for layer in range(layers) if layer not in dense]
    if not samples or not sparse or config is None:
        return {"recall_mean": None, "recall_p5": None}
    device = next(model.parameters()).device
    means, lows = [], []
    for sample in samples:
        recorder = Recorder(sparse)
        ids = torch.tensor([tokenizer.encode(sample.prompt + sample.answer_prefix).ids], device=device)
        with torch.inference_mode():
            model(ids, attention=[recorder.around(layer, dense_attention) for layer in range(layers)])
        found = recorder.result(model.config.head_size**-0.5, {})
        moved = {layer: type(heads)(*(x.to(device) for x in heads)) for layer, heads in found.layers.items()}
        whole = measure_recall(
            found._replace(layers=moved), [dataclasses.replace(config, score=cell.score)], outputs=False
        )[-1]  # fmt: skip
        means.append(whole.recall_mean)
        lows.append(whole.recall_p5)
    return {"recall_mean": sum(means) / len(means), "recall_p5": sum(lows) / len(lows)}


def show(records: list[dict[str, Any]]) -> list[Table]:
    """A table per task and length, a row per cell."""
    tables: dict[tuple[str, int], Table] = {}
    for one in records:
        place = one["task"], one["length"]
        if place not in tables:
            tables[place] = Table("cell", title=f"{place[0]}, {place[1]} tokens, {one['n']} samples")
            for name in ("right [95 % interval]", "word for word", "McNemar p", "mass kept"):
                tables[place].add_column(name, justify="right")
        tables[place].add_row(
            cell_name(one["config"]), f"{one['accuracy']:.3f} [{one['ci_low']:.2f}-{one['ci_high']:.2f}]",
            f"{one['accuracy_whole']:.3f}", "-" if not one["config"] else f"{one['mcnemar_p']:.3g}",
            "-" if one["recall_mean"] is None else f"{one['recall_mean']:.3f}",
        )  # fmt: skip
    return list(tables.values())


def cell_name(config: Mapping[str, Any]) -> str:
    """The dials that matter: `qk in 1024, beta 0.5, 50 %`."""
    if not config:
        return "dense"
    order = "unsorted" if config["sort"] == "none" else f"{config['sort']} in {config['segment'] or 'one'}"
    size = "" if config["block_size"] == 128 else f", blocks of {config['block_size']}"
    return f"{order}, {score_name(config)}, {100 * config['sparsity']:g} %{size}"
