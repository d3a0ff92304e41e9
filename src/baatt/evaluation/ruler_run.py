"""A run of RULER: which answers it needs, the asking of those that no earlier run has kept, and all of them together.

In: cells (task, length, dials), the numbers of the samples that are this process's share, a `Respondent` and an
`AnswerStore`. Out: the answers of every cell on the first process. An interrupted run goes on with its store, and more
settings find the dense answers there. Knows nothing of intervals and tables.
"""

import functools
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from baatt.evaluation.ablation import Cell
from baatt.evaluation.ruler_answers import Respondent, RulerAnswer, RulerSetup, draw_numbers
from baatt.lab.answers import AnswerStore, request_key
from baatt.lab.ranks import Ranks
from baatt.lab.ruler.sample import RulerSample
from baatt.lab.ruler.sources import Sources
from baatt.lab.ruler.tasks import TASKS

#: Places whose samples are drawn ahead of their use; all at once would not fit into memory at 128K tokens.
PLACES_AHEAD = 2


class Work(NamedTuple):
    """What is still to be asked of one task at one length: its cells, each with the numbers of its open samples."""

    task: str
    length: int
    cells: tuple[tuple[Cell, tuple[int, ...]], ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Samples that have to be drawn."""
        return tuple(sorted({number for _, numbers in self.cells for number in numbers}))


def choose_tasks(names: str, sources: Sources) -> list[str]:
    """The tasks of a comma-separated list; `needles`: the eight needle tasks; `all`: all that the sources can make.

    Raises:
        ValueError: an unknown task, or one whose file is not given.
    """
    made = [name for name, task in TASKS.items() if not task.needs or getattr(sources, task.needs) is not None]
    groups = {"all": made, "needles": [name for name in made if name.startswith("niah_")]}
    chosen = list(dict.fromkeys(name for part in names.split(",") for name in groups.get(part, [part])))
    if unknown := [name for name in chosen if name not in TASKS]:
        raise ValueError(f"tasks must be all, needles or of {','.join(TASKS)}; got {','.join(unknown)}")
    if missing := [name for name in chosen if name not in made]:
        needed = ", ".join(f"{name} needs {TASKS[name].needs}" for name in missing)
        raise ValueError(f"tasks must have their data sets: {needed}, got none")
    return chosen


def check_questions(cells: Iterable[Cell], count: int, sources: Sources) -> None:
    """Sample n of a task with a data set is question n of its file.

    Raises:
        ValueError: fewer questions than samples.
    """
    for name in dict.fromkeys(cell.task for cell in cells):
        needs = TASKS[name].needs
        if needs and len(sources.questions(needs).questions) < count:
            found = len(sources.questions(needs).questions)
            raise ValueError(f"count must be at most {found}, the questions that {name} has, got {count}")


def same_everywhere(setup: RulerSetup, cells: Sequence[Cell], count: int, processes: Ranks) -> bool:
    """Whether all processes are about to answer the same samples in the same way."""
    identity = request_key(sorted(key for cell in cells for key in setup.keys(cell, (count,)).values()))
    found = processes.all_gather(torch.tensor(int(identity[:15], 16)))
    return bool((found == found.flatten()[0]).all())


def open_work(cells: Sequence[Cell], numbers: Sequence[int], setup: RulerSetup, store: AnswerStore) -> list[Work]:
    """What the store has no answer for, in the order of the cells."""
    places: dict[tuple[str, int], list[tuple[Cell, tuple[int, ...]]]] = {}
    for cell in cells:
        missing = tuple(number for number, key in setup.keys(cell, numbers).items() if key not in store)
        if missing:
            places.setdefault((cell.task, cell.length), []).append((cell, missing))
    return [Work(task, length, tuple(open_cells)) for (task, length), open_cells in places.items()]


def draw_ahead(
    works: Sequence[Work], respondent: Respondent, workers: int
) -> Generator[dict[int, RulerSample], None, None]:
    """The samples of every work in turn, drawn in worker processes while earlier ones are answered.

    Args:
        workers: processes; 0 draws here, when asked. Close the iterator to end them.
    """
    setup = respondent.setup
    draw_part = functools.partial(
        draw_numbers, tokenizer=respondent.tokenizer, seed=setup.seed, sources=setup.sources, reserve=respondent.reserve
    )
    if workers == 0:
        yield from (draw_part(work.task, work.length, work.numbers) for work in works)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        waiting: deque[list[Any]] = deque()
        for work in works:
            parts = [work.numbers[first::workers] for first in range(min(workers, len(work.numbers)))]
            waiting.append([pool.submit(draw_part, work.task, work.length, part) for part in parts])
            if len(waiting) > PLACES_AHEAD:
                yield {number: sample for job in waiting.popleft() for number, sample in job.result().items()}
        while waiting:
            yield {number: sample for job in waiting.popleft() for number, sample in job.result().items()}
    finally:
        pool.shutdown(cancel_futures=True)


def answer_work(
    works: Sequence[Work],
    drawn: Iterable[Mapping[int, RulerSample]],
    respondent: Respondent,
    store: AnswerStore,
    progress: Callable[[Cell, int], None],
) -> None:
    """Ask everything that is open and keep the answers.

    Args:
        drawn: the samples of every work, of `draw_ahead`.
        progress: told after every batch how many samples of which cell it had.
    """
    size = respondent.setup.batch_size
    for work, samples in zip(works, drawn, strict=True):
        for cell, numbers in work.cells:
            keys = respondent.setup.keys(cell, numbers)
            for first in range(0, len(numbers), size):
                batch = [(number, samples[number]) for number in numbers[first : first + size]]
                for answer in respondent.answer(cell, batch):
                    store.put(keys[answer.number], answer._asdict())
                progress(cell, len(batch))


def gather_answers(
    cells: Sequence[Cell], numbers: Sequence[int], setup: RulerSetup, store: AnswerStore, processes: Ranks
) -> list[list[RulerAnswer]] | None:
    """All answers of each cell in the order of their numbers, on rank 0; None on the others.

    Args:
        numbers: the share of this process.
    """
    own = [[store[key] for key in setup.keys(cell, numbers).values()] for cell in cells]
    shares = processes.gather_object(own)
    if shares is None:
        return None
    joined = ([RulerAnswer(**one) for share in shares for one in share[place]] for place in range(len(cells)))
    return [sorted(answers, key=lambda one: one.number) for answers in joined]
