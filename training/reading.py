"""Chats about a document: plain statements stand in running text, and are asked for in plain words.

In: a generator of random numbers, words, and a function that gives running text. Out: pieces of a chat of the base's
own format about a document of `baatt.lab.reading`.
"""

from collections.abc import Callable
from random import Random

from baatt.lab.reading import document_with, draw_facts
from baatt.lab.ruler.sources import WordPool

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
USER, ANSWER, END = "<|im_start|>user\n", "\n<|im_start|>assistant\n", "<|im_end|>"
#: How a request begins; a colon and the document, or the document and then the question.
ASKING = ("Read this text:\n\n{}\n\n{}", "{}\n\n{}", "{}\n\nQuestion: {}", "Here is a document.\n\n{}\n\n{}",
          "{}\n\nAnswer from the text above: {}", "Text:\n{}\n\n{} Answer in one sentence.")  # fmt: skip


def reading(
    random: Random, words: WordPool, text: Callable[[int], str], size: int, facts: int, questions: int
) -> list[tuple[str, bool]]:
    """A chat about a document: pieces of text, and whether each is an answer.

    Args:
        text: gives running text of so many characters.
        size: characters of running text.
        facts: how many statements stand in it, at most.
        questions: how many are asked for, at most.
    """
    drawn = draw_facts(random, words, facts)
    document = document_with(drawn, text(size), random)
    asked = random.sample(drawn, min(questions, len(drawn)))
    pieces = [(SYSTEM + USER + random.choice(ASKING).format(document, asked[0].question) + END + ANSWER, False)]
    pieces.append((asked[0].answer + END, True))
    for fact in asked[1:]:
        pieces += [("\n" + USER + fact.question + END + ANSWER, False), (fact.answer + END, True)]
    return pieces
