"""Lets the base model write: chats for which it asks and answers itself, and running text. On the GPU.

In: a base as `adapt.py` takes it, and the corpus for openings. Out, by the number of the seed: `written-SEED.npy`,
tokens of running text, and `chats-SEED.npz` with `tokens` [R, T] uint16, `begins` [R], where the answer begins, and
`stop` [R], where the chat ends. Several GPUs write side by side, each with a seed of its own.
The causal model writes with the cache of our own class: every step gives one token a row.
"""

import argparse
import dataclasses
import functools
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from adapt import open_base
from mixture import prepare
from reading import ANSWER, SYSTEM, USER
from tokenizers import Tokenizer
from torch import Tensor

from baatt.models import MaskedDiffusionLM
from baatt.models.cache import KeyValueCache
from baatt.stages.dense import AttentionFunction, dense_attention

#: Beginnings of questions; the base finds the rest.
STEMS = (
    "", "", "What is", "What is the capital of", "What are", "What color", "Who was", "Who wrote", "Who invented",
    "Where is", "Where do", "When did", "Why do", "Why is", "How many", "How do", "How does", "How can I", "Which",
    "Which planet", "Which animal", "Is it true that", "Can you", "Name", "Name three", "Tell me about", "Explain",
    "Explain in one sentence", "Describe", "Define", "Give me", "Write a short", "Write a sentence about", "Summarize",
    "What does", "What do you call", "What language", "What happens when", "Complete the sentence:", "Translate",
    "I want to", "I have", "My", "The opposite of", "What is the opposite of", "What is the largest",
)  # fmt: skip
OPENING = 12  # tokens of the corpus that half of the running texts begin with


def looking_back(keys: int) -> AttentionFunction:
    """One query that sees the first `keys` keys of the cache."""

    def attention(q: Tensor, k: Tensor, v: Tensor, /, *, key_mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k[:, :, :keys], v[:, :, :keys], enable_gqa=q.shape[1] != k.shape[1])

    return attention


def sample(logits: Tensor, temperature: float, least: float) -> Tensor:
    """A token [B] of those at least `least` times as probable as the most probable one; temperature 0 takes that."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    chances = (logits.float() / temperature).softmax(dim=-1)
    chances = chances.where(chances >= least * chances.amax(dim=-1, keepdim=True), 0)
    return torch.multinomial(chances, 1)[:, 0]


@torch.inference_mode()
def write(
    model: MaskedDiffusionLM, forced: Tensor, turn: Tensor | None, end_of_turn: int, temperature: float, least: float
) -> tuple[Tensor, Tensor]:
    """Continue rows.

    Args:
        model: whose head tells the next token; its config is left as it was.
        forced: [B, T] int64, tokens that are given; -1 where the model writes. The first one is given.
        turn: tokens put behind the first `end_of_turn` that a row writes itself; None = no turns.

    Returns:
        Tokens [B, T], and where the answer begins [B]; T where there is none.
    """
    forced, (rows, length) = forced.clone(), forced.shape
    config, cache = model.config, KeyValueCache()
    begins = torch.full((rows,), length, device=forced.device)
    tokens = forced.clamp(min=0)
    model.config = dataclasses.replace(config, predicts="same")  # a row's own state tells what follows
    try:
        model(tokens, cache=cache, logits_from=length, attention=functools.partial(dense_attention, causal=1))
        known = int((forced >= 0).all(dim=0).cumprod(dim=0).sum())  # what all rows are given, that pass has read
        for place in range(known - 1, length - 1):
            logits = model(tokens[:, place : place + 1], cache=cache, start=place, attention=looking_back(place + 1))[
                :, 0
            ]
            logits[:, config.mask_token_id] = float("-inf")
            given = forced[:, place + 1]
            tokens[:, place + 1] = torch.where(given < 0, sample(logits, temperature, least), given)
            if turn is None:
                continue
            ended = (given < 0) & (tokens[:, place + 1] == end_of_turn) & (begins == length)
            stop = min(length, place + 2 + len(turn))
            span = slice(place + 2, stop)
            forced[:, span] = torch.where(ended[:, None], turn[: max(0, stop - place - 2)], forced[:, span])
            begins = torch.where(ended, min(length, place + 2 + len(turn)), begins)
    finally:
        model.config = config
    return tokens, begins


def chats(
    model: MaskedDiffusionLM, tokenizer: Tokenizer, rows: int, length: int, random: np.random.Generator,
    temperature: float, least: float,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Finished chats, by the names of `chats-SEED.npz`."""
    device = model.transformer.wte.weight.device
    end = tokenizer.token_to_id("<|im_end|>")
    forced = torch.full((rows, length), -1)
    for row in forced:
        ids = tokenizer.encode(SYSTEM + USER + random.choice(STEMS)).ids
        row[: len(ids)] = torch.tensor(ids)
    turn = torch.tensor(tokenizer.encode(ANSWER).ids, device=device)
    tokens, begins = (x.cpu().numpy() for x in write(model, forced.to(device), turn, end, temperature, least))
    places = np.arange(length)
    ends = (tokens == end) & (places > begins[:, None])
    kept = ends.any(axis=1)
    stop = ends.argmax(axis=1) + 1
    found = {"tokens": tokens.astype(np.uint16), "begins": begins, "stop": stop}
    return {name: array[kept] for name, array in found.items()}


