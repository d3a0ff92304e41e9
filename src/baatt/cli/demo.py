"""Read a fresh 4K-token document and answer from it, once with full attention and once with BA-Att.

Everything runs on the shipped model without network or GPU. Prints the question, a bar while the model works, a table
with both answers and their times, and writes a picture of one early layer's attention map.
"""

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from torch import Tensor

from baatt.attention import attend, make_plan
from baatt.cli.options import add_model_options, add_sparse_options, check_files, load_model, read_preset
from baatt.config import BAAttConfig, Policy, Preset
from baatt.integrations.enable import enable
from baatt.lab.describe import options_text
from baatt.lab.loading import check_memory
from baatt.lab.maps import Panel, attention_cells, draw_maps, kept_table, most_structured_head
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
    parser.add_argument("--length", type=int, default=4096, help="tokens of document and answer (default: 4096)")
    parser.add_argument("--task", choices=list(NIAH_TASKS), default="niah_multikey_1", help="RULER needle task")
    parser.add_argument("--seed", type=int, default=1, help="which document (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("baatt-demo.png"), help="picture (default: baatt-demo.png)")
    add_model_options(parser)
    add_sparse_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """The whole demo."""
    console = Console()
    check_files(arguments, pictures=("output",))
    setting = read_preset(arguments)
    model, tokenizer = load_model(arguments, setting.policy)
    check_memory(model.config, arguments.length, torch.device(arguments.device))
    sample = draw_samples(arguments.task, arguments.length, 1, tokenizer, seed=arguments.seed)[0]
    ids = tokenizer.encode(sample.prompt + sample.answer_prefix).ids
    console.print(f"[bold]Document[/bold] {arguments.task}, {len(ids)} tokens, {len(sample.prompt.split())} words")
    console.print(f"[bold]Question[/bold] {sample.prompt.rsplit(chr(10), 1)[1]}", highlight=False)
    console.print(f"[bold]Setting[/bold]  {arguments.preset}: {options_text(*setting)}", highlight=False)
    if arguments.length > model.config.max_sequence_length:
        console.print(f"[yellow]The model was trained up to {model.config.max_sequence_length} tokens: beyond, times "
                      "mean something, answers often do not.[/yellow]")  # fmt: skip
    dense_layers = setting.policy.check_layers(model.config.n_layers)
    drawn = next((layer for layer in range(model.config.n_layers) if layer not in dense_layers), 0)
    # One sparse call on a few tokens: building a kernel is not part of reading a document.
    weight = next(model.parameters())
    q = torch.randn(1, model.config.n_heads, 256, model.config.head_size, device=weight.device, dtype=weight.dtype)
    attend(q, q, q, make_plan(q, q, setting.config, impl=arguments.impl), impl=arguments.impl)
    ask = partial(read, console, model, tokenizer, torch.tensor([ids], device=arguments.device), arguments.impl, drawn)
    full, sparse = ask(None), ask(setting)
    console.print(table(sample, full, sparse).rich())
    draw(*sparse.drawn, setting.config, drawn, arguments.output)
    console.print(f"Attention map of layer {drawn}, kept blocks outlined: {arguments.output}")


def read(
    console: Console, model: MaskedDiffusionLM, tokenizer: Tokenizer, prompt: Tensor, impl: str, drawn_layer: int,
    setting: Preset | None,
) -> Reading:  # fmt: skip
    """Answer a prompt [1, N] once, with a progress bar. Drawn is the first step, when the answer is masked."""
    name = "full attention" if setting is None else "BA-Att"
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
    text = answer_text(tokenizer, result.tokens[0].tolist(), {model.config.eos_token_id})
    return Reading(text.strip(), result.steps, result.seconds, handle.seconds, handle.sparsity, drawn[0])


def table(sample: RulerSample, dense: Reading, sparse: Reading) -> Table:
    """Both readings side by side."""
    both = dense, sparse
    right = [whole_share(one.text, sample.values) == 1 for one in both]
    per_step = [one.seconds / one.steps for one in both]
    attention = [one.attention_seconds / one.steps for one in both]
    rows = [
        ("answer", *(one.text for one in both)),
        ("right", *("[green]yes[/green]" if one else "[red]no[/red]" for one in right)),
        ("model evaluations", *(str(one.steps) for one in both)),
        ("seconds per step", *(f"{seconds:.2f}" for seconds in per_step)),
        ("of which attention", *(f"{seconds:.2f}" for seconds in attention)),
        ("block pairs skipped", *(f"{one.sparsity:.1%}" for one in both)),
        ("attention speed-up", times(1), times(attention[0] / attention[1])),
        ("step speed-up", times(1), times(per_step[0] / per_step[1])),
    ]
    return Table(("", "full attention", "BA-Att"), rows, title=f"Expected: {sample.answer.strip()}", text=True)


def draw(q: Tensor, k: Tensor, config: BAAttConfig, layer: int, path: Path) -> None:
    """The map in the tokens' own order and sorted by norm, each with the blocks BA-Att keeps in that order."""
    sort = "qk" if config.sort == "none" else config.sort
    sorted_by = f"sorted by norm ({sort}, segments of {config.segment or 'all'} tokens)"
    plans = [make_plan(q, k, dataclasses.replace(config, sort=order), impl="reference") for order in ("none", sort)]
    head = most_structured_head(q, k, plans[0])
    panels = []
    for plan, title in zip(plans, ("in the document's order", sorted_by), strict=True):
        kept = kept_table(plan, head)
        counted = f"{title}\n{int(kept.sum())} of {kept.numel()} blocks kept"
        panels.append(Panel(attention_cells(q, k, plan, head), plan, counted))
    caption = f"Layer {layer}, head {head}: dense attention at the first denoising step; outlined: blocks BA-Att keeps"
    draw_maps(panels, head, caption, path)
