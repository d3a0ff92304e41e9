"""How a model answers RULER's samples, and what an answer is kept as.

In: a model, its tokenizer and chat template, a `RulerSetup`, numbered samples of a cell. Out: a `RulerAnswer` each, the
key it is kept by, and the attention mass a cell keeps of a sample. Knows nothing of stores, processes and tables.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from baatt import __version__
from baatt.integrations.enable import enable
from baatt.lab.answers import request_key
from baatt.lab.capture import Capture, Recorder
from baatt.lab.chat import ChatTemplates
from baatt.lab.loading import check_memory
from baatt.lab.prompts import answer_text, encode_prompt, end_tokens, pad_left
from baatt.lab.recall import measure_recall
from baatt.lab.ruler.cells import Cell
from baatt.lab.ruler.sample import RulerSample
from baatt.lab.ruler.scoring import METRICS, WHOLE_METRICS
from baatt.lab.ruler.sources import Sources
from baatt.lab.ruler.tasks import draw_samples, find_task
from baatt.models.checkpoint import without_limits
from baatt.models.llada import MaskedDiffusionLM
from baatt.sampling import SamplerConfig, SampleResult, generate

#: Prompt of the first evaluation of every setting, which is not timed: long enough for several blocks.
WARM_UP_TOKENS = 512
#: A question as RULER's, and room for tokens that fall otherwise where template and prompt meet.
PROBE, PROBE_PREFIX, SLACK = "What is the special magic number mentioned in the provided text?", " Answer:", 4


class RulerAnswer(NamedTuple):
    """One answered sample, as it is kept.

    setting: options and dense layers of its cell, {} for dense attention. values: references. score: of RULER's metric,
    0 to 1; whole: the same where only whole words count; exact: whether the text is the expected answer word for word.
    seconds: of its batch, by the number of prompts in it. tokens: positions that were filled; text_tokens: those before
    the end of text. evaluations: of the model, for its batch; cached_evaluations: of those, of a part of the sequence.
    sparsity: share of block pairs skipped. commit, device: of the run that asked. recall: mean and 5th percentile of
    the attention mass that the cell keeps of this sample, kept beside the answer where it was asked for.
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
    device: str | None
    exact: bool | None = None
    text_tokens: int = 0
    cached_evaluations: int = 0
    recall: Sequence[float] | None = None


