"""The harness's model `hf` with `baatt.enable` around it, as benchmarks/lm_eval_decoder.py has it: a tiny decoder."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from baatt.assets import shipped_model

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


def test_it_reads_sparsely_and_decodes_densely(tmp_path, monkeypatch, capsys):
    for package in ("lm_eval", "transformers", "nltk", "wonderwords"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import lm_eval_decoder
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=0)).save_pretrained(tmp_path)
    shutil.copy(Path(shipped_model()) / "tokenizer.json", tmp_path)
    settings = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    file = tmp_path / "found.json"
    lm_eval_decoder.main(["--model", str(tmp_path), "--length", "1024", "--count", "2", "--json", str(file)])
    dense, sparse = json.loads(file.read_text())["records"]
    assert dense["sparse"] == dense["skipped"] == 0
    assert dense["config"] == {}
    assert sparse["sparse"] == 2 * 2 * 2  # layers, tasks, samples: one prompt each
    assert sparse["skipped"] > 0
    assert sparse["reasons"] == {"a decoding step of one query": 8 * 15}
    assert {task: len(scores) for task, scores in sparse["scores"].items()} == dict.fromkeys(lm_eval_decoder.TASKS, 2)
    assert "| 50 % | 0.0 [0.0-65.8], 2 samples |" in capsys.readouterr().out