def prose(
    model: MaskedDiffusionLM, corpus: np.ndarray, rows: int, length: int, random: np.random.Generator, end: int,
    temperature: float, least: float,
) -> np.ndarray:  # fmt: skip
    """Running texts in one array, each ended by an end of text; half of them begin as a piece of the corpus."""
    forced = torch.full((rows, length), -1)
    forced[:, 0] = end
    for row in forced[::2]:
        start = random.integers(len(corpus) - OPENING)
        row[1 : 1 + OPENING] = torch.from_numpy(corpus[start : start + OPENING].astype(np.int64))
    device = model.transformer.wte.weight.device
    tokens, _ = write(model, forced.to(device), None, end, temperature, least)
    array = tokens.cpu().numpy()
    ends = (array[:, 1:] == end).argmax(axis=1)
    texts = [row[: stop + 1] if stop else row for row, stop in zip(array, ends, strict=True)]
    return np.concatenate(texts).astype(np.uint16)  # each begins with an end of text


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("training/data"))
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--rows", type=int, default=4096, help="texts at a time: a step takes hardly longer for more")
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--least", type=float, default=0.05, help="least probability, of that of the best token")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args(argv)
    model, tokenizer = open_base(arguments.base)
    prepare(arguments.data, tokenizer)
    model = model.to(arguments.device, torch.float32 if arguments.device == "cpu" else torch.bfloat16)
    torch.manual_seed(arguments.seed)
    random, corpus = np.random.default_rng(arguments.seed), np.load(arguments.data / "train.npy")
    how = (arguments.temperature, arguments.least)
    talks, texts, start = list[dict[str, np.ndarray]](), list[np.ndarray](), time.monotonic()
    while not texts or time.monotonic() - start < arguments.seconds:
        talks.append(chats(model, tokenizer, arguments.rows, arguments.length, random, *how))
        end = tokenizer.token_to_id("<|endoftext|>")
        texts.append(prose(model, corpus, arguments.rows, arguments.length, random, end, *how))
    joined = {name: np.concatenate([talk[name] for talk in talks]) for name in talks[0]}
    np.savez(arguments.data / f"chats-{arguments.seed}.npz", **joined)
    np.save(arguments.data / f"written-{arguments.seed}.npy", np.concatenate(texts))
    print(f"{len(joined['stop'])} chats, {sum(map(len, texts))} tokens of text, {time.monotonic() - start:.0f} s")
    for number in range(min(3, len(joined["stop"]))):
        print(repr(tokenizer.decode(joined["tokens"][number, : joined["stop"][number]].tolist())))
    print(repr(tokenizer.decode(texts[0][:200].tolist())))


if __name__ == "__main__":
    main()
