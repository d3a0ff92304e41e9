"""Answer or continue a prompt with a masked-diffusion language model, sparse or dense."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from baatt.assets import NEEDLE
from baatt.cli.errors import UsageError
from baatt.cli.options import add_model_options, add_sparse_options, load_model, model_folder, read_preset
from baatt.config import BAAttConfig, Policy
from baatt.integrations.enable import enable
from baatt.lab.chat import load_chat_templates
from baatt.lab.loading import DTYPES, check_bytes, check_memory
from baatt.lab.options import add_options, given, variants
from baatt.lab.prompts import answer_text, encode_prompt, end_tokens
from baatt.lab.ruler.tasks import is_asked
from baatt.lab.texts import decode_text, read_text
from baatt.sampling import SamplerConfig, StepInfo, generate

#: How a prompt is continued where the options say nothing else; --steps follows --gen-length.
USUAL = SamplerConfig(steps=64, gen_length=64, block_length=32, threshold=0.9, stop_at_eos=True)
#: Below as many tokens a sparse call has few blocks to leave out, and choosing them takes longer than it saves.
SHORT = 1024
EXAMPLE = (
    "One of the special magic numbers for calm-river is: 4821973. What is the special magic number for calm-river "
    "mentioned in the provided text? The special magic number for calm-river mentioned in the provided text is"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Prompt, sampler, model and sparsity."""
    parser.description = (
        f"{parser.description} The model shipped as needle answers RULER's questions about a text and nothing else, "
        f'such as --prompt "{EXAMPLE}"; --model smollm2 is asked in plain words, and --model DIR is a language model '
        "of your own. A model grown from a causal one fills from left to right where --remasking says nothing else."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to continue")
    source.add_argument("--prompt-file", type=Path, help='a UTF-8 file with the text, or "-" for standard input')
    parser.add_argument(
        "--chat", action=argparse.BooleanOptionalAction,
        help="put the prompt through the model's chat template, or continue it as it is (default: through the template "
        "where the model has one)",
    )  # fmt: skip
    parser.add_argument("--dense", action="store_true", help="full attention everywhere")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    add_options(parser.add_argument_group("sampler"), SamplerConfig, defaults=USUAL)
    add_model_options(parser)
    add_sparse_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the continuation."""
    config, policy = (None, Policy()) if arguments.dense else read_preset(arguments)
    if arguments.dense and (unread := given(arguments, BAAttConfig) | given(arguments, Policy)):
        raise UsageError(f"--dense leaves nothing sparse, got --{next(iter(unread)).replace('_', '-')} too")
    sampler = read_sampler(arguments)
    prompt = _read_prompt(arguments)
    model, tokenizer = load_model(arguments, policy)
    if model.config.predicts == "next" and "remasking" not in given(arguments, SamplerConfig):
        sampler = dataclasses.replace(sampler, remasking="left_to_right")  # as its base wrote, and as it was measured
    folder = model_folder(arguments)
    templates = load_chat_templates(folder)
    chat = bool(templates.templates) if arguments.chat is None else arguments.chat
    if chat and not templates.templates:
        raise UsageError(f"--chat needs a model whose folder has a chat template, {folder.name} has none")
    text = templates.render([{"role": "user", "content": prompt}]) if chat else prompt
    ids = encode_prompt(tokenizer, text, templates.special_tokens)
    if not ids:
        raise UsageError("the prompt must not be empty")
    tokens, device = len(ids) + sampler.gen_length, torch.device(arguments.device)
    check_memory(model.config, tokens, device)
    if sampler.cache != "none":
        kept = 2 * model.config.n_layers * model.config.kv_heads * model.config.head_size * tokens
        kept *= DTYPES[arguments.dtype].itemsize * (2 if sampler.cfg_scale > 0 else 1)
        check_bytes(f"--cache {sampler.cache}", f"keys and values of {tokens} tokens need", kept, device)
    if folder.name == NEEDLE and not arguments.json and not is_asked(prompt):
        raise UsageError(
            "the prompt must ask one of RULER's questions about a text, all that the needle model has learnt: needles, "
            "variables, common and frequent words (baatt generate --help has an example, baatt demo asks); --model "
            "smollm2 is asked in plain words (baatt fetch smollm2 brings it), --model DIR takes a language model in "
            "LLaDA's layout, --json shows what the needle model makes of a text"
        )
    bar = Progress(
        TextColumn("denoising"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=sampler.steps)

        def progress(info: StepInfo) -> None:
            bar.update(task, completed=info.step + 1)

        with enable(model, config, policy, impl=arguments.impl) as handle:
            prompt_ids = torch.tensor([ids], device=arguments.device)
            result = generate(model, prompt_ids, None, sampler, on_step=handle.at_step, progress=progress)
    ends = end_tokens(tokenizer, model.config.eos_token_id, templates.special_tokens)
    text = answer_text(tokenizer, result.tokens[0].tolist(), ends)
    record = {
        "text": text, "chat": chat, "prompt_tokens": len(ids), "generated_tokens": result.tokens[0].tolist(),
        "model_evaluations": result.steps, "full_evaluations": result.full_evaluations,
        "cached_evaluations": result.cached_evaluations, "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second, "sampler": dataclasses.asdict(sampler),
        "sparse": dataclasses.asdict(config) if config else None, "policy": dataclasses.asdict(policy),
    }  # fmt: skip
    sys.stdout.write(f"{json.dumps(record) if arguments.json else text}\n")
    if not arguments.json:
        part = f", {result.cached_evaluations} of them of one block with cached keys and values"
        cached = part if result.cached_evaluations else ""
        sys.stderr.write(
            f"{result.tokens_per_second:.1f} tokens/s: {result.filled} tokens in {result.seconds:.2f} s, "
            f"{result.steps} model evaluations{cached}\n"
        )
        if config is not None and handle.sparse_calls and tokens < SHORT:
            sys.stderr.write(
                f"{tokens} tokens make few blocks of {config.block_size}: choosing among them takes longer than it "
                "saves, --dense is faster\n"
            )


def read_sampler(arguments: argparse.Namespace) -> SamplerConfig:
    """As given; a step fills at least one token, so as many steps as tokens are the usual and the most."""
    values = given(arguments, SamplerConfig)
    tokens = values.get("gen_length", USUAL.gen_length)
    if tokens < 1:  # the steps, which follow, would be refused first
        raise UsageError(f"--gen-length must be positive, got {tokens}")
    sampler = variants(USUAL, {"steps": tokens} | values)[0]
    if sampler.steps > tokens:
        raise UsageError(f"--steps must be at most --gen-length, {tokens} tokens to fill, got {sampler.steps}")
    return sampler


def _read_prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is None:
        text = read_text(arguments.prompt_file)
    else:  # what is not UTF-8 in an argument comes as surrogates
        text = decode_text(arguments.prompt.encode("utf-8", "surrogateescape"), "--prompt")
    if not text.strip():
        raise UsageError("the prompt must not be empty")
    return text
