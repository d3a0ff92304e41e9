"""The model that answers questions, from tiny files of pictures to records: steps, resuming, the command."""

import json
import sys
from pathlib import Path

import pytest
import torch

from baatt.cli.main import main
from baatt.lab.capture import load_capture

pytest.importorskip("PIL")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "training" / "vision"))

import lessons
import running
import understanding as training
from curriculum import CURRICULUM, Progress

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
        "--seconds", "0", "--report-every", "1", "--device", "cpu", "--no-compile", "--workers", "0",
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
    assert VisionModel.load(trained / "run/model").config.frames == 8  # without what only training has
    assert told["finished"]
    assert told["stage"] == 0


@pytest.mark.parametrize("progress", [False, True])
def test_a_run_goes_on_from_a_model_in_8_bits(trained, tmp_path, progress):
    options = ["--media", str(trained), "--out", str(tmp_path), "--config", json.dumps(CONFIG), "--batch-tokens", "200",
               "--seconds", "0", "--learning-rate", "0", "--device", "cpu", "--no-compile", "--workers", "0",
               "--resume", str(trained / "run/model")]  # fmt: skip
    training.main([*options, *(["--progress", str(trained / "run/training.json")] if progress else [])])
    before, told = (json.loads((place / "training.json").read_text()) for place in (trained / "run", tmp_path))
    assert told["step"] == 1 + 2 * progress
    assert told["history"] == before["history"] * progress
    assert told["fresh"] == 2 * progress
    assert told["arguments"]["resume"] == str(trained / "run/model")  # its own, not that of the earlier piece
    for name, one in VisionModel.load(tmp_path / "model").state_dict().items():
        assert torch.allclose(one, VisionModel.load(trained / "run/model").state_dict()[name], atol=2e-2)


def pictures(trained):
    clips = media.read(trained / "media.safetensors")
    sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in CONFIG.items()}
    torch.manual_seed(0)
    pupil = training.Pupil(VisionConfig(**sizes))
    return pupil, training.Pictures(clips, pupil.model.config, 1, torch.device("cpu"))


def whole(drawn, *what):
    return drawn.show(lessons.whole(drawn.config, *what, random=drawn.draw))


