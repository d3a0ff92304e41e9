"""A run of RULER: which answers it needs, the asking of those that no earlier run has kept, and all of them together.

In: cells, the numbers of the samples that are this process's share, a `RulerModel` and an `AnswerStore`. Out: the
answers of every cell on the first process. An interrupted run goes on with its store, and more settings find the dense
answers there. Knows nothing of intervals and tables.
"""

import functools
import multiprocessing
import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from baatt.lab.answers import AnswerStore, request_key
from baatt.lab.ranks import Ranks
from baatt.lab.ruler.cells import Cell
from baatt.lab.ruler.model import RulerAnswer, RulerModel, RulerSetup
from baatt.lab.ruler.sample import RulerSample

#: Places whose samples are drawn ahead of their use; all at once would not fit into memory at 128K tokens.
PLACES_AHEAD = 2
#: What is told after every batch: its cell, and how many samples it had.
Watch = Callable[[Cell, int], None]


class Work(NamedTuple):
    """What is still to be asked of one task at one length: its cells, each with the numbers of its open samples."""

    task: str
    length: int
    cells: tuple[tuple[Cell, tuple[int, ...]], ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Samples that have to be drawn."""
        return tuple(sorted({number for _, numbers in self.cells for number in numbers}))


def same_everywhere(setup: RulerSetup, cells: Sequence[Cell], count: int, ranks: Ranks) -> bool:
    """Whether all processes are about to answer the same samples in the same way."""
    identity = request_key(sorted(key for cell in cells for key in setup.keys(cell, (count,)).values()))
    found = ranks.all_gather(torch.tensor(int(identity[:15], 16)))
    return bool((found == found.flatten()[0]).all())


def open_work(
    cells: Sequence[Cell], numbers: Iterable[int], setup: RulerSetup, store: AnswerStore, suffix: str = ""
) -> list[Work]:
    """What the store has no answer for, in the order of the cells; with `RECALL` as suffix, no recall."""
    numbers = tuple(numbers)
    places: dict[tuple[str, int], list[tuple[Cell, tuple[int, ...]]]] = {}
    for cell in cells:
        missing = tuple(number for number, key in setup.keys(cell, numbers).items() if key + suffix not in store)
        if missing:
            places.setdefault((cell.task, cell.length), []).append((cell, missing))
    return [Work(task, length, tuple(open_cells)) for (task, length), open_cells in places.items()]


#: What the key of a recall has behind that of its answer.
RECALL = "-recall"


def prepare(works: Sequence[Work], model: RulerModel) -> None:
    """Refuse what cannot run before anything is asked, and warm up every setting.

    Raises:
        RuntimeError, ValueError: as `RulerModel.check` and `RulerModel.warm_up`.
    """
    for work in works:
        model.check(work.task, work.length)
    for cell in {cell[2:]: cell for work in works for cell, _ in work.cells}.values():
        model.warm_up(cell)


def draw_ahead(works: Sequence[Work], model: RulerModel, workers: int) -> Generator[dict[int, RulerSample], None, None]:
    """The samples of every work in turn, drawn in worker processes while earlier ones are answered.

    Args:
        workers: processes; 0 draws here, when asked. Close the iterator to end them.
    """
    draw = functools.partial(_draw_part, setup=model.setup, tokenizer=model.tokenizer, reserve=model.reserve)
    if workers == 0:
        yield from (draw(work.task, work.length, work.numbers) for work in works)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        waiting: deque[list[Any]] = deque()
        for work in works:
            parts = [work.numbers[first::workers] for first in range(min(workers, len(work.numbers)))]
            waiting.append([pool.submit(draw, work.task, work.length, part) for part in parts])
            if len(waiting) > PLACES_AHEAD:
                yield {number: sample for job in waiting.popleft() for number, sample in job.result().items()}
        while waiting:
            yield {number: sample for job in waiting.popleft() for number, sample in job.result().items()}
    finally:
        pool.shutdown(cancel_futures=True)


def answer_work(
    works: Sequence[Work],
    model: RulerModel,
    store: AnswerStore,
    *,
    workers: int = 0,
    watch: Watch = lambda cell, count: None,
    shuffle: random.Random | None = None,
) -> None:
    """Ask everything that is open and keep the answers.

    Args:
        workers: processes that draw samples, see `draw_ahead`.
        watch: told after every batch.
        shuffle: asks the batches of a task and length in random order, so that all cells meet the same machine.
    """
    size = model.setup.batch_size
    with closing(draw_ahead(works, model, workers)) as drawn:
        for work, samples in zip(works, drawn, strict=True):
            batches = [
                (cell, numbers[first : first + size])
                for cell, numbers in work.cells
                for first in range(0, len(numbers), size)
            ]
            if shuffle is not None:
                shuffle.shuffle(batches)
            for cell, numbers in batches:
                keys = model.setup.keys(cell, numbers)
                for answer in model.answer(cell, [(number, samples[number]) for number in numbers]):
                    store.put(keys[answer.number], answer._asdict())
                watch(cell, len(numbers))


def measure_recalls(works: Sequence[Work], model: RulerModel, store: AnswerStore, workers: int = 0) -> None:
    """Measure the attention mass that sparse cells keep, wherever the store has none.

    Args:
        works: of `open_work` with the suffix `RECALL`.
    """
    with closing(draw_ahead(works, model, workers)) as drawn:
        for work, samples in zip(works, drawn, strict=True):
            for number in work.numbers:
                cells = [cell for cell, numbers in work.cells if number in numbers]
                for cell, found in zip(cells, model.recalls(cells, samples[number]), strict=True):
                    store.put(model.setup.keys(cell, [number])[number] + RECALL, found)


def gather_answers(
    cells: Sequence[Cell], numbers: Sequence[int], setup: RulerSetup, store: AnswerStore, ranks: Ranks, recalls: int = 0
) -> list[list[RulerAnswer]] | None:
    """All answers of each cell in the order of their numbers, on rank 0; None on the others.

    Args:
        numbers: the share of this process.
        recalls: samples whose recall is put beside the answer.
    """

    def kept(number: int, key: str) -> dict[str, Any]:
        recall = store[key + RECALL] if number < recalls and key + RECALL in store else None
        return {**store[key], "recall": recall}

    own = [[kept(*pair) for pair in setup.keys(cell, numbers).items()] for cell in cells]
    shares = ranks.gather_object(own)
    if shares is None:
        return None
    joined = ([RulerAnswer(**one) for share in shares for one in share[place]] for place in range(len(cells)))
    return [sorted(answers, key=lambda one: one.number) for answers in joined]


def _draw_part(
    task: str, length: int, numbers: Sequence[int], setup: RulerSetup, tokenizer: Tokenizer, reserve: int
) -> dict[int, RulerSample]:
    return {number: setup.draw(task, length, number, tokenizer, reserve) for number in numbers}
