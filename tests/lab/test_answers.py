"""Answers survive an interruption, another number of processes finds them, and other settings do not."""

import pytest

from baatt.lab.answers import AnswerStore, folder_state, request_key


def test_answers_are_found_again(tmp_path):
    folder = tmp_path / "deep" / "answers"
    store = AnswerStore(folder)
    store.put("a", "two\nlines ä")
    store.put("b", [-1.5, False])
    again = AnswerStore(folder)
    assert ("a" in again, "c" in again) == (True, False)
    assert (again["a"], again["b"]) == ("two\nlines ä", [-1.5, False])
    assert (folder / "rank0.jsonl").read_text().count("\n") == 2


def test_another_number_of_processes(tmp_path):
    for rank in range(3):
        AnswerStore(tmp_path, rank).put(f"of {rank}", rank)
    alone = AnswerStore(tmp_path)
    assert [alone[f"of {rank}"] for rank in range(3)] == [0, 1, 2]
    alone.put("new", 3)
    assert [len((tmp_path / f"rank{rank}.jsonl").read_text().splitlines()) for rank in range(3)] == [2, 1, 1]


def test_an_interrupted_line_is_asked_again(tmp_path, caplog):
    AnswerStore(tmp_path).put("a", 1)
    with (tmp_path / "rank0.jsonl").open("a") as lines:
        lines.write('{"key": "b", "ans')
    assert "b" not in AnswerStore(tmp_path, rank=1)  # another process leaves the file as it is
    store = AnswerStore(tmp_path)
    assert ("a" in store, "b" in store) == (True, False)
    assert "the last answer was interrupted" in caplog.text
    store.put("b", 2)
    assert AnswerStore(tmp_path)["b"] == 2


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "rank0.jsonl").write_text('{"key": "a", "answer": 1}\n[]\n')
    with pytest.raises(ValueError, match=r"rank0\.jsonl: line 2 must be an answer"):
        AnswerStore(tmp_path)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = AnswerStore(None)
    store.put("a", 1)
    assert store["a"] == 1
    assert not list(tmp_path.iterdir())


def test_keys():
    assert request_key("x", {"a": 1, "b": 2}) == request_key("x", {"b": 2, "a": 1})
    assert request_key("x", [1, 2]) != request_key("x", [12])


def test_another_model_in_the_folder_is_another_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    (tmp_path / "notes.txt").write_text("not of the model")
    before = folder_state(tmp_path)
    assert [name for name, *_ in before] == ["model.safetensors"]
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert folder_state(tmp_path) != before
