"""Draws docs/images/sharding.png: which rank holds what of one matrix and its state.

python docs/sharding_picture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402


TARGET = Path(__file__).resolve().parent / "images" / "sharding.png"
# Okabe and Ito's colours, which differ for everybody; grey: the same on every rank.
COLOURS, SAME = ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), "#BBBBBB"


def block(axes: Axes, x: float, y: float, width: float, height: float, ranks: str) -> None:
    """A tensor cut over four ranks by "rows" or "columns", or "all" of it on each of them."""
    pieces = 1 if ranks == "all" else 4
    for k in range(pieces):
        colour = SAME if ranks == "all" else COLOURS[k]
        dx, dy = (width / pieces, height) if ranks == "columns" else (width, height / pieces)
        left = x + (k * dx if ranks == "columns" else 0)
        top = y - (k * dy if ranks != "columns" else 0)
        axes.add_patch(Rectangle((left, top - dy), dx, dy, facecolor=colour, edgecolor="white", linewidth=1.2))


def stacked(axes: Axes, x: float, y: float, width: float, height: float, ranks: str, count: int, step: float) -> None:
    for k in reversed(range(count)):
        block(axes, x + k * step, y + k * step, width, height, ranks)


def panel(axes: Axes, title: str, ranks: str) -> None:
    """One placement: the matrix, its momenta and second moment, row and column accumulators, and the scheduler."""
    vectors = {"rows": ("rows", "all"), "columns": ("all", "columns")}[ranks]
    axes.set(xlim=(-0.3, 14.6), ylim=(-1.3, 5.1), aspect="equal")
    axes.axis("off")
    axes.set_title(title, fontsize=11, loc="left")
    block(axes, 0, 4, 3, 4, ranks)
    stacked(axes, 4.2, 4, 3, 4, ranks, 4, 0.28)
    stacked(axes, 9.3, 4, 0.45, 4, vectors[0], 3, 0.28)
    stacked(axes, 10.9, 4, 2.6, 0.45, vectors[1], 3, 0.28)
    block(axes, 10.9, 1.6, 2.6, 0.45, "all")
    for x, y, text in (
        (1.5, -0.25, "parameter, gradient"),
        (5.9, -0.25, "3 momenta,\nsecond moment"),
        (9.8, -0.25, "3 means\nof rows"),
        (12.3, 3.4, "3 means of columns"),
        (12.3, 0.95, "LSTM state"),
    ):
        axes.text(x, y, text, ha="center", va="top", fontsize=8.5)


def main() -> None:
    figure, axes = plt.subplots(2, 1, figsize=(7.6, 6.2), layout="constrained")
    panel(axes[0], "Cut along the first axis: FSDP2, column-wise tensor parallelism", "rows")
    panel(axes[1], "Cut along the second axis: row-wise tensor parallelism", "columns")
    handles = [Rectangle((0, 0), 1, 1, facecolor=c) for c in (*COLOURS, SAME)]
    names = [f"rank {k}" for k in range(4)] + ["the same on every rank"]
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
