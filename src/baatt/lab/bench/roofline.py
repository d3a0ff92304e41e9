"""Two panels from a stored benchmark: speed-up over length, and a roofline of the attention kernel.

In: the JSON of `baatt bench`. Out: a PNG.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from baatt.lab.plots import Records, picture
from baatt.lab.records import short_commit
from baatt.lab.tables import Record, short_length

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2")
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")


def draw_report(report: Record, path: Path) -> None:
    """Write both panels to a PNG.

    Raises:
        ImportError: matplotlib is missing (`pip install baatt[plots]`).
        ValueError: there is nothing to draw.
    """
    records = report["records"]
    if not records:
        raise ValueError("records must hold at least one measurement to be drawn, got none")
    first = records[0]
    heads = f"H{first['shape'][1]}" + ("" if first["groups"] == first["shape"][1] else f":{first['groups']}")
    sizes = f"B{first['shape'][0]} {heads} D{first['shape'][3]}, {first['dtype']}"
    where = f"torch {report['versions']['torch']}, commit {short_commit(report['commit'])}"
    with picture(path, f"{report['device']}, {sizes}, {where}", 1, 2, (14, 7)) as axes:
        _draw_speedup(axes[0][0], [one for one in records if one["what"] == "operator"])
        _draw_roofline(axes[0][1], records, report)
        for axis in axes[0]:
            axis.grid(alpha=0.3, which="major")
            if axis.get_legend_handles_labels()[0]:  # eight lines leave no corner free
                axis.minorticks_off()
                axis.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
                axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)


def _by_sparsity(records: Records) -> Iterator[tuple[int, str, Records, dict[str, Any]]]:
    """Number, sparsity in words, records by length, and the look of a line."""
    for number, sparsity in enumerate(sorted({one["sparsity"] for one in records})):
        chosen = sorted((one for one in records if one["sparsity"] == sparsity), key=lambda one: one["shape"][2])
        look = {"linestyle": LINES[number % 4], "marker": MARKERS[number % 4], "markersize": 5}
        yield number, f"{sparsity:.0%} sparse", chosen, look


def _draw_speedup(axis: Any, records: Records) -> None:
    names = list(dict.fromkeys(name for one in records for name in one["speedup"]))
    for _, sparsity, chosen, look in _by_sparsity(records):
        for color, name in enumerate(names):
            points = [(one["shape"][2], one["speedup"][name]) for one in chosen if name in one["speedup"]]
            if points:
                label = f"over {name}, {sparsity}"
                axis.plot(*zip(*points, strict=True), color=COLORS[color % 6], label=label, **look)
    axis.axhline(1, color="0.5", linewidth=1)
    axis.set(title="Operator, selection included", xlabel="tokens", ylabel="speed-up (times)")
    if not names:
        axis.text(0.5, 0.5, "no baseline was measured", transform=axis.transAxes, ha="center")
        return
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    lengths = sorted({one["shape"][2] for one in records})
    axis.set_xticks(lengths, [short_length(length) for length in lengths])


def _draw_roofline(axis: Any, records: Records, report: Record) -> None:
    from matplotlib.ticker import LogLocator

    peak, bandwidth = report["matrix_peak_tflops"], report["memory_bandwidth"]
    ridge = peak * 1e12 / bandwidth
    intensities = [one["arithmetic_intensity"] for one in records]
    left, right = min(ridge, *intensities) / 4, max(ridge, *intensities) * 4
    low, high = min([peak, *(one["kept_tflops"] for one in records)]) / 2, peak * 1.6
    axis.plot([left, ridge], [left * bandwidth / 1e12, peak], color="0.35", label=f"memory {bandwidth / 1e9:,.0f} GB/s")
    product = f"{report['matrix_peak_dtype']} product {peak:.3g} TFLOP/s"
    axis.plot([ridge, right], [peak, peak], color="0.35", linestyle="--", label=product)
    for number, sparsity, chosen, look in _by_sparsity(records):
        points = [(one["arithmetic_intensity"], one["kept_tflops"]) for one in chosen]
        color = COLORS[number % 6]
        axis.plot(*zip(*points, strict=True), color=color, label=f"attention, {sparsity}", **look)
        ends = {0: ((-8, -3), "right"), len(chosen) - 1: ((0, -15), "center")}  # beside the line, which rises
        for place, (offset, alignment) in ends.items():
            text, style = short_length(chosen[place]["shape"][2]), {"fontsize": 9, "ha": alignment, "color": color}
            axis.annotate(text, points[place], offset, textcoords="offset points", **style)
    axis.set(
        title="Roofline of the attention kernel, ceilings measured in the same run",
        xlabel="FLOP per byte (q, k, v, output and lists moved once)", ylabel="TFLOP/s of kept pairs",
        xscale="log", yscale="log", xlim=(left, right), ylim=(low, high),
    )  # fmt: skip
    axis.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