@dataclass(frozen=True)
class RulerSetup:
    """What the answers of a run depend on beside cell and number.

    Args:
        files: checksums of the model's files, of `checksums`.
        dtype: of the weights.
        seed: of the samples.
        sources: what they are made from.
        impl: as `ba_attention`.
        batch_size: prompts answered together.
        chat: put the prompt through the model's chat template; the answer prefix begins the answer.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    seed: int = 42
    sources: Sources = Sources()  # noqa: RUF009  (frozen)
    impl: str = "auto"
    batch_size: int = 1
    chat: bool = False

    def keys(self, cell: Cell, numbers: Iterable[int]) -> dict[int, str]:
        """The name of the answer to each sample of a cell.

        What a dense answer does not depend on is left out: other options find the dense answers that are there.
        """
        sparse = None if cell.config is None else [cell.options, dataclasses.asdict(cell.policy), self.impl]
        common = request_key(
            "ruler", __version__, dict(self.files), self.dtype, self.seed, source_digest(cell.task, self.sources),
            dataclasses.asdict(cell.sampler), self.batch_size, self.chat, cell.task, cell.length, sparse,
        )  # fmt: skip
        return {number: f"{common}-{number}" for number in numbers}


class RulerModel:
    """A model that answers.

    Args:
        templates: of the model's folder; used if the setup says so.
        made: `records.provenance` of the run; answers keep its commit and device.

    Raises:
        ValueError: a chat template is asked for, and the folder has none.
    """

    def __init__(
        self,
        model: MaskedDiffusionLM,
        tokenizer: Tokenizer,
        setup: RulerSetup = RulerSetup(),
        templates: ChatTemplates = ChatTemplates({}, {}),  # noqa: B008  (never written to)
        made: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.setup = model, without_limits(tokenizer), setup
        self.device = next(model.parameters()).device
        self._templates, self._stamp = templates, {name: (made or {}).get(name) for name in ("commit", "device")}
        self._ends = end_tokens(tokenizer, model.config.eos_token_id, templates.special_tokens)
        self.reserve = 0
        if setup.chat:
            with_template, plain = (len(self.ids(PROBE, PROBE_PREFIX, chat=chat)) for chat in (True, False))
            self.reserve = max(0, with_template - plain) + SLACK

    @property
    def draw(self) -> Callable[..., list[RulerSample]]:
        """`tasks.draw_samples` for this model; what it holds can be sent to another process."""
        return functools.partial(
            draw_samples, tokenizer=self.tokenizer, seed=self.setup.seed, sources=self.setup.sources,
            reserve=self.reserve,
        )  # fmt: skip

    def ids(self, prompt: str, prefix: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt and the beginning of its answer."""
        text = prompt + prefix
        if chat:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": prefix}]
            text = self._templates.render(turns, continue_final_message=True)
        return encode_prompt(self.tokenizer, text, self._templates.special_tokens)

    def check(self, task: str, length: int) -> None:
        """Draw one sample, so that a length that is too small or too large for a task is refused at once.

        Raises:
            ValueError: such a length, one that does not fit into memory, or a chat template that leaves no room.
        """
        check_memory(self.model.config, self.setup.batch_size * length, self.device)
        (sample,) = self.draw(task, length, 1)
        tokens = len(self._sample_ids(sample)) + sample.answer_tokens
        if tokens > length:
            raise ValueError(f"{task} with its chat template must have at most {length} tokens, got {tokens}")

    def warm_up(self, cell: Cell) -> None:
        """Evaluate the model once as in a cell: what cannot run fails now, and no answer's time has a kernel's build.

        Raises:
            RuntimeError: an `impl` that cannot do this model's work.
            ValueError: a policy that does not fit the model.
        """
        prompt = torch.zeros(1, WARM_UP_TOKENS, dtype=torch.int64, device=self.device)
        self.generate(cell.sampled(gen_length=cell.sampler.block_length, steps=1), prompt, None)

    def generate(self, cell: Cell, ids: Tensor, mask: Tensor | None) -> tuple[SampleResult, float]:
        """Continue prompts [B, N] as a cell says; beside the tokens the share of block pairs skipped."""
        with enable(self.model, cell.config, cell.policy, impl=self.setup.impl) as handle:
            return generate(self.model, ids, mask, cell.sampler, on_step=handle.at_step), handle.sparsity

    def prompts(self, samples: Sequence[RulerSample]) -> tuple[Tensor, Tensor]:
        """Ids [B, N] and mask [B, N] of samples, on the model's device."""
        ids, mask = pad_left(list(map(self._sample_ids, samples)), self.model.config.pad_token_id or 0)
        return ids.to(self.device), mask.to(self.device)

    def answer(self, cell: Cell, batch: Sequence[tuple[int, RulerSample]]) -> list[RulerAnswer]:
        """Answer numbered samples of a cell together."""
        samples = [sample for _, sample in batch]
        sampler = shortened(cell.sampler, max(sample.answer_tokens for sample in samples))
        result, sparsity = self.generate(cell._replace(sampler=sampler), *self.prompts(samples))
        filled = (result.unmasked_at >= 0).sum(dim=1).tolist()
        setting = cell.options | {"dense_layers": cell.dense_layers} if cell.options else {}
        answers = []
        for (number, sample), tokens, positions in zip(batch, result.tokens.tolist(), filled, strict=True):
            text = answer_text(self.tokenizer, tokens[: sample.answer_tokens], self._ends)
            score, whole = (metrics[sample.metric](text, sample.values) for metrics in (METRICS, WHOLE_METRICS))
            answers.append(RulerAnswer(
                cell.task, cell.length, number, setting, text, list(sample.values), score, whole,
                result.seconds / len(batch), positions, result.steps, sparsity, **self._stamp,
                exact=text == sample.answer, cached_evaluations=result.cached_evaluations,
                text_tokens=next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens)),
            ))  # fmt: skip
        return answers

    def recalls(self, cells: Sequence[Cell], sample: RulerSample) -> list[Sequence[float] | None]:
        """As `kept_mass`, while the model reads a sample."""
        ids = torch.tensor([self._sample_ids(sample)], device=self.device)
        return kept_mass(self.model, lambda: self.model(ids), cells)

    def _sample_ids(self, sample: RulerSample) -> list[int]:
        return self.ids(sample.prompt, sample.answer_prefix, chat=self.setup.chat)


