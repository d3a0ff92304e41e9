"""`baatt evaluate fidelity`: what sparse attention costs on a model of one's own, beside dense attention.

The same documents are read densely and by every setting: KL to the dense predictions, loss, tokens predicted alike, and
planted numbers recalled, with intervals over documents. `--by-layer` makes each layer sparse alone and saves a profile,
a sparsity per layer at the same mean, that `--policy` and `Policy.load` read. What was measured is kept in a folder.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from baatt.assets import held_out_text
from baatt.cli.errors import UsageError, resumable
from baatt.cli.options import (
    add_model_options,
    add_sparse_options,
    at_least,
    check_files,
    check_store,
    lengths,
    load_any_model,
    model_folder,
    read_configs,
    read_place,
    read_preset,
    seed,
)
from baatt.config import Policy
from baatt.lab.answers import AnswerStore
from baatt.lab.fidelity.documents import CITIES
from baatt.lab.fidelity.measure import is_routed
from baatt.lab.fidelity.profile import allocate, costs_of
from baatt.lab.fidelity.reader import Reader
from baatt.lab.fidelity.report import draw_fidelity, layer_table, length_table
from baatt.lab.fidelity.study import Cell, Setup, Study
from baatt.lab.loading import find_mask_token
from baatt.lab.records import installed_version, provenance, write_json
from baatt.lab.ruler.model import checksums, weights_of
from baatt.lab.texts import read_text

SUMMARY = "What sparse attention costs on any model: KL to dense, loss, planted numbers; with --by-layer a profile."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add = parser.add_argument
    add("--lengths", type=lengths, default=[4096], help="tokens of a document, by commas (default: 4096)")
    add(
        "--text",
        type=Path,
        help="UTF-8 file with the prose (default: encyclopedic text shipped with baatt)",
    )
    add("--documents", type=at_least(1), default=8, help="documents of each length (default: 8)")
    add("--needles", type=at_least(0), default=6, help="numbers planted in a document and asked later (default: 6)")
    add("--seed", type=seed, default=0, help="which numbers, places and masks (default: 0)")
    add("--mask-share", type=float, default=0.15, help="share of the prose to be predicted by a model that sees later "
        "tokens (default: 0.15); others predict every token of the second half")  # fmt: skip
    add("--batch-size", type=at_least(1), default=1, help="documents read together (default: 1)")
    add("--policy", type=Path, metavar="FILE", help="measure a saved policy too, such as --by-layer makes")
    add("--by-layer", action="store_true", help="make each layer sparse alone, at sparsities around --sparsity, "
        "and share the kept blocks out among the layers; takes one length, sparsity and score")  # fmt: skip
    add("--save", type=Path, help="the profile of --by-layer (default: "
        "fidelity.policy.json)")  # fmt: skip
    add("--gguf", metavar="NAME", help="GGUF file in --model to load the weights and the tokenizer from, through "
        "transformers and the package gguf")  # fmt: skip
    add("--json", type=Path, default=Path("fidelity.json"), help="the records (default: fidelity.json)")
    add("--plot", type=Path, metavar="FILE.png", help="picture of KL and recalled numbers over sparsity")
    add("--store", type=Path, metavar="FOLDER", help="where measurements are kept, of any number of runs (default: "
        "fidelity.answers beside fidelity.json)")  # fmt: skip
    add_sparse_options(parser, many={"sparsity": [0.5, 0.7, 0.9], "score": None})
    add_model_options(parser, any_kind=True)


def run(arguments: argparse.Namespace) -> None:
    """All measurements, then tables, records and picture."""
    check_arguments(arguments)
    made = provenance(arguments.command, read_place(arguments))
    made["versions"]["transformers"] = installed_version("transformers")
    text = held_out_text() if arguments.text is None else read_text(arguments.text)
    model, tokenizer = load_any_model(arguments, head=True, gguf=arguments.gguf)
    setup = Setup(
        checksums(model_folder(arguments)),
        **{name: getattr(arguments, name) for name in Setup.__dataclass_fields__ if name != "files"},
    )
    reader = Reader(model, find_mask_token(model, tokenizer, arguments.model))
    folder = arguments.store or arguments.json.with_suffix(".answers")
    store = AnswerStore(folder)
    with (
        resumable(lambda: f"{len(store)} measurements in {folder}", arguments.command),
        reading_bar() as (expect, advance),
    ):
        study = Study(reader, tokenizer, text, arguments.lengths, setup, store, made["commit"], advance)
        cells = make_cells(arguments, study.layers)
        length, (config, policy) = arguments.lengths[0], read_preset(arguments)
        layers = study.layer_cells(length, config, policy) if arguments.by_layer else []
        expect(study.open_documents([*cells, *layers]) + (setup.documents if layers else 0))
        header: dict[str, Any] = {
            "study": "fidelity", **made, "model": model_folder(arguments).name,
            "weights": weights_of(setup.files), "text": str(arguments.text or "heldout.txt"),
            "predicts": "masked tokens" if reader.sees_ahead else "the tokens of the second half",
            "shift": reader.shift, **{name: value for name, value in vars(setup).items() if name != "files"},
        }  # fmt: skip
        if layers:
            found = study.layer_records(layers)
            profile = allocate(costs_of(found), config.sparsity, policy)
            profile.save(arguments.save)
            header |= {"profile": dataclasses.asdict(profile), "layers": found}
            cells.append(Cell(length, config, profile, "profile"))
        records = [study.record(cell) for cell in cells]
    report(header | {"records": records}, arguments)
    Console(soft_wrap=True).print(f"Records: {arguments.json}, measurements: {folder}", highlight=False)


@contextmanager
def reading_bar() -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """How many documents are read of how many; gives what to tell their number, and then those that were just read.
    Without a terminal a line says every twentieth part."""
    console, read, everything = Console(stderr=True), 0, 0
    columns = TextColumn("documents read"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("", total=None)

    def expect(total: int) -> None:
        nonlocal everything
        everything = total
        bar.update(task, total=total)

    def advance(done: int) -> None:
        nonlocal read
        before, read = read, read + done
        bar.update(task, completed=read)
        if everything and not console.is_terminal and 20 * before // everything < 20 * read // everything:
            console.print(f"{read}/{everything} documents read", highlight=False)

    with bar:
        yield expect, advance


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what can be seen without a model."""
    check_files(arguments, "json", pictures=("plot",))
    check_store(arguments.store or arguments.json.with_suffix(".answers"))
    if arguments.needles > len(CITIES):
        raise UsageError(f"--needles must be at most {len(CITIES)}, got {arguments.needles}")
    if not 0 < arguments.mask_share < 1:
        raise UsageError(f"--mask-share must be between 0 and 1, got {arguments.mask_share:g}")
    if arguments.gguf is not None and not (
        arguments.model is not None and (arguments.model / arguments.gguf).is_file()
    ):
        raise UsageError(f"--gguf must name a file in the folder --model, got {arguments.gguf!r}")
    if arguments.save is not None and not arguments.by_layer:
        raise UsageError(f"--save needs --by-layer, whose profile it names, got {arguments.save}")
    arguments.save = arguments.save or Path("fidelity.policy.json")
    check_files(arguments, "save")
    if arguments.by_layer and (len(read_configs(arguments)) > 1 or len(arguments.lengths) > 1 or arguments.policy):
        raise UsageError("--by-layer must have one of --lengths, one --sparsity, one --score and no --policy")


