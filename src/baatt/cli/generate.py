"""Continue a prompt with a masked-diffusion language model, sparse or dense."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from baatt.cli.dials import DTYPES, free_bytes
from baatt.cli.errors import UsageError
from baatt.cli.options import add_model_options, add_sparse_options, check_memory, load_model, read_setting
from baatt.config import Policy
from baatt.lab.prompts import answer_text
from baatt.models.config import ModelConfig
from baatt.sampling import CACHES, REMASKING, SamplerConfig, StepInfo, generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Prompt, sampler, model and sparsity."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to continue")
    source.add_argument("--prompt-file", type=Path, help='a UTF-8 file with the text, or "-" for standard input')
    parser.add_argument("--dense", action="store_true", help="full attention everywhere")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    sampler = parser.add_argument_group("sampler")
    sampler.add_argument("--gen-length", type=int, default=64, help="tokens to generate (default: 64)")
    sampler.add_argument("--block-length", type=int, default=32, help="tokens denoised together (default: 32)")
    sampler.add_argument("--steps", type=int, default=64, help="denoising steps in all (default: 64)")
    sampler.add_argument("--temperature", type=float, default=0.0, help="of Gumbel noise (default: 0)")
    sampler.add_argument("--cfg-scale", type=float, default=0.0, help="classifier-free guidance (default: 0)")
    sampler.add_argument("--remasking", choices=list(REMASKING), default="low_confidence")
    sampler.add_argument("--threshold", type=float, help="fill every position surer than this at once")
    sampler.add_argument(
        "--cache", choices=list(CACHES), default="none",
        help="what the later steps of a block take over from its first: nothing, the keys and values of everything "
        "before the block, or of everything but the block; faster, and approximate (default: none)",
    )  # fmt: skip
    sampler.add_argument("--seed", type=int, default=0)
    sampler.add_argument("--stop-at-eos", action="store_true", help="leave out the blocks after an end-of-text token")
    add_model_options(parser)
    add_sparse_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the continuation."""
    config, policy = (None, Policy()) if arguments.dense else read_setting(arguments)
    fields = [field.name for field in dataclasses.fields(SamplerConfig)]
    sampler = SamplerConfig(**{name: getattr(arguments, name) for name in fields})
    prompt = _read_prompt(arguments)
    model, tokenizer = load_model(arguments)
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise UsageError("the prompt must not be empty")
    check_memory(model.config, len(ids) + sampler.gen_length, arguments.device)
    if sampler.cache != "none":
        _check_cache(model.config, len(ids) + sampler.gen_length, sampler.cfg_scale > 0, arguments)
    bar = Progress(
        TextColumn("denoising"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=sampler.steps)

        def progress(info: StepInfo) -> None:
            bar.update(task, completed=info.step + 1)

        result = generate(
            model, torch.tensor([ids], device=arguments.device), None, sampler,
            sparse=config, policy=policy, impl=arguments.impl, progress=progress,
        )  # fmt: skip
    text = answer_text(tokenizer, result.tokens[0].tolist(), {model.config.eos_token_id})
    record = {
        "text": text, "prompt_tokens": len(ids), "generated_tokens": result.tokens[0].tolist(),
        "model_evaluations": result.steps, "full_evaluations": result.full_evaluations,
        "cached_evaluations": result.cached_evaluations, "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second, "sampler": dataclasses.asdict(sampler),
        "sparse": dataclasses.asdict(config) if config else None, "policy": dataclasses.asdict(policy),
    }  # fmt: skip
    sys.stdout.write(f"{json.dumps(record) if arguments.json else text}\n")
    if not arguments.json:
        sys.stderr.write(
            f"{result.tokens_per_second:.1f} tokens/s: {result.filled} tokens in {result.seconds:.2f} s, "
            f"{result.full_evaluations} full and {result.cached_evaluations} cached model evaluations\n"
        )


def _check_cache(config: ModelConfig, tokens: int, guided: bool, arguments: argparse.Namespace) -> None:
    """Refuse keys and values that cannot fit, before a minute is spent on the first pass."""
    per_token = 2 * config.n_layers * config.kv_heads * config.head_size * DTYPES[arguments.dtype].itemsize
    needed, free = per_token * tokens * (2 if guided else 1), free_bytes(torch.device(arguments.device))
    if needed > free:
        raise UsageError(
            f"--cache {arguments.cache} must fit into memory: keys and values of {tokens} tokens need "
            f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        )


def _read_prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        text = str(arguments.prompt)
    elif str(arguments.prompt_file) == "-":
        text = sys.stdin.read()
    else:
        try:
            text = arguments.prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UsageError(f"--prompt-file must hold UTF-8 text, {arguments.prompt_file} does not") from None
        except OSError as error:
            raise UsageError(f"--prompt-file {arguments.prompt_file} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UsageError("the prompt must not be empty")
    return text
