"""What the answers of a RULER run come to: a record per task, length and setting, and RULER's averages per setting.

In: the answers of cells, dense attention's on the same samples beside them. Out: dicts of JSON values; shares are 0 to
1, tables show them in percent. Scores that are all 0 or 1 get Wilson's interval and McNemar's test, others, such as the
share of four values found, `bounded_interval` of the mean and of the paired difference.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from baatt.lab.ruler.cells import Cell
from baatt.lab.ruler.model import RulerAnswer
from baatt.lab.ruler.scoring import averages
from baatt.lab.statistics import (
    FEW,
    Interval,
    average_interval,
    bootstrap_interval,
    bounded_interval,
    is_right_or_wrong,
    mcnemar_p,
    score_interval,
)

STUDY = "ruler"
Record = dict[str, Any]


def make_records(cells: Sequence[Cell], answers: Sequence[Sequence[RulerAnswer]], study: str = STUDY) -> list[Record]:
    """The record of every cell.

    task, length, config ({} for dense attention), dense_layers, n: what was asked; sampler: only where cells differ in
    it. accuracy: mean of RULER's score, with ci_low and ci_high; accuracy_whole: the same where only whole words count;
    accuracy_exact: share of answers that are the expected text word for word, None where an earlier version kept them;
    dense_accuracy, and the fields of `compare`: against dense attention on the same samples. sparsity_achieved: share
    of block pairs skipped, calls that stay dense included. recall_mean, recall_p5: of the attention mass kept in sparse
    layers, means over samples, where it was measured. seconds_per_answer, tokens_per_second: of one process.
    scores, scores_whole: per sample. commits, devices: of the runs that asked.

    Args:
        cells: for each task, length and sampler dense attention before the others, as `make_cells` has them.
        answers: of each cell, for the same numbers in the same order at every cell of a task and length.
        study: what the records are of.
    """
    several = len({cell.sampler for cell in cells}) > 1
    dense: dict[Cell, list[float]] = {}
    records = []
    for cell, found in zip(cells, answers, strict=True):
        place = Cell(cell.task, cell.length, sampler=cell.sampler)
        scores, whole = [one.score for one in found], [one.whole for one in found]
        if cell.config is None:
            dense[place] = scores
        low, high = score_interval(scores)
        recalls = list(zip(*(one.recall for one in found if one.recall is not None), strict=True))
        seconds, count = sum(one.seconds for one in found), len(found)
        records.append({
            "study": study, "task": cell.task, "length": cell.length, "config": cell.options,
            "dense_layers": cell.dense_layers, "n": count,
            **({"sampler": dataclasses.asdict(cell.sampler)} if several else {}),
            "accuracy": sum(scores) / count, "ci_low": low, "ci_high": high, "accuracy_whole": sum(whole) / count,
            "accuracy_exact": _mean([one.exact for one in found]),
            "dense_accuracy": sum(dense[place]) / count, **compare(dense[place], scores),
            "sparsity_achieved": sum(one.sparsity for one in found) / count,
            **({"recall_mean": _mean(recalls[0]), "recall_p5": _mean(recalls[1])} if recalls else {}),
            "seconds_per_answer": seconds / count,
            "tokens_per_second": sum(one.tokens for one in found) / seconds,
            "evaluations_per_answer": sum(one.evaluations for one in found) / count,
            "scores": scores, "scores_whole": whole,
            "commits": list(dict.fromkeys(one.commit for one in found)),
            "devices": list(dict.fromkeys(one.device for one in found)),
        })  # fmt: skip
    return records


def setting_of(record: Mapping[str, Any]) -> Record:
    """What two records of one setting share: config, dense layers, and the sampler where it is not that of the run."""
    return {name: record[name] for name in ("config", "dense_layers", "sampler") if name in record}


def make_averages(records: Sequence[Record]) -> list[Record]:
    """The averages of every setting, in the order of the records.

    by_length: accuracy and accuracy_whole over all tasks at one length, with `average_interval`, and the difference to
    dense attention with its paired bootstrap interval; mean, rising, falling: over lengths, as `scoring.averages`.

    Args:
        records: of `make_records`, every setting at every task and length, all with the same number of samples.
    """
    settings: dict[str, list[Record]] = {}
    for one in records:
        settings.setdefault(json.dumps(setting_of(one)), []).append(one)
    found = []
    for members in settings.values():
        scores: dict[int, dict[str, float]] = {}
        for one in members:
            scores.setdefault(one["length"], {})[one["task"]] = one["accuracy"]
        over = averages(scores)
        dense = [one for one in records if not one["config"] and one.get("sampler") == members[0].get("sampler")]
        found.append({
            **setting_of(members[0]), "tasks": list(scores[min(scores)]),
            "by_length": [_average_at(length, members, dense) for length in over.by_length],
            "mean": over.mean, "rising": over.rising, "falling": over.falling,
        })  # fmt: skip
    return found


def _average_at(length: int, members: Sequence[Record], dense: Sequence[Record]) -> Record:
    here, beside = ([one for one in records if one["length"] == length] for records in (members, dense))
    mean, dense_mean = (float(np.mean([one["accuracy"] for one in records])) for records in (here, beside))
    low, high = average_interval([(one["accuracy"], one["ci_low"], one["ci_high"]) for one in here])
    difference = _difference_interval([one["scores"] for one in here], [one["scores"] for one in beside])
    return {
        "length": length, "accuracy": mean, "ci_low": low, "ci_high": high,
        "accuracy_whole": float(np.mean([one["accuracy_whole"] for one in here])), "dense_accuracy": dense_mean,
        "difference": mean - dense_mean, "difference_low": difference.low, "difference_high": difference.high,
    }  # fmt: skip


def _difference_interval(scores: Sequence[Sequence[float]], dense: Sequence[Sequence[float]]) -> Interval:
    """Of the average over tasks, sparse less dense, from the scores of each task sample by sample."""
    differences = np.asarray(scores) - np.asarray(dense)
    # Samples of different tasks are independent: the mean over tasks of their n-th samples is a sample of the average.
    rows = differences.mean(axis=0)
    if len(rows) >= FEW and rows.min() < rows.max():
        return bootstrap_interval(rows.tolist())
    tasks = [(sum(row) / len(row), *bounded_interval(row, -1, 1)) for row in differences.tolist()]
    return average_interval(tasks, least=-1)  # a bootstrap knows nothing of what such rows have not seen


def compare(dense: Sequence[float], sparse: Sequence[float]) -> Record:
    """Sparse against dense attention on the same samples.

    difference: of the mean scores, sparse less dense. Of scores that are all 0 or 1: only_dense_right (b) and
    only_sparse_right (c), samples that one of both has right, and mcnemar_p, McNemar's exact two-sided test. Of others:
    difference_low and difference_high, the paired bootstrap's 95 % interval. The fields of the other kind are None.

    Raises:
        ValueError: not the same number of samples.
    """
    if len(dense) != len(sparse):
        raise ValueError(f"both must answer the same samples, got {len(dense)} and {len(sparse)}")
    differences = [after - before for before, after in zip(dense, sparse, strict=True)]
    low = high = lost = won = p = None
    if is_right_or_wrong([*dense, *sparse]):
        lost, won = differences.count(-1), differences.count(1)
        p = mcnemar_p(list(map(round, dense)), list(map(round, sparse)))
    else:
        low, high = bounded_interval(differences, -1, 1)
    return {
        "difference_low": low, "difference_high": high, "only_dense_right": lost, "only_sparse_right": won,
        "mcnemar_p": p, "difference": sum(differences) / len(differences),
    }  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    """None if there is a value that is not known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
