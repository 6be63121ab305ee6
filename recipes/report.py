"""What a recipe leaves behind: a JSON file, a picture of the curves, a summary in the terminal."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table


matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (after the choice of backend: no display is needed)

from hf_lopt.plot import log_ticks  # noqa: E402


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a temporary file beside `path`, then put it in its place: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as standard JSON, atomically; NaN and infinities, which JSON lacks, become null."""
    text = json.dumps(_without_nonfinite(value), indent=indent, allow_nan=False) + "\n"
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

    names = {"loss": "line: training, dots: held out", f"held-out {metric_name}": ""}
    if any(entries(run, "lopt/lr_mult_mean") for run in runs.values()):
        names["learned step size"] = "mean and range over tensors"
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.5 * len(names) + 1.2, 3.0), layout="constrained")
    for index, (label, run) in enumerate(runs.items()):
        color, line = f"C{index}", "--" if label.startswith("adamw") else "-"
        axes[0].plot(*points(run, "loss"), color=color, linestyle=line, label=label)
        axes[0].plot(*points(run, "eval_loss"), color=color, marker="o", markersize=4, linestyle="none")
        axes[1].plot(*points(run, metric), color=color, linestyle=line, marker="o", markersize=4)
        learned = entries(run, "lopt/lr_mult_mean")
        if learned:
            steps, mean, low, high = (
                [entry[key] for entry in learned]
                for key in ("step", "lopt/lr_mult_mean", "lopt/lr_mult_min", "lopt/lr_mult_max")
            )
            axes[2].plot(steps, mean, color=color)
            axes[2].fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    if metric_scale == "log":
        log_ticks(axes[1].yaxis)
    for axis, (name, remark) in zip(axes, names.items(), strict=True):
        axis.set_title(remark, fontsize=10)
        axis.set(xlabel="optimizer step", ylabel=name)
        axis.grid(alpha=0.3)
    figure.legend(loc="outside center right", frameon=False)
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


def _series(run: Mapping[str, Any], key: str, along: str) -> tuple[list[float], list[float]]:
    entries = [entry for entry in run["history"] if entry.get(key) is not None]
    return [entry[along] for entry in entries], [entry[key] for entry in entries]


def draw_mean(axis: Any, runs: Sequence[Mapping[str, Any]], key: str, along: str, **style: Any) -> None:
    """Mean over the seeds, with a band of one standard deviation; `along` is averaged as well."""
    series = [_series(run, key, along) for run in runs]
    length = min(len(values) for _, values in series)
    if not length:
        return
    places = np.mean([xs[:length] for xs, _ in series], axis=0)
    values = np.array([ys[:length] for _, ys in series])
    mean = values.mean(0)
    axis.plot(places, mean, **style)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        axis.fill_between(places, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)


def draw_comparisons(
    path: Path,
    comparisons: Sequence[Mapping[str, Any]],
    dpi: int = 110,
    columns: Sequence[str] = ("training", "held-out", "seconds"),
) -> None:
    """Draw one row per comparison (results.json of compare.py): losses over the steps, and over the seconds.

    Of several learning rates of one optimizer the best one and the default are drawn. On a CPU, seconds are processor
    time within the optimizer steps, which other processes on the machine hardly change.
    """
    size = (1.5 + 4 * len(columns), 3.1 * len(comparisons))
    figure, grid = pyplot.subplots(len(comparisons), len(columns), figsize=size, layout="constrained", squeeze=False)
    for axes, results in zip(grid, comparisons, strict=True):
        runs = [results["runs"][key] for key in results["compared"]]
        on_cpu = all(run["machine"]["device"] == "cpu" for run in runs)
        seconds = "step_cpu_seconds" if on_cpu else "step_seconds"
        # Of each column: the loss, along what, and the words for both.
        known = {
            "training": ("loss", "step", "training loss", "optimizer step"),
            "held-out": ("eval_loss", "step", "held-out loss", "optimizer step"),
            "seconds": ("eval_loss", seconds, "held-out loss", f"{'processor ' if on_cpu else ''}seconds in steps"),
        }
        grids = {row["optim"] for row in results["rows"] if row.get("best")}
        for index, row in enumerate(
            row for row in results["rows"] if row.get("best") or row["optim"] not in grids or "=" not in row["label"]
        ):
            mine = [run for run in runs if run["label"] == row["label"]]
            label = f"{row['label']}\n(best of grid)" if row.get("best") else row["label"]
            style = {"color": f"C{index}", "label": label, "linestyle": "--" if row["optim"] == "adamw_torch" else "-"}
            for axis, column in zip(axes, columns, strict=True):
                loss, along, *_ = known[column]
                marks = {} if loss == "loss" else {"marker": "o", "markersize": 3}
                draw_mean(axis, mine, loss, along, **marks, **style)
        for axis, column in zip(axes, columns, strict=True):
            _, _, name, along = known[column]
            axis.set(ylabel=name, xlabel=along)
            log_ticks(axis.yaxis)
            axis.tick_params(labelsize=9)
            axis.grid(alpha=0.3)
        axes[0].set_title(results["recipe"], loc="left", fontsize=11)
        axes[-1].legend(fontsize=9, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    _replace(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))
    pyplot.close(figure)


def plus_minus(number: Mapping[str, float | None]) -> str:
    """A mean with its standard deviation, such as "0.1234 ± 0.0012"."""
    mean, spread = number["mean"], number["spread"]
    if mean is None or not math.isfinite(mean):
        return "not finite"
    return f"{mean:.4g}" if spread is None else f"{mean:.4g} ± {spread:.2g}"


def comparison_cells(results: Mapping[str, Any]) -> list[list[str]]:
    """The table of a comparison as text: the names of the columns, then one row per optimizer and learning rate."""
    on_cpu = all(results["runs"][key]["machine"]["device"] == "cpu" for key in results["compared"])
    seconds = "step_cpu_seconds" if on_cpu else "step_seconds"
    metric = results["metric"]
    cells = [["optimizer", "lr, schedule", "seeds", "train loss", "held-out loss", results["metric_name"], "s"]]
    for row in results["rows"]:
        note = "best, at the edge of the grid" if row.get("edge") else "best"
        cells.append(
            [
                f"{row['label']} ({note})" if row.get("best") else row["label"],
                f"{row['learning_rate']:g}, {row['lr_scheduler_type']}",
                str(len(row["seeds"])),
                *(plus_minus(row[key]) for key in ("train_loss", "eval_loss", metric)),
                f"{row[seconds]:.1f}",
            ]
        )
    return cells


def print_comparison(results: Mapping[str, Any], folder: Path) -> None:
    """Print the table of a comparison, and where the results are."""
    names, *rows = comparison_cells(results)
    table = Table(title=f"{results['recipe']}: mean ± standard deviation over the seeds")
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index > 1 else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    print(f"Results: {folder / 'results.json'}")
    print(f"Picture: {folder / 'comparison.png'}")
