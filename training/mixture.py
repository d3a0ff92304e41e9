"""Free text for masked diffusion beside RULER's tasks: prose, and chats of which the answers are hidden.

In: a data folder with `tokenizer.json`, `train.npy` (tokens of the corpus, made here) and, where `base_text.py` has
written them, `written.npy` and `chats.npz`. Out: batches as those of `samples.py`, and how they are masked: a share of
the tokens that is drawn for each row, behind a random place or everywhere, each weighted by 1 over that share.
"""

import lzma
from pathlib import Path

import numpy as np
import torch
from samples import CONTEXT, FIRST_ANSWER, SOURCES, TAIL, Batch, SampleMaker
from tokenizers import Tokenizer
from torch import Tensor
from train import TAIL_RATE, Corrupted

PROSE, CHAT = SOURCES.index("prose"), SOURCES.index("chat")
PROSE_LENGTHS, CHAT_LENGTHS = (256, 512, 512, 1024, 2048), (256, 512)
CHAT_SHARE, WRITTEN_SHARE = 0.4, 0.5  # of free batches; of prose, what the base wrote
LEAST_RATE = 0.02
BEHIND_SHARE, SHUT_SHARE = 0.6, 0.5  # rows hidden behind a place; of those, rows of which only a block is open
OPEN_BLOCK, FAR_WEIGHT = 32, 0.02  # tokens of that block; weight of what is hidden beyond it


def prepare(data: Path, tokenizer: Tokenizer) -> None:
    """Write `tokenizer.json` and `train.npy` of a data folder with `train.txt` or `train.txt.xz`."""
    tokenizer.save(str(data / "tokenizer.json"))
    text, packed = data / "train.txt", data / "train.txt.xz"
    if not text.exists() and packed.exists():
        text.write_bytes(lzma.decompress(packed.read_bytes()))
    if (data / "train.npy").exists():
        return
    end = tokenizer.token_to_id("<|endoftext|>")
    documents = [part for part in text.read_text().split("\n\n") if part.strip()]
    ids = [token for one in tokenizer.encode_batch(documents) for token in (*one.ids, end)]
    np.save(data / "train.npy", np.asarray(ids, np.uint16))


class MixtureMaker(SampleMaker):
    """`SampleMaker` with batches of free text."""

    def __init__(self, data: Path, seed: int) -> None:
        super().__init__(data, seed)
        self.corpus = np.load(data / "train.npy", mmap_mode="r")
        written, chats = data / "written.npy", data / "chats.npz"
        self.written = np.load(written, mmap_mode="r") if written.exists() else None
        self.chats = dict(np.load(chats)) if chats.exists() else None

    def free_batch(self, tokens: int, stage: int) -> Batch:
        """Chats in a share of the batches where there are some, else prose; about `tokens` tokens of one length."""
        is_chat = self.chats is not None and self.random.random() < CHAT_SHARE
        length = self.random.choice(CHAT_LENGTHS if is_chat else PROSE_LENGTHS)
        rows = max(1, tokens // length)
        made, regions = self.chat(length, rows) if is_chat else self.prose(length, rows)
        return Batch(made, regions, np.full(rows, CHAT if is_chat else PROSE, np.uint8), stage)

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
