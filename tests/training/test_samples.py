"""Training sequences: exact lengths, regions that mark the answers and nothing else, no held-out words; and masking."""

import collections
import functools
import itertools
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from baatt.assets import shipped_model
from baatt.lab.ruler import niah
from baatt.lab.ruler.sources import load_words

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "training"))


import samples as training_samples  # noqa: E402
from samples import CONTEXT, CURRICULUM, FIRST_ANSWER, MAX_ANSWERS, SOURCES, TAIL, TEXT, SampleMaker  # noqa: E402
from train import corrupt  # noqa: E402

NEEDLE = re.compile(r"One of the special magic \w+ for (\S+) is: (\S+)\.")
ASKED = re.compile(r" special magic \w+ for ([^?]*?) mentioned in the provided text (?:is|are)$")
STAGES = pytest.mark.parametrize("number", range(len(CURRICULUM)))
COUNT = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small data folder: the first part of the held-out text plays the training text."""
    folder = tmp_path_factory.mktemp("data")
    text = (shipped_model().parent / "heldout.txt").read_text()
    (folder / "train.txt").write_text(text[:120_000])
    shutil.copy(shipped_model() / "tokenizer.json", folder)
    return folder


@pytest.fixture
def maker(data):
    return keeping_maker(data)


def keeping_maker(data):
    """A `SampleMaker` that keeps the pieces of its last sequence."""
    maker = SampleMaker(data, seed=5)
    draw = maker.draw

    def kept_draw(stage, length):
        maker.last = draw(stage, length)
        return maker.last

    maker.draw = kept_draw
    return maker


@pytest.fixture(scope="module")
def sequences(data):
    """By the number of a stage: tokens, regions, source and pieces of some sequences, drawn once for all tests."""

    @functools.cache
    def drawn(number):
        maker, stage, found = keeping_maker(data), CURRICULUM[number], []
        for _ in range(COUNT):
            length = maker.random.choice(stage.lengths)
            tokens, regions, source = maker.sequence(stage, length)
            assert tokens.shape == regions.shape == (length,)
            assert SOURCES[source] == maker.last[1]
            found.append((tokens, regions, SOURCES[source], maker.last[0]))
        return found, maker

    return drawn


def tracked(context, asked):
    """The names that a value is handed on to, in their order."""
    assigned = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", context))
    names = [re.findall(r"assigned the value (\d+) in the text above", asked)[-1]]
    while following := [name for name, given in assigned.items() if given == names[-1]]:
        names += following
    return f" {' '.join(names[1:])}"


def most_common(context, asked):
    """The ten most common words of the last list, as they first appear."""
    entries = re.findall(r"\d+\. ([a-z-]+)", context.split("Memorize the ones")[-1].split("\nQuestion")[0])
    counts = collections.Counter(entries)
    least = sorted(counts.values())[-int(re.findall(r"What are the (\d+) most common", asked)[-1])]
    common = [word for word in dict.fromkeys(entries) if counts[word] >= least]
    return " " + " ".join(f"{number}. {word}" for number, word in enumerate(common, 1))


def most_frequent(context, asked):
    """The three most frequent coded words."""
    counts = collections.Counter(re.findall(r"\b[a-z]{6}\b", context.split("coded words. ")[1].split("\nQuestion")[0]))
    return f" {', '.join(word for word, _ in counts.most_common(3))}."


FROM_CONTEXT = {"vt": tracked, "cwe": most_common, "fwe": most_frequent}


@STAGES
def test_regions_of_answers_hold_the_answers(sequences, number):
    drawn, maker = sequences(number)
    for tokens, regions, _, pieces in drawn:
        answers = [text for text, region in pieces if region != CONTEXT]
        assert [region for _, region in pieces if region != CONTEXT] == [FIRST_ANSWER + n for n in range(len(answers))]
        assert 1 <= len(answers) <= MAX_ANSWERS
        for answer_number, answer in enumerate(answers):
            (places,) = np.nonzero(regions == FIRST_ANSWER + answer_number)
            assert (np.diff(places) == 1).all()
            ids = tokens[places].tolist()
            if answer_number == len(answers) - 1:
                assert ids.pop() == maker.end  # the end of the text belongs to the last answer
            assert maker.tokenizer.decode(ids, skip_special_tokens=False) == answer
        assert regions.max() == FIRST_ANSWER + len(answers) - 1
        assert (tokens[regions == TAIL] == maker.end).all()
        assert (np.diff((regions == TAIL).astype(int)) >= 0).all()
        whole = maker.tokenizer.decode([token for token in tokens.tolist() if token != maker.end])
        assert whole == "".join(text for text, _ in pieces)


@STAGES
def test_answers_are_what_the_context_says(sequences, number):
    """Checked from the text alone: the values of the keys asked for, by key and then by place."""
    for _, _, source, pieces in sequences(number)[0]:
        if source == "pairs":
            values = dict(re.findall(r"(\S+) is: (\S+)\.\n", pieces[0][0]))
            for (asked, _), (answer, region) in itertools.pairwise(pieces):
                if region >= FIRST_ANSWER:
                    key = asked.split("\n")[-1].removesuffix(" is")
                    assert answer == f" {values[key]}."
            continue
        if source in FROM_CONTEXT:
            for (asked, _), (answer, region) in itertools.pairwise(pieces):
                if region >= FIRST_ANSWER:
                    assert answer == FROM_CONTEXT[source](pieces[0][0], asked)
            continue
        needles = NEEDLE.findall(pieces[0][0])
        for (asked, _), (answer, region) in itertools.pairwise(pieces):
            if region < FIRST_ANSWER:
                continue
            match = ASKED.search(asked)
            assert match is not None
            keys = re.split(r", and |, ", match[1])
            assert answer == f" {niah.join_list([value for key in keys for name, value in needles if name == key])}."


@STAGES
def test_text_regions_are_running_text_only(sequences, number):
    """No token that may be hidden as text touches a needle, the instruction or the question."""
    text_tokens = 0
    drawn, maker = sequences(number)
    for _, regions, _, pieces in drawn:
        text = pieces[0][0]
        encoding = maker.tokenizer.encode(text)
        assert (regions[len(encoding.ids) :] != TEXT).all()
        forbidden = np.zeros(len(text), bool)
        forbidden[: text.index("\n")] = True
        forbidden[text.rindex("\n") :] = True
        for needle in NEEDLE.finditer(text):
            forbidden[needle.start() : needle.end()] = True
        for (start, end), region in zip(encoding.offsets, regions, strict=False):
            if region == TEXT:
                text_tokens += 1
                assert not forbidden[start:end].any()
        assert niah.NOISE_LINE[:12] not in text or not (regions == TEXT).any()
    kind = CURRICULUM[number].kind
    if kind != "all":  # of all tasks, few sequences may have none of running text
        assert (text_tokens > 0) == (kind in ("document", "ruler"))


@pytest.mark.parametrize("number", [3, 7])
def test_keys_are_training_words(sequences, number):
    heldout = load_words("heldout")
    reserved = {*heldout.nouns, *heldout.adjectives}
    for _, _, _, pieces in sequences(number)[0]:
        keys = re.findall(r"(?:for |^)([a-z]+)-([a-z]+) is: ", pieces[0][0], re.MULTILINE)
        assert reserved.isdisjoint(word for key in keys for word in key)


def test_batches(maker, monkeypatch):
    monkeypatch.setattr(training_samples, "TOKENS_PER_BATCH", 4096)
    for number in (4, 5, 6, 8):
        batch = maker.batch(number)
        length = batch.tokens.shape[1]
        assert length in CURRICULUM[number].lengths
        assert batch.tokens.shape == batch.regions.shape == (4096 // length, length)
        assert batch.source.shape == (4096 // length,)
        assert (batch.tokens.dtype, batch.regions.dtype, batch.source.dtype) == (np.int32, np.uint8, np.uint8)
        assert batch.stage == number


def test_batches_of_shorter_rows_take_about_the_time_of_one_of_the_longest(maker, monkeypatch):
    monkeypatch.setattr(training_samples, "TOKENS_PER_BATCH", 8192)
    monkeypatch.setattr(training_samples, "EVEN_LENGTH", 1024)
    whole = training_samples.step_time(4096)
    for _ in range(12):
        rows, length = maker.batch(7, 4096, longest=4096).tokens.shape
        assert rows * training_samples.step_time(length) <= whole
        assert rows == 8192 // length or (rows + 1) * training_samples.step_time(length) > whole
    assert maker.batch(4, 100, longest=4096).tokens.shape[0] >= 1
    assert maker.batch(3, 4096, longest=4096).tokens.shape == (CURRICULUM[3].rows // 2, 640)


def test_batches_are_fixed_by_the_seed(data, monkeypatch):
    monkeypatch.setattr(training_samples, "TOKENS_PER_BATCH", 2048)
    first, second, other = (SampleMaker(data, seed).batch(5) for seed in (1, 1, 2))
    assert np.array_equal(first.tokens, second.tokens)
    assert np.array_equal(first.regions, second.regions)
    assert first.tokens.shape != other.tokens.shape or not np.array_equal(first.tokens, other.tokens)


MASK = 1
ROWS, LENGTH = 400, 120


@pytest.fixture(scope="module")
def corrupted():
    """Random rows with context, text, three answers and a tail, and what `corrupt` makes of them."""
    torch.manual_seed(0)
    layout = [CONTEXT] * 10 + [TEXT] * 40 + [CONTEXT] * 10
    for answer in range(3):
        layout += [FIRST_ANSWER + answer] * 10 + [CONTEXT] * 5
    layout = layout[:-5] + [TAIL] * 20
    regions = torch.tensor(layout, dtype=torch.uint8).repeat(ROWS, 1)
    assert regions.shape == (ROWS, LENGTH)
    tokens = torch.randint(2, 4096, (ROWS, LENGTH))
    return tokens, regions, corrupt(tokens, regions, MASK)


def test_only_allowed_tokens_are_hidden(corrupted):
    tokens, regions, result = corrupted
    hidden = result.inputs == MASK
    assert torch.equal(result.inputs[~hidden], tokens[~hidden])
    assert not hidden[regions == CONTEXT].any()
    assert torch.equal(hidden & (regions >= FIRST_ANSWER), result.answer)
    assert torch.equal(hidden & (regions == TEXT), result.text)
    assert not (result.tail & ~(hidden & (regions == TAIL))).any()
    assert 0.05 < result.text[regions == TEXT].float().mean() < 0.075
    assert 0.08 < result.tail.sum() / (hidden & (regions == TAIL)).sum() < 0.17


def test_answers_are_hidden_whole_or_scattered_or_from_a_place_on(corrupted):
    _, regions, result = corrupted
    answers = result.answer[regions >= FIRST_ANSWER].view(ROWS, -1)
    assert answers[result.whole].all()
    assert 0.35 < result.whole.float().mean() < 0.55
    rest = answers[~result.whole].int().view(-1, 3, 10)  # three answers of ten tokens
    suffix = (rest.diff(dim=2) >= 0).all(dim=2).all(dim=1)
    assert 0.55 < suffix.float().mean() < 0.9
    begins = rest[suffix].sum(dim=2)
    assert begins.max() == 10
    assert (begins[:, 0] != begins[:, 1]).any()
    assert rest[~suffix].float().mean(dim=(1, 2)).std() > 0.2


def test_next_is_the_first_hidden_token_of_an_answer_that_begins_to_be_known(corrupted):
    _, regions, result = corrupted
    inside = regions >= FIRST_ANSWER
    following = result.next[inside].view(ROWS, 3, 10)
    hidden = result.answer[inside].view(ROWS, 3, 10)
    assert not following[result.whole].any()
    assert not result.next[~inside].any()
    rows = following.any(dim=(1, 2))
    assert (following[rows].sum(dim=2) == 1).all()
    assert torch.equal(following[rows].int().argmax(dim=2), hidden[rows].int().argmax(dim=2))


def test_tokens_count_less_far_behind_the_first_hidden_one_and_in_rows_that_hide_many(corrupted):
    _, regions, result = corrupted
    inside = regions >= FIRST_ANSWER
    weight = result.weight[inside].view(ROWS, 3, 10)
    hidden = result.answer[inside].view(ROWS, 3, 10)
    torch.testing.assert_close(weight[result.whole][:, :, 0], torch.full_like(weight[result.whole][:, :, 0], 30**-0.5))
    torch.testing.assert_close(weight[result.whole][:, :, 8], weight[result.whole][:, :, 0] / 2)
    rows = result.next.any(dim=1)
    at_first = weight[rows].gather(2, hidden[rows].int().argmax(dim=2, keepdim=True))[..., 0]
    torch.testing.assert_close(at_first, hidden[rows].sum(dim=(1, 2))[:, None].float().rsqrt().expand(-1, 3))
