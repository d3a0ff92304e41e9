"""All 13 tasks through one door: names, budgets with the shipped tokenizer, and what a sample depends on."""

import functools
import json
import time

import pytest

from baatt.assets import shipped_model
from baatt.lab.ruler import vt
from baatt.lab.ruler.sample import Request
from baatt.lab.ruler.scoring import METRICS, WHOLE_METRICS
from baatt.lab.ruler.sources import Sources, heldout_words
from baatt.lab.ruler.tasks import OFFLINE_TASKS, TASKS, check_sources, draw, draw_samples, find_task
from baatt.models.checkpoint import load_tokenizer

ALL = pytest.mark.parametrize("name", list(TASKS))


class Remembering:
    """The shipped tokenizer, which is most of the time: each text is made into tokens once. `asked`: all texts."""

    def __init__(self):
        self.encode, self.asked = functools.cache(load_tokenizer(shipped_model()).encode), []

    def count(self, text):
        self.asked.append(text)
        return len(self.encode(text).ids)


@pytest.fixture(scope="module")
def tokenizer():
    return Remembering()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Data sets of the right form made of the held-out text."""
    folder, words = tmp_path_factory.mktemp("data"), heldout_words()
    texts = [" ".join(words[start : start + 90]) for start in range(0, 54_000, 90)]
    asked = [
        {"question": f"Question {n}?", "is_impossible": False, "answers": [{"text": texts[n].split()[0]}]}
        for n in range(9)
    ]
    paragraphs = [{"context": text, "qas": asked[n : n + 1]} for n, text in enumerate(texts)]
    (folder / "squad.json").write_text(
        json.dumps({"data": [{"paragraphs": paragraphs[:200]}, {"paragraphs": paragraphs[200:]}]})
    )
    hotpot = [
        {
            "question": f"Question {n}?",
            "answer": "yes",
            "context": [[f"T{n}", [text[:80]]] for text in texts[n : n + 10]],
        }
        for n in range(0, 590, 10)
    ]
    (folder / "hotpot.json").write_text(json.dumps(hotpot))
    return Sources(squad=folder / "squad.json", hotpot=folder / "hotpot.json")


def test_names_budgets_and_metrics_are_rulers():
    assert [(task.name, task.answer_tokens, task.metric) for task in TASKS.values()] == [
        *((f"niah_single_{number}", 128, "all") for number in (1, 2, 3)),
        *((f"niah_multikey_{number}", 128, "all") for number in (1, 2, 3)),
        ("niah_multivalue", 128, "all"),
        ("niah_multiquery", 128, "all"),
        ("vt", 30, "all"),
        ("cwe", 120, "all"),
        ("fwe", 50, "all"),
        ("qa_1", 32, "part"),
        ("qa_2", 32, "part"),
    ]
    assert list(TASKS) == [task.name for task in TASKS.values()]
    assert tuple(TASKS)[:11] == OFFLINE_TASKS
    assert {task.metric for task in TASKS.values()} <= METRICS.keys() == WHOLE_METRICS.keys()


def test_an_unknown_task_is_refused(tokenizer):
    for refuse in (find_task, functools.partial(draw_samples, length=512, count=1, tokenizer=tokenizer)):
        with pytest.raises(ValueError, match=r"task must be one of \['niah_single_1', .*'qa_2'\], got 'niah'"):
            refuse("niah")
    with pytest.raises(ValueError, match="got 'niah'"):
        check_sources(["vt", "niah"], Sources())


@ALL
@pytest.mark.parametrize("length", [1024, 4096, pytest.param(16384, marks=pytest.mark.slow)])
def test_samples_fill_the_length_and_never_pass_it_after_few_encodings(name, length, tokenizer, sources):
    """A text of 4096 tokens takes about 5 ms to encode, one of 32768 about 50."""
    task, room = TASKS[name], {"cwe": 0.96, "qa_1": 0.9, "qa_2": 0.9, "niah_multikey_3": 0.9}.get(name, 0.96)
    for number in range(3 if length < 16384 else 1):
        tokenizer.asked.clear()
        started = time.process_time()
        sample = draw(task, length, number, tokenizer.count, sources=sources)
        assert time.process_time() - started < 0.5 * max(1, length / 4096)
        assert sum(len(text) > 2 * length for text in tokenizer.asked) <= 8
        used = len(tokenizer.encode(sample.prompt + sample.answer_prefix).ids) + task.answer_tokens
        assert room * length - 200 < used <= length
        assert (sample.task, sample.answer_tokens, sample.metric) == (name, task.answer_tokens, task.metric)
        larger = task.recipe(Request(name, 42, length, number, sources, tokenizer.count)).build(sample.size + 1)
        assert tokenizer.count(larger.prompt + larger.answer_prefix) + task.answer_tokens > length
        # What a model that knows the answer writes is found and fits.
        assert METRICS[sample.metric](sample.answer, sample.values) == 1
        assert len(tokenizer.encode(sample.answer).ids) <= task.answer_tokens


@ALL
def test_samples_are_fixed_by_seed_task_length_and_number(name, tokenizer, sources):
    first = draw_samples(name, 1536 if name != "qa_2" else 2048, 3, tokenizer, seed=7, sources=sources)
    again = functools.partial(draw_samples, name, tokenizer=tokenizer, sources=sources)
    length = 1536 if name != "qa_2" else 2048
    assert again(length, count=3, seed=7) == first
    assert again(length, count=2, seed=7) == first[:2]
    assert again(length, count=1, seed=7, first=2) == first[2:]
    assert len({sample.prompt for sample in first}) == 3
    assert again(length, count=3, seed=8) != first


def test_tokens_are_kept_free_for_a_chat_template(tokenizer):
    for name in OFFLINE_TASKS:
        sample = draw(TASKS[name], 2048, 0, tokenizer, reserve=300)
        used = len(tokenizer.encode(sample.prompt + sample.answer_prefix).ids) + sample.answer_tokens
        assert 1600 < used <= 1748


@ALL
def test_a_length_that_holds_nothing_is_refused(name, tokenizer, sources):
    with pytest.raises(ValueError, match=rf"length must hold the smallest {name} sample \(\d+ tokens\), got 140"):
        draw(TASKS[name], 140, 0, tokenizer, sources=sources)


@pytest.mark.parametrize(
    ("dials", "error", "message"),
    [
        ({"length": 0}, ValueError, "length must be at least 1, got 0"),
        ({"length": 1024.0}, TypeError, "length must be an int, got 1024.0"),
        ({"number": -1}, ValueError, "number must be at least 0, got -1"),
        ({"number": True}, TypeError, "number must be an int, got True"),
        ({"reserve": -5}, ValueError, "reserve must be at least 0, got -5"),
    ],
)
def test_bad_numbers_are_refused(dials, error, message):
    with pytest.raises(error, match=message):
        draw(TASKS["vt"], **({"length": 1024, "number": 0, "tokenizer": len} | dials))


def test_a_task_with_other_dials(tokenizer):
    task = TASKS["vt"]._replace(name="vt_2_8", recipe=functools.partial(vt.recipe, chains=2, hops=8), answer_tokens=60)
    sample = draw(task, 2048, 0, tokenizer)
    assert (sample.task, sample.answer_tokens, len(sample.values)) == ("vt_2_8", 60, 9)
    assert 2000 < len(tokenizer.encode(sample.prompt + sample.answer_prefix).ids) + 60 <= 2048
