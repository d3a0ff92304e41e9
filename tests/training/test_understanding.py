"""The model that answers questions, from tiny files of pictures to records: steps, resuming, the command."""

import json
import sys
from pathlib import Path

import pytest
import torch

from baatt.cli.main import main

pytest.importorskip("PIL")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "training" / "vision"))

import understanding as training

from baatt.lab.vision import media
from baatt.lab.vision.model import VisionConfig, VisionModel
from baatt.lab.vision.scenes import END

CONFIG = {
    "photo": [48, 72], "frame": [16, 24], "frames": 8, "tower": 16, "width": 32, "heads": 2, "layers": 2, "hidden": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with files of pictures, and a run of two pieces on them."""
    folder = tmp_path_factory.mktemp("understanding")
    torch.manual_seed(0)
    film, other, photo = (torch.randint(0, 255, (n, 24, 36, 3), dtype=torch.uint8) for n in (12, 9, 1))
    held_out = media.Clip("held out", other)
    media.write([media.Clip("film", film), held_out], folder / "media.safetensors")
    media.write([media.Clip("photo", photo)], folder / "photos.safetensors")
    media.write([held_out], folder / "heldout.safetensors")
    options = [
        "--media", str(folder), "--out", str(folder / "run"), "--config", json.dumps(CONFIG), "--batch-tokens", "200",
        "--seconds", "0", "--report-every", "1", "--device", "cpu", "--no-compile",
    ]  # fmt: skip
    training.main(options)
    training.main([*options, "--resume", str(folder / "run")])
    return folder


def test_a_run_goes_on(trained):
    told = json.loads((trained / "run/training.json").read_text())
    assert told["step"] == 2
    assert {"photo_number", "photo_colour", "photo_position", "photo_count"} <= told["held_out"].keys()
    assert {"clip_when 4", "clip_number 8", "clip_often 8"} <= told["held_out"].keys()
    assert told["history"][0]["loss"] > 1
    assert (trained / "run/model/heldout.safetensors").is_file()


def pictures(trained):
    clips = media.read(trained / "media.safetensors")
    sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in CONFIG.items()}
    return training.Pictures(clips, VisionModel(VisionConfig(**sizes)), 200, 1, torch.device("cpu"))


@pytest.mark.parametrize("frames", [0, 8])
def test_batches_end_with_answers(trained, frames):
    drawn = pictures(trained)
    for _ in range(8):
        batch, words = drawn.batch(frames), drawn.model.config.words
        for row in batch.ids:
            assert words[row[-3]] == "?"
            assert (words[row[-1]] == END) == (batch.task not in ("photo_position", "clip_when"))


def test_a_model_that_knows_is_right_and_is_told_nothing(trained, monkeypatch):
    drawn = pictures(trained)
    batch, seen = drawn.batch(0), []

    def knows(pixels, ids):
        seen.append(ids)
        return torch.nn.functional.one_hot(batch.ids, len(drawn.model.config.words)).float() * 50

    monkeypatch.setattr(drawn.model, "forward", knows)
    loss, right = training.measure(drawn.model, batch, 0)
    assert loss < 1e-6
    assert right[batch.task] == 1
    assert (seen[0][:, -2:] == drawn.model.config.language.mask_token_id).all()
    assert torch.equal(seen[0][:, :-2], batch.ids[:, :-2])


def test_the_loss_falls_on_a_batch_that_is_learnt_by_heart(trained):
    drawn = pictures(trained)
    batch, optimizer = drawn.batch(0), torch.optim.Adam(drawn.model.parameters(), 1e-2)
    first, _ = training.measure(drawn.model, batch, 0)
    for _ in range(150):
        loss, right = training.measure(drawn.model, batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < first / 4
    assert sum(right.values()) / len(right) > 0.6


def test_the_command(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    command = ["evaluate", "vision", "--model", "run/model", "--frames", "4,8", "--count", "2", "--block-size", "16",
               "--dial", "beta=0,1", "--score", "covariance", "--recall-samples", "1"]  # fmt: skip
    assert main(command) == 0
    assert "block pairs" in capsys.readouterr().out
    stored = json.loads(Path("vision.json").read_text())
    # Four tasks about photos, four about clips of two lengths; dense attention and two settings.
    assert len(stored["records"]) == (4 + 2 * 4) * 3
    assert stored["averages"].keys() == {"photos", "clips"}
    for one in stored["records"]:
        assert one["study"] == "vision"
        assert {"accuracy", "ci_low", "dense_accuracy", "mcnemar_p", "scores", "commits"} <= one.keys()
        assert (one["sparsity_achieved"] > 0.2) == bool(one["config"])
        assert ("recall_mean" in one) == bool(one["config"])
    lines = len(Path("vision.answers/rank0.jsonl").read_text().splitlines())
    assert main([*command, "--batch-size", "1"]) == 0
    assert len(Path("vision.answers/rank0.jsonl").read_text().splitlines()) == lines


def test_what_is_missing_is_said_in_a_line(trained, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    for options, told in (
        (["--model", "."], "must hold a model that sees"),
        (["--model", "run/model", "--frames", "9"], "frames must be from 4 to the model's 8, got 9"),
        (["--model", "run/model", "--frames", "8,x"], "--frames must be whole numbers by commas, got '8,x'"),
        (["--model", "run/model", "--tasks", "clip_where"], "--tasks must be of photo_number"),
        (["--model", "run/model", "--dense-layers", "5"], "--dense-layers must"),
        (["--model", "run/model", "--dial", "gen_length=3"], "--dial must be NAME=VALUE"),
    ):
        assert main(["evaluate", "vision", *options]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