def kept_mass(
    model: MaskedDiffusionLM, read: Callable[[], object], cells: Sequence[Cell]
) -> list[Sequence[float] | None]:
    """Mean and 5th percentile of the attention mass that sparse cells keep in their sparse layers, while `read` calls
    the model densely; None for a cell without sparse layers."""
    recorder = Recorder()
    with enable(model, None) as handle, torch.inference_mode():
        handle.watch(recorder.keep)
        read()
    device = next(model.parameters()).device
    heads = {layer: found.to(device) for layer, found in recorder.found.items()}
    found: dict[Cell, Sequence[float]] = {}
    for policy in dict.fromkeys(cell.policy for cell in cells):
        dense = policy.check_layers(model.config.n_layers).dense_layers
        some = {cell: cell.config for cell in cells if cell.config and cell.policy == policy}
        if len(dense) == len(heads):
            continue
        sparse = {layer: x for layer, x in heads.items() if layer not in dense}
        capture = Capture(sparse, model.config.head_size**-0.5, {})
        configs = list(dict.fromkeys(some.values()))  # their records over all layers come last
        whole = zip(configs, measure_recall(capture, configs, outputs=False)[-len(configs) :], strict=True)
        kept = {config: (one["recall_mean"], one["recall_p5"]) for config, one in whole}
        found |= {cell: kept[config] for cell, config in some.items()}
    return [found.get(cell) for cell in cells]


def shortened(sampler: SamplerConfig, tokens: int) -> SamplerConfig:
    """The sampler with no more blocks than `tokens` tokens need, and the same steps a block."""
    blocks = min(sampler.blocks, -(-tokens // sampler.block_length))
    length, steps = blocks * sampler.block_length, blocks * sampler.steps_per_block
    return dataclasses.replace(sampler, gen_length=length, steps=steps)


def checksums(folder: Path) -> dict[str, str]:
    """The beginning of the SHA-256 of every file of a folder that an answer depends on.

    Of contents, not of times: a copy of the folder on another machine has the same answers.
    """
    found = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in {".json", ".safetensors", ".gguf", ".jinja"}:
            with file.open("rb") as data:
                found[file.name] = hashlib.file_digest(data, "sha256").hexdigest()[:16]
    return found


def weights_of(files: Mapping[str, str]) -> str:
    """The checksums of the weights among those of `checksums`."""
    return " ".join(sum_ for name, sum_ in files.items() if name.endswith((".safetensors", ".gguf")))


@functools.cache
def source_digest(task: str, sources: Sources) -> str:
    """A name for everything in the sources that a task is made from: their contents, not their places.

    Raises:
        ValueError: as `check_sources`.
    """
    if needs := find_task(task).needs:
        return request_key(sources.questions(needs))
    return request_key(
        sources.pool, sources.word_lists(), sources.essay_words(), sources.starts_anywhere, sources.sentences
    )  # fmt: skip
