"""What a recipe leaves behind: a JSON file, a picture of the curves, a summary in the terminal."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table


matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (after the choice of backend: no display is needed)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a temporary file beside `path`, then put it in its place: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as standard JSON, atomically; NaN and infinities, which JSON lacks, become null."""
    text = json.dumps(_without_nonfinite(value), indent=2, allow_nan=False) + "\n"
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_curves(
    path: Path,
    title: str,
    runs: Mapping[str, Mapping[str, Any]],
    metric: str,
    metric_name: str,
    metric_scale: str = "linear",
) -> None:
    """Draw losses and held-out metric of all runs over the steps, and the learned step sizes where there are any.

    Args:
        path: the PNG to write, atomically.
        title: heads the picture.
        runs: label -> a run with its `history`, as in metrics.json.
        metric, metric_name: key of the held-out metric, and the words for it.
        metric_scale: "linear" or "log".
    """

    def entries(run: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
        return [entry for entry in run["history"] if entry.get(key) is not None]

    def points(run: Mapping[str, Any], key: str) -> tuple[list[int], list[float]]:
        chosen = entries(run, key)
        return [entry["step"] for entry in chosen], [entry[key] for entry in chosen]

    names = ["loss (line: training, dots: held-out)", f"held-out {metric_name}"]
    if any(entries(run, "lopt/lr_mult_mean") for run in runs.values()):
        names.append("learned step size (mean, range over tensors)")
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.5 * len(names), 3.8), layout="constrained")
    for index, (label, run) in enumerate(runs.items()):
        color = f"C{index}"
        axes[0].plot(*points(run, "loss"), color=color, label=label)
        axes[0].plot(*points(run, "eval_loss"), color=color, marker="o", markersize=4, linestyle="none")
        axes[1].plot(*points(run, metric), color=color, marker="o", markersize=4)
        learned = entries(run, "lopt/lr_mult_mean")
        if learned:
            steps, mean, low, high = (
                [entry[key] for entry in learned]
                for key in ("step", "lopt/lr_mult_mean", "lopt/lr_mult_min", "lopt/lr_mult_max")
            )
            axes[2].plot(steps, mean, color=color)
            axes[2].fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axes[1].set_yscale(metric_scale)
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.suptitle(title, fontsize=11, wrap=True)
    _replace(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    pyplot.close(figure)


def print_summary(
    title: str, runs: Mapping[str, Mapping[str, Any]], metric: str, metric_name: str, folder: Path
) -> None:
    """Print the final metrics of all runs as a table, and where the results are."""
    table = Table(title=title)
    table.add_column("optimizer", no_wrap=True)
    columns = {"train_loss": "train loss", "eval_loss": "held-out loss", metric: f"held-out {metric_name}"}
    for name in ("steps", "seconds", *columns.values()):
        table.add_column(name, justify="right")
    for label, run in runs.items():
        numbers = [run["final"].get(key) for key in columns]
        table.add_row(
            label,
            str(run["steps"]),
            f"{run['seconds']:.1f}",
            *("-" if number is None else f"{number:.4g}" for number in numbers),
        )
    Console().print(table)
    # Plain print: a path must not be wrapped at the width of the terminal.
    print(f"Results: {folder / 'metrics.json'}")
    print(f"Curves:  {folder / 'curves.png'}")
    for label in runs:
        print(f"Model:   {folder / label}")
