"""Judging optimizers: paired runs on the same starts and samples, confidence intervals, and AdamW with a grid.

A comparison is paired: seed k of a task means the same start and the same batches for every optimizer. The measure is
the loss on samples that are never trained on, averaged over several batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lopt.meta.particles import Particles
from hf_lopt.meta.runs import schedule
from hf_lopt.meta.search import seeded
from hf_lopt.meta.tasks import Task
from hf_lopt.step.networks import Theta


GRID = tuple(10.0 ** (k / 4.0) for k in range(-14, -3))  # eleven rates from 3e-4 to 0.1
FRESH_BATCHES = 16


@dataclass(frozen=True)
class Curves:
    """Losses on fresh samples of several seeds.

    Attributes:
        steps: steps done at each look, (L,).
        losses: (seeds, L); inf where a run has failed.
        train: mean training loss over the run, (seeds,).
    """

    steps: Tensor
    losses: Tensor
    train: Tensor

    @property
    def final(self) -> Tensor:
        """The loss at the end, (seeds,)."""
        return self.losses[:, -1]


Step = Callable[[Mapping[str, Tensor], Tensor, int], None]


def losses_and_gradients(task: Task, params: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each copy of a task's model on a batch, (P,), and the gradients by name, (P, *shape)."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    losses = task.losses(leaves, batch)
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    return losses.detach(), dict(zip(leaves, gradients, strict=True))


def mean_losses(task: Task, params: Mapping[str, Tensor], batches: Iterable[Any]) -> Tensor:
    """The mean over batches of the loss of each copy, (P,)."""
    with torch.no_grad():
        return torch.stack([task.losses(params, batch) for batch in batches]).mean(0)


def _follow(task: Task, seeds: int, steps: int, looks: int, make: Callable[[dict[str, Tensor]], tuple]) -> Curves:
    """Runs of a task for all seeds at once. ``make`` turns the start into (parameters, step(gradients, losses, t))."""
    samples, generator = task.samples(), seeded("evaluation", task.name)
    params, step = make(task.start(seeds, generator))
    fresh = [samples.batch(seeds, task.batch, generator, fresh=True) for _ in range(FRESH_BATCHES)]
    times = sorted({round(steps * (k + 1) / looks) for k in range(looks)})
    losses, train = [], torch.zeros(seeds, dtype=torch.float32)
    for t in range(steps):
        now, gradients = losses_and_gradients(task, params, samples.batch(seeds, task.batch, generator))
        step(gradients, now, t)
        train += now / steps
        if t + 1 in times:
            losses.append(mean_losses(task, params, fresh))
    curves = torch.stack(losses, 1)
    return Curves(torch.tensor(times, dtype=torch.int64), torch.where(curves.isfinite(), curves, math.inf), train)


def learned(
    task: Task,
    rule: str,
    theta: Theta,
    steps: int,
    seeds: int,
    lr: float = 1.0,
    settings: Mapping[str, Any] | None = None,
    looks: int = 10,
) -> Curves:
    """Runs under a learned rule; ``lr`` is the peak of a cosine with warm-up where the schedule is the caller's."""
    particles = Particles(rule, task.shapes, seeds, settings)
    particles.set_weights({name: leaf.expand(seeds, *leaf.shape) for name, leaf in theta.items()})
    horizons = torch.full((seeds,), steps, dtype=torch.int64)

    def make(start: dict[str, Tensor]) -> tuple[Mapping[str, Tensor], Step]:
        particles.restart(range(seeds), start)

        def step(gradients: Mapping[str, Tensor], losses: Tensor, t: int) -> None:
            rates = torch.full((seeds,), lr, dtype=torch.float32)
            if not particles.rule.own_schedule:
                rates = rates * schedule(particles.steps, horizons)
            particles.update(gradients, losses, rates, horizons)

        return particles.params, step

    curves = _follow(task, seeds, steps, looks, make)
    curves.losses[particles.failed] = math.inf
    return curves


def adamw(task: Task, steps: int, seeds: int, lr: float, decay: str = "cosine", looks: int = 10) -> Curves:
    """Runs under torch's AdamW: "cosine" with 5 % warm-up, or "linear" to zero without one, Trainer's default."""

    def make(start: dict[str, Tensor]) -> tuple[Mapping[str, Tensor], Step]:
        params = {name: p.clone() for name, p in start.items()}
        optimizer = torch.optim.AdamW(params.values(), lr=lr, weight_decay=0.0 if decay == "linear" else 0.01)
        horizon = torch.tensor(steps, dtype=torch.int64)

        def step(gradients: Mapping[str, Tensor], losses: Tensor, t: int) -> None:
            now = torch.tensor(t, dtype=torch.int64)
            share = 1.0 - t / steps if decay == "linear" else schedule(now, horizon).item()
            optimizer.param_groups[0]["lr"] = lr * share
            for name, p in params.items():
                p.grad = gradients[name]
            optimizer.step()

        return params, step

    return _follow(task, seeds, steps, looks, make)


def best_of(runs: Callable[[float], Curves], rates: Sequence[float]) -> tuple[float, Curves]:
    """The rate with the lowest mean of the final losses, and its runs."""
    results = {rate: runs(rate) for rate in rates}
    best = min(results, key=lambda rate: (results[rate].final.mean().item(), rate))
    return best, results[best]


@dataclass(frozen=True)
class Comparison:
    """The ratio of final losses, in logarithms: mean over seeds and its standard error."""

    mean: float
    error: float

    @property
    def ratio(self) -> float:
        return math.exp(self.mean)

    def interval(self) -> tuple[float, float]:
        """Ratios two standard errors to either side."""
        return math.exp(self.mean - 2.0 * self.error), math.exp(self.mean + 2.0 * self.error)


def paired(ours: Tensor, theirs: Tensor) -> Comparison:
    """log(ours / theirs) seed by seed; a failed run counts as a loss a thousand times as high."""
    differences = torch.log(ours.double() / theirs.double())
    differences = torch.nan_to_num(differences, nan=0.0, posinf=math.log(1e3), neginf=-math.log(1e3))
    n = len(differences)
    error = (differences.std() / math.sqrt(n)).item() if n > 1 else math.inf
    return Comparison(differences.mean().item(), error)


def over_tasks(comparisons: Sequence[Comparison]) -> Comparison:
    """The mean over tasks, with the standard error over tasks, which holds that over seeds."""
    means = torch.tensor([c.mean for c in comparisons], dtype=torch.float64)
    error = (means.std() / math.sqrt(len(means))).item() if len(means) > 1 else math.inf
    return Comparison(means.mean().item(), error)
