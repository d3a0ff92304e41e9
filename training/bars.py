"""Measures what a diffusion model grown from a causal one can do beside its base: text, questions, continuations.

In: a GGUF base, and `--adapter`, what `adapt.py` left. Out: one JSON file; with `--folder` also a model folder, on
which `evaluate.py` and `baatt evaluate ruler` measure the tasks. `--causal` answers with the base, left to right.
"""

import argparse
import dataclasses
import json
import math
import random
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from base_text import write
from reading import ANSWER, SYSTEM, USER
from tokenizers import Tokenizer

from baatt.assets import held_out_text
from baatt.lab.likelihood import log_likelihood
from baatt.lab.prompts import answer_text, pad_left
from baatt.lab.reading import document_with, draw_facts
from baatt.lab.records import provenance, write_json
from baatt.lab.ruler.sources import load_words
from baatt.lab.smollm2 import sha256_of, write_folder
from baatt.models import MaskedDiffusionLM
from baatt.models.adapter import merge, read_adapter
from baatt.models.gguf import load_gguf_tokenizer, load_llama
from baatt.sampling import SamplerConfig, generate
from baatt.stages.dense import dense_attention

QUESTIONS = Path(__file__).with_name("questions.json")
CONTINUED = (
    "Once upon a time, there was a little girl who lived in a small village near the sea.",
    "The most important thing to know about learning a new language is",
    "A database is a collection of data that is",
)
ANSWER_TOKENS, CONTINUATION_TOKENS = 32, 96
READ_TOKENS, FACTS = (1000, 3000), 8  # tokens of a document, statements in it
#: A token is filled only where it is sure, from the left, as the base wrote.
SAMPLER = SamplerConfig(steps=32, gen_length=32, block_length=32, remasking="left_to_right", threshold=0.9)
#: Of continuations, which repeat themselves otherwise: what the model takes off for repetition, what the base draws at.
PENALTY, TEMPERATURE = 1.2, 0.8
LENGTH, RATES = 512, (0.15, 0.5, 0.9)  # tokens of a piece of held-out prose; shares that are hidden


def is_right(answer: str, pattern: str) -> bool:
    """Whether an answer has one of the words `a|b` that are right, as whole words."""
    return re.search(rf"(?<!\w)(?:{pattern})(?!\w)", answer, re.IGNORECASE) is not None


def open_model(arguments: argparse.Namespace) -> tuple[MaskedDiffusionLM, Tokenizer]:
    """The base, changed as the arguments say, in fp32."""
    model, tokenizer = load_llama(arguments.base), load_gguf_tokenizer(arguments.base)
    if arguments.adapter is not None:
        merge(model, read_adapter(arguments.adapter, sha256_of(arguments.base)))
    return model, tokenizer


