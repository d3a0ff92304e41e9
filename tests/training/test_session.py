"""A session of training on pixels: every command of its queues is understood, limits hold, what comes back is whole."""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from baatt import assets
from baatt.cli.main import build_parser
from baatt.lab.records import commit_here, stored_text

pytest.importorskip("PIL")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "training" / "vision"))

import session
import steps
import understanding
import video

ROOT = Path(__file__).resolve().parents[2]
PLACE = steps.Place("cpu", "float32", seconds=60, training=20, total=40)


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", steps.QUEUES)
def test_every_command_is_understood(name, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "DATA", tmp_path / "data")  # a checkout may hold copies of earlier runs
    place = dataclasses.replace(PLACE, tiny=tiny)
    for step in steps.QUEUES[name](place, tmp_path):
        program, words = step.command[:3], step.command[3:]
        assert program == [sys.executable, "-m", "baatt"]
        assert build_parser(words[0]).parse_args(words)
    command = steps.training_of(name, place, tmp_path).command
    assert (ROOT / command[1]).is_file()
    told = {"video": video, "understanding": understanding}[name].build_parser().parse_args(command[2:])
    assert (told.seconds, told.total_seconds, told.resume) == (20, 40, None)
    assert f"{name}/{told.name}" in session.PLACES
    if name == "video":
        assert told.scenes.split(",") == [*steps.SCENES]
    shipped = dataclasses.replace(place, shipped=True)
    further = steps.training_of(name, shipped, tmp_path).command
    for option in ("--resume", "--progress"):
        assert (ROOT / further[further.index(option) + 1]).exists()
    (tmp_path / name).mkdir()
    (tmp_path / name / "state.pt").touch()
    assert steps.training_of(name, shipped, tmp_path).command == steps.training_of(name, place, tmp_path).command
    again = steps.training_of(name, dataclasses.replace(place, compiled=False), tmp_path).command
    assert again[again.index("--resume") + 1] == str(tmp_path / name)
    assert again[-1] == "--no-compile"


def test_the_scripts_of_the_queues_are_those_that_train():
    assert {*steps.QUEUES} == {Path(script.__file__).stem for script in (understanding, video)} == {*steps.TINY}
    assert steps.NAMES == {"video": assets.VIDEO, "understanding": assets.VISION}


def queue(tmp_path, **changes):
    (tmp_path / "logs").mkdir(exist_ok=True)
    return session.Queue("video", dataclasses.replace(PLACE, **changes), tmp_path)


def python(code):
    return [sys.executable, "-c", code]


def test_a_step_ends_at_its_limit_and_says_how(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(session, "PATIENCE", 1)
    mine = queue(tmp_path)
    assert mine.step(steps.Step("good", 20, python("print('said')")))
    assert not mine.step(steps.Step("bad", 20, python("raise SystemExit(3)")))
    began = time.monotonic()
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    monkeypatch.setattr(session, "LEAST", 0)
    assert not mine.step(steps.Step("late", 1, python(deaf)))
    assert time.monotonic() - began < 10
    told = capsys.readouterr().out
    assert "good done in" in told
    assert "bad FAILED with 3 in" in told
    assert "late FAILED with -9 in" in told
    assert (tmp_path / "logs/video-good.log").read_text() == "said\n"
    monkeypatch.setattr(session, "LEAST", 5)
    assert not queue(tmp_path, seconds=4).step(steps.Step("none", 20, python("")))
    assert "none LEFT OUT: no time" in capsys.readouterr().out


def test_training_that_breaks_goes_on_without_compilation(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "DATA", tmp_path / "data")
    tried = []

    def run(self, step):
        tried.append(step.command)
        (tmp_path / "video").mkdir(exist_ok=True)
        (tmp_path / "video/state.pt").touch()
        return len(tried) == 2

    monkeypatch.setattr(session.Queue, "step", run)
    queue(tmp_path, training=50).learn()
    assert ["--no-compile" in command for command in tried] == [False, True]
    assert ["--resume" in command for command in tried] == [False, True]
    assert all(command[command.index("--total-seconds") + 1] == "40" for command in tried)


def test_a_queue_runs_in_a_process_of_its_own_and_what_it_left_comes_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs.py").write_text(
        "import sys, pathlib; pathlib.Path('training/runs/session/results/x.json').write_text('{}'); print('END')"
    )
    monkeypatch.setattr(session, "__file__", str(tmp_path / "runs.py"))
    session.main(["start", "--seconds", "30", "--training", "10", "--device", "cpu", "--only", "video"])
    session.main(["watch", "30", "back"])
    assert "video.log, 1 lines\nEND" in capsys.readouterr().out
    assert not (tmp_path / "training/runs/session/logs/understanding.log").exists()
    came = tmp_path / "came"
    came.mkdir()
    session.read_parts(tmp_path / "back", came)
    assert (came / "results/x.json").read_text() == "{}"


