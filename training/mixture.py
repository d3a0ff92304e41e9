"""Free text for masked diffusion beside RULER's tasks: prose, and chats of which the answers are hidden.

In: a data folder with `tokenizer.json`, `train.npy` (tokens of the corpus, made here) and, where `base_text.py` has
written them, `written-*.npy` and `chats-*.npz`; chats about documents come from `reading.py`. Out: batches as those of
`samples.py`, and how they are masked: a share of the tokens that is drawn for each row, behind a random place or
everywhere, each weighted by 1 over that share.
"""

import contextlib
import lzma
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from reading import reading
from samples import CONTEXT, FIRST_ANSWER, SOURCES, TAIL, Batch, SampleMaker
from tokenizers import Tokenizer
from torch import Tensor
from train import TAIL_RATE, Corrupted

PROSE, CHAT, READING = FREE = tuple(SOURCES.index(name) for name in ("prose", "chat", "reading"))
LENGTHS = {PROSE: (256, 512, 512, 1024, 2048), CHAT: (256, 512), READING: (512, 1024, 2048, 4096)}
CHAT_SHARE, READING_SHARE = 0.35, 0.2  # of free batches
WRITTEN_SHARE = 0.5  # of prose, what the base wrote
LEAST_RATE = 0.02
BEHIND_SHARE, SHUT_SHARE = 0.6, 0.5  # rows hidden behind a place; of those, rows of which only a block is open
OPEN_BLOCK, FAR_WEIGHT = 32, 0.02  # tokens of that block; weight of what is hidden beyond it


def prepare(data: Path, tokenizer: Tokenizer) -> None:
    """Write `tokenizer.json` and `train.npy` of a data folder with `train.txt` or `train.txt.xz`; several processes may
    do so at once, and each file is whole whenever it is there."""
    with whole(data / "tokenizer.json") as file:
        tokenizer.save(str(file))
    text, packed = data / "train.txt", data / "train.txt.xz"
    if not text.exists() and packed.exists():
        with whole(text) as file:
            file.write_bytes(lzma.decompress(packed.read_bytes()))
    if (data / "train.npy").exists():
        return
    end = tokenizer.token_to_id("<|endoftext|>")
    documents = [part for part in text.read_text().split("\n\n") if part.strip()]
    ids = [token for one in tokenizer.encode_batch(documents) for token in (*one.ids, end)]
    with whole(data / "train.npy") as file, file.open("wb") as out:
        np.save(out, np.asarray(ids, np.uint16))


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of a file once it is complete."""
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    yield partial
    partial.replace(file)


class MixtureMaker(SampleMaker):
    """`SampleMaker` with batches of free text."""

    def __init__(self, data: Path, seed: int) -> None:
        super().__init__(data, seed)
        self.corpus = np.load(data / "train.npy", mmap_mode="r")
        written = [np.load(file) for file in sorted(data.glob("written-*.npy"))]
        self.written = np.concatenate(written) if written else None
        chats = [dict(np.load(file)) for file in sorted(data.glob("chats-*.npz"))]
        self.chats = {name: np.concatenate([one[name] for one in chats]) for name in chats[0]} if chats else None

    def free_batch(self, tokens: int, stage: int) -> Batch:
        """Chats in a share of the batches where there are some, else prose; about `tokens` tokens of one length."""
        draw = self.random.random()
        source = READING if draw < READING_SHARE else PROSE
        if self.chats is not None and READING_SHARE <= draw < READING_SHARE + CHAT_SHARE:
            source = CHAT
        make = {PROSE: self.prose, CHAT: self.chat, READING: self.reading}[source]
        length = self.random.choice(LENGTHS[source])
        rows = max(1, tokens // length)
        made, regions = make(length, rows)
        return Batch(made, regions, np.full(rows, source, np.uint8), stage)

    def prose(self, length: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Pieces of running text from random places; documents follow each other with an end of text between."""
        made = np.empty((rows, length), np.int32)
        for row in made:
            written = self.written is not None and self.random.random() < WRITTEN_SHARE
            source = self.written if written else self.corpus
            start = self.random.randrange(max(1, len(source) - length))
            piece = source[start : start + length]
            row[:], row[: len(piece)] = self.end, piece
        return made, np.full(made.shape, FIRST_ANSWER, np.uint8)

    def chat(self, length: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Question and answer, ended by end-of-text tokens; what does not fit is cut."""
        made = np.full((rows, length), self.end, np.int32)
        regions = np.full(made.shape, TAIL, np.uint8)
        for row, kinds in zip(made, regions, strict=True):
            number = self.random.randrange(len(self.chats["tokens"]))
            begins, stop = (int(self.chats[name][number]) for name in ("begins", "stop"))
            row[:stop] = self.chats["tokens"][number, :stop][:length]
            kinds[:begins] = CONTEXT
            kinds[begins : stop + 1] = FIRST_ANSWER
        return made, regions

    def reading(self, length: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Chats about documents, ended by end-of-text tokens."""
        made = np.full((rows, length), self.end, np.int32)
        regions = np.full(made.shape, TAIL, np.uint8)
        for row, kinds in zip(made, regions, strict=True):
            parts = self.read(length)
            ids = [token for part, _ in parts for token in part]
            row[: len(ids)] = ids
            kinds[: len(ids) + 1] = [FIRST_ANSWER if answer else CONTEXT for part, answer in parts for _ in part] + [
                FIRST_ANSWER
            ]
        return made, regions

    def read(self, length: int) -> list[tuple[list[int], bool]]:
        """Tokens of the pieces of a chat about a document, fewer than `length` together, and whether each answers."""
        size = 4 * (length - 180)
        while True:
            pieces = reading(self.random, self.words, self.running_text, size, self.random.randint(1, 12), 3)
            parts = [(self.tokenizer.encode(text).ids, answer) for text, answer in pieces]
            if sum(len(part) for part, _ in parts) < length - 1:
                return parts
            size = int(size * 0.85)

    def running_text(self, size: int) -> str:
        """Characters of the training text from a random place, from a word on."""
        start = self.random.randrange(max(1, len(self.text) - size))
        return self.text[start : start + max(0, size)].partition(" ")[2]


def corrupt_free(tokens: Tensor, regions: Tensor, mask_token: int) -> Corrupted:
    """Hide tokens of answers at a rate drawn for each row, in most rows behind a random place alone; in some of those
    everything beyond a block is hidden, as while a text is written block by block."""
    rows, device = (tokens.shape[0], 1), tokens.device
    answer, tail = regions >= FIRST_ANSWER, regions == TAIL
    spread = (torch.randperm(rows[0], device=device)[:, None] + torch.rand(rows, device=device)) / rows[0]
    rate = LEAST_RATE + (1 - LEAST_RATE) * spread
    place = answer.cumsum(dim=1)
    behind = torch.rand(rows, device=device) < BEHIND_SHARE
    begins = torch.where(behind, torch.rand(rows, device=device) * place[:, -1:], 0)
    shut = behind & (torch.rand(rows, device=device) < SHUT_SHARE)
    beyond = shut & (place > begins + OPEN_BLOCK)
    hidden = answer & (place > begins) & ((torch.rand(tokens.shape, device=device) < rate) | beyond)
    counted = tail & (torch.rand(tokens.shape, device=device) < TAIL_RATE)
    never = torch.zeros_like(answer)
    weight = torch.where(beyond, FAR_WEIGHT, 1 / rate)
    inputs = tokens.masked_fill(hidden | tail, mask_token)
    return Corrupted(inputs, hidden, never, counted, never[:, 0], weight, hidden & ~beyond)
