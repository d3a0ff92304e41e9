"""A tiny causal model grown into a masked-diffusion one: data, masking, a run, its copy and its going on."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from baatt.assets import shipped_model
from baatt.models import MaskedDiffusionLM, ModelConfig
from baatt.models.adapter import changes, merge, read_adapter
from baatt.models.checkpoint import load_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "training"))

import adapt
import base_text
from mixture import CHAT, PROSE, READING, MixtureMaker, corrupt_free, prepare
from samples import CONTEXT, FIRST_ANSWER, TAIL

from tests.processes import START

CONFIG = ModelConfig(
    d_model=48, n_heads=3, n_kv_heads=1, n_layers=2, mlp_hidden_size=64, vocab_size=4096, mask_token_id=1,
    eos_token_id=0, pad_token_id=0, weight_tying=True, rope_theta=1e5, predicts="next",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base with the tokenizer of the shipped model, and a data folder with chats."""
    base, data = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    MaskedDiffusionLM(CONFIG).save_pretrained(base, dtype=torch.float32)
    shutil.copy(shipped_model() / "tokenizer.json", base)
    text = (shipped_model().parent / "heldout.txt").read_text()
    (data / "train.txt").write_text(text[:120_000])
    prepare(data, load_tokenizer(base))
    chats = np.arange(5, 5 + 4 * 40).reshape(4, 40).astype(np.uint16)
    np.savez(data / "chats-1.npz", tokens=chats, begins=np.full(4, 10), stop=np.full(4, 30))
    return base, data


def test_free_batches(folders):
    maker = MixtureMaker(folders[1], seed=1)
    drawn = [maker.free_batch(2048, 3) for _ in range(30)]
    assert {int(batch.source[0]) for batch in drawn} == {PROSE, CHAT, READING}
    for batch in drawn:
        assert batch.tokens.dtype == np.int32
        assert batch.stage == 3
        if batch.source[0] == PROSE:
            assert (batch.regions == FIRST_ANSWER).all()
            whole = maker.tokenizer.decode(batch.tokens[0].tolist())
            assert any(line in (folders[1] / "train.txt").read_text() for line in whole.split(". ")[1:-1])
        elif batch.source[0] == READING:
            row, regions = batch.tokens[0], batch.regions[0]
            asked = maker.tokenizer.decode(row[regions == CONTEXT].tolist(), skip_special_tokens=False)
            answers = maker.tokenizer.decode(row[regions == FIRST_ANSWER].tolist(), skip_special_tokens=False)
            assert asked.count("<|im_start|>assistant\n") == answers.count("<|im_end|>") >= 1
            assert row[regions == FIRST_ANSWER][-1] == maker.end
            assert (row[regions == TAIL] == maker.end).all()
        else:
            assert (batch.regions[:, :10] == CONTEXT).all()
            assert (batch.regions[:, 10:31] == FIRST_ANSWER).all()
            assert (batch.regions[:, 31:] == TAIL).all()
            assert (batch.tokens[:, 30:] == maker.end).all()


def test_masking_of_free_text():
    torch.manual_seed(0)
    tokens = torch.randint(2, 100, (400, 100))
    regions = torch.full((400, 100), FIRST_ANSWER)
    regions[:, :20], regions[:, 90:] = CONTEXT, TAIL
    found = corrupt_free(tokens, regions, 1)
    assert not found.answer[:, :20].any()
    assert (found.inputs[:, 90:] == 1).all()
    assert ((found.inputs == 1) == (found.answer | (regions == TAIL))).all()
    assert (found.inputs[found.inputs != 1] == tokens[found.inputs != 1]).all()
    shares = found.answer[:, 20:90].float().mean(dim=1)
    assert shares.min() < 0.1
    assert shares.max() > 0.9
    assert found.weight.max() <= 50
    assert found.weight[found.next].min() >= 1


@pytest.mark.usefixtures("forked_workers")
def test_a_run_goes_on_from_its_state_and_from_its_copy(folders, tmp_path):
    base, data = folders
    common = ["--base", str(base), "--data", str(data), "--device", "cpu", "--no-compile", "--workers", "1"]
    common += ["--batch-tokens", "512", "--last-stage", "0", "--rank", "4", "--learning-rate", "0.01"]
    first, copy, second = tmp_path / "first", tmp_path / "copy.safetensors", tmp_path / "second"
    adapt.main([*common, "--seconds", "0.3", "--out", str(first), "--copy", str(copy)])
    story = json.loads((first / "training.json").read_text())
    assert story["step"] > 0
    assert story["tokens"] > 0
    adapt.main([*common, "--seconds", "0.3", "--out", str(second), "--resume", str(first)])
    assert json.loads((second / "training.json").read_text())["step"] > story["step"]
    tensors = read_adapter(copy, adapt.checksum(base))
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if name.endswith(".up"))
    run_arguments = ["--seconds", "0.1", "--out", str(tmp_path / "third"), "--resume", str(copy)]
    adapt.main([*common, *run_arguments])
    assert json.loads((tmp_path / "third/training.json").read_text())["step"] > story["step"]
    with pytest.raises(ValueError, match="must hold what --rank 0 trains, and does not"):
        adapt.main([*common, "--rank", "0", "--out", str(tmp_path / "fourth"), "--resume", str(copy)])