def test_each_model_has_a_gpu_of_its_own_whichever_begin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = []
    monkeypatch.setattr(session.subprocess, "Popen", lambda command, **options: begun.append((command[3], options)))
    for only, own in ([], {"video": "0", "understanding": "1"}), (["--only", "understanding"], {"understanding": "1"}):
        begun.clear()
        session.main(["start", "--seconds", "30", "--training", "10", *only])
        assert {name: options["env"]["CUDA_VISIBLE_DEVICES"] for name, options in begun} == own
        assert all(options["start_new_session"] for _, options in begun)


def test_a_queue_that_breaks_says_its_end(tmp_path, monkeypatch, capsys):
    def breaks(self):
        raise OSError("no room")

    monkeypatch.setattr(session.Queue, "learn", breaks)
    with pytest.raises(OSError, match="no room"):
        queue(tmp_path).run()
    assert capsys.readouterr().out.endswith(session.END)


def watched(work):
    """A queue's log that goes on, a log of before, and one that grows."""
    for name in ("logs", "results"):
        (work / name).mkdir(parents=True)
    (work / "logs/video.log").write_text("0 s  train FAILED with 1 in 3 s\n")
    (work / "logs/video-old.log").write_text("old\n")
    os.utime(work / "logs/video-old.log", (0, 0))
    (work / "logs/video-train.log").write_text("a\nb\nc\nd\n" + 900 * "x")
    return argparse.Namespace(seconds=60, out=work / "out", lines=3)


def test_what_is_to_come_back_is_left_again_and_again_until_a_step_fails(tmp_path, monkeypatch, capsys):
    told, looks = watched(tmp_path / "work"), []
    monkeypatch.setattr(session, "EVERY", 0)

    def sleep(seconds):
        looks.append(sorted(path.name for path in told.out.iterdir()))
        if len(looks) == 3:
            (tmp_path / "work/results/x.json").write_text("{}")
            os.utime(tmp_path / "work/logs/video-train.log")
            with (tmp_path / "work/logs/video.log").open("a") as log:
                log.write("9 s  table FAILED with -9 in 5 s\n")

    monkeypatch.setattr(session.time, "sleep", sleep)
    told.out = tmp_path / "out"
    told.out.mkdir()
    (told.out / "session.01").touch()  # of an earlier copy, which was larger
    session.watch(told, tmp_path / "work")
    assert looks == [["session.00"]] * 3
    (tmp_path / "came").mkdir()
    session.read_parts(told.out, tmp_path / "came")
    assert (tmp_path / "came/results/x.json").read_text() == "{}"
    shown = capsys.readouterr().out
    assert "video-train.log, 5 lines\nc\nd\n" + session.SHOWN * "x" + "\n" in shown
    assert "video-old.log" not in shown
    assert "1 parts" in shown


def test_a_shipped_model_is_measured_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    mine = session.Queue("video", dataclasses.replace(PLACE, training=0, shipped=True), tmp_path)
    monkeypatch.setattr(mine, "step", lambda step: pytest.fail(f"{step.name} was run"))
    mine.learn()
    copied = tmp_path / "video" / assets.VIDEO
    assert {one.name for one in copied.iterdir()} == {"config.json", "model.safetensors"}
    assert "measured as it is shipped" in capsys.readouterr().out


def test_more_than_can_come_back_is_told(tmp_path, monkeypatch):
    told = watched(tmp_path)
    told.seconds, told.out = 0, tmp_path / "out"
    monkeypatch.setattr(session, "BACK", 40)
    with pytest.raises(OSError, match="must be at most 4 parts, got"):
        session.watch(told, tmp_path)


