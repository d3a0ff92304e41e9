"""Answer a question about a document: full attention, the paper's setting and the default side by side.

A model with a chat template, smollm2 where it was fetched, reads a passage with a statement planted in it, or a
document of the user's, and is asked in plain words; any other one a needle document of RULER. No network or GPU. Prints
the question, a bar while the model works, a table with all answers and their times, and writes a picture of one layer's
attention map with the blocks that each keeps.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
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
from baatt.lab.chat import ChatTemplates, load_chat_templates
from baatt.lab.describe import options_text, selection_name
from baatt.lab.loading import check_memory, find_model
from baatt.lab.maps import compared, draw_maps, most_structured_head, paper_like
from baatt.lab.prompts import answer_text, encode_prompt, end_tokens
from baatt.lab.reading import held_out_document
from baatt.lab.ruler.niah import NIAH_TASKS
from baatt.lab.ruler.scoring import whole_share
from baatt.lab.ruler.tasks import draw_samples
from baatt.lab.tables import Table, times
from baatt.lab.texts import read_text
from baatt.models.llada import MaskedDiffusionLM
from baatt.sampling import SamplerConfig, StepInfo, generate

# At most eight model evaluations, so that a document beyond the trained length, where no token is sure, still ends.
NEEDLE_SAMPLER = SamplerConfig(steps=8, gen_length=64, block_length=32, threshold=0.9)
# The document is read once for every 32 tokens of the answer, and what it gave is kept meanwhile.
CHAT_SAMPLER = SamplerConfig(
    steps=64, gen_length=64, block_length=32, remasking="left_to_right", threshold=0.9, stop_at_eos=True, cache="dual"
)
NEEDLE_LENGTH, CHAT_LENGTH = 4096, 3072


class Asked(NamedTuple):
    """A document with a question.

    title: what document. text: all that the model is given. excerpt: a line of the document. values: what a right
    answer holds, () where nobody knows. expected: the answer that was expected, "" likewise.
    """

    title: str
    text: str
    excerpt: str
    question: str
    values: Sequence[str]
    expected: str
    sampler: SamplerConfig


class Reading(NamedTuple):
    """One run over the document: what was answered, what it cost, and q and k of the layer that is drawn.

    full_steps: of the model evaluations, those of the whole document. sparsity: block pairs that they skipped.
    """

    tokens: list[int]
    steps: int
    full_steps: int
    seconds: float
    attention_seconds: float
    sparsity: float
    drawn: tuple[Tensor, Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Document, output and the shared options."""
    add = parser.add_argument
    add("--document", type=Path, metavar="FILE", help='a UTF-8 text of your own, or "-" for standard input, which a '
        "model with a chat template reads; needs --question")  # fmt: skip
    add("--question", metavar="TEXT", help="what is asked about --document")
    add("--length", type=length, help="tokens of document and answer (default: 3072; 4096 of a needle document)")
    add("--task", choices=list(NIAH_TASKS), help="RULER needle task, for any model (default: niah_multikey_1, of the "
        "needle model; a model with a chat template is asked about plain statements in a real text)")  # fmt: skip
    add("--seed", type=seed, help="which document (default: 1)")
    add("--output", type=Path, default=Path("baatt-demo.png"), help="picture (default: baatt-demo.png)")
    add("--video", action="store_true", help="sample a clip instead, from the shipped video model "
        "(--model: another folder of training/vision/video.py): frames to --output, a GIF beside it; --seed "
        "says which clip and noise, the other options above are of documents")  # fmt: skip
    add("--steps", type=at_least(1), help="model evaluations of --video (default: 12)")
    add_model_options(parser, usual="smollm2 where it was fetched, else needle")
    add_sparse_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """The whole demo."""
    check_arguments(arguments)
    console = Console()
    if arguments.video:
        video.demo(arguments)
        return
    check_files(arguments, pictures=("output",))
    setting = read_preset(arguments)
    note = choose_model(arguments)
    templates = load_chat_templates(arguments.model)
    document = choose_document(arguments, templates)
    model, tokenizer = load_model(arguments, setting.policy)
    check_memory(model.config, arguments.length or 0, torch.device(arguments.device))
    asked = document(arguments, tokenizer, templates)
    ids = encode_prompt(tokenizer, asked.text, templates.special_tokens)
    tokens = len(ids) + asked.sampler.gen_length
    check_memory(model.config, tokens, torch.device(arguments.device))
    if note:
        console.print(f"[yellow]{note}[/yellow]", soft_wrap=True, highlight=False)
    introduce(console, arguments.model.name, model, asked, len(ids))
    settings: dict[str, Preset] = {"paper": Preset(paper_like(setting.config), Policy())}
    if setting != settings["paper"]:
        settings[arguments.preset if arguments.preset != "paper" else "paper, changed"] = setting
    for name, one in settings.items():
        console.print(f"[bold]Setting[/bold]  {name}: {options_text(*one)}", highlight=False)
    if tokens > model.config.max_sequence_length:
        console.print(f"[yellow]The model was trained up to {model.config.max_sequence_length} tokens: beyond, times "
                      "mean something, answers often do not.[/yellow]")  # fmt: skip
    warm_up(model, settings.values(), arguments.impl)
    drawn = model.config.n_layers // 3
    ends = end_tokens(tokenizer, model.config.eos_token_id, templates.special_tokens)
    prompt = torch.tensor([ids], device=arguments.device)
    ask = partial(read, console, model, prompt, asked.sampler, arguments.impl, drawn)
    readings = [ask("full attention", None), *(ask(name, one) for name, one in settings.items())]
    texts = [answer_text(tokenizer, one.tokens, ends).strip() for one in readings]
    names = [f"{name}: {selection_name(vars(one.config), one.policy.dense_layers)}" for name, one in settings.items()]
    console.print(table(asked, ["full attention", *names], texts, readings).rich())
    draw(*readings[0].drawn, setting.config, drawn, arguments.output)
    console.print(f"Attention map of layer {drawn}, skipped blocks dimmed: {arguments.output}", soft_wrap=True)


