"""Tables of `baatt evaluate fidelity` on a real pretrained model: scores, a profile of its layers, what was asked.

`python benchmarks/fidelity_tables.py STORED PICTURE` draws a stored run again, in words for those who did not run it.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tables import block, crossed, source, verdict

from baatt.lab.fidelity.report import draw_fidelity, kl_text, layer_table, recalled_text, setting_names
from baatt.lab.statistics import bootstrap_interval
from baatt.lab.tables import Record, Table, percent, short_length, signed_interval

#: Asked of clusters at this length and sparsity: digits lost in points, KL over that of exact mass by its mean.
LENGTH, SPARSITY, MOST_LOST, MOST_KL = 8192, 0.7, 1.0, 1.5

#: What cells of these tables hold.
UNITS = (
    "KL to the dense model in nats a token of the second half; digits predicted right, in percent; 95 % bootstrap "
    "intervals over documents."
)


def by_score(record: Record) -> str:
    """A row per length and score, a column per sparsity: KL and digits recalled."""
    sparse = [one for one in record["records"] if one["config"]]
    header, rows = crossed(
        sparse,
        ("tokens", "score"),
        lambda one: (short_length(one["length"]), one["config"]["score"]),
        lambda one: percent(one["config"]["sparsity"]),
        lambda one: f"{kl_text(one)}; {recalled_text(one)}",
    )
    dense = ", ".join(
        f"{recalled_text(one)} at {short_length(one['length'])}" for one in record["records"] if not one["config"]
    )
    caption = (
        f"{record['model']}, {record['documents']} documents a length, {record['needles']} numbers in each, "
        f"{record['dtype']}, every layer sparse, the first key block kept. {UNITS} `covariance` is "
        "the paper's score, `antidiagonal-8` XAttention's, `exact` the attention mass itself, its mean over queries. "
        f"Dense: {dense}."
    )
    return block(record, header, rows, caption)


def by_first(records: Sequence[Record]) -> str:
    """A row per score with the first block free and kept, a column per sparsity: KL and digits recalled."""
    sparse = [one for record in records for one in record["records"] if one["config"]]
    header, rows = crossed(
        sparse,
        ("score", "first block"),
        lambda one: (one["config"]["score"], "kept" if one["config"]["keep_first"] else "free"),
        lambda one: percent(one["config"]["sparsity"]),
        lambda one: f"{kl_text(one)}; {recalled_text(one)}",
    )
    (dense,) = (one for one in records[0]["records"] if not one["config"])
    caption = (
        f"{records[0]['model']}, {records[0]['documents']} documents of {dense['length']} tokens, "
        f"{records[0]['needles']} numbers in each, {records[0]['dtype']}, every layer sparse. {UNITS} "
        f"Dense: {recalled_text(dense)}."
    )
    return block(list(records), header, rows, caption)


def bars(records: Sequence[Record]) -> str:
    """What was asked beforehand and what was found; the profile, on other numbers than it was made with, last."""
    here = [one for one in records[0]["records"] if one["length"] == LENGTH and one["config"]]
    found = {one["config"]["score"]: one for one in here if one["config"]["sparsity"] == SPARSITY}
    one = found["clusters"]
    ratio = one["kl"] / found["exact"]["kl"]
    lost = 100 * one["recalled_lost"]
    points = signed_interval(*(0 - one[f"recalled_lost{end}"] for end in ("", "_high", "_low")))
    rows = [
        ["clusters, 70 %, digits", f"at most {MOST_LOST:g} point less than dense", points, verdict(lost <= MOST_LOST)],
        [
            "clusters, 70 %, KL",
            f"at most {MOST_KL:g} times exact mass",
            f"{ratio:.2f} times",
            verdict(ratio <= MOST_KL),
        ],
    ]
    for record in records[1:]:
        uniform, profile = (one for one in record["records"] if one["config"])
        gain = bootstrap_interval(
            [a - b for a, b in zip(uniform["kl_of_documents"], profile["kl_of_documents"], strict=True)]
        )
        text = f"{profile['kl']:.3g}; less by {gain.low:.3g} to {gain.high:.3g}"
        rows.append(["profile, 90 %, KL", f"below {uniform['kl']:.3g}, uniform", text, verdict(gain.low > 0)])
    return Table(("of", "asked", "found", ""), rows).markdown()


def profile(record: Record) -> str:
    """Uniform and profile beside each other, of a run with `--policy`."""
    rows = [
        [name, percent(one["sparsity_achieved"], 1), kl_text(one), f"{one['loss']:.3f}", recalled_text(one)]
        for name, one in zip(setting_names(record["records"]), record["records"], strict=True)
    ]
    return block(record, ("setting", "block pairs skipped", "KL", "loss", "digits recalled"), rows)


def layers(record: Record) -> str:
    """What each layer costs alone, and its sparsity in the profile."""
    return f"{layer_table(record['layers'], record['profile']).markdown()}\n\n{source(record | {'records': []})}"


def draw(record: Record, path: Path) -> None:
    """As `--plot` draws it, with a caption that tells what is drawn and names for every reader."""
    words = {"covariance": "the paper's score", "exact": "exact attention mass"}
    records = [
        one | {"config": one["config"] and one["config"] | {"score": words.get(score, score)}}
        for one in record["records"]
        for score in [one["config"].get("score")]
    ]
    caption = (
        f"{record['model']}, every layer sparse; shades are 95 % intervals over {record['documents']} documents.\n"
        "Above: KL to the same model with dense attention, lower is better; every panel has its own scale.\n"
        "Below: share of the digits of planted numbers that are predicted right, with dense attention dashed."
    )
    draw_fidelity(record | {"records": records, "model": caption}, path)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
