"""The Markdown of what a session on real pixels stores, from made-up records."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import registry
import vision_tables

from baatt.config import PRESETS, Policy
from baatt.lab.ruler.cells import Cell
from baatt.lab.ruler.model import RulerAnswer
from baatt.lab.ruler.summary import make_averages, make_records

PAPER = PRESETS["paper"].config
SETTINGS = {
    "paper": [replace(PAPER, beta=beta) for beta in (0.0, 0.5)],
    "unsorted": [replace(PAPER, beta=beta, sort="none", keep_first=1) for beta in (0.0, 0.5)],
    "clusters": [replace(PRESETS["default"].config, sparsity=sparsity) for sparsity in (0.5, 0.9)],
}
TASKS = {"clips": ("clip_when", "clip_often"), "photos": ("photo_count",), "words": ("vt",)}


def summary(study, setting):
    """As the commands write it: dense attention is always right, sparse attention in half of the cases."""
    kinds = ("words",) if study == "ruler" else ("clips", "photos")
    cells = [
        Cell(task, 4096, config, Policy())
        for kind in kinds for task in TASKS[kind] for config in (None, *SETTINGS[setting])
    ]  # fmt: skip
    answers = [
        [
            RulerAnswer(cell.task, 4096, number, {}, "", [], score, score, 0.5, 2, 2, 0.4, "c" * 40, "here")
            for number, score in enumerate([1.0] * 8 if cell.config is None else [1.0, 0.0] * 4)
        ]
        for cell in cells
    ]
    records = make_records(cells, answers, study)
    averages = {
        kind: make_averages([one for one in records if one["task"] in TASKS[kind]]) for kind in kinds
    }  # fmt: skip
    return {
        "study": study, "command": f"baatt evaluate {study}", "commit": "d" * 40, "device": "here",
        "versions": {"torch": "2"}, "model": study, "count": 8, "frames": [48], "records": records,
        "averages": averages["words"] if study == "ruler" else averages,
    }  # fmt: skip


def stored():
    return [summary(study, setting) for study in ("vision", "ruler") for setting in SETTINGS]


def test_table_8_has_a_row_for_each_setting_and_the_papers_numbers():
    text = vision_tables.table_8(stored())
    lines = text.splitlines()
    assert lines[0] == (
        "| setting | questions about clips | questions about photos | RULER, 4096 tokens | the paper's |"
    )
    rows = [line for line in lines[2:] if line.startswith("|")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [
        "dense",
        "BA-Att, qk in 1024, beta 0, 50 %",
        "BA-Att, qk in 1024, beta 0.5, 50 %",
        "BA-Att, first block kept, unsorted, beta 0, 50 %",
        "BA-Att, first block kept, unsorted, beta 0.5, 50 %",
        "16 clusters, first block kept, unsorted, 50 %",
        "16 clusters, first block kept, unsorted, 90 %",
    ]
    assert rows[0].count("100.0 [") == 3
    assert rows[0].endswith(" | - |")
    assert rows[2].count("| 50.0 [") == 3
    assert rows[2].count("; -50.0 [") == 3
    assert rows[2].endswith(" | 56.56; 64.84; 90.06 |")
    assert all(row.endswith(" | - |") for row in rows[3:])
    assert "clips n = 16, photos n = 8, RULER n = 8; clips of 48 frames, `vision`; RULER: `ruler`." in text
    assert text.count("Command: `baatt evaluate") == 6


def test_tasks_have_the_papers_default_and_all_clusters():
    text = vision_tables.tasks(stored()[:3])
    assert text.splitlines()[0] == (
        "| task | dense | BA-Att, qk in 1024, beta 0.5, 50 % | BA-Att, first block kept, unsorted, beta 0.5, 50 % | "
        "16 clusters, first block kept, unsorted, 50 % | 16 clusters, first block kept, unsorted, 90 % |"
    )
    assert "| `clip_often` | 100.0 [67.6-100.0] | 50.0 [" in text
    assert "n = 8 each" in text


def test_training_of_both_models():
    told = {
        "arguments": {"batch_tokens": 73728, "learning_rate": 1e-3}, "parameters": 3116304, "step": 20000,
        "seconds": 950.4, "begun": 21.5, "stages": [{"stage": 0, "ended": 30.2, "step": 600, "worst": 0.92}],
        "command": "python x.py",
        "held_out": {"photo_count": 0.953, "clip_when 72": 0.9}, "device": "NVIDIA H200", "commit": "d" * 40,
    }  # fmt: skip
    text = vision_tables.training(told)
    for line in (
        "| parameters | 3,116,304 |", "| seconds | 950 on NVIDIA H200 |", "| learning had begun after | 22 s |",
        "| stage 0 ended after | 30 s, worst task 92.0 % |", "| held out, `clip_when 72` | 90.0 % |",
    ):  # fmt: skip
        assert line in text
    text = vision_tables.training({**told, "held_out": 0.1234, "stages": []})
    assert "| loss on held-out starts | 0.1234 |" in text
    del told["begun"]
    assert "| learning had begun after | never |" in vision_tables.training(told)


def test_clips_by_method_and_sparsity():
    one = {
        "task": "video_generation", "method": "clusters", "tiles": "none", "sparsity": 0.5, "dense_steps": 0.1,
        "clips": [0, 1], "psnr": 24.08, "psnr_low": 23.0, "psnr_high": 25.0, "ssim": 0.812, "ms_ssim": 0.9301,
    }  # fmt: skip
    record = {
        "records": [one, one | {"sparsity": 0.9, "psnr": 20.0}, one | {"dense_steps": 0.0, "tiles": "4x8x4"}],
        "steps": 24, "tokens": [24, 16, 24], "dtype": "bfloat16", "command": "baatt evaluate video", "commit": None,
        "device": "here", "versions": {"torch": "2"},
    }  # fmt: skip
    text = vision_tables.clips(record)
    assert text.index("Every step sparse:") < text.index("first 10 %")
    assert "| clusters | order of the model | 24.1 [23.0-25.0]; 0.81; 0.930 | 20.0 [23.0-25.0]; 0.81; 0.930 |" in text
    assert "| clusters | 4x8x4 | 24.1 [23.0-25.0]; 0.81; 0.930 |" in text
    assert "of 2 clips" in text
    assert "24 x 16 x 24 tokens" in text


@pytest.mark.parametrize(("case", "model"), [("vision", "understanding"), ("video", "video")])
def test_pictures_are_those_of_a_model_that_was_trained(case, model):
    block = registry.BLOCKS[f"{case}_figures"]
    assert block.results == (f"training/{model}.json",)
    names = vision_tables.PICTURES if case == "vision" else vision_tables.FILMS
    text = block.render([json.loads("{}")])
    assert all(f"](figures/{name})" in text for name in names)
