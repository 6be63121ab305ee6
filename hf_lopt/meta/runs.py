"""Training runs of many particles on one task, unrolled piece by piece: what evolution strategies need of a task."""

from __future__ import annotations

import contextlib
import gc
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_lopt.meta import graphs as cuda_graphs
from hf_lopt.meta.particles import Particles
from hf_lopt.meta.tasks import Task
from hf_lopt.meta.theta import Vector


OBJECTIVES = ("mean", "last")
SAMPLES = ("fresh", "train")
WARMUP = 0.05
# Where a meta-loss ends: the logarithm of a loss e times that at the start, which is also that of a failed particle.
WORST = 1.0


@dataclass(frozen=True)
class Objective:
    """What makes a run good. The measure is log(loss / loss at the start of the run), at most 1.

    Attributes:
        kind: "mean" over the steps, or only the "last" one of a run.
        samples: "fresh": samples that are never trained on; "train": the batch of the step.
        every: steps between two evaluations on fresh samples.
        batch: fresh samples per evaluation, in batches of the task.
    """

    kind: str = "mean"
    samples: str = "fresh"
    every: int = 5
    batch: int = 2

    def __post_init__(self) -> None:
        if self.kind not in OBJECTIVES:
            raise ValueError(f"objective.kind must be one of {', '.join(OBJECTIVES)}, got {self.kind!r}")
        if self.samples not in SAMPLES:
            raise ValueError(f"objective.samples must be one of {', '.join(SAMPLES)}, got {self.samples!r}")
        if self.every < 1 or self.batch < 1:
            raise ValueError(f"objective.every and objective.batch must be positive, got {self.every}, {self.batch}")


@dataclass(frozen=True)
class RunSettings:
    """How long runs are, and what is drawn anew for each of them, log-uniformly between two limits.

    Attributes:
        truncation: K, steps of a truncation.
        shortest, longest: limits of the length of a run, which is rounded to a multiple of K.
        growth: truncations until ``longest`` is reached, linearly from ``shortest``; 0: at once.
        lr: limits of the learning rate, where its schedule is the caller's (5 % warm-up, cosine); else a multiplier.
        parameter_scale: limits of c in the reparametrisation p = c p', for each tensor: the rule sees p'.
        loss_scale: limits of what the loss is multiplied with, before the rule sees it and its gradients.
    """

    truncation: int = 50
    shortest: int = 100
    longest: int = 1000
    growth: int = 0
    lr: tuple[float, float] = (1e-3, 1e-2)
    parameter_scale: tuple[float, float] = (1.0, 1.0)
    loss_scale: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 < self.truncation <= self.longest or not 0 < self.shortest <= self.longest:
            raise ValueError(
                "runs need 0 < truncation <= longest and 0 < shortest <= longest, got truncation "
                f"{self.truncation}, shortest {self.shortest}, longest {self.longest}"
            )
        for name in ("lr", "parameter_scale", "loss_scale"):
            limits = getattr(self, name)
            if len(limits) != 2 or not 0 < limits[0] <= limits[1]:
                raise ValueError(f"runs.{name} must be two positive numbers, the smaller first, got {limits}")


def schedule(steps: Tensor, horizons: Tensor) -> Tensor:
    """Share of the peak learning rate after ``steps`` of ``horizons`` steps: 5 % linear warm-up, a cosine to 0."""
    done = steps / horizons
    warm = ((steps + 1) / (WARMUP * horizons)).clamp(max=1.0)
    return warm * 0.5 * (1.0 + torch.cos(math.pi * done.clamp(max=1.0)))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector, which many small tensors would keep busy; they are freed without it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass
class Draws:
    """What was drawn for each run. Lists of numbers per parameter in the order of the task's shapes."""

    horizons: Tensor  # (N,) int64
    ends: Tensor  # (N,) int64: the step at which the run is cut, at most the horizon
    lr: Tensor  # (N,)
    loss_scale: Tensor  # (N,)
    parameter_scale: Tensor  # (N, parameters)
    first_loss: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float32))  # (C N,)


@dataclass
class Inputs:
    """What a step takes from the host, on the device. Always the same tensors, which a graph of the step reads."""

    places: Tensor  # (N, B) int64: samples of the step
    lr: Tensor  # (C N,): at its peak
    horizons: Tensor  # (C N,) int64
    loss_scale: Tensor  # (C N,)
    parameter_scale: Tensor  # (parameters, C N)
    first_loss: Tensor  # (C N,)