def introduce(console: Console, name: str, model: MaskedDiffusionLM, asked: Asked, tokens: int) -> None:
    """Who reads what, and is asked what."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    words = len(asked.text.split())
    for title, text in (
        ("Model", f"{name}, {parameters / 1e6:.1f} million parameters"),
        ("Document", f"{asked.title}, {tokens} tokens, {words} words"), ("", asked.excerpt),
        ("Question", asked.question),
    ):  # fmt: skip
        console.print(f"[bold]{title:8}[/bold] {escape(text)}", highlight=False)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse options that would say nothing beside others."""
    if arguments.steps is not None and not arguments.video:
        raise UsageError("--steps must come with --video: a document is answered in as few as the model needs")
    if (arguments.document is None) != (arguments.question is None):
        raise UsageError("--document and --question must come together: a text, and what is asked about it")
    if arguments.document is not None:
        others = [name for name in ("length", "task", "seed") if getattr(arguments, name) is not None]
        others += ["video"] * arguments.video
        if others:
            raise UsageError(f"--{others[0]} must come without --document, which is read as it is")
    arguments.seed = 1 if arguments.seed is None else arguments.seed


def choose_model(arguments: argparse.Namespace) -> str:
    """Where no model is given, smollm2, and the needle model for its own tasks or where smollm2 is not here; returns
    what the user is to be told of that."""
    if arguments.model is not None:
        return ""
    if arguments.task is not None:
        arguments.model = find_model("needle")
        return ""
    try:
        arguments.model = find_model("smollm2")
    except FileNotFoundError as error:
        if arguments.document is not None:
            raise
        arguments.model = find_model("needle")
        return f"{error}; {arguments.model.name} answers in its place"
    return ""


def choose_document(
    arguments: argparse.Namespace, templates: ChatTemplates
) -> Callable[[argparse.Namespace, Tokenizer, ChatTemplates], Asked]:
    """Which document the arguments ask for, and the model can read."""
    if arguments.document is not None:
        if not templates.templates:
            raise UsageError(
                f"--document needs a model with a chat template, {arguments.model.name} has none: --model smollm2 has "
                "(baatt fetch smollm2)"
            )
        return own_document
    return planted_document if templates.templates and arguments.task is None else needle_document


def needle_document(arguments: argparse.Namespace, tokenizer: Tokenizer, templates: ChatTemplates) -> Asked:
    """A needle task as RULER asks it, which begins the answer too."""
    task, tokens = arguments.task or "niah_multikey_1", arguments.length or NEEDLE_LENGTH
    sample = draw_samples(task, tokens, 1, tokenizer, seed=arguments.seed)[0]
    question = sample.prompt.rsplit("\n", 1)[1]
    text, line = sample.prompt + sample.answer_prefix, excerpt(sample.prompt, sample.values[0])
    return Asked(task, text, line, question, sample.values, sample.answer.strip(), NEEDLE_SAMPLER)


def planted_document(arguments: argparse.Namespace, tokenizer: Tokenizer, templates: ChatTemplates) -> Asked:
    """Held-out text with plain statements in it, the first of which is asked for."""
    tokens = arguments.length or CHAT_LENGTH
    around = len(encode_prompt(tokenizer, chat_about("", 32 * "word ", templates), templates.special_tokens))
    room = tokens - around - CHAT_SAMPLER.gen_length
    try:
        document, facts = held_out_document(tokenizer, room, arguments.seed)
    except ValueError as error:
        raise UsageError(f"--length {tokens} leaves {room} tokens for a document, whose {error}") from None
    fact = facts[0]
    title = f"held-out text with {len(facts)} statements planted in it"
    text = chat_about(document, fact.question, templates)
    return Asked(
        title, text, excerpt(document, fact.statement.removesuffix(".")), fact.question, [fact.value], fact.answer,
        CHAT_SAMPLER,
    )  # fmt: skip


