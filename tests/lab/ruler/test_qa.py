"""Question answering is RULER's: prompt, choice of documents, and what is read from SQuAD and HotpotQA files."""

import functools
import json
import re
from random import Random

import pytest

from baatt.lab.ruler import qa
from baatt.lab.ruler.questions import Question, QuestionSet, read_questions
from baatt.lab.ruler.sources import Sources
from baatt.lab.ruler.tasks import TASKS, check_sources, draw

read_squad, read_hotpot = (functools.partial(read_questions, name) for name in ("squad", "hotpot"))
INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


def squad_entry(question, answers, impossible=False):
    return {"question": question, "is_impossible": impossible, "answers": [{"text": text} for text in answers]}


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "first",
            "paragraphs": [
                {"context": "zebra text", "qas": [squad_entry("Which?", ["zebra", "a zebra", "zebra"])]},
                {"context": "ant text", "qas": [squad_entry("None?", [], True), squad_entry("Small?", ["ant"])]},
            ],
        },
        {"title": "second", "paragraphs": [{"context": "cat text", "qas": [squad_entry("Soft?", ["cat"])]}]},
    ],
}
HOTPOT = [
    {"question": "Both?", "answer": "yes", "context": [["T", ["One. ", "Two."]], ["S", ["Three."]]]},
    {"question": "Who?", "answer": "Me", "context": [["T", ["One. ", "Two."]], ["A", []]]},
]


@pytest.fixture
def write(tmp_path):
    def written(data):
        path = tmp_path / f"data{len(list(tmp_path.iterdir()))}.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    return written


def test_squad(write):
    """Answerable questions only, documents sorted, others of the same article beside the gold one."""
    assert read_squad(write(SQUAD)) == QuestionSet(
        (
            Question("Which?", ("zebra", "a zebra", "zebra"), (2,), (0,)),
            Question("Small?", ("ant",), (0,), (2,)),
            Question("Soft?", ("cat",), (1,), ()),
        ),
        ("ant text", "cat text", "zebra text"),
    )


def test_hotpot(write):
    """A document is a title and its sentences as they are; all of a question are gold."""
    assert read_hotpot(write(HOTPOT)) == QuestionSet(
        (Question("Both?", ("yes",), (2, 1), ()), Question("Who?", ("Me",), (2, 0), ())),
        ("A\n", "S\nThree.", "T\nOne. Two."),
    )


@pytest.mark.parametrize(
    ("read", "data", "message"),
    [
        (read_squad, [], r"the file must have 'data' of type list, got NoneType"),
        (read_squad, "{", r"must be JSON as in https://rajpurkar.*dev-v2.0.json, got: "),
        (
            read_squad,
            {"data": [{"paragraphs": [{"qas": []}]}]},
            r"data\[0\].paragraphs\[0\] must have 'context' of type str",
        ),
        (
            read_squad,
            {"data": [{"paragraphs": [{"context": "", "qas": [{"question": "v1.1", "answers": []}]}]}]},
            r"data\[0\].paragraphs\[0\].qas\[0\] must have 'is_impossible' of type bool",
        ),
        (
            read_squad,
            {"data": [{"paragraphs": [{"context": "", "qas": [squad_entry("?", [])]}]}]},
            r"qas\[0\] must have answers that are not empty, got \[\]",
        ),
        (read_squad, {"data": []}, "must hold at least one answerable question"),
        (read_hotpot, {}, r"must hold a list of questions \(HotpotQA\), got dict"),
        (read_hotpot, "[", "must be JSON as in http://curtis.*hotpot_dev_distractor_v1.json"),
        (
            read_hotpot,
            [{"question": "", "answer": "a", "context": [["T"]]}],
            r"\[0\].context\[0\] must be \[title, \[sent",
        ),
        (read_hotpot, [{"question": "", "context": []}], r"\[0\] must have 'answer' of type str, got NoneType"),
        (read_hotpot, [{"question": "", "answer": " ", "context": []}], r"\[0\] must have answers that are not empty"),
    ],
)
def test_another_form_is_refused_with_the_place(write, read, data, message):
    with pytest.raises(ValueError, match=message):
        read(write(data))


