"""RULER's question answering: the documents of a question among others of the same data set.

In: a question set, a question's number, a random generator and a number of documents. Out: a `RulerSample`. Sample n is
question n of the file. Knows nothing of tokens or scoring, and reads no file.
"""

from random import Random

from baatt.lab.ruler.questions import Question, QuestionSet
from baatt.lab.ruler.sample import Recipe, Request, RulerSample

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
TEMPLATE = f"{INSTRUCTION}\n\nThe following are given documents.\n\n{{context}}\n\n{INSTRUCTION}\n\nQuestion: {{query}}"
ANSWER_PREFIX = " Answer:"
ANSWER_TOKENS = 32
TOKENS_PER_DOCUMENT = 200.0


def choose_documents(random: Random, question: Question, documents: int, size: int) -> list[int]:
    """Numbers of `size` out of `documents`: the gold ones, then of the same article, then any others.

    From as many as there are on, all of them in order, over and over, as RULER does.
    """
    if size >= documents:
        return [number % documents for number in range(size)]
    own, missing = question.gold + question.related, size - len(question.gold)
    if missing <= len(question.related):
        return [*question.gold, *random.sample(question.related, missing)]
    return [*own, *random.sample(sorted({*range(documents)} - {*own}), size - len(own))]


def build(random: Random, data: QuestionSet, number: int, size: int) -> RulerSample:
    """Question `number` with `size` documents, shuffled; no fewer than its own (ValueError)."""
    if not 0 <= number < len(data.questions):
        raise ValueError(f"number must be in [0, {len(data.questions)}), the questions of the file, got {number}")
    question = data.questions[number]
    if size < len(question.gold):
        raise ValueError(f"size must be at least the {len(question.gold)} documents of question {number}, got {size}")
    chosen = choose_documents(random, question, len(data.documents), size)
    random.shuffle(chosen)
    texts = (f"Document {place}:\n{data.documents[one]}" for place, one in enumerate(chosen, 1))
    prompt = TEMPLATE.format(context="\n\n".join(texts), query=question.text)
    answers = question.answers
    return RulerSample("qa", prompt, ANSWER_PREFIX, f" {answers[0]}", answers, size, ANSWER_TOKENS, "part")


def recipe(request: Request, data: str) -> Recipe:
    """How question number `request.number` of the sources' set `data` looks with any number of documents."""
    found, number = request.sources.questions(data), request.number
    if number >= len(found.questions):
        raise ValueError(f"{request.task} has {len(found.questions)} questions, got number {number}")
    smallest = len(found.questions[number].gold)
    return Recipe(lambda size: build(request.random(), found, number, size), smallest, TOKENS_PER_DOCUMENT)
