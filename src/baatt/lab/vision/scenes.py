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
#: A photo and a frame have a grid of cells, each wide enough for a sign; a photo also one of thirds, whose names answer
#: where a sign is.
CELLS, FRAME_CELLS = (6, 9), (2, 3)
THIRDS = (("top", "middle", "bottom"), ("left", "centre", "right"))
#: Signs of the colour that is counted, and other colours, at most.
MOST, OTHERS = 5, 5
#: What an answer of one word ends with, and what stands where the model has not answered yet.
END, MASK = ".", "[mask]"
ANSWER_WORDS = 2


class Window(NamedTuple):
    """What is seen of a scene: `size` rows and columns of cells from `cell` on, in `frames` frames from `frame` on. A
    model learns from small ones first; one that is asked sees everything."""

    frame: int = 0
    frames: int = 1
    cell: tuple[int, int] = (0, 0)
    size: tuple[int, int] = CELLS


PHOTO = Window()


def whole_clip(frames: int) -> Window:
    """All of a clip."""
    return Window(0, frames, size=FRAME_CELLS)


class Sign(NamedTuple):
    """A sign in a cell (row, column) of a photo or of a frame of a clip, wherever the window begins."""

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


def plant_photo(
    random: Random, window: Window = PHOTO, most: int = MOST, others: tuple[int, int] = (2, OTHERS)
) -> list[Sign]:
    """One to five signs of one colour, then two to five others that have their colours alone; no number comes twice,
    no cell has two.

    Args:
        most, others: other bounds of both, for a model that begins to learn. Where cells run out, the last signs are
            left out.
    """
    rows, columns = window.size
    places = [divmod(place, columns) for place in random.sample(range(rows * columns), rows * columns)]
    painted = _colours(random, len(places), most, others)
    return [
        Sign(colour, random.choice(SHAPES), number, (window.cell[0] + row, window.cell[1] + column))
        for colour, number, (row, column) in zip(painted, random.sample(range(10), len(painted)), places, strict=False)
    ]


def plant_clip(
    random: Random, window: Window, most: int = MOST, others: tuple[int, int] = (2, OTHERS - 1)
) -> list[Sign]:
    """One colour that is shown up to five times, then two to four that are shown once; no frame has two signs. A clip
    of few frames has fewer; arguments as `plant_photo`."""
    frames = range(window.frame, window.frame + window.frames)
    painted = _colours(random, len(frames), most, others)
    found = []
    for colour, frame in zip(painted, random.sample(frames, len(painted)), strict=True):
        cell = tuple(first + random.randrange(size) for first, size in zip(window.cell, window.size, strict=True))
        found.append(Sign(colour, random.choice(SHAPES), random.randrange(10), (cell[0], cell[1]), frame))
    return found


def _colours(random: Random, room: int, most: int, others: tuple[int, int]) -> list[str]:
    """A colour up to so many times, then between so many others once, for `room` places. One colour is always alone."""
    colours = random.sample(list(COLOURS), 1 + random.randint(*others))
    repeated = min(random.randint(1, most), room - 1) if len(colours) > 1 and room > 1 else 1
    return (colours[:1] * repeated + colours[1:])[:room]


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
