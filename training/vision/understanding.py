"""Trains the small model of `baatt.lab.vision` to answer questions about photos and clips with signs planted in them.

In: the files of `media.py`; what it holds out is only measured on. Out: as `running.py` writes it, and the held-out
pixels beside the model. What is learnt when is in `curriculum.py`, what is asked in `lessons.py`. One GPU.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from curriculum import Progress
from einops import rearrange
from lessons import Lesson, Lessons, drawn_by, pixels_of, whole
from running import Losses, Run, add_arguments, go_on
from torch import Tensor, nn

from baatt.lab.vision.media import Clip, read, view
from baatt.lab.vision.model import PATCH, VisionConfig, VisionModel
from baatt.lab.vision.planting import Placed, paint
from baatt.lab.vision.scenes import ANSWER_WORDS, CLIP_TASKS, COLOURS, PHOTO_TASKS, TASKS, Window

#: The share of answers of which one word is given, as when the sampler has filled it.
TOLD = 0.2
#: Weight of what the tower is taught, and how sure a fresh head is that a patch is not the middle of a sign: of small
#: windows, and of the long clips that a model sees that is trained further.
TOWER, NOTHING, RARELY = 0.3, 4.0, 9.0
#: So many backgrounds of a batch are new; the others were drawn before and get other colours and signs.
FRESH = 6
#: Of held-out pixels: numbers of frames, sequences of a batch, and how many batches of each task and length.
LENGTHS, MEASURED, BATCHES = (4, 8, 16, 24, 48, 72), 8, 4
#: Right answers of a guess, for the tasks that tell whether learning has begun, and how many times as many do.
CHANCE = {"photo_number": 1 / 10, "photo_colour": 1 / 8, "clip_number": 1 / 10, "clip_colour": 1 / 8}
BEGUN = 2.0


class Batch(NamedTuple):
    """A lesson and the pixels [B, F, 3, rows, columns] of its windows, with the signs on them, on the device."""

    name: str
    windows: list[Window]
    pixels: Tensor
    ids: Tensor
    placed: Placed


class Pupil(nn.Module):
    """The model, and a head that only training has: of every patch it tells the colour and the number of the sign whose
    middle lies there. LLaDA-V's tower was taught what pictures show before it met the language model; ours is taught
    this at the same time, or the language model would wait long for something that can be read."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.model = VisionModel(config)
        self.head = nn.Sequential(nn.LayerNorm(config.tower), nn.Linear(config.tower, 1 + len(COLOURS) + 10))
        nn.init.zeros_(self.head[1].weight)
        nn.init.zeros_(self.head[1].bias)
        with torch.no_grad():
            self.head[1].bias[0] = NOTHING

    @classmethod
    def load(cls, folder: Path) -> "Pupil":
        """Of a model in 8 bits, with a fresh head."""
        model = VisionModel.load(folder)
        pupil = cls(model.config)
        pupil.model = model
        with torch.no_grad():
            pupil.head[1].bias[0] = RARELY
        return pupil

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """The model without the head."""
        own = (weights or self.state_dict()).items()
        start = "model."
        self.model.save(folder, {name.removeprefix(start): one for name, one in own if name.startswith(start)})


