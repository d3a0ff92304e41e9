"""Llama-shaped weights of a GGUF file, as llama.cpp writes them, as a `MaskedDiffusionLM` with its tokenizer.

In: a local file with tensors in F32, F16, Q8_0, Q4_0 or Q4_1. Out: the model, whose head tells the next token as the
causal model's did and whose attention sees everything; and the byte-level BPE that the file holds. One of its reserved
tokens becomes the mask. Needs no package but numpy; what the file has and this does not know is refused by name.
"""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from baatt.models.config import ModelConfig
from baatt.models.llada import EMBEDDING, MaskedDiffusionLM

Array = NDArray[Any]

#: Formats of `struct` by GGUF's number of a type; 8 is a string and 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
#: Weights of a block with one scale.
BLOCK = 32


def _halves(raw: Array) -> Array:
    """Low and then high four bits of [R, 16] bytes: [R, 32]."""
    halves: Array = np.concatenate((raw & 15, raw >> 4), axis=1)
    return halves.astype(np.float32)


def _scales(raw: Array) -> Array:
    scales: Array = raw.copy().view(np.float16).astype(np.float32)
    return scales


class Format(NamedTuple):
    """How weights are stored: blocks of `weights` in `size` bytes, and bytes [R, size] -> fp32 [R, weights]."""

    weights: int
    size: int
    read: Callable[[Array], Array]


FORMATS = {
    0: Format(1, 4, lambda raw: raw.view(np.float32)),
    1: Format(1, 2, lambda raw: raw.view(np.float16).astype(np.float32)),
    2: Format(BLOCK, 18, lambda raw: _scales(raw[:, :2]) * (_halves(raw[:, 2:]) - 8)),
    3: Format(BLOCK, 20, lambda raw: _scales(raw[:, :2]) * _halves(raw[:, 4:]) + _scales(raw[:, 2:4])),
    8: Format(BLOCK, 34, lambda raw: _scales(raw[:, :2]) * raw[:, 2:].view(np.int8)),
}
#: Our name of a block's tensor -> that of the file; q and k are stored with the channels of a rotation side by side.
NAMES = {
    "attn_norm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "attn_out": "attn_output",
    "ff_norm": "ffn_norm", "ff_proj": "ffn_gate", "up_proj": "ffn_up", "ff_out": "ffn_down",
}  # fmt: skip
#: That of SmolLM2's 17 reserved tokens which becomes the mask: no text of a chat has it.
MASK_TOKEN, MASK_NAME = 16, "<|mask|>"


