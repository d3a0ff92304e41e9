"""A run of RULER: which answers it needs, the asking of those that no earlier run has kept, and all of them together.

In: a model that answers, as `RulerModel` does, an `AnswerStore`, cells and the numbers of this process's samples. Out:
the answers of every cell on the first process. An interrupted run goes on with its store, and more settings find the
dense answers there. Knows nothing of intervals and tables.
"""

import functools
import itertools
import multiprocessing
import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from baatt.lab.answers import AnswerStore, request_key
from baatt.lab.ranks import Ranks
from baatt.lab.ruler.cells import Cell
from baatt.lab.ruler.model import RulerAnswer, RulerSetup

#: Places whose samples are drawn ahead of their use; all at once would not fit into memory at 128K tokens.
PLACES_AHEAD = 2
#: What the key of a recall has behind that of its answer.
RECALL = "-recall"
#: What is still to be asked: place, a task at a length -> its cells, each with the numbers of its open samples.
Open = dict[tuple[str, int], dict[Cell, list[int]]]
#: What is told after every batch: its cell, and how many samples it had.
Watch = Callable[[Cell, int], None]


class Setup(Protocol):
    """What answers depend on beside cell and number."""

    @property
    def batch_size(self) -> int: ...

    def keys(self, cell: Cell, numbers: Iterable[int]) -> dict[int, str]: ...


class Model(Protocol):
    """What a run asks; see `RulerModel`. Samples are whatever its `draw` gives."""

    @property
    def setup(self) -> Setup: ...

    @property
    def draw(self) -> Callable[..., list[Any]]: ...

    def check(self, task: str, length: int) -> None: ...

    def warm_up(self, cell: Cell) -> None: ...

    def answer(self, cell: Cell, batch: Sequence[tuple[int, Any]]) -> list[RulerAnswer]: ...

    def recalls(self, cells: Sequence[Cell], sample: Any) -> list[Sequence[float] | None]: ...


def same_everywhere(setup: RulerSetup, cells: Sequence[Cell], count: int, ranks: Ranks) -> bool:
    """Whether all processes are about to answer the same samples in the same way."""
    identity = request_key(sorted(key for cell in cells for key in setup.keys(cell, (count,)).values()))
    found = ranks.all_gather(torch.tensor(int(identity[:15], 16), device="cpu"))
    return bool((found == found.flatten()[0]).all())


@dataclass(frozen=True)
class Run:
    """The share of one process.

    Args:
        cells: as `make_cells` has them. numbers: of the samples of every cell.
        workers: processes that draw samples while earlier ones are answered; 0 draws here, when asked.
        recalls: samples below this number are also asked for the attention mass that sparse cells keep.
    """

    model: Model
    store: AnswerStore
    cells: Sequence[Cell]
    numbers: Sequence[int]
    workers: int = 0
    recalls: int = 0

    def open(self) -> Open:
        """What the store has no answer for, in the order of the cells."""
        return self._missing(self.cells, self.numbers)

    def open_recalls(self) -> Open:
        """What the store has no recall for."""
        sparse = [cell for cell in self.cells if cell.config is not None]
        return self._missing(sparse, [number for number in self.numbers if number < self.recalls], RECALL)

    def _missing(self, cells: Iterable[Cell], numbers: Sequence[int], suffix: str = "") -> Open:
        places: Open = {}
        for cell in cells:
            keys = self.model.setup.keys(cell, numbers)
            if missing := [number for number, key in keys.items() if key + suffix not in self.store]:
                places.setdefault((cell.task, cell.length), {})[cell] = missing
        return places

    def prepare(self) -> None:
        """Refuse what cannot run before anything is asked, and warm up every setting.

        Raises:
            RuntimeError, ValueError: as `RulerModel.check` and `RulerModel.warm_up`.
        """
        places = self.open()
        for task, length in places:
            self.model.check(task, length)
        for cell in {cell[2:]: cell for cells in places.values() for cell in cells}.values():
            self.model.warm_up(cell)

    def draw(self, places: Open) -> Generator[dict[int, Any], None, None]:
        """The samples of every place in turn, by number. Close the iterator to end the workers."""
        draw = functools.partial(_draw_some, self.model.draw)
        wanted = [(*place, sorted({n for some in cells.values() for n in some})) for place, cells in places.items()]
        if self.workers == 0:
            yield from (draw(*place) for place in wanted)
            return
        pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"))
        try:
            waiting: deque[list[Future[dict[int, Any]]]] = deque()
            following = iter(wanted)
            for _ in wanted:
                for task, length, numbers in itertools.islice(following, PLACES_AHEAD + 1 - len(waiting)):
                    parts = [numbers[first :: self.workers] for first in range(min(self.workers, len(numbers)))]
                    waiting.append([pool.submit(draw, task, length, part) for part in parts])
                yield {number: sample for part in waiting.popleft() for number, sample in part.result().items()}
        finally:
            pool.shutdown(cancel_futures=True)

    def answer(self, watch: Watch = lambda cell, count: None, shuffle: random.Random | None = None) -> None:
        """Ask everything that is open and keep the answers.

        Args:
            watch: told after every batch.
            shuffle: asks the batches of a place in random order, so that all cells meet the same machine.
        """
        size, places = self.model.setup.batch_size, self.open()
        with closing(self.draw(places)) as drawn:
            for cells, samples in zip(places.values(), drawn, strict=True):
                batches = [
                    (cell, numbers[first : first + size])
                    for cell, numbers in cells.items()
                    for first in range(0, len(numbers), size)
                ]
                if shuffle is not None:
                    shuffle.shuffle(batches)
                for cell, numbers in batches:
                    keys = self.model.setup.keys(cell, numbers)
                    for answer in self.model.answer(cell, [(number, samples[number]) for number in numbers]):
                        self.store.put(keys[answer.number], answer._asdict())
                    watch(cell, len(numbers))

    def measure_recalls(self) -> None:
        """Measure the attention mass that sparse cells keep, wherever the store has none."""
        places = self.open_recalls()
        with closing(self.draw(places)) as drawn:
            for open_cells, samples in zip(places.values(), drawn, strict=True):
                for number, sample in samples.items():
                    cells = [cell for cell, numbers in open_cells.items() if number in numbers]
                    for cell, found in zip(cells, self.model.recalls(cells, sample), strict=True):
                        self.store.put(self.model.setup.keys(cell, [number])[number] + RECALL, found)

    def kept(self) -> list[list[RulerAnswer]]:
        """The answers of each cell that the store has, with the recalls that were asked for."""
        found = []
        for cell in self.cells:
            keys = self.model.setup.keys(cell, self.numbers)
            found.append([
                RulerAnswer(**self.store[key] | {"recall": self.store.get(key + RECALL) if n < self.recalls else None})
                for n, key in keys.items() if key in self.store
            ])  # fmt: skip
        return found

    def gather(self, ranks: Ranks) -> list[list[RulerAnswer]] | None:
        """All answers of each cell in the order of their numbers, on rank 0; None on the others."""
        if (shares := ranks.gather_object(self.kept())) is None:
            return None
        return [sorted(itertools.chain(*parts), key=lambda one: one.number) for parts in zip(*shares, strict=True)]


def _draw_some(draw: Callable[..., list[Any]], task: str, length: int, numbers: Iterable[int]) -> dict[int, Any]:
    return {number: draw(task, length, 1, first=number)[0] for number in numbers}
