"""Take the method apart on a real input: record a model's attention, or read yours, then measure it.

`capture` writes q, k and v of chosen layers to a safetensors file; the other actions read such a file, or one with q, k
and v of your own. `recall`, `bound`, `layers` and `keys` print a table and can store JSON, `maps` draws; `patches`
draws what the small model that sees reads of a photo.
"""

import argparse
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from baatt.attention import make_plan
from baatt.cli import patches
from baatt.cli.errors import UsageError
from baatt.cli.options import (
    add_model_options,
    add_sparse_options,
    check_files,
    layer_numbers,
    length,
    load_any_model,
    model_folder,
    names_of,
    read_configs,
    read_device,
    seed,
)
from baatt.config import PRESETS, BAAttConfig
from baatt.integrations.enable import enable
from baatt.lab.capture import LAYOUT, Capture, Recorder, load_capture, save_capture
from baatt.lab.describe import order_name
from baatt.lab.keys import measure_keys
from baatt.lab.layers import measure_bound, measure_layers
from baatt.lab.loading import check_bytes, check_memory
from baatt.lab.maps import compared, draw_maps, maps_page, most_structured_head
from baatt.lab.options import given, variants
from baatt.lab.plots import draw_bound, draw_keys, draw_recall
from baatt.lab.recall import measure_recall
from baatt.lab.records import provenance, write_json
from baatt.lab.ruler.niah import NIAH_TASKS
from baatt.lab.ruler.tasks import draw_samples
from baatt.lab.tables import Record, Table, percent, pivot
from baatt.lab.texts import read_text
from baatt.models.llada import MaskedDiffusionLM
from baatt.scores import SCORES

CPU = torch.device("cpu")
#: Of a token of a document while it is drawn: its words, their tokens, and q, k and v of a layer at the least.
DOCUMENT_BYTES = 1024


class Study(NamedTuple):
    """An action on a capture.

    summary, title: in the help, and above the tables. measure: capture, configs, progress -> records. tables: of the
    stored records. draw: records, caption, path -> a PNG; None where there is nothing to draw. ordered: whether it
    measures orders of the tokens, and has their options.
    """

    summary: str
    title: str
    measure: Callable[..., list[dict[str, Any]]]
    tables: Callable[[Sequence[Record]], list[Table]]
    draw: Callable[[Sequence[Record], str, Path], None] | None = None
    ordered: bool = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One parser per action."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    capture = _add_action(actions, "capture", "Record q, k and v of a model's layers on a text.", run_capture)
    add = capture.add_argument
    add("--output", type=Path, default=Path("capture.safetensors"), help="(default: capture.safetensors)")
    add("--layers", type=layer_numbers, help="numbers like 0,2,-1 (default: all)")
    text = capture.add_mutually_exclusive_group()
    where = 'a UTF-8 file with the text, or "-" for standard input (default: a document of --task)'
    text.add_argument("--prompt-file", type=Path, help=where)
    text.add_argument("--task", choices=list(NIAH_TASKS), default="niah_multikey_1", help="RULER needle task")
    add("--length", type=length, default=4096, help="tokens of a document of --task and its answer (default: 4096)")
    add("--seed", type=seed, default=0, help="which document (default: 0)")
    add("--impl", default="auto", help=argparse.SUPPRESS)
    add_model_options(capture, any_kind=True)

    studies = {name: _add_action(actions, name, study.summary, run_study) for name, study in STUDIES.items()}
    _add_study_options(studies["recall"], {"sparsity": (0.3, 0.5, 0.7, 0.9), "beta": None}, ["score"])
    add, usual = (
        studies["recall"].add_argument,
        list({score: name for name, score in reversed(SCORES.items())}.values()),
    )
    add("--scores", type=names_of(SCORES), default=usual[::-1], help=f"by commas (default: {','.join(usual[::-1])})")
    add(
        "--no-outputs", dest="measured", action="store_const", const={"outputs": False}, default={},
        help="do not attend, and print no error of the output: that takes half of the time",
    )  # fmt: skip
    for name in ("bound", "layers"):
        _add_study_options(studies[name], {}, ["sparsity", "score", "beta"])
    _add_file_options(studies["keys"])

    summary = "Attention and the kept blocks of the paper's setting, the preset and the oracle, or of orders (Fig. 5)."
    maps = _add_action(actions, "maps", summary, run_maps)
    _add_study_options(maps, {}, [])
    maps.description = f"{summary} Orders, as in the other studies, where --sort or --score is given."
    patches.add_arguments(_add_action(actions, "patches", patches.SUMMARY, patches.run))
    maps.add_argument("--head", type=int, help="query head of --plot (default: the one with most structure)")
    maps.add_argument("--html", type=Path, help="page of all layers and heads, one file for any browser")