class Pictures:
    """Brings pixels of clips, panoramas and photos to lessons, on the device."""

    def __init__(self, clips: Sequence[Clip], config: VisionConfig, seed: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.clips = [clip._replace(frames=clip.frames.to(device)) for clip in clips]
        self.moving = [clip for clip in self.clips if clip.is_panorama or len(clip.frames) > 1]
        self.draw = random.Random(seed)
        self.backgrounds: dict[tuple[int, int, int], Tensor] = {}

    def show(self, lesson: Lesson, *, recoloured: bool = False) -> Batch:
        """A lesson with its pixels; recoloured: lighter or darker, and in other colours."""
        size = pixels_of(self.config, lesson.windows[0], is_photo=lesson.is_photo)
        pixels = self.background(lesson.windows[0].frames, size, len(lesson.windows), is_photo=lesson.is_photo)
        if recoloured:
            pixels = self.recoloured(pixels)
        placed = lesson.placed.to(self.device)
        return Batch(lesson.name, lesson.windows, paint(pixels, placed), lesson.ids.to(self.device), placed)

    def background(self, frames: int, size: tuple[int, int], count: int, *, is_photo: bool) -> Tensor:
        """Pixels [count, frames, 3, rows, columns] without signs, of twice as many that are kept. In each batch some of
        these are drawn anew: a view is a dozen small kernels, and a GPU would wait for them."""
        clips, kept = self.clips if is_photo else self.moving, self.backgrounds.get((frames, *size))
        if kept is None:
            kept = torch.stack([view(self.draw.choice(clips), frames, size, self.draw) for _ in range(2 * count)])
            self.backgrounds[frames, *size] = kept
        else:
            for place in self.draw.sample(range(len(kept)), min(FRESH, count)):
                kept[place] = view(self.draw.choice(clips), frames, size, self.draw)
        chosen = self.draw.sample(range(len(kept)), count)
        return kept[torch.tensor(chosen, device="cpu").to(self.device)]

    def recoloured(self, pixels: Tensor) -> Tensor:
        """Every picture lighter or darker, each of its colours by itself, and some with colours exchanged."""
        gain = 0.5 + torch.rand(len(pixels), 1, 3, 1, 1, device=self.device)
        if self.draw.random() < 0.3:
            pixels = pixels[:, :, self.draw.sample(range(3), 3)]
        return (pixels * gain).clamp(0, 1)


def measure(pupil: Pupil, batch: Batch, told: float) -> Losses:
    """The loss, and its two parts: mean cross-entropy of the masked words, and what the tower is taught; of answers
    that are masked as a whole the share that is right.

    Args:
        told: the share of answers of which one of the two words is given.
    """
    model, device = pupil.model, batch.ids.device
    answers = batch.ids[:, -ANSWER_WORDS:]
    one, first = (torch.rand(len(answers), device=device) < share for share in (told, 0.5))
    masked = torch.stack((~one | first, ~one | ~first), dim=1)
    hidden = answers.masked_fill(masked, model.config.language.mask_token_id)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        found = model.look(batch.pixels)
        logits = model.read(model.tell(found, batch.windows), torch.cat((batch.ids[:, :-ANSWER_WORDS], hidden), dim=1))
        seen = pupil.head(found)
    logits = logits[:, -ANSWER_WORDS:].float()
    losses = F.cross_entropy(rearrange(logits, "B w V -> (B w) V"), answers.flatten(), reduction="none")
    words = (losses * masked.flatten()).sum() / masked.sum()
    tower, read = taught(seen.float(), batch.placed)
    right = (logits.argmax(dim=-1) == answers).all(dim=-1) & ~one
    share = right.sum() / (~one).sum().clamp(min=1)
    parts = {"words": words.detach(), "tower": tower.detach(), "signs_read": read}
    return words + TOWER * tower, {**parts, batch.name: share}


def taught(seen: Tensor, placed: Placed) -> tuple[Tensor, Tensor]:
    """The loss of the tower's head for each sign, and the share of signs whose colour and number it tells.

    Args:
        seen: [B, F, h, w, 1 + colours + 10]: logits of nothing or a colour for every patch, and of a number, which
            count in the middle of signs only.
    """
    picture, frame, row, column = placed.middles
    places, (number, colour) = (picture, frame, row // PATCH, column // PATCH), placed.table.unbind(1)[6:]
    kinds = torch.zeros(seen.shape[:-1], dtype=torch.long, device=seen.device)
    kinds[places] = 1 + colour
    colours, numbers = seen.split((1 + len(COLOURS), 10), dim=-1)
    there = numbers[places]
    loss = F.cross_entropy(rearrange(colours, "... k -> (...) k"), kinds.flatten(), reduction="sum") / len(number)
    right = (colours[places].argmax(-1) == 1 + colour) & (there.argmax(-1) == number)
    return loss + F.cross_entropy(there, number), right.float().mean()


def held_out(run: Run, clips: Sequence[Clip], device: torch.device) -> dict[str, float]:
    """The share of questions answered right by the moving average, on the same ones every time."""
    found: dict[str, list[float]] = {}
    with run.averaged() as pupil:
        config = pupil.model.config
        others = Pictures(clips, config, 0, device)
        for frames in [0, *(frames for frames in LENGTHS if frames <= config.frames)]:
            for task in [*(CLIP_TASKS if frames else PHOTO_TASKS)] * BATCHES:
                batch = others.show(whole(config, task, frames, MEASURED, others.draw))
                found.setdefault(batch.name, []).append(float(measure(pupil, batch, 0)[1][batch.name]))
    return {task: sum(shares) / len(shares) for task, shares in found.items()}


def has_begun(row: dict[str, Any]) -> str | None:
    """None if a row of the history says that learning has begun, else what is missing."""
    shares = [row[task] / chance for task, chance in CHANCE.items() if task in row]
    if shares and sum(shares) / len(shares) >= BEGUN:
        return None
    told = ", ".join(f"{task} {row[task]:.2f}, a guess {chance:.2f}" for task, chance in CHANCE.items() if task in row)
    return f"{told}; signs that the tower reads {row['signs_read']:.2f}"


def train(arguments: argparse.Namespace) -> None:
    """A piece of the run."""
    began, device = time.monotonic(), torch.device(arguments.device)
    torch.set_float32_matmul_precision("high")
    for folder in {arguments.out, arguments.copy or arguments.out}:
        (folder / arguments.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(arguments.media / "heldout.safetensors", folder / arguments.name)
    asked = read(arguments.media / "heldout.safetensors")
    names = {clip.name for clip in asked}
    clips = [clip for part in ("media", "photos") for clip in read(arguments.media / f"{part}.safetensors")]
    torch.manual_seed(arguments.seed)
    config = VisionConfig(**{name: tuple(value) if isinstance(value, list) else value
                             for name, value in json.loads(arguments.config).items()})  # fmt: skip
    run = Run(arguments, Pupil(config), device)
    seed = arguments.seed + run.progress["step"]
    torch.manual_seed(seed)
    lessons = Lessons(config, arguments.batch_tokens, seed)
    pictures = Pictures([one for one in clips if one.name not in names], config, seed, device)
    progress = Progress(run.progress, arguments.total_seconds)
    lessons.practise(progress.stage, {})
    ready = drawn_by(lessons, arguments.workers)
    if arguments.compile:
        for block in run.model.model.language.transformer.blocks:
            block.compile(dynamic=True)

    def losses() -> Losses:
        return measure(run.model, pictures.show(next(ready), recoloured=True), TOLD)

    def look(row: dict[str, Any]) -> None:
        progress.look(row, [*TASKS])
        lessons.practise(progress.stage, row)

    go_on(run, began, losses, lambda: held_out(run, asked, device), has_begun, look)


def build_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--media", type=Path, default=Path("training/data"), help="folder of the files of media.py")
    parser.add_argument("--config", default="{}", help="fields of VisionConfig as JSON, for another size")
    parser.add_argument("--workers", type=int, default=6, help="processes that draw questions (default: 6)")
    add_arguments(parser, "understanding")
    parser.set_defaults(learning_rate=1e-3, report_every=200)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    train(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