class TaskRuns:
    """N runs on one task. C copies of each go side by side, with weights of their own; copy c of run i is particle
    c N + i. Two copies are the pairs of :class:`hf_lopt.meta.estimators.Runs`. Everything is drawn on the CPU.

    The first runs are cut short at random, so that afterwards they are at different places.

    ``graphs``: on CUDA the steps are replayed from a graph, of rules whose particles share one call without numbers of
    the host in it.
    """

    def __init__(
        self,
        task: Task,
        vector: Vector,
        rule: str,
        pairs: int,
        runs: RunSettings,
        objective: Objective,
        generator: torch.Generator,
        settings: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        copies: int = 2,
        graphs: bool = True,
    ):
        if pairs < 1:
            raise ValueError(f"{task.name} needs at least one run, got {pairs}")
        self.task, self.vector, self.pairs, self.copies = task, vector, pairs, copies
        self.settings, self.objective, self.generator = runs, objective, generator
        self.particles = Particles(rule, task.shapes, copies * pairs, settings, device)
        self.samples = task.samples().to(self.particles.device)
        ones = torch.ones(pairs, dtype=torch.float32)
        zeros = torch.zeros(pairs, dtype=torch.int64)
        self.draws = Draws(
            zeros + 1, zeros, ones, ones.clone(), torch.ones(pairs, len(task.shapes), dtype=torch.float32)
        )
        self.draws.first_loss = torch.ones(copies * pairs, dtype=torch.float32)
        self.truncations = 0
        own_schedule = self.particles.rule.own_schedule
        self._scheduled = not own_schedule
        self._augmented = runs.parameter_scale != (1.0, 1.0)
        self._inputs = self._new_inputs()
        if graphs and self.particles.device.type == "cuda" and not self.particles.together:
            warnings.warn(f"the steps of {rule} depend on numbers of the host: no CUDA graphs", stacklevel=2)
            graphs = False
        self._inner_step = cuda_graphs.Replayed(self._step_of_inputs, self.particles.device, graphs)

    def _new_inputs(self) -> Inputs:
        device, shape = self.particles.device, (len(self.task.shapes), self.count)
        places = torch.zeros(self.pairs, self.task.batch, dtype=torch.int64, device=device)
        horizons = torch.ones(self.count, dtype=torch.int64, device=device)
        scales = torch.ones(shape, device=device, dtype=torch.float32)
        lr, loss_scale, first_loss = torch.ones(3, self.count, device=device, dtype=torch.float32).unbind()
        return Inputs(places, lr, horizons, loss_scale, scales, first_loss)

    @property
    def count(self) -> int:
        """Number of particles."""
        return self.copies * self.pairs

    @property
    def steps_per_call(self) -> int:
        """Particle-steps of one :meth:`unroll`."""
        return self.count * self.settings.truncation

    def ended(self) -> list[int]:
        """Runs that are over, or have not begun."""
        steps = self.particles.steps[: self.pairs].cpu()
        return (steps >= self.draws.ends).nonzero().flatten().tolist()

    def unroll(self, vectors: Tensor) -> Tensor:
        """One truncation with the weights ``vectors`` (C N, D); its meta-losses (C N,)."""
        self.particles.set_weights(self.vector.leaves(vectors))
        self._restart(self.ended())
        with _no_collection():
            return self._truncation()

    def _truncation(self) -> Tensor:
        objective = self.objective
        self._send_draws()
        total, count = torch.zeros(self.count, device=self.particles.device, dtype=torch.float32), 0
        for k in range(self.settings.truncation):
            losses = self._step()
            if objective.samples == "train":
                total, count = total + self._measure(losses), count + 1
            elif objective.kind == "mean" and (k + 1) % objective.every == 0:
                total, count = total + self._measure(self._fresh_losses()), count + 1
        self.truncations += 1
        if objective.kind == "mean":
            return total / max(count, 1)
        last = self._measure(losses if objective.samples == "train" else self._fresh_losses())
        complete = (self.particles.steps.cpu() >= self.draws.horizons.repeat(self.copies)).to(last.device)
        return torch.where(complete, last, 0.0)

    def _send_draws(self) -> None:
        """What the steps need of the draws, to the device, all copies of a run alike."""
        draws, inputs = self.draws, self._inputs
        for name in ("lr", "horizons", "loss_scale"):
            cuda_graphs.send(getattr(draws, name).repeat(self.copies), getattr(inputs, name))
        cuda_graphs.send(draws.parameter_scale.T.repeat(1, self.copies), inputs.parameter_scale)
        cuda_graphs.send(draws.first_loss, inputs.first_loss)

    def _step(self) -> Tensor:
        """One step of every particle; the losses before it, (C N,), until the next step."""
        places = self.samples.places(self.pairs, self.task.batch, self.generator)
        cuda_graphs.send(places, self._inputs.places)
        return self._inner_step()

    def _step_of_inputs(self) -> Tensor:
        """The step, of nothing but ``_inputs`` and the particles."""
        inputs = self._inputs
        leaves = {name: p.detach().requires_grad_() for name, p in self.particles.params.items()}
        batch = self.samples.at(inputs.places, self.copies)
        with torch.enable_grad():
            losses = self.task.losses(self._scaled(leaves), batch)
            scaled = losses * inputs.loss_scale
            grads = torch.autograd.grad(scaled.sum(), list(leaves.values()))
        lr = inputs.lr
        if self._scheduled:
            lr = lr * schedule(self.particles.steps, inputs.horizons)
        self.particles.update(dict(zip(leaves, grads, strict=True)), scaled.detach(), lr, inputs.horizons)
        return losses.detach()

    def _scaled(self, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The parameters of the model, c p', from those that the rule sees."""
        if not self._augmented:
            return params
        pairs = zip(params.items(), self._inputs.parameter_scale.unbind(), strict=True)
        return {name: p * c.view(-1, *[1] * (p.dim() - 1)) for (name, p), c in pairs}

    @torch.no_grad()
    def _fresh_losses(self) -> Tensor:
        size = self.objective.batch * self.task.batch
        batch = self.samples.batch(self.pairs, size, self.generator, fresh=True, copies=self.copies)
        return self.task.losses(self._scaled(self.particles.params), batch)

    def _measure(self, losses: Tensor) -> Tensor:
        """log(loss / first loss), at most ``WORST``, which is also that of failed particles."""
        ratio = torch.log(losses.clamp_min(1e-12) / self._inputs.first_loss)
        ratio = torch.where(self.particles.failed | ~ratio.isfinite(), WORST, ratio)
        return ratio.clamp(max=WORST)

    def _log_uniform(self, limits: Sequence[float], *shape: int) -> Tensor:
        low, high = (math.log(x) for x in limits)
        return torch.exp(low + (high - low) * torch.rand(*shape, generator=self.generator, dtype=torch.float32))

    def _longest(self) -> float:
        s = self.settings
        share = min(1.0, self.truncations / s.growth) if s.growth else 1.0
        return s.shortest + share * (s.longest - s.shortest)

    def _restart(self, over: list[int]) -> None:
        if not over:
            return
        s, n, k = self.settings, len(over), self.settings.truncation
        pieces = (self._log_uniform((s.shortest, self._longest()), n) / k).round().long().clamp(min=1)
        self.draws.horizons[over] = k * pieces
        staggered = 1 + (torch.rand(n, generator=self.generator, dtype=torch.float32) * pieces).long()
        self.draws.ends[over] = k * (pieces if self.truncations else staggered)
        self.draws.lr[over] = self._log_uniform(s.lr, n)
        self.draws.loss_scale[over] = self._log_uniform(s.loss_scale, n)
        self.draws.parameter_scale[over] = self._log_uniform(s.parameter_scale, n, len(self.task.shapes))
        start = self.task.start(n, self.generator)
        if self._augmented:
            scales = self.draws.parameter_scale[over].unbind(1)
            pairs = zip(start.items(), scales, strict=True)
            start = {name: p / c.view(-1, *[1] * (p.dim() - 1)) for (name, p), c in pairs}
        both = {name: p.repeat(self.copies, *[1] * (p.dim() - 1)) for name, p in start.items()}
        places = [c * self.pairs + i for c in range(self.copies) for i in over]
        self.particles.restart(places, both)
        self._send_draws()
        self.draws.first_loss[places] = self._fresh_losses().cpu()[places]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next :meth:`unroll` depends on, but for its argument."""
        saved = {"draws": dict(vars(self.draws)), "generator": self.generator.get_state()}
        return saved | {"particles": self.particles.state_dict(), "truncations": self.truncations}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.draws = Draws(**{name: x.clone() for name, x in saved["draws"].items()})
        self.generator.set_state(saved["generator"].cpu())
        self.truncations = saved["truncations"]
        if saved["particles"]["state"]:
            self.particles.set_weights(self.vector.leaves(self.vector.start().expand(self.count, -1)))
            self.particles.load_state_dict(saved["particles"])
