"""What is planted in a photo or a clip, and what is asked about it: every answer is known exactly.

In: a source of random numbers. Out: signs, each with colour, shape, number and place, and questions in two manners:
RealWorldQA's about a photo (number, colour, position, count) and VideoMME's about a clip (when a sign is shown, what a
frame shows, how often). Questions of a task all have the same number of words, answers have two. Knows no pixels.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

#: Red, green and blue of what a sign may be painted in.
COLOURS = {
    "red": (200, 30, 35), "orange": (240, 130, 20), "yellow": (245, 215, 40), "green": (25, 140, 60),
    "blue": (30, 80, 205), "purple": (125, 45, 160), "pink": (250, 150, 190), "black": (20, 20, 20),
}  # fmt: skip
SHAPES = ("disc", "square", "octagon")
#: A photo has a grid of cells, each wide enough for a sign, and of thirds, whose names answer where a sign is.
CELLS = (6, 9)
THIRDS = (("top", "middle", "bottom"), ("left", "centre", "right"))
#: Signs of the colour that is counted, and other colours, at most.
MOST, OTHERS = 5, 5
#: What an answer of one word ends with, and what stands where the model has not answered yet.
END, MASK = ".", "[mask]"
ANSWER_WORDS = 2


class Sign(NamedTuple):
    """A sign in a cell (row, column) of a photo, or in a frame of a clip, where the cell is (0, 0)."""

    colour: str
    shape: str
    number: int
    cell: tuple[int, int] = (0, 0)
    frame: int = 0


class Question(NamedTuple):
    """words: with the question mark; answer: always `ANSWER_WORDS` words."""

    task: str
    words: tuple[str, ...]
    answer: tuple[str, ...]


def plant_photo(random: Random, *, easy: bool = False) -> list[Sign]:
    """One to five signs of one colour, then two to five others that have their colours alone; no number comes twice.
    easy: one or two signs, from which a model begins to learn."""
    painted = _colours(random, 1 if easy else MOST, (0, 1) if easy else (2, OTHERS))
    numbers, cells = random.sample(range(10), len(painted)), random.sample(range(CELLS[0] * CELLS[1]), len(painted))
    return [
        Sign(colour, random.choice(SHAPES), number, divmod(cell, CELLS[1]))
        for colour, number, cell in zip(painted, numbers, cells, strict=True)
    ]


def plant_clip(random: Random, frames: int, *, easy: bool = False) -> list[Sign]:
    """One colour that is shown up to five times, then two to four that are shown once; no frame has two signs. A clip
    of few frames has fewer. easy: as in a photo."""
    painted = _colours(random, 1 if easy else min(MOST, frames - 2), (0, 1) if easy else (2, min(OTHERS - 1, frames)))
    painted = painted[:frames]
    return [
        Sign(colour, random.choice(SHAPES), random.randrange(10), frame=frame)
        for colour, frame in zip(painted, random.sample(range(frames), len(painted)), strict=True)
    ]


def _colours(random: Random, most: int, others: tuple[int, int]) -> list[str]:
    """A colour up to so many times, then between so many others once."""
    colours = random.sample(list(COLOURS), 1 + random.randint(*others))
    return colours[:1] * random.randint(1, most) + colours[1:]


def ask(task: str, signs: Sequence[Sign], random: Random) -> Question:
    """A question of a task about what `plant_photo` or `plant_clip` has planted."""
    text, answer = TASKS[task](signs, random)
    words = answer.split()
    return Question(task, tuple(text.split()), (*words, *[END] * (ANSWER_WORDS - len(words))))


def _alone(signs: Sequence[Sign], random: Random) -> Sign:
    """A sign that has its colour alone."""
    colours = [one.colour for one in signs]
    return random.choice([one for one in signs if colours.count(one.colour) == 1])


def _some_colour(signs: Sequence[Sign], random: Random) -> tuple[str, str]:
    """A colour and how many signs have it: mostly the one that may have several."""
    colour = signs[0].colour if random.random() < 0.8 else _alone(signs, random).colour
    return colour, str(sum(one.colour == colour for one in signs))


def _digits(frame: int) -> str:
    return f"{frame // 10} {frame % 10}"


def _number(signs: Sequence[Sign], random: Random) -> tuple[str, str]:
    sign = _alone(signs, random)
    return f"what number is on the {sign.colour} sign ?", str(sign.number)


def _colour(signs: Sequence[Sign], random: Random) -> tuple[str, str]:
    sign = random.choice(signs)
    return f"what colour is the sign with number {sign.number} ?", sign.colour


def _position(signs: Sequence[Sign], random: Random) -> tuple[str, str]:
    sign = _alone(signs, random)
    where = (names[3 * place // size] for names, place, size in zip(THIRDS, sign.cell, CELLS, strict=True))
    return f"where is the {sign.colour} sign ?", " ".join(where)


def _count(signs: Sequence[Sign], random: Random) -> tuple[str, str]:
    colour, count = _some_colour(signs, random)
    return f"how many {colour} signs are there ?", count


def _when(signs: Sequence[Sign], random: Random) -> tuple[str, str]:
    sign = _alone(signs, random)
    return f"in which frame is the {sign.colour} sign ?", _digits(sign.frame)


def _number_in(signs: Sequence[Sign], random: Random) -> tuple[str, str]:
    sign = random.choice(signs)
    return f"what number is on the sign in frame {_digits(sign.frame)} ?", str(sign.number)


def _colour_in(signs: Sequence[Sign], random: Random) -> tuple[str, str]:
    sign = random.choice(signs)
    return f"what colour is the sign in frame {_digits(sign.frame)} ?", sign.colour


def _often(signs: Sequence[Sign], random: Random) -> tuple[str, str]:
    colour, count = _some_colour(signs, random)
    return f"how often is a {colour} sign shown ?", count


PHOTO_TASKS: dict[str, Callable[[Sequence[Sign], Random], tuple[str, str]]] = {
    "photo_number": _number, "photo_colour": _colour, "photo_position": _position, "photo_count": _count,
}  # fmt: skip
CLIP_TASKS: dict[str, Callable[[Sequence[Sign], Random], tuple[str, str]]] = {
    "clip_when": _when, "clip_number": _number_in, "clip_colour": _colour_in, "clip_often": _often,
}  # fmt: skip
TASKS = PHOTO_TASKS | CLIP_TASKS


def _every_word() -> tuple[str, ...]:
    """The vocabulary: of the templates, and of what is put into them."""
    sign = Sign("red", "disc", 0)
    texts = [part for task in TASKS.values() for part in task([sign], Random(0))]
    words = {word for text in texts for word in text.split()}
    return (MASK, END, *sorted(words | {*COLOURS, *map(str, range(10)), *THIRDS[0], *THIRDS[1]}))


WORDS = _every_word()
