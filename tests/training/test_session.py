"""A session of training on pixels: every command of its queues is understood, limits hold, what comes back is whole."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import pytest

from baatt.cli.main import build_parser

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "training" / "vision"))

import session
import steps
import understanding
import video
from running import add_arguments

ROOT = Path(__file__).resolve().parents[2]
PLACE = steps.Place("cpu", "float32", seconds=60, training=20, total=40)


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", steps.QUEUES)
def test_every_command_is_understood(name, tiny, tmp_path):
    place = dataclasses.replace(PLACE, tiny=tiny)
    for step in steps.QUEUES[name](place, tmp_path):
        program, words = step.command[:3], step.command[3:]
        assert program == [sys.executable, "-m", "baatt"]
        assert build_parser(words[0]).parse_args(words)
    command = steps.training_of(name, place, tmp_path).command
    assert (ROOT / command[1]).is_file()
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    add_arguments(parser, name)
    told = parser.parse_args(command[2:])
    assert (told.seconds, told.total_seconds, told.resume) == (20, 40, None)
    (tmp_path / name).mkdir()
    (tmp_path / name / "state.pt").touch()
    again = steps.training_of(name, dataclasses.replace(place, compiled=False), tmp_path).command
    assert again[again.index("--resume") + 1] == str(tmp_path / name)
    assert again[-1] == "--no-compile"


def test_the_scripts_of_the_queues_are_those_that_train():
    assert {*steps.QUEUES} == {Path(script.__file__).stem for script in (understanding, video)} == {*steps.TINY}


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
    came = tmp_path / "came"
    came.mkdir()
    session.read_parts(tmp_path / "back", came)
    assert (came / "results/x.json").read_text() == "{}"


def test_parts_are_small_and_join_to_the_same(tmp_path):
    work, back, came = (tmp_path / name for name in ("work", "back", "came"))
    for folder in (work / "video/model", work / "video/__pycache__", work / "vision.answers", back, came):
        folder.mkdir(parents=True)
    content = bytes(range(256)) * 400
    for name in ("video/model/weights", "video/state.pt", "video/__pycache__/x", "vision.answers/rank0.jsonl", "log"):
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
    for name in ("video/model/config.json", "video/training.json", "results/video_h200.json", "pictures/video_12.png",
                 "pictures/video_12.gif"):  # fmt: skip
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    (tmp_path / "back").mkdir()
    session.write_parts(work, [path.name for path in work.iterdir()], tmp_path / "back/session", 10**6, "gz")
    called = []
    monkeypatch.setattr(session.subprocess, "run", lambda command, check: called.append(command))
    session.main(["keep", "back"])
    for place, name in (
        ("src/baatt/assets/video-6m/config.json", "video/model/config.json"),
        ("benchmarks/results/training/video.json", "video/training.json"),
        ("benchmarks/results/video_h200.json", "results/video_h200.json"),
        ("docs/figures/video_12.png", "pictures/video_12.png"),
    ):
        assert (tmp_path / place).read_text() == name
    assert not (tmp_path / "docs/figures/video_12.gif").exists()
    assert called == [[sys.executable, "benchmarks/render.py"]]
