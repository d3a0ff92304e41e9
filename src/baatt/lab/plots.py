"""Pictures of what the laboratory found, as PNGs: recall, the bound, accuracy, and the frame that all drawers share.

In: records as stored. Out: a file. matplotlib is imported only to draw.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from baatt.lab.describe import differences, order_name, score_name
from baatt.lab.tables import Record

Records = Sequence[Record]


@contextmanager
def picture(
    path: Path, caption: str, rows: int, columns: int, size: tuple[float, float], **options: Any
) -> Iterator[Any]:
    """Panels to draw into, an array [rows, columns] of matplotlib's axes; the file is written in the end.

    Args:
        size: of the whole picture, in inches. options: of `matplotlib.pyplot.subplots`.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'baatt[plots]'") from error
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    try:
        yield axes
        figure.suptitle(caption, fontsize=11)
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)


def draw_recall(records: Records, caption: str, path: Path) -> None:
    """Mean (line) and 5th percentile (dashes) of the kept attention mass over sparsity, a panel per order."""
    whole = [one for one in records if one["layer"] is None]
    panels = _grouped(whole, lambda one: f"{order_name(one)}, beta {one['beta']:g}", lambda one: one["score"])
    with picture(path, caption, 1, len(panels), (max(7, 5.2 * len(panels)), 5.6), sharey=True) as axes:
        for axis, (panel, lines) in zip(axes[0], panels.items(), strict=True):
            for number, (score, line) in enumerate(lines.items()):
                points = sorted((one["achieved_sparsity"], one["recall_mean"], one["recall_p5"]) for one in line)
                skipped, means, lows = zip(*points, strict=True)
                axis.plot(skipped, means, "-o", color=f"C{number}", markersize=4, label=score)
                axis.plot(skipped, lows, "--", color=f"C{number}", linewidth=1)
            axis.set(title=panel, xlabel="block pairs skipped", ylim=(0, 1.02))
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel("attention mass kept: mean, dashed 5th percentile")
        legend_below(axes, 7)


def draw_bound(records: Records, caption: str, path: Path) -> None:
    """The paper's Fig. 2: U of E9 against the true largest deviation, a row per layer, a column per order."""
    layers = list(dict.fromkeys(one["layer"] for one in records))
    orders = list(dict.fromkeys(map(order_name, records)))
    size = 4.4 * len(orders), 3.6 * len(layers)
    with picture(path, caption, len(layers), len(orders), size, sharex="row", sharey="row") as axes:
        for one in records:
            axis = axes[layers.index(one["layer"])][orders.index(order_name(one))]
            axis.plot(*zip(*one["points"], strict=True), ".", markersize=2, alpha=0.5)
            title = f"layer {one['layer']}, {order_name(one)}\nR = {one['correlation_largest']:.3f}"
            axis.set_title(title, fontsize=10)
            axis.grid(alpha=0.3)
        for row in axes:
            row[0].set_ylabel("largest deviation of a logit")
        for axis in axes[-1]:
            axis.set_xlabel("bound U")


def draw_keys(records: Records, caption: str, path: Path) -> None:
    """Over the layers: the share of the attention that goes to few keys, and what their norms say."""
    few = {
        "on_first_block": "the first block of keys", "on_heaviest": "the key that gets most",
        "on_few": "the 1 % of the keys that get most",
    }  # fmt: skip
    norms = {
        "heaviest_norm": "norm of the key that gets most, over the mean",
        "key_norm_variation": "norms of all keys: standard deviation over mean",
        "norm_correlation": "R of a key's norm with the logarithm of what it gets",
    }
    layers = [one["layer"] for one in records]
    with picture(path, caption, 1, 2, (12, 5.2)) as axes:
        for axis, lines in zip(axes[0], (few, norms), strict=True):
            for field, name in lines.items():
                axis.plot(layers, [one[field] for one in records], "-o", markersize=3, label=name)
            axis.axhline(0, color="0.4", linewidth=0.8)
            axis.set(xlabel="layer")
            axis.grid(alpha=0.3)
            axis.legend(frameon=False, fontsize=9)
        axes[0][0].set(ylabel="share of the attention of all queries")


def draw_accuracy(records: Records, caption: str, path: Path) -> None:
    """Accuracy over sparsity with 95 % intervals, a line per order and score, a panel per task and length."""

    def line_of(one: Record) -> str:
        if not one["config"]:
            return "dense"
        return ", ".join([order_name(one["config"]), score_name(one["config"]), *differences(one, records)])

    panels = _grouped(records, lambda one: f"{one['task']}, {one['length']} tokens", line_of)
    width = max(9, 5.6 * len(panels))
    with picture(path, caption, 1, len(panels), (width, 6.5), sharey=True) as axes:
        for axis, (panel, lines) in zip(axes[0], panels.items(), strict=True):
            for dense in lines.pop("dense", []):
                axis.axhline(dense["accuracy"], color="0.4", label=", ".join(["dense", *differences(dense, records)]))
                axis.axhspan(dense["ci_low"], dense["ci_high"], color="0.4", alpha=0.15)
            for number, (name, line) in enumerate(lines.items()):
                line.sort(key=lambda one: one["config"]["sparsity"])
                places, middle = zip(*((one["config"]["sparsity"], one["accuracy"]) for one in line), strict=True)
                spread = (
                    [max(0.0, one["accuracy"] - one["ci_low"]) for one in line],
                    [max(0.0, one["ci_high"] - one["accuracy"]) for one in line],
                )
                color = f"C{number % 10}"
                axis.errorbar(places, middle, spread, fmt="-o", color=color, markersize=4, capsize=3, label=name)
            axis.set(title=panel, xlabel="sparsity", ylim=(-0.02, 1.02))
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel("RULER's score")
        legend_below(axes, int(width // 4.2))


def _grouped(
    records: Records, panel_of: Callable[[Record], str], line_of: Callable[[Record], str]
) -> dict[str, dict[str, list[Record]]]:
    panels: dict[str, dict[str, list[Record]]] = {}
    for one in records:
        panels.setdefault(panel_of(one), {}).setdefault(line_of(one), []).append(one)
    return panels


def legend_below(axes: Any, columns: int) -> None:
    """One legend of the first panel's lines below all panels."""
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure = axes[0][0].figure
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False)