def one_of_two(rank: int, port: int, arguments: list[str]) -> None:
    """A rank of a run with two."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    adapt.main(arguments)


def test_two_ranks_train_one_change(folders, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base, data = folders
    arguments = [
        "--base", str(base), "--data", str(data), "--device", "cpu", "--no-compile", "--workers", "1", "--rank", "2",
        "--batch-tokens", "1024", "--seconds", "0.1", "--out", str(tmp_path),
    ]  # fmt: skip
    context = torch.multiprocessing.get_context(START)
    ranks = [context.Process(target=one_of_two, args=(rank, port, arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=120)
        assert rank.exitcode == 0
    story = json.loads((tmp_path / "training.json").read_text())
    assert story["processes"] == 2
    assert 0 < story["step"] <= adapt.CHECK_EVERY
    assert read_adapter(tmp_path / "adapter.safetensors", adapt.checksum(base))


def test_stages_end_when_learned_or_late_and_some_are_left_out():
    stage = multiprocessing.get_context("spawn").Value("i", 0)
    curriculum = adapt.Curriculum(stage, [0, 1, 3], patience=0.5)
    assert not curriculum.look({"pairs": 0.99}, 1.0)
    assert curriculum.look({"pairs": 0.99}, 2.0)
    late = 2.0 + 0.5 * adapt.CURRICULUM[1].patience
    assert not curriculum.look({"pairs": 0.1}, late)
    assert curriculum.look({"pairs": 0.1}, late + 0.1)
    assert stage.value == 3
    assert not curriculum.look({}, 1e9)


def test_low_rank_and_whole_weights_learn_and_become_one_model(folders):
    base = folders[0]
    ids = torch.randint(2, 4096, (1, 12), generator=torch.Generator().manual_seed(1))
    for rank in (0, 3):
        model = MaskedDiffusionLM.from_pretrained(base)
        trained = adapt.make_trainable(model, rank, torch.float32)
        assert sum(p.numel() for p in trained.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in trained.values():
                if rank or parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                else:  # a change that has rank 3
                    rows, columns = parameter.shape
                    parameter.add_(torch.randn(rows, 3) @ torch.randn(3, columns) * 0.05)
            ids[0, 4] = CONFIG.mask_token_id
            expected = model(ids)
            origin = MaskedDiffusionLM.from_pretrained(base)
            merged = merge(MaskedDiffusionLM.from_pretrained(base), dict(changes(origin, trained, 3)))
            found = merged(ids)
        keep = torch.arange(4096) != CONFIG.mask_token_id  # its row is no embedding of the head's in training
        torch.testing.assert_close(found[..., keep], expected[..., keep], atol=1e-4, rtol=1e-4)


def test_the_base_writes_what_a_pass_without_cache_would(folders):
    model = MaskedDiffusionLM.from_pretrained(folders[0])
    forced = torch.full((2, 12), -1)
    forced[:, 0] = torch.tensor([7, 9])
    forced[1, 1] = 11
    turn = torch.tensor([20, 21])
    tokens, begins = base_text.write(model, forced, None, 2, 0.0, 0.0)
    assert tokens[1, 1] == 11
    model.config = dataclasses.replace(model.config, predicts="same")
    with torch.no_grad():
        logits = model(tokens, attention=lambda q, k, v, key_mask: base_text.dense_attention(q, k, v, causal=1))
    logits[..., 1] = float("-inf")
    assert torch.equal(logits.argmax(-1)[0, :-1], tokens[0, 1:])
    assert (begins == 12).all()
    end = int(tokens[0, 3])  # as if this one ended a turn: the next ones are given
    first = int((tokens[0, 1:] == end).nonzero()[0]) + 1
    turned, begins = base_text.write(model, forced, turn, end, 0.0, 0.0)
    assert turned[0, first + 1 : first + 3].tolist() == [20, 21]
    assert begins[0] == first + 3
