"""Common words extraction is RULER's: template, example and repeats on fixed strings and counts."""

import json
import re
from collections import Counter
from random import Random

import pytest

from baatt.assets import shipped_model
from baatt.lab.ruler import cwe
from baatt.lab.ruler.sample import Request
from baatt.lab.ruler.sizing import token_counter
from baatt.lab.ruler.sources import Sources, load_words
from baatt.lab.ruler.tasks import TASKS, draw
from baatt.models.checkpoint import load_tokenizer

WORDS = [f"w{number}" for number in range(300)]


class Still:
    """A generator that takes the first ones and shuffles nothing."""

    def sample(self, words, size):
        return list(words[:size])

    def shuffle(self, entries):
        pass


def lists(prompt):
    """Words of every numbered list in the text, whose numbers must run from 1 on."""
    found = []
    for number, word in re.findall(r"(\d+)\. (\S+)", prompt):
        if number == "1":
            found.append([])
        assert int(number) == len(found[-1]) + 1
        found[-1].append(word)
    return found


def test_prompt_as_a_whole():
    shape = cwe.Shape(cwe.Repeats(2, 1), cwe.Repeats(1, 1), 10)
    sample = cwe.build(Still(), [*"abcdefghijk"], 11, shape)
    question = "\nQuestion: What are the 10 most common words in the above list?"
    prefix = " Answer: The top 10 words that appear most often in the list are:"
    start = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    ten = "1. a 2. b 3. c 4. d 5. e 6. f 7. g 8. h 9. i 10. j"
    twice = "11. a 12. b 13. c 14. d 15. e 16. f 17. g 18. h 19. i 20. j 21. k"
    assert sample.prompt == f"{start}{ten}{question}{prefix} {ten}\n{start}{ten} {twice}{question}"
    assert sample.answer_prefix == prefix
    assert sample.answer == f" {ten}"
    assert sample.values == tuple("abcdefghij")
    assert (sample.task, sample.answer_tokens, sample.metric, sample.size) == ("cwe", 120, "all", 11)


@pytest.mark.parametrize(
    ("shape", "main", "example"), [(cwe.LONG, (30, 3), (40, 10, 3)), (cwe.SHORT, (6, 1), (20, 3, 1))]
)
def test_counts(shape, main, example):
    """RULER's 30 and 3, 10 and 3 in an example of 40 words; below 4096 tokens 6 and 1, 3 and 1 in one of 20 words."""
    for seed in range(5):
        sample = cwe.build(Random(seed), WORDS, 70, shape)
        shown, answer, entries = lists(sample.prompt)
        assert Counter(Counter(entries).values()) == {main[0]: 10, main[1]: 60}
        assert Counter(Counter(shown).values()) == {example[1]: 10, example[2]: example[0] - 10}
        counts = Counter(entries)
        assert {word for word in counts if counts[word] == main[0]} == set(sample.values)
        counts = Counter(shown)
        assert {word for word in counts if counts[word] == example[1]} == set(answer)
        assert entries != sorted(entries)


def test_values_come_in_the_order_of_the_list():
    sample = cwe.build(Random(2), WORDS, 50)
    entries = lists(sample.prompt)[-1]
    places = [entries.index(value) for value in sample.values]
    assert places == sorted(places)
    assert lists(sample.answer)[0] == list(sample.values)


def test_without_an_example():
    assert len(lists(cwe.build(Random(0), WORDS, 12, example=False).prompt)) == 1


@pytest.mark.parametrize("size", [9, 301])
def test_sizes_without_words_are_refused(size):
    with pytest.raises(ValueError, match=rf"size must be in \[10, 300\] distinct words, got {size}"):
        cwe.build(Random(0), WORDS, size)


def by_word(text):
    return len(text.split())


def request(length, count=by_word, sources=Sources()):  # noqa: B008
    return Request("cwe", 1, length, 0, sources, token_counter(count))


def test_the_form_changes_at_4096_tokens():
    assert cwe.shape_of(request(4095)) == cwe.SHORT
    assert cwe.shape_of(request(4096)) == cwe.LONG
    assert cwe.shape_of(request(131072)) == cwe.LONG


def test_the_form_is_short_where_the_long_one_does_not_fit():
    """The shipped tokenizer takes one token a digit: 390 entries and the example are more than 4096 tokens."""
    tokenizer = load_tokenizer(shipped_model())
    shapes = {length: cwe.shape_of(request(length, tokenizer)) for length in (2048, 4096, 8192)}
    assert shapes == {2048: cwe.SHORT, 4096: cwe.SHORT, 8192: cwe.LONG}


def test_held_out_words_are_followed_by_all():
    """As RULER changes to another list for all words when wonderwords runs out."""
    heldout, every = set(load_words("heldout").all), set(load_words("full").all)
    recipe = cwe.recipe(request(131072))
    few, many = (set(lists(recipe.build(size).prompt)[-1]) for size in (len(heldout), len(heldout) + 1))
    assert few == heldout
    assert many <= every
    assert len(many & heldout) < 400
    assert recipe.limit == len(every)


def test_training_words_are_followed_by_nothing():
    recipe = cwe.recipe(request(131072, sources=Sources(words="train")))
    assert recipe.limit == len(load_words("train").all)
    assert set(lists(recipe.build(3000).prompt)[-1]) <= set(load_words("train").all)


def test_a_list_too_short_is_refused_with_what_gives_more(tmp_path):
    def hundredth(text):
        return len(text) // 100

    with pytest.raises(ValueError, match=r"cwe at 5000 tokens must have more than the 8039 distinct .*english_words"):
        draw(TASKS["cwe"], 5000, 0, hundredth, seed=1)
    path = tmp_path / "english_words.json"
    path.write_text(json.dumps({str(number): f"word{number}" for number in range(20_000)}))
    sample = draw(TASKS["cwe"], 5000, 0, hundredth, sources=Sources(english_words=path))
    assert 8039 < sample.size < 20_000
    assert all(value.startswith("word") for value in sample.values)
