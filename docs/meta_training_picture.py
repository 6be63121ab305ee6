"""Draws docs/images/meta_training.png: truncations of staggered runs, and what PES accumulates along one of them.

python docs/meta_training_picture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402


TARGET = Path(__file__).resolve().parent / "images" / "meta_training.png"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
# Lengths of the runs of each pair, in truncations; the first one is cut short.
RUNS = ((2, 5, 3), (4, 2, 4), (1, 3, 6), (3, 4, 3))


def staggered(axes: Axes) -> None:
    """Pairs below each other, truncations side by side, a colour for every run."""
    for pair, lengths in enumerate(RUNS):
        place = 0
        for run, length in enumerate(lengths):
            for k in range(length):
                shade = 0.45 + 0.55 * (k + 1) / length
                axes.add_patch(
                    Rectangle(
                        (place, -pair), 0.92, 0.7, facecolor=COLOURS[run], alpha=shade, edgecolor="black",
                        linewidth=1.6 if k == 0 else 0.0,
                    )
                )  # fmt: skip
                axes.text(place + 0.46, 0.35 - pair, f"{k + 1}", ha="center", va="center", fontsize=8)
                place += 1
        axes.text(-0.2, 0.35 - pair, f"pair {pair + 1}", ha="right", va="center", fontsize=9)
    axes.annotate(
        "one outer step", (5.46, 0.72), (5.46, 1.35), ha="center", fontsize=9, arrowprops={"arrowstyle": "->"}
    )
    axes.add_patch(Rectangle((4.94, -3.1), 1.02, 3.9, fill=False, linestyle="--", linewidth=1.2))
    axes.set(xlim=(-1.8, 10.2), ylim=(-3.3, 1.8))
    axes.set_title(
        "Truncations of K steps; a run begins at each thick frame, its number of truncation inside", fontsize=10
    )
    axes.axis("off")


def accumulated(axes: Axes) -> None:
    """One component of the perturbation of a pair, over the truncations of two runs."""
    noise = torch.randn(9, generator=torch.Generator().manual_seed(4)).tolist()
    lengths, total, sums, starts = (5, 4), 0.0, [], []
    for length in lengths:
        total = 0.0
        starts.append(len(sums))
        for _ in range(length):
            total += noise[len(sums)]
            sums.append(total)
    places = range(len(noise))
    axes.bar([x - 0.2 for x in places], noise, 0.4, color=COLOURS[4], label="e: new in every truncation")
    axes.bar([x + 0.2 for x in places], sums, 0.4, color=COLOURS[0], label="x: their sum since the run began")
    for start in starts:
        axes.axvline(start - 0.5, color="black", linewidth=1.6)
        axes.text(start - 0.42, max(sums) + 0.25, "a run begins: x = e", fontsize=8, ha="left")
    axes.axhline(0.0, color="black", linewidth=0.6)
    axes.set(ylim=(min(*sums, *noise) - 0.2, max(sums) + 0.7), xlabel="truncation", xticks=list(places))
    axes.set_xticklabels([str(x + 1) for x in places])
    axes.set_title("PES weighs L+ - L- with x, truncated ES with e", fontsize=10)
    axes.set_ylabel("one number of theta")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    figure, (above, below) = plt.subplots(2, 1, figsize=(8.4, 6.0), height_ratios=(1.0, 1.1), constrained_layout=True)
    staggered(above)
    accumulated(below)
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()
