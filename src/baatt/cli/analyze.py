"""Take the method apart on a real input: record a model's attention, then measure recall and bound.

`capture` writes q, k and v of chosen layers to a safetensors file; `recall`, `bound` and `maps` read such a file, of
any model. The first two print a table and can store JSON and a picture, `maps` draws one.
"""

import argparse
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from baatt.analysis.capture import Capture, Recorder, load_capture, save_capture
from baatt.analysis.layers import measure_layers
from baatt.analysis.maps import Panel, attention_cells, draw_maps, most_structured_head
from baatt.analysis.maps_page import maps_page
from baatt.analysis.reports import commit_here, device_name, store_json, versions_here
from baatt.analysis.rivals import RIVALS
from baatt.analysis.studies import measure_bound, measure_recall
from baatt.analysis.study_plots import draw_bound, draw_recall, order_name
from baatt.attention import make_plan
from baatt.cli.errors import UsageError
from baatt.cli.options import (
    add_model_options,
    add_sparse_options,
    check_files,
    layer_numbers,
    names_of,
    read_device,
)
from baatt.cli.readers import open_reader
from baatt.config import PRESETS, BAAttConfig
from baatt.lab.options import given, variants
from baatt.lab.ruler.niah import NIAH_TASKS
from baatt.lab.ruler.tasks import draw_samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One parser per action."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    capture = _add_action(actions, "capture", "Record q, k and v of a model's layers on a text.", run_capture)
    capture.add_argument(
        "--output", type=Path, default=Path("capture.safetensors"), help="(default: capture.safetensors)"
    )
    capture.add_argument("--layers", type=layer_numbers, help="numbers like 0,2,-1 (default: all)")
    text = capture.add_mutually_exclusive_group()
    text.add_argument("--prompt-file", type=Path, help="a UTF-8 file with the text (default: a document of --task)")
    text.add_argument("--task", choices=list(NIAH_TASKS), default="niah_multikey_1", help="RULER needle task")
    capture.add_argument("--length", type=int, default=4096, help="tokens of a document of --task (default: 4096)")
    capture.add_argument("--seed", type=int, default=0, help="which document (default: 0)")
    capture.add_argument("--impl", default="auto", help=argparse.SUPPRESS)
    capture.add_argument(
        "--trust-remote-code", action="store_true", help="run the modelling code that a transformers folder brings"
    )
    add_model_options(capture)

    recall = _add_action(
        actions, "recall", "How much attention mass each score keeps at equal budgets, beside the oracle.", run_recall
    )
    _add_study_options(recall, {"sparsity": (0.3, 0.5, 0.7, 0.9), "beta": None}, ["score"])
    recall.add_argument(
        "--scores", type=names_of(RIVALS), default=list(RIVALS), help=f"by commas (default: {','.join(RIVALS)})"
    )
    recall.add_argument("--no-outputs", action="store_true", help="skip the error of the output, which takes longest")

    maps = _add_action(actions, "maps", "Attention before and after sorting, kept blocks outlined (Fig. 5).", run_maps)
    _add_study_options(maps, {}, [])
    maps.add_argument("--head", type=int, help="query head of --plot (default: the one with most structure)")
    maps.add_argument("--html", type=Path, help="page of all layers and heads, one file for any browser")

    bound = _add_action(actions, "bound", "The error bound U against the true deviation (E9, Fig. 2).", run_bound)
    _add_study_options(bound, {}, ["sparsity", "score", "beta"])

    layers = _add_action(
        actions, "layers", "What an order does to each layer: norms, width of blocks, spread of attention.", run_layers
    )
    _add_study_options(layers, {}, ["sparsity", "score", "beta"])


def run(arguments: argparse.Namespace) -> None:
    """The chosen action."""
    arguments.act(arguments)


def run_capture(arguments: argparse.Namespace) -> None:
    """Run the model once, densely, and write the file."""
    check_files(arguments, "output")
    reader = open_reader(arguments)
    count = reader.layers
    if any(not -count <= layer < count for layer in arguments.layers or ()):
        raise UsageError(f"--layers must be numbers from {-count} to {count - 1}, got {arguments.layers}")
    if arguments.prompt_file is not None:
        text, source = arguments.prompt_file.read_text(encoding="utf-8"), str(arguments.prompt_file)
    else:
        sample = draw_samples(arguments.task, arguments.length, 1, reader.tokenizer, seed=arguments.seed)[0]
        text, source = sample.prompt + sample.answer_prefix, f"{arguments.task}, seed {arguments.seed}"
    ids = reader.tokenizer.encode(text).ids
    if not ids:
        raise UsageError("the text must not be empty")
    # A layer that sees a window only, or is causal, makes no call that could be sparse: "all" leaves it out.
    recorder = Recorder(None if arguments.layers is None else {layer % count for layer in arguments.layers})
    reader.read(torch.tensor([ids], device=arguments.device), recorder)
    name = arguments.model.name if arguments.model else "needle-18m"
    about = {"model": name, "text": source, "tokens": str(len(ids)), "dtype": arguments.dtype}
    missing = sorted((recorder.wanted or set()) - recorder.found.keys())
    if missing or recorder.scale is None:
        raise UsageError(
            f"--layers {missing or 'all'} of {name} made no bidirectional attention call, {sorted(recorder.found)} did"
            f"{'; ' + reader.reasons() if reader.reasons() else ''}"
        )
    save_capture(recorder.result(recorder.scale, about), arguments.output)
    Console().print(
        f"{arguments.output}: {name}, {len(ids)} tokens of {source}, layers {sorted(recorder.found)}", soft_wrap=True
    )


