"""``python -m hf_lopt.plot RUN``: what a learned optimizer decided in a run of Trainer, as a picture.

The schedule comes from what every run logs; the maps of tensors by steps need ``optim_args="log_layers=true"``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


PREFIX = "lopt/"
MAPS = {"lr_mult": "learned step size", "update_ratio": "size of the step / size of the tensor"}
_MOST_LABELS = 30
# Tensors that are named last where there is not room for all: biases, and norms by the usual names of their modules.
_MINOR = re.compile(r"(^|\.)bias$|(^|[._])(ln|norm|layernorm|layer_norm)", re.IGNORECASE)

History = list[dict[str, Any]]


def find_histories(run: Path) -> dict[str, History]:
    """Label -> log rows of the runs in ``run``: a file or folder of Trainer (``trainer_state.json``, also the one of
    the last checkpoint below it) or of a recipe (``metrics.json``).

    Raises:
        ValueError: if there is no such file, or none with numbers of a learned optimizer.
    """
    files = [run] if run.is_file() else [run / "metrics.json", run / "trainer_state.json", *_checkpoints(run)]
    file = next((each for each in files if each.is_file()), None)
    if file is None:
        raise ValueError(
            f"{run} holds no metrics.json, trainer_state.json or checkpoint-*/trainer_state.json; name the output_dir "
            "of a run, which writes the latter with each checkpoint (or call trainer.save_state())"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        runs = {label: each["history"] for label, each in found["runs"].items()} if "runs" in found else None
        histories = {file.parent.name: found["log_history"]} if runs is None else runs
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is not what Trainer or a recipe writes: {error!r}") from error
    learned = {label: rows for label, rows in histories.items() if any(PREFIX + "update_rms" in row for row in rows)}
    if not learned:
        raise ValueError(f"{file} holds no numbers of a learned optimizer; was it trained with optim=... of hf_lopt?")
    return learned


def _checkpoints(run: Path) -> list[Path]:
    """The states of all checkpoints, the latest first."""
    found = [path for path in run.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return [path / "trainer_state.json" for path in sorted(found, key=lambda p: -int(p.name.rpartition("-")[2]))]


def layer_table(history: History, kind: str) -> tuple[list[int], list[str], list[list[float]]]:
    """Steps, sorted names of tensors, and values [tensor][step] of ``kind``, "lr_mult" or "update_ratio"; NaN where a
    row has none. Empty lists if layers were not logged."""
    start = f"{PREFIX}{kind}/"
    rows = [row for row in history if any(key.startswith(start) for key in row)]
    names = sorted({key[len(start) :] for row in rows for key in row if key.startswith(start)}, key=_by_number)
    values = [[_number(row.get(start + name)) for row in rows] for name in names]
    return [row["step"] for row in rows], names, values


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10; Trainer's file has them in alphabetical order."""
    return [(int(part) if part.isdigit() else -1, part) for part in name.split(".")]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def tensor_labels(names: Sequence[str]) -> list[tuple[int, str]]:
    """(row, label) of the tensors that a map names: all where there is room, otherwise the matrices, and of these
    evenly chosen ones. What all names begin with is left out, and so is a final ``.weight``."""
    chosen = list(range(len(names)))
    if len(chosen) > _MOST_LABELS:
        chosen = [row for row in chosen if not _MINOR.search(names[row])] or chosen
        chosen = chosen[:: math.ceil(len(chosen) / _MOST_LABELS)]
    common = os.path.commonprefix(list(names)).rpartition(".")[0] if len(names) > 1 else ""
    start = len(common) + 1 if common else 0
    return [(row, names[row][start:].removesuffix(".weight")) for row in chosen]


