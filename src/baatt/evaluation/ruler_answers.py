"""How a model answers RULER's samples, and what an answer is kept as.

In: a model, its tokenizer and chat template, a `RulerSetup`, numbered samples of a cell (task, length, dials). Out: a
`RulerAnswer` each, and the key it is kept by, which names everything it depends on. Knows nothing of stores, processes
and tables.
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from baatt import __version__
from baatt.config import Policy
from baatt.evaluation.ablation import Cell
from baatt.evaluation.chat import ChatTemplates
from baatt.evaluation.lm_eval_requests import Generation
from baatt.evaluation.retrieval import shortened
from baatt.integrations.enable import enable
from baatt.lab.answers import request_key
from baatt.lab.prompts import end_tokens, pad_left
from baatt.lab.ruler.sample import RulerSample
from baatt.lab.ruler.scoring import METRICS, WHOLE_METRICS
from baatt.lab.ruler.sources import Sources
from baatt.lab.ruler.tasks import draw, find_task
from baatt.models.llada import MaskedDiffusionLM
from baatt.sampling import SamplerConfig, generate

#: Prompt of the first evaluation of every setting, which is not timed: long enough for several blocks.
WARM_UP_TOKENS = 512
#: A question as RULER's, and room for tokens that fall otherwise where template and prompt meet.
PROBE, PROBE_PREFIX, SLACK = "What is the special magic number mentioned in the provided text?", " Answer:", 4


class RulerAnswer(NamedTuple):
    """One answered sample, as it is kept.

    setting: dials and dense layers of its cell, {} for dense attention. values: references. score: of RULER's metric, 0
    to 1; whole: the same where only whole words count. seconds: of its batch, by the number of prompts in it. tokens:
    positions that were filled. evaluations: of the model, for its batch. sparsity: share of block pairs skipped.
    commit, device: of the run that asked.
    """

    task: str
    length: int
    number: int
    setting: dict[str, Any]
    text: str
    values: list[str]
    score: float
    whole: float
    seconds: float
    tokens: int
    evaluations: int
    sparsity: float
    commit: str | None
    device: str


@dataclass(frozen=True)
class RulerSetup:
    """What the answers of a run depend on beside cell and number.

    Args:
        files: checksums of the model's files, of `checksums`.
        dtype: of the weights.
        seed: of the samples.
        sources: what they are made from.
        sampler: of the answers; of its `gen_length` a task uses what it lets a model write.
        policy: what stays dense in a sparse cell.
        impl: as `ba_attention`.
        batch_size: prompts answered together.
        chat: put the prompt through the model's chat template; the answer prefix begins the answer.
    """

    files: Mapping[str, str]
    dtype: str
    seed: int
    sources: Sources
    sampler: SamplerConfig
    policy: Policy
    impl: str = "auto"
    batch_size: int = 1
    chat: bool = False

    def keys(self, cell: Cell, numbers: Iterable[int]) -> dict[int, str]:
        """The name of the answer to each sample of a cell.

        What a dense answer does not depend on is left out: other dials find the dense answers that are there.
        """
        sparse = None if cell.config is None else [cell.dials, dataclasses.asdict(self.policy), self.impl]
        common = request_key(
            "ruler", __version__, dict(self.files), self.dtype, self.seed, source_digest(cell.task, self.sources),
            dataclasses.asdict(self.sampler), self.batch_size, self.chat, cell.task, cell.length, sparse,
        )  # fmt: skip
        return {number: f"{common}-{number}" for number in numbers}


class Respondent:
    """A model that answers.

    Args:
        templates: of the model's folder; used if the setup says so.
        stamp: `commit` and `device` of the answers.

    Raises:
        ValueError: a chat template is asked for, and the folder has none.
    """

    def __init__(
        self,
        model: MaskedDiffusionLM,
        tokenizer: Tokenizer,
        setup: RulerSetup,
        templates: ChatTemplates,
        stamp: Mapping[str, Any],
    ) -> None:
        tokenizer.no_truncation()  # a length stored in tokenizer.json must not cut a prompt unseen
        tokenizer.no_padding()
        self.model, self.tokenizer, self.setup = model, tokenizer, setup
        self._templates, self._stamp = templates, dict(stamp)
        self._ends = end_tokens(tokenizer, model.config.eos_token_id, templates.special_tokens)
        self.reserve = self._template_tokens() if setup.chat else 0

    def ids(self, prompt: str, prefix: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt and the beginning of its answer; a template that begins the text gets no second one."""
        text = prompt + prefix
        if chat:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": prefix}]
            text = self._templates.render(turns, continue_final_message=True)
        begins = self._templates.special_tokens.get("bos_token")
        special = not (begins and text.startswith(begins))
        return list(self.tokenizer.encode(text, add_special_tokens=special).ids)

    def check(self, task: str, length: int) -> None:
        """Draw one sample, so that a length that is too small or too large for a task is refused at once.

        Raises:
            ValueError: such a length, or a chat template that leaves no room.
        """
        setup = self.setup
        (sample,) = draw_numbers(task, length, (0,), self.tokenizer, setup.seed, setup.sources, self.reserve).values()
        tokens = len(self.ids(sample.prompt, sample.answer_prefix, chat=setup.chat)) + sample.answer_tokens
        if tokens > length:
            raise ValueError(f"{task} with its chat template must have at most {length} tokens, got {tokens}")

    def warm_up(self, cell: Cell) -> None:
        """Evaluate the model once as in a cell: what cannot run fails now, and no answer's time has a kernel's build.

        Raises:
            RuntimeError: an `impl` that cannot do this model's work.
            ValueError: a policy that does not fit the model.
        """
        block = self.setup.sampler.block_length
        prompt = torch.zeros(1, WARM_UP_TOKENS, dtype=torch.int64, device=self._device)
        sampler = dataclasses.replace(self.setup.sampler, gen_length=block, steps=1)
        with enable(self.model, cell.sparse, self.setup.policy, impl=self.setup.impl) as handle:
            generate(self.model, prompt, None, sampler, on_step=handle.at_step)

    def answer(self, cell: Cell, batch: Sequence[tuple[int, RulerSample]]) -> list[RulerAnswer]:
        """Answer numbered samples of a cell together."""
        setup = self.setup
        rows = [self.ids(sample.prompt, sample.answer_prefix, chat=setup.chat) for _, sample in batch]
        ids, mask = pad_left(rows, self.model.config.pad_token_id or 0)
        sampler = shortened(setup.sampler, max(sample.answer_tokens for _, sample in batch))
        started = time.perf_counter()
        with enable(self.model, cell.sparse, setup.policy, impl=setup.impl) as handle:
            result = generate(
                self.model, ids.to(self._device), mask.to(self._device), sampler, on_step=handle.at_step
            )  # fmt: skip
        seconds = (time.perf_counter() - started) / len(batch)
        filled = (result.unmasked_at >= 0).sum(dim=1).tolist()
        setting = {} if cell.config is None else cell.dials | {"dense_layers": list(setup.policy.dense_layers)}
        answers = []
        for (number, sample), tokens, positions in zip(batch, result.tokens.tolist(), filled, strict=True):
            text = Generation(sample.answer_tokens, (), 0.0).cut(tokens, self.tokenizer, self._ends)
            score, whole = (metrics[sample.metric](text, sample.values) for metrics in (METRICS, WHOLE_METRICS))
            answers.append(RulerAnswer(
                cell.task, cell.length, number, setting, text, list(sample.values), score, whole, seconds, positions,
                result.steps, handle.sparsity, **self._stamp,
            ))  # fmt: skip
        return answers

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _template_tokens(self) -> int:
        with_template, plain = (len(self.ids(PROBE, PROBE_PREFIX, chat=chat)) for chat in (True, False))
        return max(0, with_template - plain) + SLACK


