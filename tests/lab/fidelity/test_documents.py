"""Documents of fidelity runs: their length, where facts and questions stand, and what is masked."""

from itertools import chain

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from baatt.assets import held_out_text, shipped_model
from baatt.lab.fidelity.documents import DIGITS, Masks, make_documents
from baatt.models.checkpoint import load_tokenizer

NEEDLES = 5
#: A part of what is shipped, all of which would be made into tokens again and again.
TEXT = held_out_text()[:40_000]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(shipped_model())


def made(tokenizer, length=1024, masks=None, **options):
    options = {"count": 2, "needles": NEEDLES, "seed": 0, **options}
    return make_documents(tokenizer, TEXT, length, masks=masks, **options)


@pytest.mark.parametrize("masks", [None, Masks(1, 0.2)])
def test_facts_stand_in_the_first_half_and_questions_apart_in_the_second(tokenizer, masks):
    one, other = documents = made(tokenizer, masks=masks)
    assert one.tokens[:200] != other.tokens[:200]
    for document in documents:
        assert len(document.tokens) == len(document.inputs) == 1024
        assert len(document.answers) == NEEDLES
        for number, answer in enumerate(document.answers):
            assert answer[0] > 512 + number * 512 // NEEDLES - 20
            assert number == 0 or answer[0] - document.answers[number - 1][-1] > 10
            ids = [document.tokens[place] for place in answer]
            assert len(tokenizer.decode(ids)) == len(ids) == DIGITS
            copies = [at for at in range(1024) if document.tokens[at : at + DIGITS] == ids]
            assert copies[1:] == answer[:1]
            assert copies[0] + DIGITS <= 512
        assert {*chain(*document.answers)} <= set(document.targets)


def test_what_is_predicted(tokenizer):
    (causal,) = made(tokenizer, count=1)
    assert causal.inputs == causal.tokens
    assert causal.targets == [*range(512, 1024)]
    (masked,) = made(tokenizer, count=1, masks=Masks(1, 0.2))
    assert [place for place, token in enumerate(masked.inputs) if token == 1] == masked.targets
    prose = set(masked.targets) - {*chain(*masked.answers)}
    lines = [tokenizer.decode(masked.inputs[place - 9 : place]) for place, *_ in masked.answers]
    assert all(" number of " in line and line.endswith(": ") for line in lines)  # what is asked can be read
    assert 0.15 < len(prose) / 1024 < 0.2
    assert masked == made(tokenizer, count=1, masks=Masks(1, 0.2))[0] != made(tokenizer, seed=1, count=1)[0]


def test_special_tokens_stand_around_and_are_not_predicted(tokenizer):
    special = load_tokenizer(shipped_model())
    special.post_processor = processors.TemplateProcessing(
        single="<|mask|> $A <|endoftext|>", special_tokens=[("<|mask|>", 1), ("<|endoftext|>", 0)]
    )
    special.enable_truncation(100)
    (document,) = made(special, count=1)
    assert (document.tokens[0], document.tokens[-1], len(document.tokens)) == (1, 0, 1024)
    assert document.targets[-1] == 1022


def test_a_tokenizer_with_tokens_of_several_digits():
    pieces = [*set(TEXT), *"0123456789\n", *(f"{n:02d}" for n in range(100))]
    words = {piece: number for number, piece in enumerate(dict.fromkeys(["?", *pieces]))}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="?", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    (document,) = made(tokenizer, count=1, length=2048)
    for answer in document.answers:
        assert len(answer) == 4  # two digits a token, and one


def test_what_documents_need(tokenizer):
    with pytest.raises(ValueError, match=r"the text must have 1000 x 1024 tokens for documents that differ, got \d+"):
        made(tokenizer, count=1000)
    with pytest.raises(ValueError, match="--lengths must have room for 5 facts and their questions, got 128 tokens"):
        made(tokenizer, length=128)
    assert made(tokenizer, length=64, needles=0)[0].answers == []