def log_ticks(axis: Any) -> None:
    """Set an ``Axis`` of matplotlib (``axes.yaxis``) to a log scale with labels that differ, as plain numbers: powers
    of ten or round multiples of them; where the view spans less than a factor of three, round steps."""
    from matplotlib import ticker

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    if high < 3 * low:
        axis.set_major_locator(ticker.MaxNLocator(5))
    else:
        ratio = high / low
        subs = (1.0,) if ratio > 300 else (1.0, 2.0, 5.0) if ratio > 10 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
        axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def draw(histories: dict[str, History], path: Path) -> None:
    """Draw one column per run: the loss, the learned schedule, and the maps where layers were logged.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = {label: {kind: layer_table(rows, kind) for kind in MAPS} for label, rows in histories.items()}
    kinds = [kind for kind in MAPS if any(tables[label][kind][1] for label in histories)]
    most = max((len(t[kind][1]) for t in tables.values() for kind in kinds), default=0)
    heights = [2.2, 2.2, *([min(max(2.5, 0.13 * most), 4.6)] * len(kinds))]
    figure, grid = pyplot.subplots(
        len(heights),
        len(histories),
        figsize=(8 * len(histories), sum(heights) + 0.6),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for column, (label, rows) in enumerate(histories.items()):
        axes = grid[:, column]
        for key, style in (("loss", {}), ("eval_loss", {"marker": "o", "markersize": 3, "linestyle": "none"})):
            axes[0].plot(*_points(rows, key), label={"loss": "training", "eval_loss": "held out"}[key], **style)
        axes[0].set_title(label, loc="left")
        axes[0].set_ylabel("loss")
        axes[0].legend(fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=2, frameon=False)
        _draw_schedule(axes[1], rows)
        for axis, kind in zip(axes[2:], kinds, strict=True):
            _draw_map(figure, axis, kind, *tables[label][kind])
        for axis in axes:
            axis.set_xlabel("optimizer step", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png", dpi=110)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        pyplot.close(figure)


def _points(rows: History, key: str) -> tuple[list[int], list[float]]:
    chosen = [row for row in rows if isinstance(row.get(key), int | float)]
    return [row["step"] for row in chosen], [row[key] for row in chosen]


def _draw_map(
    figure: Any, axis: Any, kind: str, steps: list[int], names: list[str], values: list[list[float]]
) -> None:
    """Tensors by steps, in colours on a log scale."""
    from matplotlib.colors import LogNorm

    positive = [value for line in values for value in line if value > 0]
    if not positive:
        axis.set_axis_off()
        return
    norm = LogNorm(min(positive), max(max(positive), 1.01 * min(positive)))
    mesh = axis.pcolormesh([0, *steps], range(len(names) + 1), values, norm=norm, cmap="viridis")
    figure.colorbar(mesh, ax=axis, label=MAPS[kind])
    labels = tensor_labels(names)
    axis.set_yticks([row + 0.5 for row, _ in labels], [name for _, name in labels], fontsize=6.5)
    axis.set_ylabel("tensor")
    axis.invert_yaxis()


def _draw_schedule(axis: Any, rows: History) -> None:
    """Mean and range of the learned step sizes; for rules without one, how large the steps were."""
    steps, mean = _points(rows, PREFIX + "lr_mult_mean")
    if not steps:
        axis.plot(*_points(rows, PREFIX + "update_rms"))
        axis.set_ylabel("root mean square\nof the steps")
        return
    low, high = (_points(rows, PREFIX + f"lr_mult_{end}")[1] for end in ("min", "max"))
    axis.plot(steps, mean, label="mean over tensors")
    axis.fill_between(steps, low, high, alpha=0.2, linewidth=0, label="their range")
    axis.set_ylabel("learned step size")
    axis.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=2, frameon=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the run that the command line names.

    Raises:
        SystemExit: without matplotlib, and for a folder without a run.
    """
    parser = argparse.ArgumentParser(prog="python -m hf_lopt.plot", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="output_dir of a Trainer or of a recipe, or a file in it")
    parser.add_argument("-o", "--output", type=Path, help="the PNG to write (default: lopt.png beside the run)")
    options = parser.parse_args(argv)
    output = options.output or (options.run.parent if options.run.is_file() else options.run) / "lopt.png"
    try:
        histories = find_histories(options.run)
        draw(histories, output)
    except ImportError as error:
        raise SystemExit(f"hf_lopt.plot needs matplotlib: pip install matplotlib ({error})") from error
    except ValueError as error:
        raise SystemExit(f"hf_lopt.plot: {error}") from error
    if not any(layer_table(rows, "update_ratio")[0] for rows in histories.values()):
        sys.stdout.write('For a map of all tensors, train with optim_args="log_layers=true".\n')
    sys.stdout.write(f"{output}\n")


if __name__ == "__main__":
    main()