def test_a_part_has_what_the_tree_leaves_and_brings_the_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / ".gitignore").write_text(".carry\ntraining/data\ntraining/runs\nout\n")
    (tmp_path / "tree").write_bytes(bytes(10**7))
    real = subprocess.run  # without what fetches pixels and packages
    monkeypatch.setattr(
        session.subprocess, "run", lambda command, **options: command[0] == "git" and real(command, **options)
    )
    for name in ("media", "photos", "heldout"):
        (tmp_path / "training/data").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"training/data/{name}.safetensors").write_text(name)
    (tmp_path / "training/data/site").mkdir()
    session.main(["pack"])
    assert session.room_beside_the_tree() == session.TRAVELS - session.SPARED - 10**7 - 39
    for name in ("average.safetensors", "average.json", "state.pt"):
        (tmp_path / "training/runs/session/video").mkdir(parents=True, exist_ok=True)
        (tmp_path / "training/runs/session/video" / name).write_text(name)
    session.leave(session.WORK, tmp_path / "out")
    session.main(["pack", "out"])
    shutil.rmtree(tmp_path / "training/data")
    session.main(["unpack"])
    assert (tmp_path / "training/data/video.safetensors").read_text() == "average.safetensors"
    assert (tmp_path / "training/data/video.json").read_text() == "average.json"
    assert not (tmp_path / "training/data/understanding.json").exists()
    assert "--resume" in steps.training_of("video", PLACE, session.WORK.with_name("new")).command
    assert (tmp_path / ".commit").read_text() == f"{commit_here(Path(session.__file__))}\n"
    assert (tmp_path / "training/data/media.safetensors").read_text() == "media"
    monkeypatch.setattr(session, "TRAVELS", 10**7)
    with pytest.raises(OSError, match="the tree must leave"):
        session.room_beside_the_tree()


def test_parts_are_small_and_join_to_the_same(tmp_path):
    work, back, came = (tmp_path / name for name in ("work", "back", "came"))
    for folder in (work / "video/model", work / "video/__pycache__", work / "vision.answers", back, came):
        folder.mkdir(parents=True)
    content = bytes(range(256)) * 400
    for name in (
        "video/model/weights",
        "video/x.json.partial",
        "video/state.pt",
        "video/__pycache__/x",
        "vision.answers/rank0.jsonl",
        "log",
    ):
        (work / name).write_bytes(content)
    parts = session.write_parts(work, ["video", "log"], back / "session", 1000, "gz")
    assert [part.name for part in parts] == [f"session.{number:02}" for number in range(len(parts))]
    assert len(parts) > 1
    assert all(part.stat().st_size <= 1000 for part in parts)
    assert sorted(back.iterdir()) == parts
    session.read_parts(back, came)
    found = sorted(str(path.relative_to(came)) for path in came.rglob("*") if path.is_file())
    assert found == ["log", "video/model/weights"]
    assert (came / "video/model/weights").read_bytes() == content


def test_what_came_back_is_put_to_its_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = tmp_path / "work"
    for name in ("video/video-6m/config.json", "video/training.json", "results/video.json",
                 "pictures/video_12.png", "pictures/video_12.gif"):  # fmt: skip
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    from PIL import Image

    noise = torch.randint(0, 255, (300, 700, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(work / "pictures/large.png")
    (work / "results/answers.json").write_text(json.dumps([0.5] * 50_000))
    (tmp_path / "back").mkdir()
    session.write_parts(work, [path.name for path in work.iterdir()], tmp_path / "back/session", 10**6, "gz")
    called = []
    monkeypatch.setattr(session.subprocess, "run", lambda command, check: called.append(command))
    session.main(["keep", "back"])
    for place, name in (
        ("src/baatt/assets/video-6m/config.json", "video/video-6m/config.json"),
        ("benchmarks/results/training/video.json", "video/training.json"),
        ("benchmarks/results/video.json", "results/video.json"),
        ("docs/figures/video_12.png", "pictures/video_12.png"),
    ):
        assert (tmp_path / place).read_text() == name
    assert not (tmp_path / "docs/figures/video_12.gif").exists()
    answers = tmp_path / "benchmarks/results/answers.json"
    assert not answers.exists()
    assert json.loads(stored_text(answers)) == [0.5] * 50_000
    small = tmp_path / "docs/figures/large.png"
    assert small.stat().st_size < (work / "pictures/large.png").stat().st_size / 2
    with Image.open(small) as opened:
        found = torch.from_numpy(np.array(opened.convert("RGB")))
    assert (found.float() - noise.float()).abs().mean() < 30
    assert called == [[sys.executable, "benchmarks/render.py"]]