def own_document(arguments: argparse.Namespace, tokenizer: Tokenizer, templates: ChatTemplates) -> Asked:
    """A text of the user's, as it is."""
    document, question = read_text(arguments.document).strip(), arguments.question.strip()
    for flag, text in (("--document", document), ("--question", question)):
        if not text:
            raise UsageError(f"{flag} must not be empty")
    title = "standard input" if str(arguments.document) == "-" else arguments.document.name
    text, line = chat_about(document, question, templates), excerpt(document, document[:160])
    return Asked(title, text, line, question, (), "", CHAT_SAMPLER)


def chat_about(document: str, question: str, templates: ChatTemplates) -> str:
    """A document and a question as the model's chat template puts them."""
    return templates.render([{"role": "user", "content": f"{document}\n\n{question}"}])


def excerpt(document: str, part: str) -> str:
    """A line of the document around what is asked for, which the model has to find."""
    text, part = " ".join(document.split()), " ".join(part.split())
    place = text.find(part)
    before, after = text[:place], text[place + len(part) :]
    if len(before) > 160:
        before = f"... {before[-160:].partition(' ')[2]}"
    if len(after) > 80:
        after = f"{after[:80].rpartition(' ')[0]} ..."
    return before + part + after


def warm_up(model: MaskedDiffusionLM, settings: Iterable[Preset], impl: str) -> None:
    """Every setting on a few tokens: building a kernel is not part of reading a document."""
    weight = next(model.parameters())
    q = torch.randn(1, model.config.n_heads, 256, model.config.head_size, device=weight.device, dtype=weight.dtype)
    for config, _ in settings:
        attend(q, q, q, make_plan(q, q, config, impl=impl), impl=impl)


def read(
    console: Console, model: MaskedDiffusionLM, prompt: Tensor, sampler: SamplerConfig, impl: str, drawn_layer: int,
    name: str, setting: Preset | None,
) -> Reading:  # fmt: skip
    """Answer a prompt [1, N] once, with a progress bar. Drawn is the first step, when the answer is masked."""
    config, policy = (None, Policy()) if setting is None else setting
    if sampler.cache != "none":  # a block of the answer against all that is kept has nothing to leave out
        policy = dataclasses.replace(policy, min_queries=2 * sampler.block_length)
    drawn: list[tuple[Tensor, Tensor]] = []
    columns = (TextColumn(f"{name:15}"), BarColumn(), TextColumn("{task.completed} of {task.total} tokens"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=sampler.gen_length)

        def watch(layer: int | None, q: Tensor, k: Tensor, *_: object) -> None:
            if layer == drawn_layer and not drawn:
                drawn.append((q, k))

        def progress(info: StepInfo) -> None:
            bar.update(task, completed=sampler.gen_length - info.masked_remaining)

        with enable(model, config, policy, impl=impl) as handle:
            handle.watch(watch)
            handle.is_timed = True
            result = generate(model, prompt, None, sampler, on_step=handle.at_step, progress=progress)
    return Reading(
        result.tokens[0].tolist(), result.steps, result.full_evaluations, result.seconds, handle.seconds,
        handle.tally(lambda reason: reason is None or "min_queries" not in reason).skipped, drawn[0],
    )  # fmt: skip


def table(asked: Asked, names: Sequence[str], texts: Sequence[str], readings: Sequence[Reading]) -> Table:
    """All readings side by side; the first one is that of full attention. Where keys and values are kept, what costs
    time are the evaluations of the whole document, with the cheap ones behind each of them."""
    unit = "step" if all(one.steps == one.full_steps for one in readings) else "pass"
    evaluations = [
        f"{one.steps}" if unit == "step" else f"{one.full_steps} of the document, {one.steps - one.full_steps} of the "
        "answer" for one in readings
    ]  # fmt: skip
    seconds = [one.seconds / one.full_steps for one in readings]
    attention = [one.attention_seconds / one.full_steps for one in readings]
    right = [whole_share(text, asked.values) == 1 for text in texts] if asked.values else []
    rows = [
        ("answer", *map(escape, texts)),
        *([("right", *("[green]yes[/green]" if one else "[red]no[/red]" for one in right))] if right else []),
        ("model evaluations", *evaluations),
        (f"seconds per {unit}", *(f"{one:.2f}" for one in seconds)),
        ("of which attention", *(f"{one:.2f}" for one in attention)),
        ("block pairs skipped", *(f"{one.sparsity:.1%}" for one in readings)),
        ("attention speed-up", *(times(attention[0] / one) for one in attention)),
        (f"{unit} speed-up", *(times(seconds[0] / one) for one in seconds)),
    ]
    title = f"Expected: {asked.expected}" if asked.expected else ""
    return Table(("", *names), rows, title=title, text=True)


def draw(q: Tensor, k: Tensor, config: BAAttConfig, layer: int, path: Path) -> None:
    """The map in the order of the paper's setting, of a config and of the oracle, each with the blocks it keeps."""
    plans = [make_plan(q, k, one, impl="reference") for one in compared(config)]
    head = most_structured_head(q, k, plans[-1])
    caption = f"Layer {layer}, head {head}: full attention at the first denoising step; dimmed: what each setting skips"
    draw_maps(q, k, plans, head, caption, path)