def run_recall(arguments: argparse.Namespace) -> None:
    """Table, JSON and picture of the recalls."""
    scores, found = arguments.scores, _configs(arguments)
    sparsities = list(dict.fromkeys(config.sparsity for config in found))
    configs = list(dict.fromkeys(dataclasses.replace(config, sparsity=sparsities[0]) for config in found))
    recorded = _read(arguments)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        step = _stepper(bar, len(recorded.layers) * len(configs))
        records = measure_recall(recorded, configs, sparsities, scores, outputs=not arguments.no_outputs, progress=step)
    whole = {(one.sort, one.segment, one.beta, one.sparsity, one.score): one for one in records if one.layer is None}
    console = Console()
    console.print(f"{_title(recorded)}: attention mass kept, mean (5th percentile)", soft_wrap=True)
    for config in configs:
        table = Table("sparsity", title=f"{order_name(config.sort, config.segment)}, beta {config.beta:g}")
        for sparsity in sparsities:
            table.add_column(f"{sparsity:g}", justify="right")
        for score in scores:
            row = [whole[config.sort, config.segment, config.beta, sparsity, score] for sparsity in sparsities]
            table.add_row(score, *(f"{one.recall_mean:.3f} ({one.recall_p5:.3f})" for one in row))
        console.print(table)
    _finish(arguments, recorded, "recall", [one._asdict() for one in records], draw_recall)


def run_bound(arguments: argparse.Namespace) -> None:
    """Table, JSON and picture of the bound."""
    configs = _configs(arguments)
    recorded = _read(arguments)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        records = measure_bound(recorded, configs, _stepper(bar, len(recorded.layers) * len(configs)))
    console = Console()
    console.print(f"{_title(recorded)}: the bound U (E9) against the deviation of logits", soft_wrap=True)
    columns = {
        "R, largest": "correlation_largest", "R, mean": "correlation_mean", "mean U": "bound_mean",
        "mean largest": "largest_mean", "mean deviation": "deviation_mean",
    }  # fmt: skip
    _print_layers(console, configs, records, columns)
    _finish(arguments, recorded, "bound", [one._asdict() for one in records], draw_bound)


def run_layers(arguments: argparse.Namespace) -> None:
    """A table per order, and JSON."""
    if arguments.plot is not None:
        raise UsageError("--plot has nothing to draw here: layers are a table")
    configs = _configs(arguments)
    recorded = _read(arguments)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        records = measure_layers(recorded, configs, _stepper(bar, len(recorded.layers) * len(configs)))
    console = Console()
    console.print(f"{_title(recorded)}: what an order does to each layer", soft_wrap=True)
    columns = {
        "norms of q vary": "query_norm_variation", "norms of k vary": "key_norm_variation",
        "radius of q blocks": "query_radius", "radius of k blocks": "key_radius",
        "blocks for 90 %": "blocks_for_most", "on diagonal": "on_diagonal",
    }  # fmt: skip
    _print_layers(console, configs, records, columns)
    _finish(arguments, recorded, "layers", [one._asdict() for one in records], None)


def run_maps(arguments: argparse.Namespace) -> None:
    """A page of all layers and heads, or a picture of one."""
    if arguments.plot is None and arguments.html is None:
        raise UsageError("--plot FILE.png or --html FILE.html is required")
    if arguments.json is not None:
        raise UsageError("--json has nothing to hold here: maps are a picture")
    check_files(arguments, "html")
    configs = _configs(arguments)
    recorded = _read(arguments)
    if arguments.plot is not None:
        _draw_one_head(arguments, recorded, configs)
    if arguments.html is not None:
        title = f"{_title(recorded)}, sparsity {100 * configs[0].sparsity:g} %"
        with Progress(console=Console(stderr=True), transient=True) as bar:
            step = _stepper(bar, len(recorded.layers) * len(configs))
            page = maps_page(recorded, configs, lambda one: order_name(one.sort, one.segment), title, step)
        arguments.html.write_text(page, encoding="utf-8")
        Console().print(f"Page: {arguments.html}, open it in a browser", soft_wrap=True)