def test_missing_data_is_refused_with_its_origin(tmp_path):
    with pytest.raises(
        ValueError, match=r"sources.squad must be the path of a local copy of https://.*dev-v2.0.json, got None"
    ):
        draw(TASKS["qa_1"], 1000, 0, len)
    with pytest.raises(ValueError, match=r"sources.hotpot must be .*hotpot_dev_distractor_v1.json, got None"):
        check_sources(["niah_single_1", "qa_2"], Sources(squad=tmp_path / "there"))
    with pytest.raises(ValueError, match=r"nothing.json must be a local copy of https.*got no such file"):
        draw(TASKS["qa_1"], 1000, 0, len, sources=Sources(squad=tmp_path / "nothing.json"))


class Still:
    """A generator that takes the first ones and shuffles nothing."""

    def sample(self, choices, size):
        return list(choices[:size])

    def shuffle(self, choices):
        pass


DATA = QuestionSet(
    (Question("Which {query}?", ("b", "c"), (4,), (1, 3)),), tuple(f"text {{context}} {letter}" for letter in "abcdefg")
)


def test_prompt_as_a_whole():
    """Braces in the data are text."""
    sample = qa.build(Still(), DATA, 0, 2)
    assert sample.prompt == (
        f"{INSTRUCTION}\n\nThe following are given documents.\n\n"
        "Document 1:\ntext {context} e\n\nDocument 2:\ntext {context} b\n\n"
        f"{INSTRUCTION}\n\nQuestion: Which {{query}}?"
    )
    assert (sample.answer_prefix, sample.answer, sample.values) == (" Answer:", " b", ("b", "c"))
    assert (sample.answer_tokens, sample.metric, sample.size) == (32, "part", 2)


@pytest.mark.parametrize(
    ("size", "chosen"),
    [
        (1, [4]),
        (2, [4, 1]),
        (3, [4, 1, 3]),
        (4, [4, 1, 3, 0]),
        (6, [4, 1, 3, 0, 2, 5]),
        (7, [0, 1, 2, 3, 4, 5, 6]),
        (9, [0, 1, 2, 3, 4, 5, 6, 0, 1]),
    ],
)
def test_order_of_documents_before_they_are_shuffled(size, chosen):
    """Gold, then the same article, then any; from all of them on over and over."""
    assert qa.choose_documents(Still(), DATA.questions[0], 7, size) == chosen


def test_documents_are_shuffled_and_numbered():
    places = set()
    for seed in range(30):
        sample = qa.build(Random(seed), DATA, 0, 6)
        found = re.findall(r"Document (\d+):\ntext {context} (\w)", sample.prompt)
        assert [number for number, _ in found] == ["1", "2", "3", "4", "5", "6"]
        letters = [letter for _, letter in found]
        assert len(set(letters)) == 6
        assert {"b", "d", "e"} <= set(letters)
        places.add(letters.index("e"))
    assert places == set(range(6))


def test_sample_n_is_question_n(write):
    sources = Sources(squad=write(SQUAD), hotpot=str(write(HOTPOT)))
    for number, text in enumerate(("Which?", "Small?", "Soft?")):
        sample = draw(TASKS["qa_1"], 2000, number, len, sources=sources)
        assert sample.prompt.endswith(f"Question: {text}")
        assert sample.task == "qa_1"
    assert draw(TASKS["qa_2"], 2000, 1, len, sources=sources).values == ("Me",)
    with pytest.raises(ValueError, match="qa_1 has 3 questions, got number 3"):
        draw(TASKS["qa_1"], 2000, 3, len, sources=sources)


def test_fewer_documents_than_gold_are_refused(write):
    data = read_hotpot(write(HOTPOT))
    with pytest.raises(ValueError, match="size must be at least the 2 documents of question 0, got 1"):
        qa.build(Random(0), data, 0, 1)
    with pytest.raises(ValueError, match=r"number must be in \[0, 2\), the questions of the file, got -1"):
        qa.build(Random(0), data, -1, 5)
