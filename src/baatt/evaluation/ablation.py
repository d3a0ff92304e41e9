"""A grid of dials against the accuracy on needle tasks: cells, their records, and a file that a later run goes on with.

In: model, samples and cells. Out: a record per cell with Wilson intervals and McNemar's test against dense attention on
the same samples. Does not print or draw.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from baatt.config import BAAttConfig
from baatt.evaluation.retrieval import Answer
from baatt.lab.ruler.scoring import whole_share
from baatt.lab.statistics import mcnemar_p, wilson_interval

STUDY = "ablation"


class Cell(NamedTuple):
    """What one cell of the grid runs: config None is dense attention, `score` a name in `baatt.scores.SCORES`."""

    task: str
    length: int
    config: BAAttConfig | None
    score: str

    @property
    def sparse(self) -> BAAttConfig | None:
        """The config with the score that is used, None for dense attention."""
        return None if self.config is None else dataclasses.replace(self.config, score=self.score)

    @property
    def dials(self) -> dict[str, Any]:
        """The config with the score that is used, {} for dense attention."""
        return {} if self.config is None else dataclasses.asdict(self.config) | {"score": self.score}


def make_cells(
    tasks: Sequence[str], lengths: Sequence[int], dials: Mapping[str, Sequence[Any]], scores: Sequence[str]
) -> list[Cell]:
    """Every combination; for each task and length dense attention comes first.

    An unsorted order does not depend on the segment, nor a score other than the operator's own on beta: of cells that
    would run the same only the first is kept.

    Args:
        dials: name in `BAAttConfig` -> values.

    Raises:
        TypeError, ValueError: as `BAAttConfig`.
    """
    cells: dict[Cell, None] = {}
    for task, length in itertools.product(tasks, lengths):
        cells[Cell(task, length, None, "dense")] = None
        for score, *values in itertools.product(scores, *dials.values()):
            config = BAAttConfig(**dict(zip(dials, values, strict=True)))
            if config.sort == "none":
                config = dataclasses.replace(config, segment=None)
            if score != "covariance":
                config = dataclasses.replace(config, beta=0.0)
            cells[Cell(task, length, config, score)] = None
    return list(cells)


def make_record(cell: Cell, answers: Sequence[Answer], dense: Mapping[str, Any] | None, **more: Any) -> dict[str, Any]:
    """The record of a cell.

    accuracy: share of samples whose answer contains every value (RULER's measure), with its Wilson interval;
    accuracy_whole: share that is right word for word; mcnemar_p, mcnemar_p_whole: two-sided, against dense attention on
    the same samples; right, right_whole: a 0 or 1 per sample.

    Args:
        dense: the record of dense attention; None if this is it.
    """
    right = [int(one.exact) for one in answers]
    whole = [int(whole_share(one.text, one.sample.values) == 1) for one in answers]
    low, high = wilson_interval(sum(right), len(right))
    right_dense, whole_dense = (right, whole) if dense is None else (dense["right"], dense["right_whole"])
    return {
        "study": STUDY, "task": cell.task, "length": cell.length, "config": cell.dials, "n": len(right),
        "accuracy": sum(right) / len(right), "ci_low": low, "ci_high": high,
        "accuracy_whole": sum(whole) / len(whole), "dense_accuracy": sum(right_dense) / len(right_dense),
        "dense_accuracy_whole": sum(whole_dense) / len(whole_dense),
        "mcnemar_p": mcnemar_p(right_dense, right), "mcnemar_p_whole": mcnemar_p(whole_dense, whole),
        "seconds_per_answer": sum(one.seconds for one in answers) / len(answers),
        "right": right, "right_whole": whole, **more,
    }  # fmt: skip


class Store:
    """The file of a grid: written again after every cell, and read by a later run that goes on with it.

    Every record carries the header of the run that made it: a run may go on at another commit or on another device.

    Raises:
        ValueError: the file is of another study, or of other samples.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], same: Sequence[str]) -> None:
        self.path, self.header = path, dict(header)
        self.records: list[dict[str, Any]] = []
        if path.exists():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                self.records = stored["records"]
                changed = [name for name in same if stored[name] != header[name]]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} must be a file of this command to go on with, got {error!r}") from None
            if changed:
                was = ", ".join(f"{name} {stored[name]!r}" for name in changed)
                raise ValueError(f"{path} was made with {was}: give another file or the same values")

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a cell that is done."""
        wanted = (cell.task, cell.length, cell.dials)
        found = (one for one in self.records if (one["task"], one["length"], one["config"]) == wanted)
        return next(found, None)

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record; a reader never sees half a file."""
        record.update(self.header)
        self.records.append(record)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.header | {"records": self.records}) + "\n", encoding="utf-8")
        partial.replace(self.path)


def run_grid(
    cells: Sequence[Cell],
    store: Store,
    ask: Callable[[Cell], list[Answer]],
    measure: Callable[[Cell], Mapping[str, Any]],
    progress: Callable[[Cell], None],
) -> list[dict[str, Any]]:
    """The records of all cells, in their order; those that the store has are not run again.

    Args:
        cells: of `make_cells`: dense attention before the others of its task and length.
        ask: answers of a cell, over the same samples for cells of the same task and length.
        measure: more fields for a record.
        progress: called after every cell.
    """
    dense: dict[tuple[str, int], dict[str, Any]] = {}
    records = []
    for cell in cells:
        place = cell.task, cell.length
        record = store.find(cell)
        if record is None:
            record = make_record(cell, ask(cell), dense.get(place), **measure(cell))
            store.add(record)
        if cell.config is None:
            dense[place] = record
        records.append(record)
        progress(cell)
    return records
