"""Questions with their documents, read from the files RULER takes: SQuAD's dev-v2.0.json, HotpotQA's distractor set.

In: a local path. Out: a `QuestionSet` in the order of the file, documents deduplicated and sorted as RULER has them. A
file of another form is refused with the place in it. Downloads nothing and knows no prompt.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

SQUAD_FROM = "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json"
HOTPOT_FROM = "http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json"


class Question(NamedTuple):
    """One question. gold: documents its answer stands in; related: others of the same article (document numbers)."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...]


class QuestionSet(NamedTuple):
    """All questions of a file and all its documents."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]


@functools.cache
def read_squad(path: Path) -> QuestionSet:
    """SQuAD 2.0: the answerable questions; a document is a paragraph, related ones are of the same article.

    Raises:
        ValueError: no such file, not JSON, or not SQuAD 2.0.
    """
    data = _load(path, SQUAD_FROM)
    articles = _member(data, "data", list, path, "the file")
    parsed = []
    for number, article in enumerate(articles):
        where = f"data[{number}]"
        paragraphs = _member(article, "paragraphs", list, path, where)
        parsed.append([
            (
                _member(paragraph, "context", str, path, f"{where}.paragraphs[{place}]"),
                _squad_questions(paragraph, path, f"{where}.paragraphs[{place}]"),
            )
            for place, paragraph in enumerate(paragraphs)
        ])  # fmt: skip
    documents = tuple(sorted({context for article in parsed for context, _ in article}))
    numbers = {document: number for number, document in enumerate(documents)}
    questions = []
    for article in parsed:
        siblings = [numbers[context] for context, _ in article]
        for context, asked in article:
            gold = numbers[context]
            related = tuple(number for number in siblings if number != gold)
            questions += [Question(text, answers, (gold,), related) for text, answers in asked]
    return _checked(QuestionSet(tuple(questions), documents), path)


def _squad_questions(paragraph: Any, path: Path, where: str) -> list[tuple[str, tuple[str, ...]]]:
    """Text and answers of the answerable questions of one paragraph."""
    found = []
    for number, entry in enumerate(_member(paragraph, "qas", list, path, where)):
        place = f"{where}.qas[{number}]"
        if _member(entry, "is_impossible", bool, path, place):
            continue
        answers = _member(entry, "answers", list, path, place)
        texts = tuple(_member(answer, "text", str, path, f"{place}.answers") for answer in answers)
        found.append((_member(entry, "question", str, path, place), _answers(texts, path, place)))
    return found


@functools.cache
def read_hotpot(path: Path) -> QuestionSet:
    """HotpotQA, distractor setting: a document is a title, a newline and its sentences; all of a question are gold.

    Raises:
        ValueError: no such file, not JSON, or not HotpotQA.
    """
    data = _load(path, HOTPOT_FROM)
    if not isinstance(data, list):
        raise ValueError(f"{path} must hold a list of questions (HotpotQA), got {type(data).__name__}")
    parsed = []
    for number, entry in enumerate(data):
        where = f"[{number}]"
        contexts = _member(entry, "context", list, path, where)
        documents = [_hotpot_document(context, path, f"{where}.context[{n}]") for n, context in enumerate(contexts)]
        answers = _answers((_member(entry, "answer", str, path, where),), path, where)
        parsed.append((_member(entry, "question", str, path, where), answers, documents))
    names = tuple(sorted({document for _, _, documents in parsed for document in documents}))
    numbers = {document: number for number, document in enumerate(names)}
    questions = tuple(
        Question(text, answers, tuple(numbers[document] for document in documents), ())
        for text, answers, documents in parsed
    )
    return _checked(QuestionSet(questions, names), path)


def _hotpot_document(context: Any, path: Path, where: str) -> str:
    match context:
        case [str() as title, [*sentences]] if all(isinstance(sentence, str) for sentence in sentences):
            return f"{title}\n{''.join(sentences)}"
    raise ValueError(f"{path}: {where} must be [title, [sentence, ...]], got {str(context)[:60]!r}")


def _answers(answers: tuple[str, ...], path: Path, where: str) -> tuple[str, ...]:
    """Answers as they are: an empty one would be found in every prediction."""
    if not answers or not all(answer.strip() for answer in answers):
        raise ValueError(f"{path}: {where} must have answers that are not empty, got {list(answers)}")
    return answers


def _checked(found: QuestionSet, path: Path) -> QuestionSet:
    if not found.questions:
        raise ValueError(f"{path} must hold at least one answerable question, got none")
    return found


def _load(path: Path, source: str) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} must be a local copy of {source}, got no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON as in {source}, got: {error}") from error


def _member(value: Any, name: str, kind: type, path: Path, where: str) -> Any:
    """`value[name]` of the given type."""
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise ValueError(f"{path}: {where} must have {name!r} of type {kind.__name__}, got {type(found).__name__}")
    return found
