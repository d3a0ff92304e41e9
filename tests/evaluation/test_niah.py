"""The needle tasks are RULER's: templates on fixed strings, needles, places, sizes, and no words seen in training."""

import re
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

import baatt.assets
from baatt.evaluation.retrieval import draw_samples
from baatt.evaluation.ruler import niah
from baatt.evaluation.ruler.words import load_heldout_essay, load_words
from baatt.models.checkpoint import load_tokenizer

MODEL = Path(baatt.assets.__file__).parent / "needle-18m"
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
    return load_tokenizer(MODEL)


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
        places.append(needle.start() / (len(context) - len(needle[0])))
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


@TASKS
def test_fit_is_the_largest_that_stays_within_the_budget(name, tokenizer):
    words, essay = load_words("heldout"), load_heldout_essay()
    for length in (600, 1024):

        def tokens(sample):
            return len(tokenizer.encode(sample.prompt + sample.answer_prefix).ids) + niah.ANSWER_TOKENS

        task = niah.NIAH_TASKS[name]
        sample = niah.fit(task, Random(length), words, essay, tokenizer, length)
        assert tokens(sample) <= length
        assert sample == niah.build(task, Random(length), words, essay, sample.haystack_size)
        larger = niah.build(task, Random(length), words, essay, sample.haystack_size + 1)
        assert tokens(larger) > length


@TASKS
def test_answer_fits_into_its_budget(name, tokenizer):
    """Of the four numbers of a multi-value task too, in the format the model is trained on."""
    for sample in draw_samples(name, 600, 3, tokenizer):
        assert len(tokenizer.encode(sample.answer).ids) <= niah.ANSWER_TOKENS


def test_fit_refuses_a_length_that_holds_nothing(tokenizer):
    task = niah.NIAH_TASKS["niah_multivalue"]
    with pytest.raises(ValueError, match=r"max_length must hold the smallest niah_multivalue sample .*, got 150"):
        niah.fit(task, Random(0), POOL, ESSAY, tokenizer, 150)


def test_an_essay_task_without_text_is_refused():
    with pytest.raises(ValueError, match="essay must hold words"):
        niah.build(niah.NIAH_TASKS["niah_single_2"], Random(0), POOL, [], 10)


@TASKS
def test_samples_are_fixed_by_the_seed(name, tokenizer):
    first = draw_samples(name, 512, 3, tokenizer, seed=7)
    assert draw_samples(name, 512, 3, tokenizer, seed=7) == first
    assert draw_samples(name, 512, 2, tokenizer, seed=7) == first[:2]
    assert len({sample.prompt for sample in first}) == 3
    assert draw_samples(name, 512, 3, tokenizer, seed=8) != first


def test_an_unknown_task_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"task must be one of \['niah_single_1', .*got 'vt'"):
        draw_samples("vt", 512, 1, tokenizer)


def test_heldout_words_are_not_training_words():
    train, heldout = load_words("train"), load_words("heldout")
    assert set(train.nouns + train.adjectives).isdisjoint(heldout.nouns + heldout.adjectives)
    assert all(len(words) > 100 for words in (*train, *heldout))
    with pytest.raises(ValueError, match="split must be"):
        load_words("test")


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_1", "niah_multikey_2", "niah_multivalue"])
def test_samples_use_heldout_words(name, tokenizer):
    heldout = load_words("heldout")
    for sample in draw_samples(name, 700, 3, tokenizer):
        for _, key, _ in NEEDLE.findall(sample.prompt):
            adjective, noun = key.split("-")
            assert adjective in heldout.adjectives
            assert noun in heldout.nouns


def test_samples_use_heldout_text(tokenizer):
    essay = " ".join(load_heldout_essay())
    essay += " " + essay[:10000]  # a sample may run over the end
    for sample in draw_samples("niah_single_2", 700, 5, tokenizer):
        context = sample.prompt.split("\n")[1]
        pieces = NEEDLE.split(context)[:: NEEDLE.groups + 1]
        assert all(piece.strip() in essay for piece in pieces)
        assert sum(map(len, pieces)) > 1000
