"""Asks a model RULER's questions and scores the answers: samples in, `Answer` out.

Prompts of unequal length are padded on the left and answered in batches by the sampler, with dense or sparse attention.
The shipped model's accuracy, the demo and the ablations all come through `answer`.
"""

import dataclasses
import functools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

from tokenizers import Tokenizer

from baatt.config import BAAttConfig, Policy
from baatt.integrations.enable import enable
from baatt.lab.prompts import answer_text, pad_left
from baatt.lab.ruler.sample import RulerSample
from baatt.lab.ruler.scoring import METRICS
from baatt.lab.ruler.sources import Sources
from baatt.lab.ruler.tasks import draw_samples
from baatt.models.llada import MaskedDiffusionLM
from baatt.sampling import SamplerConfig, generate

# A token is filled as soon as the model is this sure of it; blocks of 32 as in Fast-dLLM.
RETRIEVAL_SAMPLER = SamplerConfig(steps=32, gen_length=128, block_length=32, threshold=0.9, stop_at_eos=True)


class Answer(NamedTuple):
    """One answered sample. share: its score by the task's metric, for most tasks the share of the expected values that
    were found; exact: share == 1."""

    sample: RulerSample
    text: str
    share: float
    exact: bool
    seconds: float


class SamplePool:
    """Draws samples in worker processes ahead of their use, as `draw_samples` would: about 40 ms each at 4096 tokens.

    Args:
        places: (task, length) in the order of use.
        workers: processes; 0 draws in this one, when asked.
        sources, reserve: as `draw_samples`.
    """

    def __init__(
        self,
        places: Sequence[tuple[str, int]],
        count: int,
        tokenizer: Tokenizer,
        *,
        seed: int,
        workers: int,
        sources: Sources = Sources(),  # noqa: B008  (frozen)
        reserve: int = 0,
    ) -> None:
        self._drawn: dict[tuple[str, int], list[RulerSample]] = {}
        draw_part = functools.partial(draw_samples, tokenizer=tokenizer, seed=seed, sources=sources, reserve=reserve)
        self._now = functools.partial(draw_part, count=count)
        self._jobs: dict[tuple[str, int], list[Future[list[RulerSample]]]] = {}
        self._pool: ProcessPoolExecutor | None = None
        if workers == 0:
            return
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        part = -(-count // workers)
        for task, length in dict.fromkeys(places):
            self._jobs[task, length] = [
                self._pool.submit(draw_part, task, length, count=min(part, count - first), first=first)
                for first in range(0, count, part)
            ]

    def __enter__(self) -> "SamplePool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def samples(self, task: str, length: int) -> list[RulerSample]:
        """All samples of one place, waiting for them if need be."""
        place = task, length
        if place not in self._drawn:
            jobs = self._jobs.get(place)
            self._drawn[place] = self._now(task, length) if jobs is None else [x for job in jobs for x in job.result()]
        return self._drawn[place]


def answer(
    model: MaskedDiffusionLM,
    tokenizer: Tokenizer,
    samples: Sequence[RulerSample],
    *,
    sampler: SamplerConfig = RETRIEVAL_SAMPLER,
    sparse: BAAttConfig | None = None,
    policy: Policy = Policy(),  # noqa: B008  (frozen)
    impl: str = "auto",
    batch_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answers in the order of the samples; `progress` is told how many are done. The rest as `generate` and `enable`.

    Of the sampler's `gen_length` as many blocks are generated as the tasks of a batch let a model write, with the same
    steps a block; an answer is cut at its own task's number of tokens.
    """
    device = next(model.parameters()).device
    pad = model.config.pad_token_id or 0
    answers: list[Answer] = []
    encoded = tokenizer.encode_batch([sample.prompt + sample.answer_prefix for sample in samples])
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        ids, mask = pad_left([row.ids for row in encoded[first : first + batch_size]], pad)
        started = time.perf_counter()
        short = shortened(sampler, max(one.answer_tokens for one in batch))
        with enable(model, sparse, policy, impl=impl) as handle:
            result = generate(model, ids.to(device), mask.to(device), short, on_step=handle.at_step)
        seconds = (time.perf_counter() - started) / len(batch)
        for sample, tokens in zip(batch, result.tokens.tolist(), strict=True):
            text = answer_text(tokenizer, tokens[: sample.answer_tokens], {model.config.eos_token_id})
            share = METRICS[sample.metric](text, sample.values)
            answers.append(Answer(sample, text, share, share == 1, seconds))
        if progress is not None:
            progress(len(answers))
    return answers


def shortened(sampler: SamplerConfig, tokens: int) -> SamplerConfig:
    """The sampler with no more blocks than `tokens` tokens need."""
    blocks = min(sampler.blocks, -(-tokens // sampler.block_length))
    return dataclasses.replace(
        sampler, gen_length=blocks * sampler.block_length, steps=blocks * sampler.steps_per_block
    )
