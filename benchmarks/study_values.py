"""Numbers of the prose from studies of `baatt analyze`, as values.py has those of benchmarks.

A file is named as it is stored, an order as `none`, `k256` or `qk1024`: the sorted side and the segment.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tables import share_of

Record = Mapping[str, Any]
Read = Callable[[str], Record]


def kept(read: Read, stored: str, score: str, order: str, sparsity: str, beta: str = "0.5") -> str:
    """Share of the attention that a score keeps, in percent: `kept recall_smollm2 covariance qk1024 50%`."""
    wanted = {"layer": None, "score": score, "beta": float(beta), "sparsity": share_of(sparsity)}
    for one in in_order(read(stored), order):
        if wanted.items() <= one.items():
            return f"{100 * one['recall_mean']:.1f}"
    raise LookupError(f"{stored} has no {score} at {sparsity} in the order {order} with beta {beta}")


def bound_above(read: Read, stored: str, order: str, least: str) -> str:
    """In how many layers the bound's R is above a number: `bound_above bound_smollm2 none 0.5`."""
    return str(sum(one["correlation_largest"] > float(least) for one in in_order(read(stored), order)))


def bound_least(read: Read, stored: str, order: str) -> str:
    """The least R of a layer: `bound_least bound_smollm2 qk1024`."""
    return f"{min(one['correlation_largest'] for one in in_order(read(stored), order)):.2f}"


def bound_better(read: Read, stored: str, order: str, other: str) -> str:
    """In how many layers R is higher in one order than in another: `bound_better bound_smollm2 qk1024 none`."""
    both = zip(*(in_order(read(stored), name) for name in (order, other)), strict=True)
    return str(sum(one["correlation_largest"] > before["correlation_largest"] for one, before in both))


def blocks_needed(read: Read, stored: str, order: str, layer: str) -> str:
    """Share of the blocks that hold 90 % of the attention, in percent: `blocks_needed layers_smollm2 k1024 4`."""
    (one,) = (one for one in in_order(read(stored), order) if one["layer"] == int(layer))
    return f"{100 * one['blocks_for_most']:.0f}"


def keys_from(read: Read, stored: str, field: str, first: str, last: str) -> str:
    """Least and largest value in layers from one to another, shares in percent: `keys_from keys_smollm2 on_few 3 9`."""
    found = [one[field] for one in read(stored)["records"] if int(first) <= one["layer"] <= int(last)]
    if field.endswith(("_norm", "_variation", "_correlation")):
        return f"{min(found):.2f} to {max(found):.2f}"
    return f"{100 * min(found):.0f} to {100 * max(found):.0f}"


def most(read: Read, stored: str, field: str) -> str:
    """The largest share of a layer, in percent: `most keys_needle-18m on_heaviest`."""
    return f"{100 * max(one[field] for one in read(stored)['records']):.1f}"


def keys_at(read: Read, stored: str, place: str) -> str:
    """In how many layers the key at a place gets most: `keys_at keys_smollm2 7`."""
    return str(sum(one["heaviest_key"] == int(place) for one in read(stored)["records"]))


def in_order(record: Record, order: str) -> Iterator[Record]:
    """Records in one order."""
    for one in record["records"]:
        segment = "" if one["sort"] == "none" else one["segment"]
        if order == f"{one['sort']}{segment}":
            yield one


VALUES: dict[str, Callable[..., str]] = {
    "kept": kept,
    "bound_above": bound_above,
    "bound_least": bound_least,
    "bound_better": bound_better,
    "blocks_needed": blocks_needed,
    "keys_from": keys_from,
    "keys_at": keys_at,
    "most": most,
}