def _draw_one_head(arguments: argparse.Namespace, recorded: Capture, configs: Sequence[BAAttConfig]) -> None:
    if len(recorded.layers) != 1:
        raise UsageError(f"--layers must name one of the layers {', '.join(map(str, recorded.layers))} for --plot")
    layer, heads = next(iter(recorded.layers.items()))
    plans = [make_plan(heads.q, heads.k, config, scale=recorded.scale, impl="reference") for config in configs]
    head = most_structured_head(heads.q, heads.k, plans[0]) if arguments.head is None else arguments.head
    if not 0 <= head < heads.q.shape[1]:
        raise UsageError(f"--head must be from 0 to {heads.q.shape[1] - 1}, got {head}")
    panels = [
        Panel(
            attention_cells(heads.q, heads.k, plan, head).cpu(), plan, order_name(plan.config.sort, plan.config.segment)
        )
        for plan in plans
    ]
    caption = f"{_title(recorded)}, head {head}; outlined: the blocks kept at {100 * configs[0].sparsity:g} % sparsity"
    draw_maps(panels, head, caption, arguments.plot)
    Console().print(f"Picture: {arguments.plot}, layer {layer}, head {head}", soft_wrap=True)


def _print_layers(
    console: Console, configs: Sequence[BAAttConfig], records: Sequence[Any], columns: dict[str, str]
) -> None:
    """A table per order with a row per layer; columns: title -> field of the records."""
    for config in configs:
        table = Table("layer", title=order_name(config.sort, config.segment))
        for name in columns:
            table.add_column(name, justify="right")
        for one in records:
            if (one.sort, one.segment) == (config.sort, config.segment):
                table.add_row(str(one.layer), *(f"{getattr(one, field):.3g}" for field in columns.values()))
        console.print(table)


def _add_action(
    actions: Any, name: str, summary: str, function: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=summary, description=summary)
    parser.set_defaults(act=function)
    return parser


def _add_study_options(
    parser: argparse.ArgumentParser, many: Mapping[str, Sequence[Any] | None], without: Collection[str]
) -> None:
    parser.description = f"{parser.description} Orders are none and the preset's where --sort is not given."
    parser.add_argument("capture", type=Path, help="file of `baatt analyze capture`")
    parser.add_argument("--layers", type=layer_numbers, help="numbers like 0,2 (default: all in the file)")
    add_sparse_options(
        parser, many={"sort": None, "segment": None, **many}, without=without, dense_layers=False, impl=False
    )
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda" (default: cpu)')
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("--plot", type=Path, help="picture, a PNG")


def _configs(arguments: argparse.Namespace) -> list[BAAttConfig]:
    """Every order with every other value; an unsorted one does not depend on the segment."""
    base = PRESETS[arguments.preset].config
    found = variants(base, {"sort": list(dict.fromkeys(["none", base.sort]))} | given(arguments, BAAttConfig))
    return list(dict.fromkeys(dataclasses.replace(one, segment=None) if one.sort == "none" else one for one in found))


def _read(arguments: argparse.Namespace) -> Capture:
    check_files(arguments, "json", pictures=("plot",))
    arguments.commit = commit_here()  # of what is about to run
    device = read_device(arguments.device)
    recorded = load_capture(arguments.capture, arguments.layers)
    moved = {layer: type(heads)(*(x.to(device) for x in heads)) for layer, heads in recorded.layers.items()}
    return recorded._replace(layers=moved)


def _stepper(bar: Progress, total: int) -> Callable[[], None]:
    task = bar.add_task("layers and orders", total=total)
    return lambda: bar.advance(task)


def _title(recorded: Capture) -> str:
    first = next(iter(recorded.layers.values()))
    name = recorded.about.get("model", "a model")
    return f"{name}, layers {', '.join(map(str, recorded.layers))}, {first.q.shape[2]} queries, {first.k.shape[2]} keys"


def _finish(
    arguments: argparse.Namespace,
    recorded: Capture,
    study: str,
    records: list[dict[str, Any]],
    draw: Callable[[list[dict[str, Any]], str, Path], None] | None,
) -> None:
    device = torch.device(arguments.device)
    stored = {
        "study": study, "command": arguments.command, "commit": arguments.commit, "device": device_name(device),
        "versions": versions_here(device), "about": dict(recorded.about), "records": records,
    }  # fmt: skip
    console = Console()
    if arguments.json is not None:
        store_json(stored, arguments.json)
        console.print(f"Records: {arguments.json}", soft_wrap=True)
    if arguments.plot is not None and draw is not None:
        draw(records, _title(recorded), arguments.plot)
        console.print(f"Picture: {arguments.plot}", soft_wrap=True)
