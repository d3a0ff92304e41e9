"""Numbers of the prose about the two small models on real pixels, as values.py has those of benchmarks.

A file of questions is named as what follows `vision_`, a sparsity as `50%`, where `0%` is dense attention.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tables import share_of
from vision_tables import USUAL_BETA

Record = Mapping[str, Any]
Read = Callable[[str], Record]


def score(read: Read, stored: str, kind: str, sparsity: str, beta: str = str(USUAL_BETA)) -> str:
    """Right answers of a kind in percent: `pixels_score paper clips 50% 2`; `words` of a file of RULER."""
    return f"{100 * _average(read, stored, kind, sparsity, beta)['accuracy']:.1f}"


def loss(read: Read, stored: str, kind: str, sparsity: str, beta: str = str(USUAL_BETA)) -> str:
    """Points lost against dense attention: `pixels_loss clusters photos 90%`."""
    return f"{0 - 100 * _average(read, stored, kind, sparsity, beta)['difference']:.1f}"


def tasks(read: Read, stored: str, kind: str, sparsity: str) -> str:
    """The least and the largest share of right answers of a task, in percent: `pixels_tasks clusters photos 0%`."""
    whole = read(f"vision_{stored}")
    names = whole["averages"][kind][0]["tasks"]
    found = [100 * one["accuracy"] for one in whole["records"] if one["task"] in names and _is(one, sparsity)]
    return _span(found)


def gap(read: Read, method: str, other: str, tiles: str = "all") -> str:
    """By how many dB clips are nearer to the dense ones than with another way to choose blocks: least and largest mean
    over clips, over all sparsities and shares of dense steps, in an order or in both: `clips_gap clusters paper`."""
    found = [sum(apart) / len(apart) for apart in _apart(read, method, other, tiles)]
    return _span(found)


def nearer(read: Read, method: str, other: str) -> str:
    """How many clips of all are nearer to the dense ones: `clips_nearer clusters paper` may be `90 of 96`."""
    found = [one > 0 for apart in _apart(read, method, other, "all") for one in apart]
    return f"{sum(found)} of {len(found)}"


def dense_steps(read: Read, method: str, share: str) -> str:
    """How many dB a share of dense first steps brings: least and largest mean over clips, over all sparsities and
    orders: `clips_dense_steps clusters 10%`."""
    found = {_cell(one): one for one in read("video")["records"] if one["method"] == method}
    brought = [
        one["psnr"] - found[0.0, sparsity, order]["psnr"]
        for (steps, sparsity, order), one in found.items()
        if steps == share_of(share)
    ]
    return _span(brought)


def _span(numbers: Sequence[float]) -> str:
    """Least and largest, once where they are printed alike."""
    ends = [f"{end(numbers):.1f}" for end in (min, max)]
    return " to ".join(dict.fromkeys(ends))


def _apart(read: Read, method: str, other: str, tiles: str) -> Iterable[list[float]]:
    """By cell of the tables, dB of every clip beyond another way to choose blocks."""
    found = {(one["method"], *_cell(one)): one for one in read("video")["records"] if tiles in ("all", one["tiles"])}
    for cell in dict.fromkeys(key[1:] for key in found):
        here, there = (found[name, *cell]["psnr_of_clips"] for name in (method, other))
        yield [one - beside for one, beside in zip(here, there, strict=True)]


def _cell(one: Record) -> tuple[float, float, str]:
    return one["dense_steps"], one["sparsity"], one["tiles"]


def _average(read: Read, stored: str, kind: str, sparsity: str, beta: str) -> Record:
    averages = read(f"vision_{stored}")["averages"]
    for one in averages if kind == "words" else averages[kind]:
        compensates = one["config"].get("score") == "covariance"
        if _is(one, sparsity) and (not compensates or one["config"]["beta"] == float(beta)):
            return one["by_length"][0]
    raise LookupError(f"vision_{stored} has no {kind} at {sparsity} with beta {beta}")


def _is(one: Record, sparsity: str) -> bool:
    """Whether a record is of a sparsity; dense attention has no config."""
    return one["config"].get("sparsity", 0) == share_of(sparsity)


VALUES: dict[str, Callable[..., str]] = {
    "pixels_score": score,
    "pixels_loss": loss,
    "pixels_tasks": tasks,
    "clips_gap": gap,
    "clips_nearer": nearer,
    "clips_dense_steps": dense_steps,
}
