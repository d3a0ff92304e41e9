"""The questions and their checker, and a measurement of a tiny model: diffusion beside its base."""

import json
import sys
from pathlib import Path

import pytest

from baatt.lab.smollm2 import sha256_of
from baatt.models import MaskedDiffusionLM
from baatt.models.adapter import make_trainable, write_adapter
from baatt.models.gguf import load_llama
from tests.models.gguf_files import write_gguf

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "training"))

import bars


def test_questions():
    questions = json.loads(bars.QUESTIONS.read_text())
    assert len({one["question"] for one in questions}) == len(questions) == 50
    assert all(one.keys() == {"question", "right"} for one in questions)


@pytest.mark.parametrize(
    ("answer", "pattern", "right"),
    [
        ("The capital is PARIS.", "Paris", True),
        ("Parisian", "Paris", False),
        ("A week has 7 days.", "7|seven", True),
        ("There are 17.", "7|seven", False),
        ("", "Paris", False),
    ],
)
def test_checker(answer, pattern, right):
    assert bars.is_right(answer, pattern) == right


def test_a_measurement(tmp_path, monkeypatch):
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf)
    some = json.loads(bars.QUESTIONS.read_text())[:2]
    (tmp_path / "questions.json").write_text(json.dumps(some))
    monkeypatch.setattr(bars, "QUESTIONS", tmp_path / "questions.json")
    monkeypatch.setattr(bars, "CONTINUATION_TOKENS", 32)
    monkeypatch.setattr(bars, "READ_TOKENS", (50,))
    tensors = make_trainable(load_llama(gguf), 2)
    write_adapter(tmp_path / "a", tensors, sha256_of(gguf))
    common = [
        "--base",
        str(gguf),
        "--device",
        "cpu",
        "--pieces",
        "1",
        "--documents",
        "2",
        "--json",
        str(tmp_path / "found.json"),
    ]
    bars.main([*common, "--adapter", str(tmp_path / "a"), "--folder", str(tmp_path / "m")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["text"]["tokens"] == bars.LENGTH
    assert found["text"]["bound_per_token"] > 0 < found["text"]["base_loss_per_token"]
    assert all(0 <= found["text"][f"accuracy_at_{rate}"] <= 1 for rate in bars.RATES)
    assert found["questions_right"] == sum(one["right"] for one in found["questions"])
    assert found["read_50"]["right"] == sum(one["right"] for one in found["read_50"]["answers"])
    assert MaskedDiffusionLM.from_pretrained(tmp_path / "m").config.predicts == "next"
    bars.main([*common, "--causal"])
    alone = json.loads((tmp_path / "found.json").read_text())
    assert "text" not in alone
    assert len(alone["questions"]) == 2
    assert len(alone["continuations"]) == 3
