"""Figures as SVG files that are the same for the same records."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dflows.files import atomic_write

__all__ = ["drawing"]


@contextmanager
def drawing(file: Path, description: str = "", **options: Any) -> Iterator[tuple[Any, Any]]:
    """Opens a figure to draw on, and saves it as an SVG file.

    Args:
        file: The SVG file, written whole or not at all.
        description: What the figure shows, in words.
        options: Options of `matplotlib.pyplot.subplots`.

    Yields:
        The figure and its axes.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "dflows"
    figure, axes = plt.subplots(layout="constrained", **options)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield figure, axes
        with atomic_write(file) as unfinished:
            metadata = {"Date": None, "Description": description}
            figure.savefig(unfinished, format="svg", metadata=metadata)
    finally:
        plt.close(figure)
