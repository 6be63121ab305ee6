"""Particle-steps per second of meta-training, beside an optimizer of its own for each particle.

    python -m benchmarks.meta                  # writes benchmarks/results/meta_throughput.*
    python -m benchmarks.meta --rules celo2    # measures this rule anew and keeps the other rows

A particle-step is one step of one model: batch, forward, backward and update, with weights that differ between the
particles, and with a look at fresh samples in every fifth step. "One by one" is a loop over particles, each with a
model and a ``LearnedOptimizer``; with the compiled kernels, and with the plain PyTorch ones ("eager"). Wall time, one
thread, the best of at least three repetitions in at least four seconds.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.storing import write_record
from hf_lopt import LearnedOptimizer
from hf_lopt.kernels import ops
from hf_lopt.meta import tasks, theta
from hf_lopt.meta.estimators import Estimator
from hf_lopt.meta.particles import supported
from hf_lopt.meta.runs import Objective, RunSettings, TaskRuns
from hf_lopt.meta.table import machine


RESULTS = Path(__file__).parent / "results" / "meta_throughput"
RULES, TASKS = ("celo2", "celo2_base", "small_fc_lopt", "velo", "celo"), ("functions_mlp", "digits_mlp", "characters")
TRUNCATION, REPEATS, SECONDS = 20, 3, 4.0


def best_rate(call: Callable[[], object], steps: int) -> float:
    """Steps per second of the fastest of several calls after a first one."""
    call()
    times: list[float] = []
    while len(times) < REPEATS or sum(times) < SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return steps / min(times)


def together(rule: str, name: str, pairs: int) -> float:
    """One estimate of the gradient after the other."""
    vector = theta.Vector(rule, theta.starting_weights(rule, "constructed"))
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    settings = RunSettings(truncation=TRUNCATION, longest=1000)
    runs = TaskRuns(tasks.named(name), vector, rule, pairs, settings, Objective(), generators[0])
    estimator = Estimator(runs, len(vector.start()), 0.01, generators[1])
    start = vector.start()
    return best_rate(lambda: estimator.gradient(start), runs.steps_per_call)


def one_by_one(rule: str, name: str, particles: int = 8) -> float:
    """The same steps with a model and an optimizer for each particle."""
    task, generator = tasks.named(name), torch.Generator().manual_seed(0)
    start, samples = task.start(particles, generator), task.samples()
    weights = theta.starting_weights(rule, "constructed")
    settings = {"num_training_steps": 1000} if supported(rule).needs_horizon else {}
    models, optimizers = [], []
    for i in range(particles):
        models.append({key: torch.nn.Parameter(p[i : i + 1].squeeze(0).clone()) for key, p in start.items()})
        own = {key: leaf * (1.0 + 1e-3 * i) for key, leaf in weights.items()}
        optimizers.append(LearnedOptimizer(models[-1].values(), rule, weights=own, axis_order="jax", **settings))

    def run() -> None:
        for t in range(TRUNCATION):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                stacked = {key: p.unsqueeze(0) for key, p in model.items()}
                loss = task.losses(stacked, samples.batch(1, task.batch, generator)).sum()
                loss.backward()
                optimizer.step(loss)
                if t % 5 == 4:
                    with torch.no_grad():
                        task.losses(stacked, samples.batch(1, 2 * task.batch, generator, fresh=True))

    return best_rate(run, particles * TRUNCATION)


def place(row: Mapping[str, Any]) -> tuple[int, ...]:
    """Rules and tasks in the order above, then others."""
    pairs = ((RULES, row["rule"]), (TASKS, row["task"]))
    return tuple(names.index(name) if name in names else len(names) for names, name in pairs)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for rule in args.rules:
        for name in args.tasks:
            size = sum(torch.Size(shape).numel() for shape in tasks.named(name).shapes.values())
            pairs = args.pairs if len(tasks.named(name).shapes) < 12 else max(1, args.pairs // 4)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rates = {"together": together(rule, name, pairs), "one by one": one_by_one(rule, name)}
                with ops.plain():
                    rates["eager"] = one_by_one(rule, name, particles=2)
            rows.append({"rule": rule, "task": name, "parameters": size, "particles": 2 * pairs, **rates})
            print(rows[-1], flush=True)
    path = args.output.with_suffix(".json")
    measured = {(row["rule"], row["task"]) for row in rows}
    known = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows += [row for row in known if (row["rule"], row["task"]) not in measured]
    rows.sort(key=place)
    record = {"machine": machine(), "command": "python -m benchmarks.meta", "rows": rows}
    write_record(path, record)
    lines = [
        "| rule | task | parameters | particles | together | one by one | one by one, eager | together / eager |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        rates = [row[key] for key in ("together", "one by one", "eager")]
        cells = [row["rule"], row["task"], f"{row['parameters']:,}", row["particles"], *(f"{r:,.0f}" for r in rates)]
        lines.append(f"| {' | '.join(map(str, cells))} | {rates[0] / rates[2]:.0f} |")
    args.output.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
