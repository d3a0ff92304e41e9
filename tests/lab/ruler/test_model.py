"""The shipped model answers needle questions, alone and in padded batches, with dense and with sparse attention."""

import dataclasses

import pytest
import torch

from baatt import BAAttConfig
from baatt.assets import shipped_model
from baatt.lab.ruler.cells import RULER_SAMPLER, Cell
from baatt.lab.ruler.model import RulerModel, shortened
from baatt.lab.ruler.tasks import TASKS, draw_samples
from baatt.models import MaskedDiffusionLM
from baatt.models.checkpoint import load_tokenizer


@pytest.fixture(scope="module")
def model():
    folder = shipped_model()
    return RulerModel(MaskedDiffusionLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(folder))


def draw(model, task, length, count, seed):
    return draw_samples(task, length, count, model.tokenizer, seed=seed)


def answer(model, samples, **changes):
    """All samples together."""
    return model.answer(Cell("any", 512)._replace(**changes), list(enumerate(samples)))


@pytest.mark.parametrize(("task", "count"), [("niah_multikey_2", 3), ("niah_multiquery", 2)])
def test_dense_answers_are_right(model, task, count):
    samples = draw(model, task, 512, count, seed=1)
    answers = [answer(model, [sample])[0] for sample in samples]
    assert [one.text for one in answers] == [sample.answer for sample in samples]
    assert all(one.exact and one.score == one.whole == 1 and one.seconds > 0 for one in answers)


def test_sparsity_zero_equals_dense(model):
    samples = draw(model, "niah_multikey_1", 320, 2, seed=2)
    dense = answer(model, samples)
    sparse = answer(model, samples, config=BAAttConfig(block_size=32, sparsity=0.0))
    assert [one.text for one in sparse] == [one.text for one in dense]
    assert all(one.exact for one in dense)


def test_a_padded_batch_gives_the_answers_of_single_prompts(model):
    samples = [draw(model, "niah_single_1", length, 1, seed=3)[0] for length in (320, 512)]
    alone = [answer(model, [sample])[0].text for sample in samples]
    together = [one.text for one in answer(model, samples)]
    assert together == alone == [sample.answer for sample in samples]


def test_a_value_that_is_missing_counts(model):
    (sample,) = draw(model, "niah_single_1", 320, 1, seed=4)
    (one,) = answer(model, [sample._replace(values=(sample.values[0], "not there"))])
    assert one.score == one.whole == 0.5


def test_the_sampler_has_room_for_rulers_answers():
    assert max(task.answer_tokens for task in TASKS.values()) == RULER_SAMPLER.gen_length


@pytest.mark.parametrize(
    ("tokens", "length"), [(1, 32), (30, 32), (32, 32), (50, 64), (120, 128), (128, 128), (999, 128)]
)
def test_no_more_blocks_than_an_answer_needs(tokens, length):
    sampler = shortened(RULER_SAMPLER, tokens)
    assert (sampler.gen_length, sampler.steps) == (length, length // 32 * 8)
    assert sampler.threshold == RULER_SAMPLER.threshold


def test_answers_are_cut_and_scored_as_the_task_says(model):
    (sample,) = draw(model, "niah_single_1", 320, 1, seed=4)
    (whole,) = answer(model, [sample])
    (cut,) = answer(model, [sample._replace(answer_tokens=3)])
    assert whole.text.startswith(cut.text)
    assert len(model.tokenizer.encode(cut.text).ids) == 3
    values = (sample.values[0], "not there")
    (part,) = answer(model, [sample._replace(values=values, metric="part")])
    assert (part.score, part.exact) == (1, True)


def test_stopping_early_changes_no_answer(model):
    samples = [draw(model, task, 320, 1, seed=6)[0] for task in ("niah_single_1", "niah_multivalue")]
    full = dataclasses.replace(RULER_SAMPLER, stop_at_eos=False)
    early, late = answer(model, samples), answer(model, samples, sampler=full)
    assert [one.text for one in late] == [one.text for one in early]
