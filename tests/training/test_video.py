"""The video model from a tiny media file to pictures: steps, 8 bits, samples dense and sparse, measures."""

import json
import sys
from pathlib import Path

import pytest
import torch

from baatt.cli.main import main

pytest.importorskip("diffusers")
pytest.importorskip("PIL")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "training" / "vision"))

import video as training
from running import AVERAGE, STATE

from baatt.lab.video.model import VideoModel, draw_noise, sample
from baatt.lab.vision import media

CONFIG = {
    "frames": 8, "rows": 104, "columns": 104, "heads": 1, "head_size": 32, "layers": 1, "hidden": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a media file of a film and a panorama, and a run of two pieces on it."""
    folder = tmp_path_factory.mktemp("video")
    torch.manual_seed(0)
    film = torch.randint(0, 255, (12, 108, 112, 3), dtype=torch.uint8)
    ramp = torch.linspace(0, 255, 256).to(torch.uint8)[None, None, :, None].expand(1, 128, 256, 3)
    clips = [media.Clip("film", film, False), media.Clip("turn", ramp.contiguous(), True)]
    media.write(clips, folder / "media.safetensors")
    options = [
        "--media", str(folder / "media.safetensors"), "--out", str(folder / "run"), "--config", json.dumps(CONFIG),
        "--batch-tokens", "1400", "--seconds", "0", "--report-every", "1", "--device", "cpu", "--no-compile",
    ]  # fmt: skip
    training.main(options)
    training.main([*options, "--resume", str(folder / "run")])
    return folder


def test_media_comes_back(trained):
    film, turn = media.read(trained / "media.safetensors")
    assert (film.name, film.frames.shape, film.is_panorama) == ("film", (12, 108, 112, 3), False)
    assert turn.is_panorama
    assert (turn.frames[0, 0, :, 0].float() - torch.linspace(0, 255, 256)).abs().max() < 6


def test_scenes_are_chosen_by_name(trained):
    clips = media.read(trained / "media.safetensors")
    names = [one.name for one in clips]
    assert [one.name for one in training.chosen(clips, None)] == names
    assert [one.name for one in training.chosen(clips, names[-1])] == names[-1:]
    with pytest.raises(ValueError, match=f"--scenes must be of {','.join(names)}, got moon"):
        training.chosen(clips, f"{names[0]},moon")


def test_pieces_of_a_panorama_turn():
    ramp = torch.linspace(0, 250, 256).to(torch.uint8)[None, None, :, None].expand(1, 128, 256, 3)
    piece = training.cut(media.Clip("turn", ramp, True), (4, 96, 64), 0.1, torch.Generator().manual_seed(3))
    assert piece.shape == (3, 4, 96, 64)
    steps = piece[0, 1:, 0, 0] - piece[0, :-1, 0, 0]
    assert (steps.abs() > 0.3 / 255).all()
    assert (steps.sign() == steps[0].sign()).all()


def test_a_run_goes_on(trained):
    told = json.loads((trained / "run/training.json").read_text())
    assert told["step"] == 2
    assert [row["step"] for row in told["history"]] == [1, 2]
    assert told["held_out"] > 0
    options = ["--media", str(trained / "media.safetensors"), "--out", str(trained / "other"), "--seconds", "0",
               "--config", json.dumps(CONFIG), "--batch-tokens", "1400", "--device", "cpu", "--no-compile"]  # fmt: skip
    training.main([*options, "--resume", str(trained / "run" / AVERAGE)])
    told = json.loads((trained / "other/training.json").read_text())
    assert (told["step"], told["fresh"]) == (3, 2)
    # A fresh optimizer is warmed up again; one that is resumed goes on.
    rates = [torch.load(trained / folder / STATE, weights_only=True)["optimizer"]["param_groups"][0]["lr"]
             for folder in ("run", "other")]  # fmt: skip
    assert rates[1] == pytest.approx(rates[0] / 2, rel=0.05)


def test_eight_bits_come_near(trained):
    state = torch.load(trained / "run" / STATE, weights_only=True)
    model = VideoModel.load(trained / "run/model")
    for name, tensor in model.state_dict().items():
        assert (tensor - state["average"][name]).abs().max() <= state["average"][name].abs().max() / 250, name
    with pytest.raises(FileNotFoundError, match="must hold a video model"):
        VideoModel.load(trained)


def test_a_sample_of_a_perfect_model_is_its_clip(trained):
    model = VideoModel.load(trained / "run/model")
    clean = torch.full((1, 3, *model.config.size), 0.8)
    model.forward = lambda latents, noise, clips: clean
    found = sample(model, draw_noise(model.config, 0, torch.device("cpu")), 0, 3)
    assert torch.allclose(found, torch.full_like(found, 0.7))


def test_the_commands(trained, monkeypatch, capsys):
    pytest.importorskip("torchmetrics")
    monkeypatch.chdir(trained)
    command = ["evaluate", "video", "--model", "run/model", "--steps", "2", "--methods", "clusters,paper", "--tiles",
               "none,4x8x4", "--sparsity", "0.5", "--dense-steps", "0,0.5", "--count", "1"]  # fmt: skip
    assert main(command) == 0
    assert "intervals" not in capsys.readouterr().out  # one clip has none
    stored = json.loads(Path("video.json").read_text())
    assert len(stored["records"]) == 8
    for one in stored["records"]:
        assert one["task"] == "video_generation"
        assert {"psnr", "ssim", "ms_ssim", "sparsity", "dense_steps", "config"} <= one.keys()
        # 676 tokens are six blocks, of which three are kept.
        assert one["sparsity_achieved"] == pytest.approx((1 - one["dense_steps"]) / 2)
        assert one["psnr"] > 20
        assert not one["reasons"]
    lines = len(Path("video.answers/rank0.jsonl").read_text().splitlines())
    assert main([*command, "--sparsity", "0.5,0.7"]) == 0
    assert len(Path("video.answers/rank0.jsonl").read_text().splitlines()) == lines + 8
    assert main(["demo", "--video", "--model", "run/model", "--steps", "2", "--output", "seen.png"]) == 0
    assert "side by side: seen.gif" in capsys.readouterr().out
    from PIL import Image

    assert Image.open("seen.gif").n_frames == CONFIG["frames"]
    assert Image.open("seen.png").size[0] == 6 * CONFIG["columns"]


def test_what_is_missing_is_said_in_a_line(trained, capsys):
    assert main(["evaluate", "video", "--model", str(trained), "--json", str(trained / "x.json")]) == 2
    assert "must hold a video model" in capsys.readouterr().err
    assert main(["evaluate", "video", "--sparsity", "0,0.5"]) == 2
    assert "--sparsity must be above 0" in capsys.readouterr().err
    assert main(["demo", "--steps", "3"]) == 2
    assert "--steps must come with --video" in capsys.readouterr().err
