"""VeLO's schedule against others with the same peak, and tuned AdamW beside them, on validation tasks.

    python -m benchmarks.velo_schedule --steps 300 1000    # -> benchmarks/results/velo_schedule.json

The schedule of the embedded weights is a warm-up and a cosine. Here their steps are multiplied so that they follow
another one after the warm-up. Starts and batches are paired; losses are those of samples that are never trained on.
One thread.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence

import torch

from benchmarks.meta_experiments import RESULTS
from benchmarks.run_length import scratch
from benchmarks.storing import rounded, write_record
from hf_lopt.meta import evaluate, table, tasks
from hf_lopt.meta.construct import schedules
from hf_lopt.meta.particles import Particles
from hf_lopt.meta.search import seeded
from hf_lopt.meta.theta import starting_weights


TASKS = ("characters_wide", "characters_wide, sd 0.02", "digits_wide", "digits_conv_wide", "autoencoder_relu")
RATES = (1e-3, 5e-3, 1e-2)  # of AdamW
STABLE = 0.7  # of the run, before a linear decay


def cosine(x: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * x))


def stable(x: float) -> float:
    return min(1.0, (1.0 - x) / (1.0 - STABLE))


# Name -> the step at the fraction x of a run, relative to the peak.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "as it is": cosine,
    "linear": lambda x: 1.0 - x,
    "0.7 of the peak to 70 %, then linear": lambda x: 0.7 * stable(x),
    "the peak to 70 %, then linear": stable,
    "1.4 times": lambda x: 1.4 * cosine(x),
}


def finals(task: tasks.Task, steps: int, seeds: int) -> dict[str, list[float]]:
    """Name of a schedule, or AdamW with its rate -> the loss at the end for each seed."""
    count = len(SCHEDULES) * seeds
    particles = Particles("velo", task.shapes, count)
    weights = starting_weights("velo", "constructed")
    particles.set_weights({name: leaf.expand(count, *leaf.shape) for name, leaf in weights.items()})
    samples, generator = task.samples(), seeded("velo's schedule", task.name)
    start = task.start(seeds, generator)
    particles.restart(range(count), {k: p.repeat(len(SCHEDULES), *[1] * (p.dim() - 1)) for k, p in start.items()})
    adamw = {}
    for rate in RATES:
        params = {name: p.clone() for name, p in start.items()}
        adamw[rate] = params, torch.optim.AdamW(params.values(), lr=rate, weight_decay=0.01)
    horizons = torch.full((count,), steps, dtype=torch.int64)
    for step in range(steps):
        x = step / steps
        batch = samples.batch(seeds, task.batch, generator)
        factors = [shape(x) / cosine(x) if x > schedules.WARMUP else shape(0.0) for shape in SCHEDULES.values()]
        now, gradients = evaluate.losses_and_gradients(task, particles.params, batch)
        rates = torch.tensor(factors, dtype=torch.float32).repeat_interleave(seeds)
        particles.update(gradients, now, rates, horizons)
        for rate, (params, optimizer) in adamw.items():
            _, gradients = evaluate.losses_and_gradients(task, params, batch)
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (x + 1.0 / steps) / schedules.WARMUP) * cosine(x)
            for name, p in params.items():
                p.grad = gradients[name]
            optimizer.step()
    fresh = [samples.batch(seeds, task.batch, generator, fresh=True) for _ in range(2 * evaluate.FRESH_BATCHES)]
    losses = evaluate.mean_losses(task, particles.params, fresh).view(-1, seeds).tolist()
    found = dict(zip(SCHEDULES, losses, strict=True))
    return found | {f"AdamW {r:g}": evaluate.mean_losses(task, p, fresh).tolist() for r, (p, _) in adamw.items()}


def relative(found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Geometric mean of the loss relative to the schedule as it is, and two standard errors of its logarithm."""
    first = torch.tensor(found["as it is"]).log()
    logs = {name: torch.tensor(losses).log() - first for name, losses in found.items()}
    return {
        name: {"ratio": x.mean().exp().item(), "two_standard_errors": 2.0 * x.std().item() / math.sqrt(len(x))}
        for name, x in logs.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=(300, 1000))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=list(scratch()))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    file = RESULTS / "velo_schedule.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"relative loss": {}}
    record |= {"machine": table.machine(), "command": "python -m benchmarks.velo_schedule", "seeds": args.seeds}
    for steps in args.steps:
        for name in args.tasks:
            row = relative(finals(scratch()[name], steps, args.seeds))
            record["relative loss"][f"{name} | {steps}"] = row
            print(name, steps, {key: f"{x['ratio']:.3f} ± {x['two_standard_errors']:.3f}" for key, x in row.items()})
            write_record(file, rounded(record, 4))


if __name__ == "__main__":
    main()