@torch.inference_mode()
def measure_text(model: MaskedDiffusionLM, base: MaskedDiffusionLM, rows: torch.Tensor) -> dict[str, Any]:
    """Of held-out rows [R, N]: share of masked tokens told rightly by share hidden, the bound, the base's own loss."""
    generator = torch.Generator().manual_seed(0)
    mask = model.config.mask_token_id
    found: dict[str, Any] = {"tokens": rows.numel()}
    for rate in RATES:
        right = total = 0
        for row in rows:
            hidden = (torch.rand(row.shape, generator=generator) < rate).to(row.device)
            told = model(row.masked_fill(hidden, mask)[None])[0].argmax(-1)
            right, total = right + int((told == row)[hidden].sum()), total + int(hidden.sum())
        found[f"accuracy_at_{rate}"] = right / total
    device = rows.device
    bound = [log_likelihood(model, [], row.tolist(), device=device, draws=16, batch_size=8) for row in rows]
    found["bound_per_token"] = -sum(bound) / rows.numel()
    losses = [
        F.cross_entropy(base(row[None], attention=causal)[0, 1:].float(), row[1:], reduction="sum") for row in rows
    ]
    found["base_loss_per_token"] = float(sum(losses)) / (rows.numel() - len(rows))
    return found | {"bound_perplexity": math.exp(found["bound_per_token"])}


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, /, *, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of the base as it was trained."""
    return dense_attention(q, k, v, key_mask=key_mask, causal=1)


def continuations(
    model: MaskedDiffusionLM, tokenizer: Tokenizer, prompts: list[str], tokens: int, penalty: float = 1.0
) -> list[str]:
    """What a model writes after each prompt by diffusion, most probable tokens."""
    device = model.transformer.wte.weight.device
    rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    ends = model.config.end_tokens
    ids, mask = pad_left(rows, model.config.pad_token_id or 0)
    sampler = dataclasses.replace(
        SAMPLER, gen_length=tokens, steps=tokens, repetition_penalty=penalty, stop_at_eos=True
    )
    answers = generate(model, ids.to(device), mask.to(device), sampler).tokens.tolist()
    return [answer_text(tokenizer, answer, ends) for answer in answers]


def causal_continuations(
    model: MaskedDiffusionLM, tokenizer: Tokenizer, prompts: list[str], tokens: int, temperature: float = 0.0
) -> list[str]:
    """What the base writes after each prompt, left to right."""
    rows, end = [tokenizer.encode(prompt).ids for prompt in prompts], model.config.end_tokens[-1]
    forced = torch.full((len(rows), max(map(len, rows)) + tokens), -1)
    for row, ids in zip(forced, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    written = write(model, forced.to(model.transformer.wte.weight.device), None, end, temperature, 0.0)[0].tolist()
    answers = [row[len(ids) : len(ids) + tokens] for row, ids in zip(written, rows, strict=True)]
    return [answer_text(tokenizer, answer, model.config.end_tokens) for answer in answers]


def ask(model: MaskedDiffusionLM, tokenizer: Tokenizer, is_causal: bool) -> list[dict[str, Any]]:
    """Every question with its answer and whether that is right."""
    questions = json.loads(QUESTIONS.read_text())
    prompts = [f"{SYSTEM}{USER}{one['question']}<|im_end|>{ANSWER}" for one in questions]
    write_after = causal_continuations if is_causal else continuations
    answers = write_after(model, tokenizer, prompts, ANSWER_TOKENS)
    return [
        one | {"answer": answer, "right": is_right(answer, one["right"])}
        for one, answer in zip(questions, answers, strict=True)
    ]


def read(model: MaskedDiffusionLM, tokenizer: Tokenizer, documents: int, tokens: int) -> list[dict[str, Any]]:
    """What a model answers about statements in held-out text of about so many tokens, and whether that is right."""
    generator, words, found = random.Random(0), load_words("heldout"), list[dict[str, Any]]()
    text = held_out_text()
    for _ in range(documents):
        start = generator.randrange(len(text) - 4 * tokens)
        facts = draw_facts(generator, words, FACTS)
        document = document_with(facts, text[start : start + 4 * tokens].partition(" ")[2], generator)
        asked = facts[0]
        prompt = f"{SYSTEM}{USER}{document}\n\n{asked.question}<|im_end|>{ANSWER}"
        (answer,) = continuations(model, tokenizer, [prompt], ANSWER_TOKENS)
        right = is_right(answer, re.escape(asked.value))
        found.append({"question": asked.question, "answer": answer, "value": asked.value, "right": right})
    return found


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", type=Path, required=True, help="GGUF file")
    add("--adapter", type=Path, help="8-bit file with the change of the base")
    add("--folder", type=Path, help="also write the model as a folder in LLaDA's layout")
    add("--causal", action="store_true", help="the base itself, left to right: questions and continuations alone")
    add("--pieces", type=int, default=64, help="of held-out prose")
    add("--documents", type=int, default=40, help="with statements that are asked for, at each length")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, required=True)
    arguments = parser.parse_args(argv)
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    model, tokenizer = open_model(arguments)
    if arguments.folder is not None:
        write_folder(model, arguments.base, arguments.folder)
    model = model.to(arguments.device, dtype)
    found: dict[str, Any] = {}
    if not arguments.causal:
        ids = torch.tensor(tokenizer.encode(held_out_text()).ids, device=arguments.device)
        rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)[: arguments.pieces]
        found["text"] = measure_text(model, load_llama(arguments.base).to(arguments.device, dtype), rows)
    asked = ask(model, tokenizer, arguments.causal)
    found |= {"questions_right": sum(one["right"] for one in asked), "questions": asked}
    for tokens in () if arguments.causal else READ_TOKENS:
        answers = read(model, tokenizer, arguments.documents, tokens)
        found[f"read_{tokens}"] = {"right": sum(one["right"] for one in answers), "answers": answers}
    if arguments.causal:
        texts = causal_continuations(model, tokenizer, list(CONTINUED), CONTINUATION_TOKENS, TEMPERATURE)
    else:
        texts = continuations(model, tokenizer, list(CONTINUED), CONTINUATION_TOKENS, PENALTY)
    found["continuations"] = dict(zip(CONTINUED, texts, strict=True))
    print(json.dumps(found, indent=1))
    made = provenance(shlex.join(["python", *sys.argv]), torch.device(arguments.device))
    write_json({"base": sha256_of(arguments.base), **found, **made}, arguments.json)


if __name__ == "__main__":
    main()
