"""Answer from a fresh 4K-token document: full attention, the paper's setting and the default side by side.

Everything runs on the shipped model without network or GPU. Prints the question, a bar while the model works, a table
with all answers and their times, and writes a picture of one layer's attention map with the blocks that each keeps.
"""

import argparse
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from torch import Tensor

from baatt.attention import attend, make_plan
from baatt.cli import video
from baatt.cli.errors import UsageError
from baatt.cli.options import (
    add_model_options,
    add_sparse_options,
    at_least,
    check_files,
    length,
    load_model,
    read_preset,
    seed,
)
from baatt.config import BAAttConfig, Policy, Preset
from baatt.integrations.enable import enable
from baatt.lab.describe import options_text, selection_name
from baatt.lab.loading import check_memory
from baatt.lab.maps import compared, draw_maps, most_structured_head, paper_like
from baatt.lab.prompts import answer_text
from baatt.lab.ruler.niah import NIAH_TASKS
from baatt.lab.ruler.sample import RulerSample
from baatt.lab.ruler.scoring import whole_share
from baatt.lab.ruler.tasks import draw_samples
from baatt.lab.tables import Table, times
from baatt.models.llada import MaskedDiffusionLM
from baatt.sampling import SamplerConfig, StepInfo, generate

# At most eight model evaluations, so that a document beyond the trained length, where no token is sure, still ends.
DEMO_SAMPLER = SamplerConfig(steps=8, gen_length=64, block_length=32, threshold=0.9)


