"""The needle tasks are RULER's: templates on fixed strings, needles, places, and no words seen in training."""

import re
from dataclasses import replace
from random import Random

import pytest

from baatt.assets import shipped_model
from baatt.lab.ruler import niah
from baatt.lab.ruler.sample import hide_lines
from baatt.lab.ruler.sources import WordPool, heldout_words, load_words
from baatt.lab.ruler.tasks import draw_samples
from baatt.models.checkpoint import load_tokenizer

NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")
PATTERNS = {
    "numbers": r"[1-9]\d{6}",
    "words": r"[a-z]+-[a-z]+",
    "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}
# task: haystack, key type, value type, keys, values per key, queries (RULER's synthetic.yaml)
RULER = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
}
POOL = load_words("train")
ESSAY = " ".join(f"This is sentence number {word} of the text." for word in "abcdefghijklmnopqrstuvwxyz").split()
TASKS = pytest.mark.parametrize("name", list(niah.NIAH_TASKS))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(shipped_model())


def build(name, seed=0, size=150, **changes):
    return niah.build(replace(niah.NIAH_TASKS[name], **changes), Random(seed), POOL, ESSAY, size)


def test_tasks_are_rulers():
    tasks = niah.NIAH_TASKS
    found = {
        t.name: (t.haystack, t.key_type, t.value_type, t.keys, t.values, max(t.queries, 1)) for t in tasks.values()
    }
    # RULER sets the keys of multiquery to 1 and takes max(keys, queries).
    found["niah_multiquery"] = (*found["niah_multiquery"][:3], 4, *found["niah_multiquery"][4:])
    assert found == RULER
    assert list(tasks) == list(RULER)


def test_plural_template():
    template, prefix = niah.question(niah.NIAH_TASKS["niah_multiquery"], ["quiet-river", "green-stone"], 2)
    assert template == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n{context}\n"
        "What are all the special magic numbers for quiet-river, and green-stone mentioned in the provided text?"
    )
    assert prefix == " The special magic numbers for quiet-river, and green-stone mentioned in the provided text are"


def test_singular_template():
    template, prefix = niah.question(niah.NIAH_TASKS["niah_single_3"], ["quiet-river"], 1)
    assert template == (
        "A special magic uuid is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the uuid afterwards.\n{context}\n"
        "What is the special magic uuid for quiet-river mentioned in the provided text?"
    )
    assert prefix == " The special magic uuid for quiet-river mentioned in the provided text is"


def test_the_singular_leaves_the_key_alone():
    """The key is filled in after the wording changed, as in RULER."""
    template, prefix = niah.question(niah.NIAH_TASKS["niah_single_1"], ["rare-Some-are all"], 1)
    assert "for rare-Some-are all mentioned" in template
    assert "for rare-Some-are all mentioned" in prefix


def test_needle_stays_plural():
    sentence = niah.needle_sentence(niah.NIAH_TASKS["niah_single_1"], niah.Needle("quiet-river", "1234567"))
    assert sentence == "One of the special magic numbers for quiet-river is: 1234567."


@pytest.mark.parametrize(
    ("items", "joined"), [(["a"], "a"), (["a", "b"], "a, and b"), (["a", "b", "c", "d"], "a, b, c, and d")]
)
def test_lists(items, joined):
    assert niah.join_list(items) == joined


