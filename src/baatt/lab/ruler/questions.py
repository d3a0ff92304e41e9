"""Questions with their documents, read from the files RULER takes: SQuAD's dev-v2.0.json, HotpotQA's distractor set.

In: a local path. Out: a `QuestionSet` in the order of the file, documents deduplicated and sorted as RULER has them. A
file of another form is refused with the place in it. Downloads nothing and knows no prompt.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


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


#: A question, its answers, the texts of its gold and its related documents, and its place in the file.
_Asked = tuple[str, list[str], list[str], list[str], str]


@functools.cache
def read_questions(name: str, path: Path) -> QuestionSet:
    """The questions of a local copy of a data set, a name in `DATA_SETS`; ValueError: no such file, or another form."""
    parse, origin = DATA_SETS[name]
    if not path.is_file():
        raise ValueError(f"{path} must be a local copy of {origin}, got no such file")
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON as in {origin}, got: {error}") from error
    try:
        asked, documents = parse(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not asked:
        raise ValueError(f"{path} must hold at least one answerable question, got none")
    names = tuple(sorted(set(documents)))
    numbers = {document: number for number, document in enumerate(names)}
    questions = []
    for text, answers, gold, related, where in asked:
        if not answers or not all(map(str.strip, answers)):  # an empty answer would be found in every prediction
            raise ValueError(f"{path}: {where} must have answers that are not empty, got {answers}")
        own, others = (tuple(numbers[document] for document in texts) for texts in (gold, related))
        questions.append(Question(text, tuple(answers), own, others))
    return QuestionSet(tuple(questions), names)


def _parse_squad(data: Any) -> tuple[list[_Asked], list[str]]:
    """SQuAD 2.0: the answerable questions; a document is a paragraph, related ones are of the same article."""
    asked: list[_Asked] = []
    documents: list[str] = []
    for article_place, article in _members(data, "data", ""):
        paragraphs = _members(article, "paragraphs", article_place)
        contexts = [_member(paragraph, "context", str, place) for place, paragraph in paragraphs]
        documents += contexts
        for context, (place, paragraph) in zip(contexts, paragraphs, strict=True):
            related = [other for other in contexts if other != context]
            for where, entry in _members(paragraph, "qas", place):
                if _member(entry, "is_impossible", bool, where):
                    continue
                answers = [_member(answer, "text", str, spot) for spot, answer in _members(entry, "answers", where)]
                asked.append((_member(entry, "question", str, where), answers, [context], related, where))
    return asked, documents


def _parse_hotpot(data: Any) -> tuple[list[_Asked], list[str]]:
    """HotpotQA, distractor setting: a document is a title, a newline and its sentences; all of a question are gold."""
    if not isinstance(data, list):
        raise ValueError(f"the file must hold a list of questions (HotpotQA), got {type(data).__name__}")
    asked: list[_Asked] = []
    documents: list[str] = []
    for number, entry in enumerate(data):
        where = f"[{number}]"
        gold = [_hotpot_document(context, place) for place, context in _members(entry, "context", where)]
        documents += gold
        answer = _member(entry, "answer", str, where)
        asked.append((_member(entry, "question", str, where), [answer], gold, [], where))
    return asked, documents


def _hotpot_document(context: Any, where: str) -> str:
    match context:
        case [str() as title, [*sentences]] if all(isinstance(sentence, str) for sentence in sentences):
            return f"{title}\n{''.join(sentences)}"
    raise ValueError(f"{where} must be [title, [sentence, ...]], got {str(context)[:60]!r}")


def _member(value: Any, name: str, kind: type, where: str) -> Any:
    """`value[name]` of the given type; `where` it stands in the file, "" for the file itself."""
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        where = where or "the file"
        raise ValueError(f"{where} must have {name!r} of type {kind.__name__}, got {type(found).__name__}")
    return found


def _members(value: Any, name: str, where: str) -> list[tuple[str, Any]]:
    """The entries of the list `value[name]`, each behind its place in the file."""
    place = f"{where}.{name}".lstrip(".")
    return [(f"{place}[{number}]", entry) for number, entry in enumerate(_member(value, name, list, where))]


#: Name in `Sources` -> how its file is read, and where it comes from.
DATA_SETS: dict[str, tuple[Callable[[Any], tuple[list[_Asked], list[str]]], str]] = {
    "squad": (_parse_squad, "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json"),
    "hotpot": (_parse_hotpot, "http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json"),
}
