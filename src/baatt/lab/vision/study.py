"""How the small model answers questions about photos and clips: the part of `lab.ruler.model` that has pictures.

In: a `VisionModel`, held-out clips and photos, cells whose task is of `scenes.py` and whose length is the number of
visual tokens. Out: answers and keys as RULER's, so that its run, store, records and averages serve here too.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baatt import __version__
from baatt.integrations.enable import enable
from baatt.lab.answers import request_key
from baatt.lab.loading import check_memory
from baatt.lab.ruler.cells import Cell
from baatt.lab.ruler.model import RulerAnswer, kept_mass
from baatt.lab.vision.media import Clip, view
from baatt.lab.vision.model import Seen, VisionModel
from baatt.lab.vision.planting import paint, place
from baatt.lab.vision.scenes import (
    ANSWER_WORDS,
    CLIP_TASKS,
    END,
    PHOTO,
    TASKS,
    Question,
    ask,
    plant_clip,
    plant_photo,
    whole_clip,
)
from baatt.sampling import SamplerConfig, SampleResult, generate

#: Two words in two steps, as LLaDA-V answers a multiple choice.
VISION_SAMPLER = SamplerConfig(steps=ANSWER_WORDS, gen_length=ANSWER_WORDS, block_length=ANSWER_WORDS)


class VisionSample(NamedTuple):
    """pixels: uint8 [F, 3, rows, columns], signs planted: a run keeps hundreds of clips."""

    pixels: Tensor
    question: Question


@dataclass(frozen=True)
class VisionSetup:
    """What the answers of a run depend on beside cell and number; files, those of the pixels too, by checksums."""

    files: Mapping[str, str]
    dtype: str = "float32"
    seed: int = 42
    impl: str = "auto"
    batch_size: int = 1

    def keys(self, cell: Cell, numbers: Iterable[int]) -> dict[int, str]:
        """The name of the answer to each sample of a cell; a dense one does not depend on the rest."""
        sparse = None if cell.config is None else [cell.options, dataclasses.asdict(cell.policy), self.impl]
        common = request_key(
            "vision", __version__, dict(self.files), self.dtype, self.seed, self.batch_size, cell.task, cell.length,
            sparse,
        )  # fmt: skip
        return {number: f"{common}-{number}" for number in numbers}


class VisionReader:
    """A model that answers, as `lab.ruler.run` asks.

    Args:
        clips: what questions are about. made: `records.provenance` of the run; answers keep its commit and device.
    """

    def __init__(
        self, model: VisionModel, clips: Sequence[Clip], setup: VisionSetup, made: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self.clips, self.setup = model, clips, setup
        self.device, self.dtype = model.rows.weight.device, model.rows.weight.dtype
        self._made = made or {}

    @property
    def draw(self) -> Callable[..., list[VisionSample]]:
        """Samples of a task of so many visual tokens, by number."""
        return self._draw

    def check(self, task: str, length: int) -> None:
        """Refuse, with a ValueError, what does not fit into memory."""
        check_memory(self.model.language.config, self.setup.batch_size * length, self.device)

    def warm_up(self, cell: Cell) -> None:
        """Answer one question as in a cell: what cannot run fails now, and no answer's time has a kernel's build."""
        self.generate(cell, self._draw(cell.task, cell.length, 1))

    def generate(self, cell: Cell, samples: Sequence[VisionSample]) -> tuple[SampleResult, float]:
        """The answers to samples with questions of one length; beside them the share of block pairs skipped."""
        with enable(self.model.language, cell.config, cell.policy, impl=self.setup.impl) as handle:
            seen, prompt = self._prompt(samples)
            return generate(seen, prompt, None, cell.sampler, on_step=handle.at_step), handle.sparsity

    def answer(self, cell: Cell, batch: Sequence[tuple[int, VisionSample]]) -> list[RulerAnswer]:
        """Answer numbered samples of a cell together."""
        samples = [sample for _, sample in batch]
        result, sparsity = self.generate(cell, samples)
        setting = cell.options | {"dense_layers": cell.dense_layers} if cell.options else {}
        answers = []
        for (number, sample), tokens in zip(batch, result.tokens.tolist(), strict=True):
            words, expected = [self.model.config.words[token] for token in tokens], sample.question.answer
            right = float(tuple(words) == expected)
            answers.append(RulerAnswer(
                cell.task, cell.length, number, setting, _text(words), [_text(expected)], right, right,
                result.seconds / len(batch), ANSWER_WORDS, result.steps, sparsity,
                self._made.get("commit"), self._made.get("device"), exact=bool(right), text_tokens=ANSWER_WORDS,
            ))  # fmt: skip
        return answers

    def recalls(self, cells: Sequence[Cell], sample: VisionSample) -> list[Sequence[float] | None]:
        """As `kept_mass`, while the model reads a sample."""
        with torch.inference_mode():
            seen, prompt = self._prompt([sample])
        return kept_mass(self.model.language, lambda: seen(prompt), cells)

    def _draw(self, task: str, length: int, count: int, first: int = 0) -> list[VisionSample]:
        """Pixels are made on the CPU, so that every device is asked the same."""
        config = self.model.config
        is_clip, of_one = task in CLIP_TASKS, config.tokens(1)
        moving = [clip for clip in self.clips if clip.is_panorama or len(clip.frames) > 1]
        found = []
        for number in range(first, first + count):
            random = Random(f"{task} {length} {self.setup.seed} {number}")
            frames, size = (length // of_one, config.frame) if is_clip else (1, config.photo)
            window = whole_clip(frames) if is_clip else PHOTO
            pixels = view(random.choice(moving if is_clip else self.clips), frames, size, random)
            signs = plant_clip(random, window) if is_clip else plant_photo(random)
            painted = paint(pixels[None], place([signs], [window], size, random))[0]
            found.append(VisionSample((255 * painted).round().to(torch.uint8), ask(task, signs, random)))
        return found

    @torch.inference_mode()
    def _prompt(self, samples: Sequence[VisionSample]) -> tuple[Seen, Tensor]:
        pixels = torch.stack([sample.pixels for sample in samples]).to(self.device, self.dtype) / 255
        words = torch.tensor(
            [self.model.config.encode(sample.question.words) for sample in samples], device=self.device
        )
        seen = Seen(self.model.language, self.model.see(pixels))
        return seen, torch.cat((seen.ids, words), dim=1)


def _text(words: Sequence[str]) -> str:
    return " ".join(word for word in words if word != END)


def lengths_of(model: VisionModel, task: str, frames: Sequence[int]) -> list[int]:
    """Visual tokens of the samples of a task: clips of these numbers of frames, or a photo.

    Raises:
        ValueError: an unknown task, fewer than four frames, or more than the model was made for.
    """
    if task not in TASKS:
        raise ValueError(f"tasks must be of {','.join(TASKS)}, got {task}")
    if task not in CLIP_TASKS:
        return [model.config.tokens(0)]
    if unfit := [one for one in frames if not 4 <= one <= model.config.frames]:
        raise ValueError(f"frames must be from 4 to the model's {model.config.frames}, got {unfit[0]}")
    return [model.config.tokens(one) for one in frames]
