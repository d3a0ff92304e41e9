"""LLaDA-V's conversation `llava_llada` as token ids, and the text of an answer.

In: a question in which `<image>` marks where pictures go, and a tokenizer. Out: ids with `PICTURE` in those places,
then with negative ids of visual tokens instead; and the text of an answer. Follows the published code to the id, so
that prompts are those that its scores were measured with. Knows nothing of models and pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

#: Stands for a picture among ids, as in the published code.
PICTURE = -200
PICTURE_MARK = "<image>"
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
HEADER, HEADER_END, TURN_END = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
MASK = "<|mdm_mask|>"
THINK_MODES = {"no_think": " /no_think", "think": " /think", "none": ""}


class AnswerRules(NamedTuple):
    """Ids that an answer never has, and sequences of ids that end it."""

    forbidden: list[int]
    stops: list[list[int]]


def ask(question: str, pictures: int, think_mode: str) -> str:
    """The user's turn: one mark a picture in front of a question that has none, and how to think behind it.

    A question that has marks already, or goes without pictures, stays as it is: also without a think mode.
    """
    if pictures == 0 or PICTURE_MARK in question:
        return question
    return f"{' '.join([PICTURE_MARK] * pictures)}\n{question}{THINK_MODES[think_mode]}"


def conversation(turn: str) -> str:
    """The text of the whole prompt: system, one turn of the user, and the head of the answer."""

    def message(role: str, content: str) -> str:
        return f"{HEADER}{role}{HEADER_END}\n\n{content.strip()}{TURN_END}"

    return f"{BEGIN}{message('system', SYSTEM)}{message('user', turn)}{HEADER}assistant{HEADER_END}\n\n"


def prompt_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a prompt with `PICTURE` for every mark.

    As in the published code every part between marks is encoded by itself, and where the first part begins with the
    beginning-of-text token the first id of every part is dropped, even if that token is not what it begins with.
    """
    parts = [tokenizer.encode(part).ids for part in text.split(PICTURE_MARK)]
    begins = bool(parts[0]) and parts[0][0] == special_id(tokenizer, BEGIN)
    ids = parts[0]
    for part in parts[1:]:
        ids = [*ids, PICTURE, *part[begins:]]
    return ids


def place_pictures(ids: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Ids with negative ones, -1, -2 and so on, for the visual tokens of every picture.

    Args:
        counts: visual tokens of every picture, in order. Where there are more marks than pictures the last picture
            comes again, and pictures without a mark are left out, as in the published code.

    Raises:
        ValueError: a mark and no picture at all.
    """
    placed: list[int] = []
    shown = 0
    for token in ids:
        if token != PICTURE:
            placed.append(token)
            continue
        if not counts:
            raise ValueError(f"a prompt with {PICTURE_MARK} must come with pictures, got none")
        picture = min(shown, len(counts) - 1)
        first = sum(counts[:picture])
        placed += [-1 - row for row in range(first, first + counts[picture])]
        shown += 1
    return placed


def answer_rules(tokenizer: Tokenizer, vocabulary: int, stop_texts: Sequence[str] = ()) -> AnswerRules:
    """What the published sampler keeps out of answers, and what ends them.

    Args:
        vocabulary: ids that the model has; those that the tokenizer does not have never occur.
        stop_texts: besides the end of the turn.
    """
    named = [special_id(tokenizer, name) for name in (END, BEGIN, HEADER, HEADER_END)]
    stops = [tokenizer.encode(text, add_special_tokens=False).ids for text in (*stop_texts, TURN_END)]
    return AnswerRules([*named, *range(tokenizer.get_vocab_size(), vocabulary)], [stop for stop in stops if stop])


def answer_text(ids: Sequence[int], stops: Sequence[Sequence[int]], tokenizer: Tokenizer) -> str:
    """The text in front of the first stop, without special tokens, one final full stop and the space around it."""
    places = [
        start
        for stop in stops
        for start in range(len(ids) - len(stop) + 1)
        if list(ids[start : start + len(stop)]) == list(stop)
    ]
    text: str = tokenizer.decode(list(ids[: min(places, default=len(ids))]), skip_special_tokens=True)
    return text.removesuffix(".").strip()


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that LLaDA-V's tokenizer has.

    Raises:
        ValueError: this one has not.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer must have the token {token}, as LLaDA-V's has")
    return int(found)