def run(arguments: argparse.Namespace) -> None:
    """The chosen action."""
    arguments.act(arguments)


def run_capture(arguments: argparse.Namespace) -> None:
    """Run the model once, densely, and write the file."""
    check_files(arguments, "output")
    model, tokenizer = load_any_model(arguments)
    handle = enable(model, None)  # every call stays dense: a capture shows what the model itself computes
    count = handle.layer_count or 0
    if any(not -count <= layer < count for layer in arguments.layers or ()):
        raise UsageError(f"--layers must be numbers from {-count} to {count - 1}, got {arguments.layers}")
    if arguments.prompt_file is not None:
        text, source = read_text(arguments.prompt_file), str(arguments.prompt_file)
    else:
        if isinstance(model, MaskedDiffusionLM):  # before a document of a billion tokens is written
            check_memory(model.config, arguments.length, torch.device(arguments.device))
        check_bytes(f"--length {arguments.length}", "a document needs", DOCUMENT_BYTES * arguments.length, CPU)
        sample = draw_samples(arguments.task, arguments.length, 1, tokenizer, seed=arguments.seed)[0]
        text, source = sample.prompt + sample.answer_prefix, f"{arguments.task}, seed {arguments.seed}"
    ids = tokenizer.encode(text).ids
    if not ids:
        raise UsageError("the text must not be empty")
    # A layer that sees a window only, or is causal, makes no call that could be sparse: "all" leaves it out.
    recorder = Recorder(None if arguments.layers is None else {layer % count for layer in arguments.layers})
    if isinstance(model, MaskedDiffusionLM):
        check_memory(model.config, len(ids), torch.device(arguments.device))
    with handle, torch.inference_mode():
        handle.watch(recorder.keep)
        model(torch.tensor([ids], device=arguments.device))
    name = model_folder(arguments).name
    about = {
        "model": name, "text": source, "tokens": str(len(ids)), "dtype": arguments.dtype, "command": arguments.command
    }  # fmt: skip
    missing = sorted((recorder.wanted or set()) - recorder.found.keys())
    if missing or recorder.scale is None:
        raise UsageError(
            f"--layers {missing or 'all'} of {name} made no bidirectional attention call, {sorted(recorder.found)} did"
            f"{''.join(f'; {reason}' for reason in handle.reasons)}"
        )
    save_capture(Capture(dict(sorted(recorder.found.items())), recorder.scale, about), arguments.output)
    room = "" if arguments.prompt_file else f"; the other {arguments.length - len(ids)} of --length are for the answer"
    found = f"{name}, {len(ids)} tokens of {source}, layers {sorted(recorder.found)}{room}"
    Console().print(f"{arguments.output}: {found}", soft_wrap=True)


def run_study(arguments: argparse.Namespace) -> None:
    """Tables, JSON and picture of a study."""
    study = STUDIES[arguments.action]
    if arguments.plot is not None and study.draw is None:
        raise UsageError(f"--plot has nothing to draw here: {arguments.action} are a table")
    scores = getattr(arguments, "scores", None)
    bases = _configs(arguments) if study.ordered else [BAAttConfig()]
    configs = [one for config in bases for one in variants(config, {"score": scores} if scores else {})]
    recorded, header = _read(arguments)
    with _progress(len(recorded.layers) * len(configs)) as step:
        records = study.measure(recorded, configs, step, **getattr(arguments, "measured", {}))
    console = Console(soft_wrap=True)
    console.print(f"{_title(recorded)}: {study.title}")
    for table in study.tables(records):
        console.print(table.rich())
    if arguments.json is not None:
        write_json({"study": arguments.action, **header, "records": records}, arguments.json)
        console.print(f"Records: {arguments.json}")
    if arguments.plot is not None and study.draw is not None:
        study.draw(records, _title(recorded), arguments.plot)
        console.print(f"Picture: {arguments.plot}")


