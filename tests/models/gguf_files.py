"""Writes tiny Llama-shaped GGUF files, with the weights they are read back as."""

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAYERS, WIDTH, HIDDEN, HEADS, GROUPS = 2, 96, 128, 3, 1
TOKENS = [f"<|reserved {number}|>" for number in range(17)]


def block_bytes(weights: Tensor, kind: int) -> tuple[bytes, Tensor]:
    """A tensor stored as kind 0 (F32), 1 (F16), 2 (Q4_0), 3 (Q4_1) or 8 (Q8_0), and what it then is."""
    if kind == 0:
        return weights.numpy().tobytes(), weights
    if kind == 1:
        return weights.half().numpy().tobytes(), weights.half().float()
    blocks = weights.reshape(-1, 32)
    if kind == 8:
        scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
        numbers = (blocks / scale.float()).round().to(torch.int8)
        parts = [(scale, numbers)]
        read = numbers * scale.float()
    else:
        low = blocks.amin(1, keepdim=True).half()
        scale = ((blocks.amax(1, keepdim=True) - low.float()) / 15).half()
        if kind == 2:
            low = (-8 * scale.float()).half()
        numbers = ((blocks - low.float()) / scale.float()).round().clamp(0, 15)
        read = numbers * scale.float() + low.float()
        nibbles = numbers.to(torch.uint8)
        parts = [(scale, low, nibbles[:, :16] | nibbles[:, 16:] << 4) if kind == 3 else
                 (scale, nibbles[:, :16] | nibbles[:, 16:] << 4)]  # fmt: skip
    rows = torch.cat([part.contiguous().view(torch.uint8).reshape(len(blocks), -1) for part in parts[0]], dim=1)
    return rows.numpy().tobytes(), read.reshape(weights.shape)


def packed(value: Any) -> bytes:
    """Type and value of a metadata entry: str, int, float or a list of str or int."""
    if isinstance(value, str):
        return struct.pack("<IQ", 8, len(value.encode())) + value.encode()
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    inner = [packed(one) for one in value]
    return struct.pack("<I", 9) + inner[0][:4] + struct.pack("<Q", len(inner)) + b"".join(one[4:] for one in inner)


def vocabulary() -> tuple[list[str], list[str]]:
    """Reserved tokens, printable characters with the byte-level space and newline, and three merged words."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    return [*TOKENS, *letters, "th", "the", "Ġthe"], ["t h", "th e", "Ġ the"]


def write_gguf(file: Path, architecture: str = "llama", kinds: tuple[int, int] = (3, 8)) -> dict[str, Tensor]:
    """A random model; `kinds`: of matrices and of the embedding. Returns the tensors by the file's names."""
    tokens, merges = vocabulary()
    metadata = {
        "general.architecture": architecture, "llama.block_count": LAYERS, "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": HIDDEN, "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": GROUPS, "llama.rope.freq_base": 100000.0, "llama.context_length": 8192,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 17 + [1] * (len(tokens) - 17), "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
    }  # fmt: skip
    size = WIDTH // HEADS
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (GROUPS * size, WIDTH), "attn_v": (GROUPS * size, WIDTH),
              "attn_output": (WIDTH, WIDTH), "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH),
              "ffn_down": (WIDTH, HIDDEN), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}  # fmt: skip
    torch.manual_seed(0)
    wanted = {"token_embd.weight": torch.randn(len(tokens), WIDTH), "output_norm.weight": torch.rand(WIDTH) + 0.5}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            drawn = torch.randn(shape) * 0.2 if len(shape) == 2 else torch.rand(shape) + 0.5
            wanted[f"blk.{layer}.{name}.weight"] = drawn
    head = b"GGUF" + struct.pack("<IQQ", 3, len(wanted), len(metadata))
    head += b"".join(packed(key)[4:] + packed(value) for key, value in metadata.items())
    body, found = b"", {}
    for name, weights in wanted.items():
        kind = 0 if weights.dim() == 1 else kinds["embd" in name]
        stored, found[name] = block_bytes(weights, kind)
        head += packed(name)[4:] + struct.pack("<I", weights.dim())
        head += b"".join(struct.pack("<Q", axis) for axis in reversed(weights.shape))
        head += struct.pack("<IQ", kind, len(body))
        body += stored + bytes(-len(stored) % 32)
    file.write_bytes(head + bytes(-len(head) % 32) + body)
    return found