def test_noise_prompt_as_a_whole():
    sample = build("niah_single_1", size=3)
    needle = NEEDLE.search(sample.prompt)
    assert needle is not None
    key, value = needle[2], needle[3]
    lines = sample.prompt.split("\n")
    assert lines[0].startswith("A special magic number is hidden")
    assert lines[-1] == f"What is the special magic number for {key} mentioned in the provided text?"
    assert sorted(lines[1:-1]) == sorted([niah.NOISE_LINE] * 3 + [needle[0]])
    assert niah.NOISE_LINE == (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    assert (sample.values, sample.answer) == ((value,), f" {value}.")
    assert sample.task == "niah_single_1"


@TASKS
@pytest.mark.parametrize("seed", range(5))
def test_needles_keys_and_values(name, seed):
    """As many needles as RULER has, of the right type, and every expected value once beside its key."""
    haystack, key_type, value_type, keys, values, queries = RULER[name]
    sample = build(name, seed)
    needles = NEEDLE.findall(sample.prompt)
    distractors = 150 if haystack == "needle" else 0
    assert len(needles) == keys * values + distractors
    for kind, key, value in needles:
        assert kind == value_type
        assert re.fullmatch(PATTERNS[key_type], key)
        assert re.fullmatch(PATTERNS[value_type], value)
    asked = re.search(r" for (.*) mentioned in the provided text\?$", sample.prompt)
    assert asked is not None
    asked_keys = re.split(r", and |, ", asked[1])
    assert len(asked_keys) == len(set(asked_keys)) == queries
    assert len(sample.values) == queries * values
    for number, value in enumerate(sample.values):
        assert (value_type, asked_keys[number // values], value) in needles


def test_values_come_by_query_and_then_by_place():
    """RULER's answers follow the queries; several values of one key are expected in the order of the text."""
    for seed in range(20):
        sample = build("niah_multivalue", seed)
        places = [sample.prompt.index(value) for value in sample.values]
        assert places == sorted(places)
        assert sample.answer == f" {', '.join(sample.values[:-1])}, and {sample.values[-1]}."
        both = build("niah_multiquery", seed, values=2)
        asked = re.split(r", and |, ", both.prompt.rsplit(" for ", 1)[1].split(" mentioned")[0])
        by_value = {value: key for _, key, value in NEEDLE.findall(both.prompt)}
        assert [by_value[value] for value in both.values] == [key for key in asked for _ in range(2)]
        for first, second in zip(both.values[::2], both.values[1::2], strict=True):
            assert both.prompt.index(first) < both.prompt.index(second)


def test_query_order_differs_from_the_text():
    """Otherwise copying the needles in order would pass."""
    orders = set()
    for seed in range(30):
        sample = build("niah_multiquery", seed)
        places = [sample.prompt.index(value) for value in sample.values]
        orders.add(tuple(sorted(range(4), key=places.__getitem__)))
    assert len(orders) > 10


def test_essay_is_kept_and_cut_only_between_sentences():
    for name in ("niah_single_2", "niah_multikey_1", "niah_multivalue"):
        context = build(name, size=len(ESSAY)).prompt.split("\n")[1]
        pieces = NEEDLE.sub("@", context).split("@")
        words = " ".join(pieces).split()
        assert sorted(words) == sorted(ESSAY)
        closed = [piece.strip() for piece in pieces if piece.strip()][:-1]  # the last one ends where the words do
        assert all(piece.endswith(".") for piece in closed)


def test_essay_depths_are_distinct_and_reach_everywhere():
    assert len(niah.DEPTHS) == len(set(niah.DEPTHS)) == 40
    assert (niah.DEPTHS[0], niah.DEPTHS[-1]) == (0, 100)
    places = []
    for seed in range(300):
        context = build("niah_single_2", seed, size=len(ESSAY)).prompt.split("\n")[1]
        needle = NEEDLE.search(context)
        assert needle is not None
        places.append((needle.start() - 1) / (len(context) - len(needle[0]) - 2))
    assert min(places) == 0
    assert max(places) == 1
    assert all(70 <= sum(low <= place < low + 1 / 3 for place in places) <= 130 for low in (0, 1 / 3, 2 / 3 + 0.01))


def test_needles_stand_on_lines_of_their_own_everywhere():
    places = []
    for seed in range(200):
        lines = build("niah_single_1", seed, size=50).prompt.split("\n")[1:-1]
        places += [number for number, line in enumerate(lines) if NEEDLE.fullmatch(line)]
    assert len(places) == 200
    assert min(places) < 5
    assert max(places) > 44


class Middle:
    """A generator whose sample is the middle of what it chooses from, to write down whole contexts."""

    def sample(self, choices, count):
        start = (len(choices) - count) // 2
        return list(choices)[start : start + count]


ONE = niah.NeedleTask("one", "essay")


def test_an_essay_as_a_whole():
    """First words, needles before the sentences at their depths, and RULER's doubled and outer spaces."""
    words = ["One", "two.", "Three!", "Four", "five?", "Six"]

    def context(size, depths, sentences):
        class Fixed:
            def sample(self, choices, count):
                assert tuple(choices) == niah.DEPTHS
                return depths

        return niah.fill_haystack(ONE, sentences, size, Fixed(), POOL, words)

    assert context(6, [51], ["N."]) == "One two. Three! N. Four five? Six"
    assert context(5, [67], ["N."]) == "One two. Three! N. Four five?"
    assert context(6, [51, 0], ["N.", "M."]) == " N. One two. Three! M. Four five? Six"
    assert context(6, [100], ["N."]) == "One two. Three! Four five? Six N. "
    assert context(6, [31, 28], ["N.", "M."]) == "One two. N.  M. Three! Four five? Six"
    # Repeated when it runs out: the last sentence ends where the words do.
    assert context(13, [0], ["N."]) == " N. One two. Three! Four five? Six One two. Three! Four five? Six One"


def test_an_essay_may_be_cut_by_another_rule():
    split = niah.build(ONE, Random(3), POOL, ["a", "b", "c"], 3, lambda text: text.split(" "))
    whole = niah.build(ONE, Random(3), POOL, ["a", "b", "c"], 3)
    assert re.sub(r"\s+", " ", NEEDLE.sub("", split.prompt)) == re.sub(r"\s+", " ", NEEDLE.sub("", whole.prompt))
    assert any(
        re.search(r"a One of .* b c", niah.build(ONE, Random(seed), POOL, ["a", "b", "c"], 3, str.split).prompt)
        for seed in range(20)
    )


def test_lines_as_a_whole():
    assert hide_lines(["a", "b", "c", "d"], ["N", "M"], Middle()) == [*"aNbMcd"]


def test_distractors_are_drawn_without_a_look_at_the_needles():
    """RULER draws them independently, so that with few words the key asked for comes up again."""
    pool = WordPool(("noun",), ("bad", "good"), ())
    sample = niah.build(niah.NIAH_TASKS["niah_multikey_2"], Random(0), pool, (), 20)
    keys = [key for _, key, _ in NEEDLE.findall(sample.prompt)]
    asked = re.findall(r"for (\S+) mentioned", sample.prompt)
    assert len(keys) == 21
    assert keys.count(asked[0]) > 1
    assert len(sample.values) == 1


@TASKS
def test_a_larger_haystack_keeps_needles_and_question(name):
    """Otherwise the search for the size would compare different samples."""
    small, large = build(name, 3, 50), build(name, 3, 90)
    assert sorted(small.values) == sorted(large.values)
    assert small.prompt.split("\n")[-1] == large.prompt.split("\n")[-1]
    assert small.answer_prefix == large.answer_prefix
    assert (small.size, large.size) == (50, 90)


def test_too_few_words_for_the_keys():
    with pytest.raises(ValueError, match="at least 4 adjective-noun pairs for as many keys, got 2"):
        niah.build(niah.NIAH_TASKS["niah_multikey_1"], Random(0), WordPool(("a",), ("b", "c"), ()), ESSAY, 9)


@TASKS
def test_answer_fits_into_its_budget(name, tokenizer):
    """Of the four numbers of a multi-value task too, in the format the model is trained on."""
    for sample in draw_samples(name, 600, 3, tokenizer):
        assert len(tokenizer.encode(sample.answer).ids) <= niah.ANSWER_TOKENS


def test_an_essay_task_without_text_is_refused():
    with pytest.raises(ValueError, match="essay must hold words"):
        niah.build(niah.NIAH_TASKS["niah_single_2"], Random(0), POOL, [], 10)


def test_heldout_words_are_not_training_words():
    train, heldout = load_words("train"), load_words("heldout")
    assert set(train.all).isdisjoint(heldout.all)
    assert all(len(words) > 100 for words in (*train, *heldout))


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_1", "niah_multikey_2", "niah_multivalue"])
def test_samples_use_heldout_words(name, tokenizer):
    heldout = load_words("heldout")
    for sample in draw_samples(name, 700, 3, tokenizer):
        for _, key, _ in NEEDLE.findall(sample.prompt):
            adjective, noun = key.split("-")
            assert adjective in heldout.adjectives
            assert noun in heldout.nouns


def test_samples_use_heldout_text(tokenizer):
    essay = " ".join(heldout_words())
    essay += " " + essay[:10000]  # a sample may run over the end
    for sample in draw_samples("niah_single_2", 700, 5, tokenizer):
        context = sample.prompt.split("\n")[1]
        pieces = NEEDLE.split(context)[:: NEEDLE.groups + 1]
        assert all(piece.strip() in essay for piece in pieces)
        assert not context.strip().startswith(essay[:30])
        assert sum(map(len, pieces)) > 1000
