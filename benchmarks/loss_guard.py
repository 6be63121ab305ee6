"""The guard of the embedded VeLO against the weights that were embedded before it, in healthy and disturbed runs.

    python -m benchmarks.loss_guard        # -> benchmarks/results/loss_guard.md and .json

Validation tasks, paired seeds: undisturbed; every 60 steps a batch of noise; classes permuted, or targets negated, in
the middle; an lr of 4 and of 16. The weights differ in the pull of what gets no gradient too. One thread.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.meta_experiments import RESULTS, write
from hf_lopt import rules, weights
from hf_lopt.meta import data, evaluate, table, tasks
from hf_lopt.meta.particles import Particles
from hf_lopt.meta.search import seeded
from hf_lopt.step.networks import Theta


BEFORE = {"velo": "2b06e0b858eb"}
TASKS = ("characters_wide", "digits_wide", "functions_wide", "digits_conv_wide", "autoencoder_relu")
EVENTS = {"undisturbed": 1.0, "noise": 1.0, "flip": 1.0, "lr 4": 4.0, "lr 16": 16.0}
EVERY, AT = 60, 50


def flipped(batch: tuple[Tensor, Tensor], classes: int) -> tuple[Tensor, Tensor]:
    """The same inputs with other targets: the next class, or the negative of a vector."""
    inputs, targets = batch
    return inputs, -targets if targets.is_floating_point() else (targets + 1) % classes


def noisy(batch: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs ten times as large, or targets in random order."""
    inputs, targets = batch
    if inputs.is_floating_point():
        return 10.0 * inputs, targets
    return inputs, targets[:, torch.randperm(targets.shape[1], generator=generator)].flip(-1)


def finals(task: tasks.Task, theta: Theta, steps: int, seeds: int, event: str) -> Tensor:
    """Losses on fresh samples at the end, (seeds,)."""
    particles = Particles("velo", task.shapes, seeds)
    particles.set_weights({name: leaf.expand(seeds, *leaf.shape) for name, leaf in theta.items()})
    samples, generator = task.samples(), seeded("guard", task.name)
    particles.restart(range(seeds), task.start(seeds, generator))
    classes = 10 if "digits" in task.name else len(data.ALPHABET)
    rates = torch.full((seeds,), EVENTS[event], dtype=torch.float32)
    horizons = torch.full((seeds,), steps, dtype=torch.int64)
    for t in range(steps):
        batch = samples.batch(seeds, task.batch, generator)
        if event == "noise" and t % EVERY == AT:
            batch = noisy(batch, generator)
        if event == "flip" and t >= steps // 2:
            batch = flipped(batch, classes)
        now, gradients = evaluate.losses_and_gradients(task, particles.params, batch)
        particles.update(gradients, now, rates, horizons)
    fresh = (samples.batch(seeds, task.batch, generator, fresh=True) for _ in range(evaluate.FRESH_BATCHES))
    if event == "flip":
        fresh = (flipped(batch, classes) for batch in fresh)
    final = evaluate.mean_losses(task, particles.params, fresh)
    return torch.where(particles.failed | ~final.isfinite(), math.inf, final)


def before() -> Theta:
    """The weights that were embedded before the guard."""
    folder = weights.EMBEDDED / "earlier"
    return rules.get("velo").load_weights(folder / f"velo.{BEFORE['velo']}.safetensors").theta


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    old, new = before(), rules.get("velo").load_weights("bundled").theta
    found: dict[str, Any] = {}
    for name in args.tasks:
        task, found[name] = tasks.named(name), {}
        for event in EVENTS:
            pair = [finals(task, theta, args.steps, args.seeds, event) for theta in (old, new)]
            compared = evaluate.paired(pair[1], pair[0])
            means = [x.mean().item() for x in pair]
            means = [x if math.isfinite(x) else None for x in means]
            found[name][event] = {"before": means[0], "guarded": means[1], "ratio": compared.ratio}
            found[name][event]["two errors"] = 2.0 * compared.error * compared.ratio
        print(name, found[name], flush=True)
    write("loss_guard", {"steps": args.steps, "seeds": args.seeds, "tasks": found}, "", "loss_guard")
    lines = [f"Final loss with the guard relative to that without, {args.steps} steps, {args.seeds} seeds, ± two"]
    lines[0] += (
        f" standard errors. `python -m benchmarks.loss_guard`, {', '.join(map(str, table.machine().values()))}."
    )
    lines += ["", f"| task | {' | '.join(EVENTS)} |", f"| :--- |{' ---: |' * len(EVENTS)}"]
    for name, rows in found.items():
        cells = [f"{row['ratio']:.4f} ± {row['two errors']:.4f}" for row in rows.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    (RESULTS / "loss_guard.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