class GgufFile:
    """Metadata by key, and tensors by name, read when asked for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a GGUF file of version 2 or 3.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self.metadata: dict[str, Any] = {}
        self._tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}
        self._data: Array = np.memmap(self.file, np.uint8, "r") if self.file.stat().st_size else np.empty(0, np.uint8)
        self._place = 4
        try:
            self._read()
        except (struct.error, KeyError, TypeError) as error:
            raise ValueError(f"{file}: must be a whole GGUF file, its header breaks off or is none: {error}") from error

    def _read(self) -> None:
        if bytes(self._data[:4]) != b"GGUF" or self._scalar("I") not in (2, 3):
            raise ValueError(f"{self.file}: must be a GGUF file of version 2 or 3, got another one")
        tensors, keys = self._scalar("Q"), self._scalar("Q")
        for _ in range(keys):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        for _ in range(tensors):
            name, axes = self._string(), self._scalar("I")
            shape = tuple(self._scalar("Q") for _ in range(axes))[::-1]
            self._tensors[name] = (shape, self._scalar("I"), self._scalar("Q"))
        step = self.metadata.get("general.alignment", 32)
        self._start = -(-self._place // step) * step

    def value(self, key: str) -> Any:
        """Of the metadata; ValueError: it is not there."""
        if key not in self.metadata:
            raise ValueError(f"{self.file}: must have the key {key}, and has not")
        return self.metadata[key]

    def tensor(self, name: str) -> Tensor:
        """A tensor in fp32; ValueError: it is not there, or in a format that is not one of `FORMATS`."""
        if name not in self._tensors:
            raise ValueError(f"{self.file}: must have the tensor {name}, and has not")
        shape, kind, offset = self._tensors[name]
        if kind not in FORMATS:
            raise ValueError(f"{self.file}: {name} must be in a format of {sorted(FORMATS)}, got {kind}")
        weights, size, read = FORMATS[kind]
        blocks = math.prod(shape) // weights
        first = self._start + offset
        if math.prod(shape) % weights or first + blocks * size > len(self._data):
            raise ValueError(f"{self.file}: must hold all of {name} {shape}, whose data end early")
        raw = np.array(self._data[first : first + blocks * size]).reshape(blocks, size)
        return torch.from_numpy(read(raw).reshape(shape))

    def _scalar(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self._data.data, self._place)
        self._place += struct.calcsize(f"<{kind}")
        return value

    def _string(self) -> str:
        size = self._scalar("Q")
        self._place += size
        return bytes(self._data[self._place - size : self._place]).decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(SCALARS[kind])
        inner, size = self._scalar("I"), self._scalar("Q")
        return [self._value(inner) for _ in range(size)]


def load_llama(
    file: str | Path, *, dtype: torch.dtype = torch.float32, mask_token: int = MASK_TOKEN
) -> MaskedDiffusionLM:
    """The model of a Llama-shaped GGUF file with tied embeddings, in evaluation mode; attention is bidirectional.

    Args:
        dtype: of the parameters.
        mask_token: id of the token that becomes the mask; its embedding becomes the mean of all.

    Raises:
        FileNotFoundError, ValueError: no such file, or one of another architecture or with tensors not known here.
    """
    stored = GgufFile(file)
    config = _config(stored, mask_token)
    tensors = {EMBEDDING: stored.tensor("token_embd.weight")}
    tensors["model.transformer.ln_f.weight"] = stored.tensor("output_norm.weight")
    for layer in range(config.n_layers):
        for ours, theirs in NAMES.items():
            tensor = stored.tensor(f"blk.{layer}.{theirs}.weight")
            if ours in ("q_proj", "k_proj"):
                tensor = rearrange(tensor, "(H D two) C -> (H two D) C", two=2, D=config.head_size // 2)
            tensors[f"model.transformer.blocks.{layer}.{ours}.weight"] = tensor
    tensors[EMBEDDING][mask_token] = tensors[EMBEDDING].mean(dim=0)
    with torch.device("meta"):
        model = MaskedDiffusionLM(config)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def load_gguf_tokenizer(file: str | Path, *, mask_token: int = MASK_TOKEN) -> Tokenizer:
    """The byte-level BPE with single digits of a GGUF file, with the mask under a name of its own.

    Raises:
        FileNotFoundError, ValueError: no such file, or one with another kind of tokenizer.
    """
    stored = GgufFile(file)
    kind = (stored.metadata.get("tokenizer.ggml.model"), stored.metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{file}: must hold a tokenizer of the kind ('gpt2', 'smollm'), got {kind}")
    tokens = list(stored.value("tokenizer.ggml.tokens"))
    tokens[mask_token] = MASK_NAME
    merges = [tuple(merge.split(" ")) for merge in stored.value("tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = stored.value("tokenizer.ggml.token_type")  # 3: control
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, one in zip(tokens, kinds, strict=True) if one == 3]
    )
    return tokenizer


def _config(stored: GgufFile, mask_token: int) -> ModelConfig:
    known, value = stored.metadata, stored.value
    if known.get("general.architecture") != "llama":
        raise ValueError(f"{stored.file}: architecture must be 'llama', got {known.get('general.architecture')!r}")
    ends = [value(f"tokenizer.ggml.{name}_token_id") for name in ("unknown", "eos")]  # end of text, end of a turn
    heads = value("llama.attention.head_count")
    return ModelConfig(
        d_model=value("llama.embedding_length"), n_heads=heads, n_layers=value("llama.block_count"),
        mlp_hidden_size=value("llama.feed_forward_length"), vocab_size=value("llama.vocab_size"),
        mask_token_id=mask_token, n_kv_heads=known.get("llama.attention.head_count_kv", heads),
        rope_theta=known.get("llama.rope.freq_base", 10_000.0), weight_tying=True, predicts="next",
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"), eos_token_id=tuple(dict.fromkeys(ends)),
        pad_token_id=ends[0], max_sequence_length=value("llama.context_length"),
    )  # fmt: skip
