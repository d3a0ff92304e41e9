"""Draws what a batch shows and asks, without its pixels, in processes of its own: a GPU would wait for Python.

In: sizes of a model, the stage that is practised and how often each task is asked, both of which the run changes as it
goes. Out: lessons, for any number of workers. A lesson has photos or clips of one size with questions of one task, so
that nothing is padded, one question a sequence: with several, tiny models did not learn which words belong to which
answer.
"""

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import NamedTuple

import torch
from curriculum import CURRICULUM, Stage, anywhere, draw_size
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from baatt.lab.vision.model import PATCH, VisionConfig
from baatt.lab.vision.planting import Placed, place
from baatt.lab.vision.scenes import (
    PHOTO,
    PHOTO_TASKS,
    TASKS,
    Sign,
    Window,
    ask,
    plant_clip,
    plant_photo,
    whole_clip,
)

#: How often a batch is of an earlier stage, which is not to be forgotten.
REPLAY = 0.15
#: Sequences of a batch at most: of small windows so many would fit that steps would be few.
SEQUENCES = 256
#: How often a task is asked that is always answered right, of one that never is.
KNOWN = 0.1
#: Lessons that each worker has ready: a run that goes to another stage has these few of the last one still.
READY = 4
EARLIER = "earlier"


class Lesson(NamedTuple):
    """name: the task, and what else tells lessons apart that are counted apart; windows: all of one size, of
    photos or of clips; ids [B, n] of questions of one task, each with its answer at the end; placed: the signs."""

    name: str
    windows: list[Window]
    is_photo: bool
    ids: Tensor
    placed: Placed


def pixels_of(config: VisionConfig, window: Window, *, is_photo: bool) -> tuple[int, int]:
    """Rows and columns of a window."""
    cells = (PHOTO if is_photo else whole_clip(1)).size
    rows, columns = config.photo if is_photo else config.frame
    return rows // cells[0] * window.size[0], columns // cells[1] * window.size[1]


def asked(
    config: VisionConfig, task: str, windows: list[Window], scenes: Sequence[Sequence[Sign]], random: Random
) -> Lesson:
    """A question to each scene, and where its signs are."""
    questions = [ask(task, signs, random) for signs in scenes]
    ids = torch.tensor([config.encode((*one.words, *one.answer)) for one in questions], device="cpu")
    is_photo = task in PHOTO_TASKS
    size = pixels_of(config, windows[0], is_photo=is_photo)
    return Lesson(task, windows, is_photo, ids, place(scenes, windows, size, random))


def whole(config: VisionConfig, task: str, frames: int, count: int, random: Random) -> Lesson:
    """Of whole photos (0 frames) or clips."""
    window = whole_clip(frames) if frames else PHOTO
    scenes = [plant_clip(random, window) if frames else plant_photo(random) for _ in range(count)]
    lesson = asked(config, task, [window] * count, scenes, random)
    return lesson._replace(name=f"{task} {frames}" if frames else task)


class Lessons(IterableDataset[Lesson]):
    """Endless; each worker has its own random numbers.

    Args:
        tokens: of a batch, at most.
    """

    def __init__(self, config: VisionConfig, tokens: int, seed: int) -> None:
        self.config, self.tokens, self.seed = config, tokens, seed
        self.stage = multiprocessing.Value("i", 0)
        self.weights = multiprocessing.Array("d", [1.0] * len(TASKS))

    def practise(self, stage: int, shares: Mapping[str, float]) -> None:
        """From now on a stage; tasks that were answered right less often, of those of which it is told, are asked more
        often."""
        if self.stage.value != stage:
            self.stage.value = stage
            self.weights[:] = [1.0] * len(TASKS)
            return
        for number, task in enumerate(TASKS):
            if task in shares:
                self.weights[number] = max(KNOWN, 1 - shares[task])

    def __iter__(self) -> Iterator[Lesson]:
        worker = get_worker_info()
        random = Random(f"{self.seed} {worker.id if worker else 0}")
        while True:
            yield self.draw(random)

    def draw(self, random: Random) -> Lesson:
        """One of the stage, or of an earlier one."""
        stage = int(self.stage.value)
        if stage > 0 and random.random() < REPLAY:
            return self.of_stage(CURRICULUM[random.randrange(stage)], random)._replace(name=EARLIER)
        return self.of_stage(CURRICULUM[stage], random)

    def of_stage(self, stage: Stage, random: Random) -> Lesson:
        """One of a stage."""
        config, task = self.config, random.choices([*TASKS], self.weights)[0]
        is_photo = task in PHOTO_TASKS
        window = draw_size(stage, config.frames, random, is_photo=is_photo)
        rows, columns = pixels_of(config, window, is_photo=is_photo)
        tokens = window.frames * (rows // PATCH) * (columns // PATCH)
        count = min(SEQUENCES, max(1, self.tokens // tokens))
        plant = plant_photo if is_photo else plant_clip
        windows = [anywhere(window, config.frames, random, is_photo=is_photo) for _ in range(count)]
        scenes = [plant(random, one, stage.most, stage.others) for one in windows]
        return asked(config, task, windows, scenes, random)


def drawn_by(lessons: Lessons, workers: int) -> Iterator[Lesson]:
    """Lessons of so many processes; 0 = of this one."""
    ready = {"prefetch_factor": READY} if workers else {}
    return iter(DataLoader(lessons, batch_size=None, num_workers=workers, collate_fn=as_it_is, **ready))


def as_it_is(lesson: Lesson) -> Lesson:
    """In place of what a `DataLoader` would convert."""
    return lesson
