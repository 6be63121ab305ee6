"""The evaluation table: learned rules beside AdamW, with paired ratios and their errors, as JSON and Markdown."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_lopt import rules
from hf_lopt.meta import atomic, evaluate, tasks
from hf_lopt.meta.theta import starting_weights


RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TUNED = "AdamW, tuned"
BASELINES: dict[str, Callable[[tasks.Task, int, int], tuple[float, evaluate.Curves]]] = {
    TUNED: lambda task, steps, seeds: evaluate.best_of(
        lambda lr: evaluate.adamw(task, steps, seeds, lr), evaluate.GRID
    ),
    "AdamW, 1e-3, cosine": lambda task, steps, seeds: (1e-3, evaluate.adamw(task, steps, seeds, 1e-3)),
    "AdamW, 5e-5, linear": lambda task, steps, seeds: (5e-5, evaluate.adamw(task, steps, seeds, 5e-5, "linear")),
}


def _candidate(spec: str) -> tuple[str, str, dict[str, float]]:
    """Rule, weights and settings of ``RULE[:SETTING=NUMBER...][@WEIGHTS]``."""
    head, _, weights = spec.partition("@")
    name, *assignments = head.split(":")
    defaults, settings = rules.get(name).defaults, {}
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        if key not in defaults:
            raise ValueError(f"{spec!r}: {name} takes no setting {key!r}; it takes {', '.join(defaults)}")
        try:
            settings[key] = float(value)
        except ValueError as error:
            raise ValueError(f"{spec!r}: {key} must be a number, got {value!r}") from error
    return name, weights or "bundled", settings


def rates_of(rule: str) -> Sequence[float]:
    """The lr, of which the best counts for each task: 1 with a schedule of its own, ``RATES`` otherwise."""
    return (1.0,) if rules.get(rule).own_schedule else RATES


def learned(spec: str, task: tasks.Task, steps: int, seeds: int) -> tuple[float, evaluate.Curves]:
    """The runs of a candidate, at the best of its rates."""
    name, weights, settings = _candidate(spec)
    theta = starting_weights(name, weights)
    return evaluate.best_of(lambda lr: evaluate.learned(task, name, theta, steps, seeds, lr, settings), rates_of(name))


def chosen(names: Sequence[str]) -> list[tasks.Task]:
    """Tasks by name or by part."""
    out: dict[str, tasks.Task] = {}
    for name in names:
        parts = tasks.of_part(name) if name in ("train", "validation", "test") else [tasks.named(name)]
        out |= {task.name: task for task in parts}
    return list(out.values())


def machine() -> dict[str, Any]:
    """Where and with what the numbers were made."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), **versions, "date": date}


def compute(
    candidates: Sequence[str], chosen_tasks: Sequence[tasks.Task], steps: int, seeds: int, log: Callable[[str], Any]
) -> dict[str, Any]:
    """All runs: final losses by task and optimizer, with the rate that was used."""
    for spec in candidates:
        _candidate(spec)
    runs: dict[str, Callable] = dict(BASELINES)
    runs |= {spec: (lambda task, steps, seeds, spec=spec: learned(spec, task, steps, seeds)) for spec in candidates}
    results: dict[str, dict[str, Any]] = {}
    for task in chosen_tasks:
        results[task.name] = {}
        for name, run in runs.items():
            rate, curves = run(task, steps, seeds)
            results[task.name][name] = {"lr": rate, "final": curves.final.tolist(), "train": curves.train.tolist()}
            log(f"{task.name}: {name}, lr {rate:.3g}: {curves.final.mean():.4f}\n")
    return {"steps": steps, "seeds": seeds, "machine": machine(), "results": results}


def comparisons(results: Mapping[str, Mapping[str, Any]], name: str, other: str) -> dict[str, evaluate.Comparison]:
    """Paired comparisons of two optimizers by task."""

    def final(task: str, optimizer: str) -> torch.Tensor:
        return torch.tensor(results[task][optimizer]["final"], dtype=torch.float64)

    return {task: evaluate.paired(final(task, name), final(task, other)) for task in results}


def markdown(record: Mapping[str, Any], other: str = TUNED) -> str:
    """Final losses relative to ``other``: the ratio of geometric means and two standard errors of the paired seeds."""
    results = record["results"]
    names = list(next(iter(results.values())))
    lines = [f"| optimizer | {' | '.join(results)} | mean over tasks |", "| :--- |" + " ---: |" * (len(results) + 1)]
    for name in names:
        compared = comparisons(results, name, other)
        cells = [f"{c.ratio:.3f} ± {2 * c.error * c.ratio:.3f}" if name != other else "1" for c in compared.values()]
        total = evaluate.over_tasks(list(compared.values()))
        mean = "1" if name == other else f"{total.ratio:.3f} ± {2 * total.error * total.ratio:.3f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {mean} |")
    absolute = [
        f"{math.fsum(results[task][other]['final']) / record['seeds']:.4f} (lr {results[task][other]['lr']:.2g})"
        for task in results
    ]
    lines.append(f"| {other}: loss | {' | '.join(absolute)} | |")
    return "\n".join(lines)


def main(
    candidates: Sequence[str], names: Sequence[str], steps: int, seeds: int, output: Path | None
) -> dict[str, Any]:
    """Compute, print and, with ``output``, write the table."""
    if steps < 1 or seeds < 2:
        raise ValueError(f"a comparison needs at least one step and two seeds, got {steps} and {seeds}")
    record = compute(candidates, chosen(names), steps, seeds, sys.stderr.write)
    text = markdown(record)
    sys.stdout.write(text + "\n")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace(output.with_suffix(".json"), lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
        atomic.replace(output.with_suffix(".md"), lambda path: path.write_text(text + "\n"))
    return record
