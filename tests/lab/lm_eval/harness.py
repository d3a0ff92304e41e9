"""lm-evaluation-harness for the tests of its adapter: the real one where it is installed, else what the adapter uses.

`tiny_folder` writes a random model of LLaDA's layout with the shipped tokenizer.
"""

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from baatt.assets import shipped_model
from baatt.models import MaskedDiffusionLM, ModelConfig

INSTALLED = importlib.util.find_spec("lm_eval") is not None
ADAPTER = "baatt.lab.lm_eval.model"
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {"d_model": 32, "n_heads": 2, "n_layers": 2, "mlp_hidden_size": 48, "vocab_size": 4096, "mask_token_id": 1}


class StandInLM:
    """What `lm_eval.api.model.LM` gives a subclass."""

    def __init__(self) -> None:
        self._rank, self._world_size, self._device = 0, 1, None
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

    @property
    def device(self) -> Any:
        return self._device

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size


def parse_args_string(text: str) -> dict[str, Any]:
    """Numbers and texts of `name=value,name=value`, which is all the tests write."""
    pairs = (part.split("=", 1) for part in text.split(","))
    return {name: int(value) if value.lstrip("-").isdigit() else value for name, value in pairs}


def stand_in() -> dict[str, ModuleType]:
    """Modules by name."""
    parts = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": StandInLM},
        "lm_eval.api.registry": {"register_model": lambda name: lambda cls: cls},
        "lm_eval.utils": {"simple_parse_args_string": parse_args_string},
    }
    modules = {}
    for name, values in parts.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(values)
    return modules


@contextmanager
def adapter() -> Iterator[Any]:
    """The adapter's module."""
    added = {} if INSTALLED else stand_in()
    sys.modules.update(added)
    try:
        yield importlib.import_module(ADAPTER)
    finally:
        for name in added:
            del sys.modules[name]
        if added:
            sys.modules.pop(ADAPTER, None)  # a later test may find the real harness


def tiny_folder(folder: Path, **changes: Any) -> Path:
    """A random model in fp32 with tokenizer and chat template."""
    torch.manual_seed(0)
    config = ModelConfig(**{**SIZES, "eos_token_id": 0, "pad_token_id": 0, "max_sequence_length": 256} | changes)
    MaskedDiffusionLM(config).save_pretrained(folder, dtype=None)
    shutil.copy(Path(shipped_model()) / "tokenizer.json", folder)
    values = {"chat_template": TEMPLATE, "eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def request(*arguments: Any) -> SimpleNamespace:
    """What the adapter reads of a request."""
    return SimpleNamespace(args=arguments)