def recall_tables(records: Sequence[Record]) -> list[Table]:
    """A table per order and beta: a row per score, a column per sparsity; below, the error of the output."""
    whole = [one for one in records if one["layer"] is None]
    measured = all(one["relative_l2"] is not None for one in whole)
    caption = "Share of the attention that the kept blocks hold, in percent: mean (5th percentile)"
    caption += "; below it the relative L2 error of the output against dense attention." if measured else "."
    grid = pivot(
        whole, lambda one: (f"{order_name(one)}, beta {one['beta']:g}", one["score"]), lambda one: one["sparsity"]
    )
    cells: dict[str, list[list[str]]] = {}
    for (title, score), row in grid.items():
        texts = [f"{100 * one['recall_mean']:.1f} ({100 * one['recall_p5']:.1f})" for one in row.values()]
        if measured:
            texts = [f"{text}\n{one['relative_l2']:.3f}" for text, one in zip(texts, row.values(), strict=True)]
        cells.setdefault(title, []).append([score, *texts])
    header = ("sparsity", *(f"{sparsity:g}" for sparsity in dict.fromkeys(one["sparsity"] for one in whole)))
    return [Table(header, rows, caption, title) for title, rows in cells.items()]


def layer_tables(records: Sequence[Record], columns: Mapping[str, str], caption: str) -> list[Table]:
    """A table per order with a row per layer; columns: title -> field of the records."""
    tables: dict[str, list[list[str]]] = {}
    for one in records:
        row = [str(one["layer"]), *(f"{one[field]:.3g}" for field in columns.values())]
        tables.setdefault(order_name(one), []).append(row)
    return [Table(("layer", *columns), rows, caption, order) for order, rows in tables.items()]


def key_tables(records: Sequence[Record]) -> list[Table]:
    """A row per layer."""
    rows = [
        [
            str(one["layer"]), *(percent(one[share], 1) for share in ("on_first_block", "on_few", "on_heaviest")),
            str(one["heaviest_key"]), percent(one["heads_on_heaviest"], 0),
            *(f"{one[field]:.2f}" for field in ("heaviest_norm", "key_norm_variation", "norm_correlation")),
        ]
        for one in records
    ]  # fmt: skip
    header = ("layer", "first block", "1 % of keys", "one key", "which", "in heads", "its norm", "norms vary", "R")
    caption = (
        "Share of the attention of all queries that goes to the first block of keys, to the hundredth of the keys that "
        "get most, to the one key that gets most. Which: the place of that key over all heads, from 0; in how many "
        "heads no other gets more; its norm over the mean norm. Norms vary: standard deviation over mean. R: "
        "Pearson's, of a key's norm with the logarithm of what the key gets."
    )
    return [Table(header, rows, caption)]


def run_maps(arguments: argparse.Namespace) -> None:
    """A page of all layers and heads, or a picture of one."""
    if arguments.plot is None and arguments.html is None:
        raise UsageError("--plot FILE.png or --html FILE.html is required")
    if arguments.json is not None:
        raise UsageError("--json has nothing to hold here: maps are a picture")
    check_files(arguments, "html")
    chosen = {"sort", "score"} & given(arguments, BAAttConfig).keys()
    configs = _configs(arguments) if chosen else compared(read_configs(arguments)[0])
    recorded, _ = _read(arguments)
    if arguments.plot is not None:
        _draw_one_head(arguments, recorded, configs)
    if arguments.html is not None:
        title = f"{_title(recorded)}, sparsity {percent(configs[0].sparsity)}"
        with _progress(len(recorded.layers) * len(configs)) as step:
            page = maps_page(recorded, configs, title, step)
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
    caption = (
        f"{_title(recorded)}, head {head}; what each setting skips at {percent(configs[0].sparsity)} sparsity is dimmed"
    )
    draw_maps(heads.q, heads.k, plans, head, caption, arguments.plot)
    Console().print(f"Picture: {arguments.plot}, layer {layer}, head {head}", soft_wrap=True)


def _add_action(
    actions: Any, name: str, summary: str, function: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=summary, description=summary)
    parser.set_defaults(act=function)
    return parser