def checksums(folder: Path) -> dict[str, str]:
    """The beginning of the SHA-256 of every file of a folder that an answer depends on.

    Of contents, not of times: a copy of the folder on another machine has the same answers.
    """
    found = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in {".json", ".safetensors", ".jinja"}:
            with file.open("rb") as data:
                found[file.name] = hashlib.file_digest(data, "sha256").hexdigest()[:16]
    return found


@functools.cache
def source_digest(task: str, sources: Sources) -> str:
    """A name for everything in the sources that a task is made from: their contents, not their places.

    Raises:
        ValueError: as `check_sources`.
    """
    needs = find_task(task).needs
    if needs:
        return request_key(sources.questions(needs))
    return request_key(
        sources.pool, sources.word_lists(), sources.essay_words(), sources.starts_anywhere, sources.sentences
    )  # fmt: skip


def draw_numbers(
    task: str,
    length: int,
    numbers: Sequence[int],
    tokenizer: Tokenizer,
    seed: int,
    sources: Sources,
    reserve: int,
) -> dict[int, RulerSample]:
    """Samples by their numbers.

    Raises:
        ValueError: as `draw`.
    """
    found = find_task(task)
    return {
        number: draw(found, length, number, tokenizer, seed=seed, sources=sources, reserve=reserve)
        for number in numbers
    }
