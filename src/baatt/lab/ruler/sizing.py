"""Chooses how much haystack fits into a number of tokens, counted with the model's own tokenizer.

In: a recipe and a token counter. Out: the largest sample within the budget, after about six countings. Knows no task.
"""

from collections.abc import Callable
from typing import Any

from baatt.lab.ruler.sample import Recipe, RulerSample

#: Interpolated guesses before the search halves the interval instead; token counts are nearly linear in the size.
INTERPOLATIONS = 8


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    """A function text -> number of tokens.

    Of anything with `encode(text)` that returns ids or an object with `ids` (tokenizers, transformers, tiktoken,
    SentencePiece), or of a function that returns the number itself. Tokens that `encode` adds at the ends are counted:
    the model reads them. TypeError: neither, or a path, which is no tokenizer though a string has `encode`.
    """
    encode = getattr(tokenizer, "encode", None)
    if isinstance(tokenizer, str) or (encode is None and not callable(tokenizer)):
        raise TypeError(f"tokenizer must have encode(text) or be a function text -> int, got {type(tokenizer)}")

    def count(text: str) -> int:
        found = tokenizer(text) if encode is None else encode(text)
        number = found if encode is None else len(getattr(found, "ids", found))
        if not isinstance(number, int):
            raise TypeError(f"tokenizer must return the number of tokens as an int, got {type(number)}")
        return number

    return count


def sample_tokens(sample: RulerSample, count: Callable[[str], int]) -> int:
    """Tokens of prompt, answer prefix and answer budget, as RULER's `max_seq_length` counts them."""
    return count(sample.prompt + sample.answer_prefix) + sample.answer_tokens


def largest_sample(recipe: Recipe, count: Callable[[str], int], length: int) -> RulerSample:
    """The sample with the most haystack whose prompt, answer prefix and answer budget stay within `length` tokens.

    RULER searches one size for all samples of a run and makes single ones smaller when they overflow; here each sample
    is as large as it can be. ValueError: not even the smallest fits, or there is too little material for the length.
    """

    def cost(size: int) -> int:
        return sample_tokens(recipe.build(size), count)

    size = largest_size(cost, length, recipe.smallest, recipe.tokens_per_unit, recipe.limit)
    if size is None:
        task, needed = recipe.build(recipe.smallest).task, cost(recipe.smallest)
        raise ValueError(f"length must hold the smallest {task} sample ({needed} tokens), got {length}")
    if size == recipe.limit:
        raise ValueError(recipe.shortage)
    return recipe.build(size)


def largest_size(
    cost: Callable[[int], int], budget: int, smallest: int, per_unit: float, limit: int | None = None
) -> int | None:
    """The largest size that costs at most `budget`: one more would cost more, or is beyond the limit.

    `cost` is size -> tokens, nearly linear with a slope of about `per_unit`. None if the smallest size costs more than
    the budget; ValueError: the cost does not grow with the size.
    """
    low, low_cost = smallest, cost(smallest)
    if low_cost > budget:
        return None
    ceiling = 16 * budget if limit is None else limit
    high, high_cost, tries = None, 0, 0
    while (high is None and low < ceiling) or (high is not None and high - low > 1):
        guess = min(low + max(1, int((budget - low_cost) / per_unit)), ceiling if high is None else high - 1)
        if high is not None and tries > INTERPOLATIONS:
            guess = (low + high) // 2
        found, tries = cost(guess), tries + 1
        if found > budget:
            high, high_cost = guess, found
        else:
            if found > low_cost:
                per_unit = (found - low_cost) / (guess - low)
            low, low_cost = guess, found
        if high is not None:
            per_unit = (high_cost - low_cost) / (high - low)
    if high is None and limit is None:
        raise ValueError(f"tokenizer must count more tokens for a longer text, got {low_cost} for {low} units")
    return low
