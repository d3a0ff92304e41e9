"""The shipped model answers needle questions, alone and in padded batches, with dense and with sparse attention."""

import dataclasses
from pathlib import Path

import pytest
import torch

import baatt.assets
from baatt import BAAttConfig
from baatt.evaluation import retrieval
from baatt.evaluation.retrieval import SamplePool, answer, shortened
from baatt.lab.ruler.sources import Sources
from baatt.lab.ruler.tasks import TASKS, draw_samples
from baatt.models import MaskedDiffusionLM
from baatt.models.checkpoint import load_tokenizer

MODEL = Path(baatt.assets.__file__).parent / "needle-18m"


@pytest.fixture(scope="module")
def model():
    return MaskedDiffusionLM.from_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.mark.parametrize(("task", "count"), [("niah_multikey_2", 3), ("niah_multiquery", 2)])
def test_dense_answers_are_right(model, tokenizer, task, count):
    samples = draw_samples(task, 512, count, tokenizer, seed=1)
    done = []
    answers = answer(model, tokenizer, samples, progress=done.append)
    assert [one.sample for one in answers] == samples
    assert [one.text for one in answers] == [sample.answer for sample in samples]
    assert all(one.exact and one.share == 1 and one.seconds > 0 for one in answers)
    assert done == list(range(1, count + 1))


def test_sparsity_zero_equals_dense(model, tokenizer):
    samples = draw_samples("niah_multikey_1", 512, 2, tokenizer, seed=2)
    dense = answer(model, tokenizer, samples)
    sparse = answer(model, tokenizer, samples, sparse=BAAttConfig(block_size=32, sparsity=0.0, segment=256))
    assert [one.text for one in sparse] == [one.text for one in dense]
    assert all(one.exact for one in dense)


def test_a_padded_batch_gives_the_answers_of_single_prompts(model, tokenizer):
    samples = [draw_samples("niah_single_1", length, 1, tokenizer, seed=3)[0] for length in (320, 512)]
    alone = [one.text for one in answer(model, tokenizer, samples)]
    together = [one.text for one in answer(model, tokenizer, samples, batch_size=2)]
    assert together == alone == [sample.answer for sample in samples]


def test_a_wrong_answer_is_not_exact(model, tokenizer):
    (sample,) = draw_samples("niah_single_1", 320, 1, tokenizer, seed=4)
    (one,) = answer(model, tokenizer, [sample._replace(values=(sample.values[0], "not there"))])
    assert one.share == 0.5
    assert not one.exact


def test_the_sampler_has_room_for_rulers_answers():
    assert max(task.answer_tokens for task in TASKS.values()) == retrieval.RETRIEVAL_SAMPLER.gen_length


@pytest.mark.parametrize(
    ("tokens", "length"), [(1, 32), (30, 32), (32, 32), (50, 64), (120, 128), (128, 128), (999, 128)]
)
def test_no_more_blocks_than_an_answer_needs(tokens, length):
    sampler = shortened(retrieval.RETRIEVAL_SAMPLER, tokens)
    assert (sampler.gen_length, sampler.steps) == (length, length // 32 * 8)
    assert sampler.threshold == retrieval.RETRIEVAL_SAMPLER.threshold


def test_answers_are_cut_and_scored_as_the_task_says(model, tokenizer):
    (sample,) = draw_samples("niah_single_1", 320, 1, tokenizer, seed=4)
    (whole,) = answer(model, tokenizer, [sample])
    (cut,) = answer(model, tokenizer, [sample._replace(answer_tokens=3)])
    assert whole.text.startswith(cut.text)
    assert len(tokenizer.encode(cut.text).ids) == 3
    values = (sample.values[0], "not there")
    (part,) = answer(model, tokenizer, [sample._replace(values=values, metric="part")])
    assert (part.share, part.exact) == (1, True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pool_draws_the_same_samples(tokenizer, workers):
    with SamplePool([("niah_single_1", 320)], 3, tokenizer, seed=5, workers=workers) as pool:
        found = pool.samples("niah_single_1", 320)
        assert pool.samples("niah_single_1", 320) is found
    assert found == draw_samples("niah_single_1", 320, 3, tokenizer, seed=5)


def test_a_pool_hands_sources_and_reserve_on(tokenizer, tmp_path):
    (tmp_path / "essay.txt").write_text("Nothing else stands here. " * 400)
    dials = {"seed": 5, "sources": Sources(essay=tmp_path / "essay.txt"), "reserve": 40}
    with SamplePool([("niah_single_2", 320)], 2, tokenizer, workers=1, **dials) as pool:
        found = pool.samples("niah_single_2", 320)
    assert found == draw_samples("niah_single_2", 320, 2, tokenizer, **dials)
    assert all("Nothing else stands here. Nothing" in sample.prompt for sample in found)


def test_stopping_early_changes_no_answer(model, tokenizer):
    samples = [draw_samples(task, 512, 1, tokenizer, seed=6)[0] for task in ("niah_single_1", "niah_multivalue")]
    early = answer(model, tokenizer, samples, batch_size=2)
    full = dataclasses.replace(retrieval.RETRIEVAL_SAMPLER, stop_at_eos=False)
    assert [one.text for one in answer(model, tokenizer, samples, sampler=full, batch_size=2)] == [
        one.text for one in early
    ]