def _add_study_options(
    parser: argparse.ArgumentParser, many: Mapping[str, Sequence[Any] | None], without: Collection[str]
) -> None:
    orders = "none and the preset's, or the paper's where it has none"
    parser.description = f"{parser.description} Orders without --sort: {orders}."
    _add_file_options(parser)
    lists = {"sort": None, "segment": None, **many}
    add_sparse_options(parser, many=lists, without=without, dense_layers=False, impl=False)


def _add_file_options(parser: argparse.ArgumentParser) -> None:
    layout = LAYOUT.replace("%", "%%")
    parser.add_argument(
        "capture", type=Path, help=f"file of `baatt analyze capture`, or a safetensors file of your own: {layout}"
    )
    parser.add_argument("--layers", type=layer_numbers, help="numbers like 0,2 (default: all in the file)")
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda" (default: cpu)')
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("--plot", type=Path, help="picture, a PNG")


def _configs(arguments: argparse.Namespace) -> list[BAAttConfig]:
    """Every order with every other value; an unsorted one does not depend on the segment."""
    base, values = PRESETS[arguments.preset].config, given(arguments, BAAttConfig)
    if "sort" not in values:
        ordered = PRESETS["paper"].config if base.sort == "none" else base
        values = {"sort": ["none", ordered.sort], "segment": ordered.segment} | values
    found = variants(base, values)
    return list(dict.fromkeys(dataclasses.replace(one, segment=None) if one.sort == "none" else one for one in found))


def _read(arguments: argparse.Namespace) -> tuple[Capture, dict[str, Any]]:
    """The capture on the chosen device, and how to repeat what is about to run."""
    check_files(arguments, "json", pictures=("plot",))
    device = read_device(arguments.device)
    recorded = load_capture(arguments.capture, arguments.layers)
    moved = {layer: heads.to(device) for layer, heads in recorded.layers.items()}
    return recorded._replace(layers=moved), provenance(arguments.command, device) | {"about": dict(recorded.about)}


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("layers and settings", total=total)
        yield lambda: bar.advance(task)


def _title(recorded: Capture) -> str:
    first = next(iter(recorded.layers.values()))
    numbers = list(recorded.layers)
    layers = f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        layers = f"layers {numbers[0]} to {numbers[-1]}"
    return f"{recorded.about['model']}, {layers}, {first.q.shape[2]} queries, {first.k.shape[2]} keys"


#: Every action that measures something on a capture. A new one is a function that measures and an entry.
STUDIES = {
    "recall": Study(
        "How much attention mass each score keeps at equal budgets, beside the oracle.",
        "attention kept at equal budgets", measure_recall, recall_tables, draw_recall,
    ),
    "bound": Study(
        "The error bound U against the true deviation (E9, Fig. 2).",
        "the bound U (E9) against the deviation of logits", measure_bound,
        partial(layer_tables, columns={
            "R, largest": "correlation_largest", "R, mean": "correlation_mean", "mean U": "bound_mean",
            "mean largest": "largest_mean", "mean deviation": "deviation_mean",
        }, caption="Over all block pairs. Deviation: how far the logit of two tokens is from that of their blocks' "
            "means; largest: of a pair of blocks. R: correlation of U (Pearson's) with the largest, with the mean."
        ), draw_bound,
    ),
    "layers": Study(
        "What an order does to each layer: norms, width of blocks, spread of attention.",
        "what an order does to each layer", measure_layers,
        partial(layer_tables, columns={
            "norms of q vary": "query_norm_variation", "norms of k vary": "key_norm_variation",
            "radius of q blocks": "query_radius", "radius of k blocks": "key_radius",
            "blocks for 90 %": "blocks_for_most", "on diagonal": "on_diagonal",
        }, caption="Norms vary: standard deviation over mean. Radius: largest distance of a token to the mean of its "
            "block, over the mean norm. Blocks for 90 %: share of the key blocks that hold 90 % of a query block's "
            "attention. On diagonal: share of the attention in the key block at the same place and its two neighbours."
        ),
    ),
    "keys": Study(
        "What single keys get: norms, sinks, and whether a norm says how much attention a key gets.",
        "what single keys get", measure_keys,
        key_tables, draw_keys, ordered=False,
    ),
}  # fmt: skip
