"""What goes into a model and what comes out: prompts cut and padded, generated ids cut at their end and read as text.

A prompt that is too long keeps its end, or its first and last half; every variant is a function in `TRUNCATIONS`. Knows
nothing of tasks and of models.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

#: The end of a turn in LLaDA's chat template; not the model's end of text.
END_OF_TURN = "<|eot_id|>"


def keep_end(ids: Sequence[int], limit: int) -> list[int]:
    """The last `limit` ids, as lm-evaluation-harness cuts prompts."""
    return list(ids[max(0, len(ids) - limit) :])


def keep_both_ends(ids: Sequence[int], limit: int) -> list[int]:
    """The first and the last limit // 2 ids of a longer prompt, as LongBench's pred.py cuts the middle out."""
    if len(ids) <= limit:
        return list(ids)
    half = limit // 2
    return [*ids[:half], *ids[len(ids) - half :]]


TRUNCATIONS: dict[str, Callable[[Sequence[int], int], list[int]]] = {"left": keep_end, "middle": keep_both_ends}


def fit_prompt(ids: Sequence[int], side: str, *, max_length: int, answer_length: int) -> list[int]:
    """A prompt that leaves room for the answer.

    Args:
        ids: the whole prompt.
        side: where it is cut, a name in `TRUNCATIONS`.
        max_length: tokens of prompt and answer together.
        answer_length: tokens kept free for the answer.

    Raises:
        ValueError: an unknown side, or a longer prompt of which not even two tokens fit beside the answer.
    """
    if side not in TRUNCATIONS:
        raise ValueError(f"truncation must be one of {list(TRUNCATIONS)}, got {side!r}")
    limit = max_length - answer_length
    if len(ids) > limit < 2:
        raise ValueError(
            f"max_length must leave two tokens for the prompt beside {answer_length} for the answer, got {max_length}"
        )
    return TRUNCATIONS[side](ids, limit)


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, N] int64 padded on the left, and the mask [B, N] bool of real tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device="cpu")
    lengths = torch.tensor([len(row) for row in rows], device="cpu")
    return ids, torch.arange(width, device="cpu") >= width - lengths[:, None]


def encode_prompt(tokenizer: Tokenizer, text: str, special_tokens: Mapping[str, str]) -> list[int]:
    """The ids of a text; one that begins with the beginning-of-text token, as a chat template's may, gets no other."""
    begins = special_tokens.get("bos_token")
    return list(tokenizer.encode(text, add_special_tokens=not (begins and text.startswith(begins))).ids)


def end_tokens(
    tokenizer: Tokenizer, end_of_text: int | tuple[int, ...] | None, special_tokens: Mapping[str, str]
) -> frozenset[int]:
    """Ids after which an answer is over: the end of text of model and tokenizer, and the end of a turn."""
    names = (special_tokens.get("eos_token"), END_OF_TURN)
    ends = end_of_text if isinstance(end_of_text, tuple) else (end_of_text,)
    ids = [*ends, *(tokenizer.token_to_id(name) for name in names if name)]
    return frozenset(number for number in ids if number is not None)


def answer_text(
    tokenizer: Tokenizer, tokens: Sequence[int], ends: Collection[int | None], stops: Collection[str] = ()
) -> str:
    """The text of generated ids, up to the first of the end tokens and the first of the stop texts."""
    added = tokenizer.get_added_tokens_decoder() if stops else {}
    ends = {*ends, *(number for number, token in added.items() if token.content in stops)}
    first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    text = str(tokenizer.decode(list(tokens[:first])))
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text