class Reading(NamedTuple):
    """One run over the document: what was answered, what it cost, and q and k of the layer that is drawn."""

    text: str
    steps: int
    seconds: float
    attention_seconds: float
    sparsity: float
    drawn: tuple[Tensor, Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Document, output and the shared options."""
    parser.add_argument("--length", type=length, default=4096, help="tokens of document and answer (default: 4096)")
    parser.add_argument("--task", choices=list(NIAH_TASKS), default="niah_multikey_1", help="RULER needle task")
    parser.add_argument("--seed", type=seed, default=1, help="which document (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("baatt-demo.png"), help="picture (default: baatt-demo.png)")
    parser.add_argument("--video", action="store_true", help="sample a clip instead, from a small video model "
                        "(--model: a folder of training/vision/video.py): frames to --output, a GIF beside it; --seed "
                        "says which clip and noise, --length and --task are of documents")  # fmt: skip
    parser.add_argument("--steps", type=at_least(1), help="model evaluations of --video (default: 12)")
    add_model_options(parser)
    add_sparse_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """The whole demo."""
    if arguments.video:
        video.demo(arguments)
        return
    if arguments.steps is not None:
        raise UsageError("--steps must come with --video: a document is answered in at most 8")
    console = Console()
    check_files(arguments, pictures=("output",))
    setting = read_preset(arguments)
    model, tokenizer = load_model(arguments, setting.policy)
    check_memory(model.config, arguments.length, torch.device(arguments.device))
    sample = draw_samples(arguments.task, arguments.length, 1, tokenizer, seed=arguments.seed)[0]
    ids = tokenizer.encode(sample.prompt + sample.answer_prefix).ids
    console.print(f"[bold]Document[/bold] {arguments.task}, {len(ids)} tokens, {len(sample.prompt.split())} words")
    console.print(f"         {excerpt(sample)}", highlight=False, markup=False)
    console.print(f"[bold]Question[/bold] {sample.prompt.rsplit(chr(10), 1)[1]}", highlight=False)
    settings: dict[str, Preset] = {"paper": Preset(paper_like(setting.config), Policy())}
    if setting != settings["paper"]:
        settings[arguments.preset if arguments.preset != "paper" else "paper, changed"] = setting
    for name, one in settings.items():
        console.print(f"[bold]Setting[/bold]  {name}: {options_text(*one)}", highlight=False)
    if arguments.length > model.config.max_sequence_length:
        console.print(f"[yellow]The model was trained up to {model.config.max_sequence_length} tokens: beyond, times "
                      "mean something, answers often do not.[/yellow]")  # fmt: skip
    warm_up(model, settings.values(), arguments.impl)
    drawn = model.config.n_layers // 3
    ask = partial(read, console, model, tokenizer, torch.tensor([ids], device=arguments.device), arguments.impl, drawn)
    readings = [ask("full attention", None), *(ask(name, one) for name, one in settings.items())]
    names = [f"{name}: {selection_name(vars(one.config), one.policy.dense_layers)}" for name, one in settings.items()]
    console.print(table(sample, ["full attention", *names], readings).rich())
    draw(*readings[0].drawn, setting.config, drawn, arguments.output)
    console.print(f"Attention map of layer {drawn}, skipped blocks dimmed: {arguments.output}", soft_wrap=True)


def excerpt(sample: RulerSample) -> str:
    """A line of the document around what is asked for, which the model has to find."""
    text = " ".join(sample.prompt.split())
    place = text.find(sample.values[0])
    return f"... {text[max(0, place - 160) : place + 80]} ..."


def warm_up(model: MaskedDiffusionLM, settings: Iterable[Preset], impl: str) -> None:
    """Every setting on a few tokens: building a kernel is not part of reading a document."""
    weight = next(model.parameters())
    q = torch.randn(1, model.config.n_heads, 256, model.config.head_size, device=weight.device, dtype=weight.dtype)
    for config, _ in settings:
        attend(q, q, q, make_plan(q, q, config, impl=impl), impl=impl)


def read(
    console: Console, model: MaskedDiffusionLM, tokenizer: Tokenizer, prompt: Tensor, impl: str, drawn_layer: int,
    name: str, setting: Preset | None,
) -> Reading:  # fmt: skip
    """Answer a prompt [1, N] once, with a progress bar. Drawn is the first step, when the answer is masked."""
    config, policy = (None, Policy()) if setting is None else setting
    drawn: list[tuple[Tensor, Tensor]] = []
    columns = (TextColumn(f"{name:15}"), BarColumn(), TextColumn("{task.completed} of {task.total} tokens"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=DEMO_SAMPLER.gen_length)

        def watch(layer: int | None, q: Tensor, k: Tensor, *_: object) -> None:
            if layer == drawn_layer and not drawn:
                drawn.append((q, k))

        def progress(info: StepInfo) -> None:
            bar.update(task, completed=DEMO_SAMPLER.gen_length - info.masked_remaining)

        with enable(model, config, policy, impl=impl) as handle:
            handle.watch(watch)
            handle.is_timed = True
            result = generate(model, prompt, None, DEMO_SAMPLER, on_step=handle.at_step, progress=progress)
    text = answer_text(tokenizer, result.tokens[0].tolist(), model.config.end_tokens)
    return Reading(text.strip(), result.steps, result.seconds, handle.seconds, handle.sparsity, drawn[0])


def table(sample: RulerSample, names: Sequence[str], readings: Sequence[Reading]) -> Table:
    """All readings side by side; the first one is that of full attention."""
    right = [whole_share(one.text, sample.values) == 1 for one in readings]
    per_step = [one.seconds / one.steps for one in readings]
    attention = [one.attention_seconds / one.steps for one in readings]
    rows = [
        ("answer", *(one.text for one in readings)),
        ("right", *("[green]yes[/green]" if one else "[red]no[/red]" for one in right)),
        ("model evaluations", *(str(one.steps) for one in readings)),
        ("seconds per step", *(f"{seconds:.2f}" for seconds in per_step)),
        ("of which attention", *(f"{seconds:.2f}" for seconds in attention)),
        ("block pairs skipped", *(f"{one.sparsity:.1%}" for one in readings)),
        ("attention speed-up", *(times(attention[0] / seconds) for seconds in attention)),
        ("step speed-up", *(times(per_step[0] / seconds) for seconds in per_step)),
    ]
    return Table(("", *names), rows, title=f"Expected: {sample.answer.strip()}", text=True)


def draw(q: Tensor, k: Tensor, config: BAAttConfig, layer: int, path: Path) -> None:
    """The map in the order of the paper's setting, of a config and of the oracle, each with the blocks it keeps."""
    plans = [make_plan(q, k, one, impl="reference") for one in compared(config)]
    head = most_structured_head(q, k, plans[-1])
    caption = f"Layer {layer}, head {head}: full attention at the first denoising step; dimmed: what each setting skips"
    draw_maps(q, k, plans, head, caption, path)
