"""Trains the small model of `baatt.lab.vision` to answer questions about photos and clips with signs planted in them.

In: the files of `media.py`; what it holds out is only measured on. Out: as `running.py` writes it, and the held-out
pixels beside the model. Every batch has about as many tokens as any other, photos or clips of one length with questions
of one task, so that nothing is padded. A sequence has one question: with several, tiny models did not learn which
words belong to which answer. One GPU.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from running import Losses, Run, add_arguments, go_on
from torch import Tensor

from baatt.lab.vision.media import Clip, read, view
from baatt.lab.vision.model import VisionConfig, VisionModel
from baatt.lab.vision.planting import paint
from baatt.lab.vision.scenes import ANSWER_WORDS, CLIP_TASKS, PHOTO_TASKS, ask, plant_clip, plant_photo

#: Frames of a clip, 0 for a photo, and how often batches of it come. Short clips teach to read at little cost.
LENGTHS = {0: 0.45, 4: 0.2, 8: 0.1, 16: 0.1, 24: 0.05, 48: 0.05, 72: 0.05}
#: Frames of the longest clips in the beginning.
SHORT = 8
#: The share of answers of which one word is given, as when the sampler has filled it.
TOLD = 0.2
#: How often a scene has one or two signs only, in the beginning and from a third of the run on. Without them tiny
#: models learnt nothing in 450 steps.
EASY = (0.7, 0.1)
#: Sequences of a batch that measures, and how many such batches of each task and length.
MEASURED, BATCHES = 8, 4


class Batch(NamedTuple):
    """pixels [B, F, 3, rows, columns]; ids [B, n] of questions of one task, each with its answer at the end."""

    task: str
    pixels: Tensor
    ids: Tensor


class Pictures:
    """Draws batches from clips, panoramas and photos on the device."""

    def __init__(self, clips: Sequence[Clip], model: VisionModel, tokens: int, seed: int, device: torch.device) -> None:
        self.model, self.tokens, self.device = model, tokens, device
        self.clips = [clip._replace(frames=clip.frames.to(device)) for clip in clips]
        self.moving = [clip for clip in self.clips if clip.is_panorama or len(clip.frames) > 1]
        self.draw = random.Random(seed)
        self.lengths = [frames for frames in LENGTHS if frames <= model.config.frames]
        #: Of the whole run, from 0 to 1.
        self.progress = 0.0

    def batch(
        self, frames: int | None = None, count: int | None = None, task: str | None = None, *, plain: bool = False
    ) -> Batch:
        """Photos or clips of one length. plain: as they are, else lighter or darker, in other colours, some with few
        signs."""
        config, draw, grown = self.model.config, self.draw, min(1.0, 3 * self.progress)
        if frames is None:  # clips grow too
            lengths = [one for one in self.lengths if one <= SHORT + grown * config.frames]
            frames = draw.choices(lengths, [LENGTHS[one] for one in lengths])[0]
        count = count or max(1, self.tokens // config.tokens(frames))
        size = config.frame if frames else config.photo
        chosen = draw.choices(self.moving if frames else self.clips, k=count)
        pixels = torch.stack([view(clip, max(1, frames), size, draw) for clip in chosen])
        if not plain:
            pixels = self.recoloured(pixels)
        easy = [not plain and draw.random() < EASY[0] + grown * (EASY[1] - EASY[0]) for _ in range(count)]
        scenes = [plant_clip(draw, frames, easy=one) if frames else plant_photo(draw, easy=one) for one in easy]
        task = task or draw.choice(tasks_of(frames))
        asked = [ask(task, signs, draw) for signs in scenes]
        ids = torch.tensor([self.model.encode((*one.words, *one.answer)) for one in asked])
        return Batch(task, paint(pixels, scenes, draw), ids.to(self.device))

    def recoloured(self, pixels: Tensor) -> Tensor:
        """Every picture lighter or darker, each of its colours by itself, and some with colours exchanged."""
        gain = 0.5 + torch.rand(len(pixels), 1, 3, 1, 1, device=self.device)
        if self.draw.random() < 0.3:
            pixels = pixels[:, :, self.draw.sample(range(3), 3)]
        return (pixels * gain).clamp(0, 1)


def tasks_of(frames: int) -> list[str]:
    """Of clips, or of photos where there are no frames."""
    return [*(CLIP_TASKS if frames else PHOTO_TASKS)]


def measure(model: VisionModel, batch: Batch, told: float) -> Losses:
    """Mean cross-entropy of the masked words; of answers that are masked as a whole the share that is right.

    Args:
        told: the share of answers of which one of the two words is given.
    """
    answers, device = batch.ids[:, -ANSWER_WORDS:], batch.ids.device
    one, first = (torch.rand(len(answers), device=device) < share for share in (told, 0.5))
    masked = torch.stack((~one | first, ~one | ~first), dim=1)
    hidden = answers.masked_fill(masked, model.config.language.mask_token_id)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(batch.pixels, torch.cat((batch.ids[:, :-ANSWER_WORDS], hidden), dim=1))
    logits = logits[:, -ANSWER_WORDS:].float()
    losses = F.cross_entropy(rearrange(logits, "B w V -> (B w) V"), answers.flatten(), reduction="none")
    right = (logits.argmax(dim=-1) == answers).all(dim=-1) & ~one
    share = right.sum() / (~one).sum().clamp(min=1)
    return (losses * masked.flatten()).sum() / masked.sum(), {batch.task: share}


def train(arguments: argparse.Namespace) -> None:
    """A piece of the run."""
    began, device = time.monotonic(), torch.device(arguments.device)
    torch.set_float32_matmul_precision("high")
    for folder in {arguments.out, arguments.copy or arguments.out}:
        (folder / "model").mkdir(parents=True, exist_ok=True)
        shutil.copy(arguments.media / "heldout.safetensors", folder / "model")
    asked = read(arguments.media / "heldout.safetensors")
    names = {clip.name for clip in asked}
    clips = [clip for part in ("media", "photos") for clip in read(arguments.media / f"{part}.safetensors")]
    torch.manual_seed(arguments.seed)
    config = VisionConfig(**{name: tuple(value) if isinstance(value, list) else value
                             for name, value in json.loads(arguments.config).items()})  # fmt: skip
    run = Run(arguments, VisionModel(config), device)
    seed = arguments.seed + run.progress["step"]
    torch.manual_seed(seed)
    seen = [clip for clip in clips if clip.name not in names]
    pictures = Pictures(seen, run.model, arguments.batch_tokens, seed, device)
    if arguments.compile:
        for block in run.model.language.transformer.blocks:
            block.compile(dynamic=True)

    def held_out() -> dict[str, float]:
        """The share of questions answered right, on the same ones every time."""
        others = Pictures(asked, run.model, arguments.batch_tokens, 0, device)
        found: dict[str, list[float]] = {}
        with run.averaged() as model:
            for frames in others.lengths:
                for task in tasks_of(frames) * BATCHES:
                    _, right = measure(model, others.batch(frames, MEASURED, task, plain=True), 0)
                    found.setdefault(f"{task} {frames}" if frames else task, []).append(float(right[task]))
        return {task: sum(shares) / len(shares) for task, shares in found.items()}

    def losses() -> Losses:
        pictures.progress = run.progress["seconds"] / arguments.total_seconds
        return measure(run.model, pictures.batch(), TOLD)

    go_on(run, began, losses, held_out)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--media", type=Path, default=Path("training/data"), help="folder of the files of media.py")
    parser.add_argument("--config", default="{}", help="fields of VisionConfig as JSON, for another size")
    add_arguments(parser, "understanding")
    parser.set_defaults(learning_rate=1e-3)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
