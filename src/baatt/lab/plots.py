"""A picture as a PNG: the shared frame of all drawers. matplotlib is imported only to draw.

In: what to draw into. Out: a file. Knows nothing of what is drawn.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NEEDED = "drawing needs matplotlib: pip install 'baatt[plots]'"


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
        raise ImportError(NEEDED) from error
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    try:
        yield axes
        figure.suptitle(caption, fontsize=11)
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)


def legend_below(axes: Any, columns: int) -> None:
    """One legend below all panels, with the labels of the first."""
    handles, labels = axes[0][0].get_legend_handles_labels()
    axes[0][0].figure.legend(
        handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False
    )


def check_picture(path: Path, option: str) -> None:
    """Refuse a picture that could not be drawn before minutes are spent on it.

    Raises:
        ValueError: no such folder, another format, or no matplotlib.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{option} must lie in an existing folder, {path.parent} is none")
    if path.suffix.lower() != ".png":
        raise ValueError(f"{option} must end in .png, got {path.name!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(NEEDED)
