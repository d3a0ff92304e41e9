"""Trains the small model of `baatt.lab.vision` to answer questions about photos and clips with signs planted in them.

In: the files of `media.py`; what it holds out is only measured on. Out: as `running.py` writes it, and the held-out
pixels beside the model. A batch has photos or clips of one size with questions of one task, so that nothing is padded,
one question a sequence: with several, tiny models did not learn which words belong to which answer. What is learnt when
is in `curriculum.py`. One GPU.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from curriculum import CURRICULUM, Progress, Stage, anywhere, draw_size
from einops import rearrange
from running import Losses, Run, add_arguments, go_on
from torch import Tensor, nn

from baatt.lab.vision.media import Clip, read, view
from baatt.lab.vision.model import PATCH, VisionConfig, VisionModel
from baatt.lab.vision.planting import Placed, paint, place
from baatt.lab.vision.scenes import (
    ANSWER_WORDS,
    CLIP_TASKS,
    COLOURS,
    PHOTO,
    PHOTO_TASKS,
    Window,
    ask,
    plant_clip,
    plant_photo,
    whole_clip,
)

#: How often a batch has photos, and how often it is of an earlier stage, which is not to be forgotten.
PHOTOS, REPLAY = 0.5, 0.15
#: Sequences of a batch at most: of small windows so many would fit that steps would be few.
SEQUENCES = 256
#: The share of answers of which one word is given, as when the sampler has filled it.
TOLD = 0.2
#: Weight of what the tower is taught, and how sure a fresh head is that a patch is not the middle of a sign.
TOWER, NOTHING = 0.3, 4.0
#: One of so many backgrounds of a batch is new; the others were drawn before and get other colours and signs.
FRESH = 8
#: Of held-out pixels: numbers of frames, sequences of a batch, and how many batches of each task and length.
LENGTHS, MEASURED, BATCHES = (4, 8, 16, 24, 48, 72), 8, 4
#: Right answers of a guess, for the tasks that tell whether learning has begun, and how many times as many do.
CHANCE = {"photo_number": 1 / 10, "photo_colour": 1 / 8, "clip_number": 1 / 10, "clip_colour": 1 / 8}
BEGUN = 2.0


class Batch(NamedTuple):
    """pixels [B, F, 3, rows, columns] of windows of one size; ids [B, n] of questions of one task, each with its answer
    at the end; placed: the signs. name: the task, and what else tells batches apart that are counted apart."""

    name: str
    windows: list[Window]
    pixels: Tensor
    ids: Tensor
    placed: list[Placed]


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

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """The model without the head."""
        own = (weights or self.state_dict()).items()
        start = "model."
        self.model.save(folder, {name.removeprefix(start): one for name, one in own if name.startswith(start)})


class Pictures:
    """Draws batches from clips, panoramas and photos on the device."""

    def __init__(self, clips: Sequence[Clip], model: VisionModel, tokens: int, seed: int, device: torch.device) -> None:
        self.model, self.tokens, self.device = model, tokens, device
        self.clips = [clip._replace(frames=clip.frames.to(device)) for clip in clips]
        self.moving = [clip for clip in self.clips if clip.is_panorama or len(clip.frames) > 1]
        self.draw = random.Random(seed)
        self.backgrounds: dict[tuple[int, int, int], list[Tensor]] = {}

    def lesson(self, stage: Stage) -> Batch:
        """A batch of a stage, its pictures lighter or darker and in other colours."""
        draw, config = self.draw, self.model.config
        is_photo = draw.random() < PHOTOS
        window = draw_size(stage, config.frames, draw, is_photo=is_photo)
        size = self.pixels_of(window, is_photo=is_photo)
        tokens = window.frames * (size[0] // PATCH) * (size[1] // PATCH)
        count = min(SEQUENCES, max(1, self.tokens // tokens))
        pixels = self.recoloured(self.background(window.frames, size, count, is_photo=is_photo))
        plant = plant_photo if is_photo else plant_clip
        windows = [anywhere(window, config.frames, draw, is_photo=is_photo) for _ in range(count)]
        scenes = [plant(draw, one, stage.most, stage.others) for one in windows]
        return self.asked(draw.choice([*(PHOTO_TASKS if is_photo else CLIP_TASKS)]), windows, pixels, scenes)

    def whole(self, task: str, frames: int, count: int) -> Batch:
        """A batch of whole photos (0 frames) or clips as they are."""
        window, draw = whole_clip(frames) if frames else PHOTO, self.draw
        size = self.pixels_of(window, is_photo=not frames)
        pixels = self.background(window.frames, size, count, is_photo=not frames)
        scenes = [plant_clip(draw, window) if frames else plant_photo(draw) for _ in range(count)]
        batch = self.asked(task, [window] * count, pixels, scenes)
        return batch._replace(name=f"{task} {frames}" if frames else task)

    def asked(self, task: str, windows: list[Window], pixels: Tensor, scenes: list[Any]) -> Batch:
        """Signs planted, a question to each."""
        asked = [ask(task, signs, self.draw) for signs in scenes]
        ids = torch.tensor([self.model.encode((*one.words, *one.answer)) for one in asked])
        placed = place(scenes, windows, (pixels.shape[-2], pixels.shape[-1]), self.draw)
        return Batch(task, windows, paint(pixels, placed), ids.to(self.device), placed)

    def pixels_of(self, window: Window, *, is_photo: bool) -> tuple[int, int]:
        """Rows and columns of a window."""
        whole = PHOTO if is_photo else whole_clip(1)
        rows, columns = self.model.config.photo if is_photo else self.model.config.frame
        return rows // whole.size[0] * window.size[0], columns // whole.size[1] * window.size[1]

    def background(self, frames: int, size: tuple[int, int], count: int, *, is_photo: bool) -> Tensor:
        """Pixels [count, frames, 3, rows, columns] without signs. Most were drawn for earlier batches: a view is dozens
        of small kernels, and a GPU would wait for them."""
        kept = self.backgrounds.setdefault((frames, *size), [])
        new = count if len(kept) < count else -(-count // FRESH)
        clips = self.clips if is_photo else self.moving
        kept += [view(self.draw.choice(clips), frames, size, self.draw) for _ in range(new)]
        del kept[: -2 * count]
        return torch.stack(self.draw.sample(kept, count))

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


def taught(seen: Tensor, placed: Sequence[Placed]) -> tuple[Tensor, Tensor]:
    """The loss of the tower's head for each sign, and the share of signs whose colour and number it tells.

    Args:
        seen: [B, F, h, w, 1 + colours + 10]: logits of nothing or a colour for every patch, and of a number, which
            count in the middle of signs only.
    """
    names, device = [*COLOURS], seen.device
    places = torch.tensor(
        [(one.picture, one.frame, *(at // PATCH for at in one.middle)) for one in placed], device="cpu"
    ).to(device)
    told = torch.tensor([(1 + names.index(one.sign.colour), one.sign.number) for one in placed], device="cpu").to(
        device
    )
    kinds = torch.zeros(seen.shape[:-1], dtype=torch.long, device=device)
    kinds[tuple(places.T)] = told[:, 0]
    colours, numbers = seen.split((1 + len(names), 10), dim=-1)
    there = numbers[tuple(places.T)]
    loss = F.cross_entropy(rearrange(colours, "... k -> (...) k"), kinds.flatten(), reduction="sum") / len(placed)
    right = (colours[tuple(places.T)].argmax(-1) == told[:, 0]) & (there.argmax(-1) == told[:, 1])
    return loss + F.cross_entropy(there, told[:, 1]), right.float().mean()


def held_out(run: Run, clips: Sequence[Clip], device: torch.device) -> dict[str, float]:
    """The share of questions answered right by the moving average, on the same ones every time."""
    found: dict[str, list[float]] = {}
    with run.averaged() as pupil:
        others = Pictures(clips, pupil.model, 0, 0, device)
        lengths = [0, *(frames for frames in LENGTHS if frames <= pupil.model.config.frames)]
        for frames in lengths:
            for task in [*(CLIP_TASKS if frames else PHOTO_TASKS)] * BATCHES:
                batch = others.whole(task, frames, MEASURED)
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
    pictures = Pictures([one for one in clips if one.name not in names], run.model.model, arguments.batch_tokens, seed,
                        device)  # fmt: skip
    progress = Progress(run.progress, arguments.total_seconds)
    if arguments.compile:
        for block in run.model.model.language.transformer.blocks:
            block.compile(dynamic=True)

    def losses() -> Losses:
        earlier = progress.stage > 0 and pictures.draw.random() < REPLAY
        stage = pictures.draw.randrange(progress.stage) if earlier else progress.stage
        batch = pictures.lesson(CURRICULUM[stage])
        return measure(run.model, batch._replace(name="earlier") if earlier else batch, TOLD)

    look: Callable[[dict[str, Any]], None] = lambda row: progress.look(row, [*PHOTO_TASKS, *CLIP_TASKS])  # noqa: E731
    go_on(run, began, losses, lambda: held_out(run, asked, device), has_begun, look)


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
