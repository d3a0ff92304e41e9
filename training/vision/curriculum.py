"""What the model that answers questions learns when: few signs in small windows first, then more, whole at last.

A small window has few tokens, so that an answer's words find the question's among them and the signs soon after; and it
may lie anywhere in a photo or a clip, so that every row, column and frame is seen from the start. In: exact match, row
by row of the history. Out: stages, and windows of them.
"""

from dataclasses import dataclass
from random import Random
from typing import Any

from baatt.lab.vision.scenes import CELLS, FRAME_CELLS, MOST, OTHERS, Window

#: So many rows of the history in a row must reach the target of a stage.
TWICE = 2


@dataclass(frozen=True)
class Stage:
    """A step of the curriculum: which windows, and how many signs.

    photos: rows and columns of cells. clips: frames, then rows and columns of cells. most, others: as `plant_photo`.
    The next stage begins once the task that is answered worst reaches `target`, or after the share `patience` of the
    whole run.
    """

    photos: tuple[tuple[int, int], ...]
    clips: tuple[tuple[int, tuple[int, int]], ...]
    most: int = MOST
    others: tuple[int, int] = (2, OTHERS - 1)
    target: float = 0.9
    patience: float = 0.15


WHOLE = FRAME_CELLS
CURRICULUM = (
    Stage(((1, 1),), ((2, (1, 1)),), most=1, others=(0, 0)),
    Stage(((1, 2),), ((2, (1, 1)), (4, (1, 1))), most=1, others=(1, 1)),
    Stage(((2, 3),), ((8, (1, 1)), (4, WHOLE)), most=3, others=(1, 3)),
    Stage(((3, 3), (4, 6)), ((16, (1, 2)), (24, (1, 1)), (8, WHOLE))),
    Stage(((4, 6), CELLS), ((72, (1, 1)), (48, (1, 2)), (16, WHOLE), (24, WHOLE)), target=0.95),
    # Long clips more often: a batch has few of them, and shorter ones come back from earlier stages.
    Stage(((4, 6), CELLS, CELLS, CELLS), ((24, WHOLE), (48, WHOLE), (48, WHOLE), (72, WHOLE), (72, WHOLE))),
)


def draw_size(stage: Stage, frames: int, random: Random, *, is_photo: bool) -> Window:
    """How large the windows of a batch of a stage are, of photos or of clips of at most so many frames."""
    if is_photo:
        return Window(size=random.choice(stage.photos))
    count, size = random.choice([one for one in stage.clips if one[0] <= frames] or [(frames, WHOLE)])
    return Window(0, count, size=size)


def anywhere(window: Window, frames: int, random: Random, *, is_photo: bool) -> Window:
    """A window of that size anywhere in a photo, or in a clip of so many frames."""
    down, across = (
        random.randint(0, whole - part)
        for whole, part in zip(CELLS if is_photo else FRAME_CELLS, window.size, strict=True)
    )
    return window._replace(frame=0 if is_photo else random.randint(0, frames - window.frames), cell=(down, across))


class Progress:
    """Which stage is practised; what it knows is kept in the progress of the run, so that a run goes on in its stage.

    Args:
        kept: of the run. total: seconds of all its pieces.
    """

    def __init__(self, kept: dict[str, Any], total: float) -> None:
        self.kept, self.total = kept, total
        kept.setdefault("stage", 0)
        kept.setdefault("stages", [])
        self.reached = 0

    @property
    def stage(self) -> int:
        """Its number."""
        return int(self.kept["stage"])

    def look(self, row: dict[str, Any], tasks: list[str]) -> None:
        """Go to the next stage if this row of the history says so; the row is told its stage."""
        row["stage"] = self.stage
        if self.stage + 1 == len(CURRICULUM):
            return
        here = CURRICULUM[self.stage]
        asked = [row[task] for task in tasks if task in row]
        self.reached = self.reached + 1 if asked and min(asked) >= here.target else 0
        since = self.kept["stages"][-1]["ended"] if self.kept["stages"] else 0.0
        if self.reached < TWICE and row["seconds"] - since <= here.patience * self.total:
            return
        worst = min(asked, default=None)
        self.kept["stages"].append({"stage": self.stage, "ended": row["seconds"], "step": row["step"], "worst": worst})
        self.kept["stage"] += 1
        self.reached = 0