def make_cells(arguments: argparse.Namespace, layers: int) -> list[Cell]:
    """Dense attention, every setting and, of `--policy`, every setting that it leaves open; at every length."""
    base = read_preset(arguments).policy
    pairs = [(config, base, "") for config in read_configs(arguments) if config.sparsity > 0]
    if not pairs:
        raise UsageError("--sparsity must be above 0: dense attention is measured anyway")
    if arguments.policy is not None:
        policy = Policy.load(arguments.policy).check_layers(layers)
        own, found = dict.fromkeys(policy.dense_layers, 0.0) | dict(policy.layer_sparsity), pairs[:]
        for config, _, _ in found:
            if len(own) == layers:  # none is left to the config: its sparsity names the mean
                config = dataclasses.replace(config, sparsity=round(sum(own.values()) / layers, 4))
            one = config, policy, arguments.policy.name
            pairs += [one] if one not in pairs else []
    return [cell for length in arguments.lengths for cell in (Cell(length), *(Cell(length, *pair) for pair in pairs))]


def report(content: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the tables, write the records, draw the picture."""
    write_json(content, arguments.json)
    # What is piped into a file is not folded at 80 columns.
    console = Console(width=None if Console().is_terminal else 200)
    for length in arguments.lengths:
        console.print(length_table(content, length).rich(), highlight=False)
    if arguments.by_layer:
        console.print(layer_table(content["layers"], content["profile"]).rich(), highlight=False)
        console.print(f"Profile: {arguments.save}, for --policy and Policy.load", highlight=False, soft_wrap=True)
    reasons = {reason for one in content["records"] for reason in one["reasons"] if not is_routed(reason)}
    for reason in sorted(reasons):
        text = f"Some calls stayed dense: {reason}"
        Console(stderr=True, soft_wrap=True).print(f"[yellow]{text}[/yellow]")
    if arguments.plot is not None:
        draw_fidelity(content, arguments.plot)
        console.print(f"Picture: {arguments.plot}", highlight=False, soft_wrap=True)