@pytest.mark.parametrize("stage", range(len(CURRICULUM)))
def test_batches_end_with_answers_and_fit(trained, stage):
    pupil, drawn = pictures(trained)
    words, asked = pupil.model.config.words, lessons.Lessons(pupil.model.config, 200, 1)
    for _ in range(8):
        batch = drawn.show(asked.of_stage(CURRICULUM[stage], drawn.draw), recoloured=True)
        for row in batch.ids:
            assert words[row[-3]] == "?"
            assert (words[row[-1]] == END) == (batch.name not in ("photo_position", "clip_when"))
        rows, columns = (side // 8 for side in batch.pixels.shape[-2:])
        assert len(batch.ids) == max(1, 200 // (batch.windows[0].frames * rows * columns))
        assert pupil.model.tell(pupil.model.look(batch.pixels), batch.windows).isfinite().all()
        assert all(one.frame + one.frames <= 8 for one in batch.windows)
        assert len(batch.windows) == len(batch.pixels)


def test_workers_draw_other_lessons_than_each_other_and_hear_of_the_stage(trained):
    pupil, _ = pictures(trained)
    asked = lessons.Lessons(pupil.model.config, 200, 1)
    drawn = lessons.drawn_by(asked, 2)
    first, second, third = (next(drawn) for _ in range(3))
    assert (first.name, *first.windows) != (second.name, *second.windows)
    assert {len(one.windows) for one in (first, second, third)} <= {100, 200}  # the first stage
    asked.practise(5, {})
    later = [next(drawn) for _ in range(60)][-30:]
    assert {one.name for one in later} >= {lessons.EARLIER, "photo_position"}
    assert {3, 4} <= {len(one.windows) for one in later}


def test_what_is_known_is_asked_less_often(trained):
    pupil, drawn = pictures(trained)
    asked = lessons.Lessons(pupil.model.config, 200, 1)
    asked.practise(0, {"photo_number": 1.0, "photo_colour": 0.1, "loss": 3.0})
    names = [asked.draw(drawn.draw).name for _ in range(400)]
    assert 0 < names.count("photo_number") < names.count("photo_colour") / 2
    assert names.count("photo_count") > names.count("photo_number")
    asked.practise(1, {"photo_number": 1.0})  # a new stage: nothing is known of it yet
    assert [*asked.weights] == [1.0] * 8


def test_backgrounds_are_drawn_anew_bit_by_bit(trained):
    _, drawn = pictures(trained)
    assert len(drawn.background(1, (8, 8), 16, is_photo=True)) == 16
    first = drawn.backgrounds[1, 8, 8].clone()
    assert len(first) == 32
    drawn.background(1, (8, 8), 16, is_photo=True)
    same = (drawn.backgrounds[1, 8, 8] == first).flatten(1).all(dim=1)
    assert same.sum() == 32 - training.FRESH
    for _ in range(60):
        drawn.background(1, (8, 8), 16, is_photo=True)
    assert not (drawn.backgrounds[1, 8, 8] == first).flatten(1).all(dim=1).any()


def test_a_model_that_knows_is_right_and_is_told_nothing(trained, monkeypatch):
    pupil, drawn = pictures(trained)
    batch, seen = whole(drawn, "photo_position", 0, 6), []

    def knows(visual, ids):
        seen.append(ids)
        return torch.nn.functional.one_hot(batch.ids, len(pupil.model.config.words)).float() * 50

    monkeypatch.setattr(pupil.model, "read", knows)
    _, told = training.measure(pupil, batch, 0)
    assert told["words"] < 1e-6
    assert told[batch.name] == 1
    assert (seen[0][:, -2:] == pupil.model.config.language.mask_token_id).all()
    assert torch.equal(seen[0][:, :-2], batch.ids[:, :-2])


def test_the_tower_is_taught_what_stands_in_the_middle_of_signs(trained):
    _, drawn = pictures(trained)
    batch = whole(drawn, "clip_when", 8, 4)
    logits = torch.zeros(4, 8, 2, 3, 19)
    logits[..., 0] = 50  # nothing, unless
    signs = zip(*(one.tolist() for one in (*batch.placed.middles, *batch.placed.table.unbind(1)[6:])), strict=True)
    for picture, frame, row, column, number, colour in signs:
        here = logits[picture, frame, row // 8, column // 8]
        here[:9] = 0
        here[1 + colour] = here[9 + number] = 50
    loss, read = training.taught(logits, batch.placed)
    assert loss < 1e-4
    assert read == 1
    loss, read = training.taught(logits.roll(1, 3), batch.placed)
    assert loss > 20
    assert read < 0.5


def test_the_loss_falls_on_a_batch_that_is_learnt_by_heart(trained):
    pupil, drawn = pictures(trained)
    batch, optimizer = whole(drawn, "photo_number", 0, 4), torch.optim.Adam(pupil.parameters(), 1e-2)
    first, _ = training.measure(pupil, batch, 0)
    for _ in range(150):
        loss, told = training.measure(pupil, batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < first / 4
    assert told["photo_number"] > 0.6


def test_stages_follow_one_another():
    kept = {}
    progress = Progress(kept, 1000)
    for seconds, share, stage in (
        (10, 0.95, 0),
        (20, 0.8, 0),
        (30, 0.95, 0),
        (40, 0.95, 1),
        (100, 0.1, 1),
        (189, 0.1, 1),
    ):
        row = {"seconds": float(seconds), "step": seconds, "clip_when": share, "photo_count": 1.0}
        progress.look(row, ["clip_when", "photo_count", "clip_often"])
        assert progress.stage == stage
    resumed = Progress(kept, 1000)
    resumed.look({"seconds": 191.0, "step": 9, "clip_when": 0.1}, ["clip_when"])
    assert kept["stage"] == 2
    assert [(one["ended"], one["worst"]) for one in kept["stages"]] == [(40, 0.95), (191, 0.1)]
    for seconds in (500, 900, 1500):
        resumed.look(row := {"seconds": float(seconds), "step": 9}, [])
    assert (kept["stage"], row["stage"]) == (5, 4)


def test_a_log_says_whether_learning_has_begun(capsys):
    row = {"clip_number": 0.11, "clip_colour": 0.12, "signs_read": 0.0}
    assert "clip_number 0.11, a guess 0.10" in training.has_begun(row)
    assert training.has_begun(row | {"clip_number": 0.5}) is None
    kept = {}
    for seconds, missing in ((90, "x"), (101, "x"), (120, None), (150, "x")):
        running.tell_beginning(kept, {"seconds": seconds}, missing)
    assert capsys.readouterr().out == "LEARNING HAS NOT BEGUN after 101 s: x\nLEARNING HAS BEGUN after 120 s\n"


def test_a_loss_that_is_no_number_ends_a_run(trained):
    options = ["--media", str(trained), "--out", str(trained / "broken"), "--config", json.dumps(CONFIG), "--seconds",
               "9", "--batch-tokens", "200", "--report-every", "1", "--device", "cpu", "--no-compile", "--workers",
               "0"]  # fmt: skip
    with pytest.raises(ArithmeticError, match="the loss is nan at step 2: go on from"):
        training.main([*options, "--learning-rate", "nan"])


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


def test_the_picture_of_what_is_read(trained, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(trained)
    for task in ("photo_colour", "clip_when"):
        command = ["analyze", "patches", "--model", "run/model", "--task", task, "--block-size", "16", "--plot",
                   f"{task}.png", "--capture", "seen.safetensors"]  # fmt: skip
        assert main(command) == 0
        assert "Question: " in capsys.readouterr().out
        assert Path(f"{task}.png").stat().st_size > 10_000
    recorded = load_capture(Path("seen.safetensors"))
    assert list(recorded.layers) == [1]
    assert recorded.layers[1].q.shape[2] == int(recorded.about["tokens"])
    assert main(["analyze", "maps", "seen.safetensors", "--block-size", "16", "--preset", "paper", "--sort", "none,qk",
                 "--plot", "maps.png"]) == 0  # fmt: skip
    for options, told in (
        (["--layer", "2"], "--layer must be from 0 to 1, got 2"),
        (["--head", "2"], "--head must be from 0 to 1, got 2"),
        (["--task", "clip_when", "--frames", "9"], "frames must be from 4 to the model's 8, got 9"),
    ):
        assert main(["analyze", "patches", "--model", "run/model", *options]) == 2
        assert told in capsys.readouterr().err


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
