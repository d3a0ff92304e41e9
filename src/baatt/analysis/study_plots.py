"""Pictures of what `baatt analyze` measured: recall over sparsity, and the bound against the truth.

In: records as stored. Out: a PNG. matplotlib is imported only to draw.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Records = Sequence[Mapping[str, Any]]


def draw_recall(records: Records, caption: str, path: Path) -> None:
    """Mean (line) and 5th percentile (dashes) of the kept attention mass over sparsity, a panel per order.

    Raises:
        ImportError: matplotlib is missing (`pip install baatt[plots]`).
    """
    pyplot = _pyplot()
    whole = [one for one in records if one["layer"] is None]
    panels = list(dict.fromkeys((one["sort"], one["segment"], one["beta"]) for one in whole))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(max(7, 5.2 * len(panels)), 5.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        here = [one for one in whole if (one["sort"], one["segment"], one["beta"]) == panel]
        for number, score in enumerate(dict.fromkeys(one["score"] for one in here)):
            points = sorted((one["achieved_sparsity"], one["recall_mean"], one["recall_p5"]) for one in here
                            if one["score"] == score)  # fmt: skip
            skipped, means, lows = zip(*points, strict=True)
            axis.plot(skipped, means, "-o", color=f"C{number}", markersize=4, label=score)
            axis.plot(skipped, lows, "--", color=f"C{number}", linewidth=1)
        axis.set(
            title=order_name(panel[0], panel[1]) + f", beta {panel[2]:g}", xlabel="block pairs skipped", ylim=(0, 1.02)
        )
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("attention mass kept: mean, dashed 5th percentile")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(7, len(labels)), frameon=False)
    figure.suptitle(caption, fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_bound(records: Records, caption: str, path: Path) -> None:
    """The paper's Fig. 2: U of E9 against the true largest deviation, a row per layer, a column per order.

    Raises:
        ImportError: matplotlib is missing (`pip install baatt[plots]`).
    """
    pyplot = _pyplot()
    layers = list(dict.fromkeys(one["layer"] for one in records))
    orders = list(dict.fromkeys((one["sort"], one["segment"]) for one in records))
    figure, axes = pyplot.subplots(
        len(layers), len(orders), figsize=(4.4 * len(orders), 3.6 * len(layers)), sharex="row", sharey="row",
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for one in records:
        axis = axes[layers.index(one["layer"])][orders.index((one["sort"], one["segment"]))]
        bounds, truths = zip(*one["points"], strict=True)
        axis.plot(bounds, truths, ".", markersize=2, alpha=0.5)
        axis.set_title(
            f"layer {one['layer']}, {order_name(one['sort'], one['segment'])}\nR = {one['correlation_largest']:.3f}",
            fontsize=10,
        )
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("largest deviation of a logit")
    for axis in axes[-1]:
        axis.set_xlabel("bound U")
    figure.suptitle(caption, fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_ablation(records: Records, caption: str, path: Path) -> None:
    """Accuracy over sparsity with 95 % intervals, a line per order and score, a panel per task and length.

    Raises:
        ImportError: matplotlib is missing (`pip install baatt[plots]`).
    """
    pyplot = _pyplot()
    panels = list(dict.fromkeys((one["task"], one["length"]) for one in records))
    width = max(9, 5.6 * len(panels))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(width, 6.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        here = [one for one in records if (one["task"], one["length"]) == panel]
        for dense in (one for one in here if not one["config"]):
            axis.axhline(dense["accuracy"], color="0.4", label="dense")
            axis.axhspan(dense["ci_low"], dense["ci_high"], color="0.4", alpha=0.15)
        lines: dict[str, list[Mapping[str, Any]]] = {}
        for one in (one for one in here if one["config"]):
            config = one["config"]
            name = f"{order_name(config['sort'], config['segment'])}, {score_name(config)}"
            lines.setdefault(name, []).append(one)
        for number, (name, line) in enumerate(lines.items()):
            line.sort(key=lambda one: one["config"]["sparsity"])
            middle = [one["accuracy"] for one in line]
            spread = (
                [max(0.0, one["accuracy"] - one["ci_low"]) for one in line],
                [max(0.0, one["ci_high"] - one["accuracy"]) for one in line],
            )
            places = [one["config"]["sparsity"] for one in line]
            axis.errorbar(
                places, middle, spread, fmt="-o", color=f"C{number % 10}", markersize=4, capsize=3, label=name
            )
        axis.set(title=f"{panel[0]}, {panel[1]} tokens", xlabel="sparsity", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of samples with every value right")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=int(width // 4.2), frameon=False)
    figure.suptitle(caption, fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def order_name(sort: str, segment: int | None) -> str:
    """`unsorted`, `qk sorted in segments of 1024`, `k sorted as a whole`."""
    if sort == "none":
        return "unsorted"
    return f"{sort} sorted " + ("as a whole" if segment is None else f"in segments of {segment}")


def score_name(config: Mapping[str, Any]) -> str:
    """`beta 0.5` for the operator's own score, else the name of the rival."""
    return f"beta {config['beta']:g}" if config["score"] == "covariance" else str(config["score"])


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'baatt[plots]'") from error
    return pyplot
