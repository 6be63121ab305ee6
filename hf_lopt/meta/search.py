"""Two ways of improving weights: gradient descent on estimated gradients, and CMA-ES over a few mixing weights.

Both go step by step, keep all of their state in a dict, and split their work over processes: a task is the unit, each
process takes some of them, and every process computes the same update from all results. The numbers do not depend on
how many processes there are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_lopt.meta import tasks
from hf_lopt.meta.config import Config
from hf_lopt.meta.estimators import Estimator
from hf_lopt.meta.head import HeadVector
from hf_lopt.meta.mixtures import MIXTURES, SCHEDULE, mixture_leaves, narrowed, with_spare_units
from hf_lopt.meta.runs import TaskRuns
from hf_lopt.meta.theta import Vector, starting_weights


LAST_LR = 0.1


def processes() -> tuple[int, int]:
    """Number of this process and of all."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def seeded(*words: Any) -> torch.Generator:
    """A generator on the CPU that depends on all of ``words``."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _gathered(results: Mapping[int, Tensor], count: int, width: int, device: torch.device) -> Tensor:
    """Rows (count, width) that each belong to one process, on all of them. Adding zeros is exact."""
    rows = torch.zeros(count, width, dtype=torch.float64)
    for i, row in results.items():
        rows[i] = row
    if processes()[1] > 1:
        rows = rows.to(device)
        dist.all_reduce(rows)
        rows = rows.cpu()
    return rows


def on_host(state: Any) -> Any:
    """Nested mappings and lists with their tensors on the CPU, where any machine can read them."""
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, Mapping):
        return {key: on_host(x) for key, x in state.items()}
    return type(state)(map(on_host, state)) if isinstance(state, (list, tuple)) else state


def _states(states: Mapping[str, Any]) -> dict[str, Any]:
    """The states of all processes' tasks, on each of them, on the CPU."""
    states = on_host(states)
    if processes()[1] == 1:
        return states
    parts: list[dict[str, Any]] = [{}] * processes()[1]
    dist.all_gather_object(parts, states)
    return {name: state for part in parts for name, state in part.items()}


def _own_tasks(config: Config) -> list[tuple[int, str]]:
    """Numbers and names of the tasks of this process: the largest ones first, one to each process in turn."""
    rank, world = processes()

    def work(name: str) -> int:
        task = tasks.named(name)
        return config.tasks[name] * task.batch * sum(math.prod(shape) for shape in task.shapes.values())

    names = list(config.tasks)
    order = sorted(range(len(names)), key=lambda i: -work(names[i]))
    return [(i, names[i]) for i in order[rank::world]]


class GradientSearch:
    """Adam on gradients estimated by evolution strategies, and a moving average of where it goes."""

    def __init__(self, config: Config, device: torch.device | str = "cpu", graphs: bool = True):
        self.config, self.device = config, torch.device(device)
        start = starting_weights(config.rule, config.start)
        if config.units:
            start = with_spare_units(config.rule, start, config.units, seeded(config.seed, "units"))
        if config.mixture:
            self.vector: Vector | HeadVector = HeadVector(start, config.mixture)
        else:
            self.vector = Vector(config.rule, start, config.trained)
        self.center = torch.nn.Parameter(self.vector.start())
        self.average = self.center.detach().clone()
        self.steps = 0
        outer, noise = config.outer, config.perturbation
        # The decay goes towards the start: what is kept is the distance from it.
        self.optimizer = torch.optim.Adam([self.center], lr=outer.lr, betas=outer.betas)
        self.estimators = {}
        for _, name in _own_tasks(config):
            runs = TaskRuns(
                *(tasks.named(name), self.vector, config.rule, config.tasks[name], config.runs, config.objective),
                *(seeded(config.seed, "runs", name), config.settings, device),
                graphs=graphs,
            )
            generator = seeded(config.seed, "perturbations", name)
            self.estimators[name] = Estimator(runs, len(self.average), noise.std, generator, noise.method, noise.clip)

    def step(self) -> dict[str, float]:
        """One truncation of every task and one outer step; numbers for a log."""
        config, names = self.config, list(self.config.tasks)
        theta, results = self.center.detach(), {}
        for i, name in _own_tasks(config):
            gradient, losses = self.estimators[name].gradient(theta)
            results[i] = torch.cat([gradient.double(), losses.mean().double().view(1)])
        rows = _gathered(results, len(names), len(theta) + 1, self.device)
        shares = torch.tensor([config.tasks[name] for name in names], dtype=torch.float64)
        gradient = (shares / shares.sum()) @ rows[:, :-1]
        norm = gradient.norm().item()
        self._descend((gradient * min(1.0, config.outer.clip / (norm + 1e-12))).float())
        metrics = {f"meta_loss/{name}": row[-1].item() for name, row in zip(names, rows, strict=True)}
        metrics |= {"meta_loss": rows[:, -1].mean().item(), "gradient_norm": norm}
        moved = (self.center.detach() - self.vector.start()).norm().item()
        return metrics | {"distance": moved, "lr": self.optimizer.param_groups[0]["lr"]}

    def _descend(self, gradient: Tensor) -> None:
        outer = self.config.outer
        share = 0.5 * (1.0 + math.cos(math.pi * self.steps / outer.steps))
        lr = outer.lr * (LAST_LR + (1.0 - LAST_LR) * share)
        self.optimizer.param_groups[0]["lr"] = lr
        self.center.grad = gradient
        with torch.no_grad():
            self.center.lerp_(self.vector.start(), lr * outer.weight_decay)
        self.optimizer.step()
        self.steps += 1
        # The average forgets its start as fast as it can.
        decay = min(outer.average, self.steps / (self.steps + 9.0)) if outer.average else 0.0
        self.average.lerp_(self.center.detach(), 1.0 - decay)

    @property
    def steps_per_call(self) -> int:
        """Particle-steps of one :meth:`step`, over all processes."""
        return 2 * sum(self.config.tasks.values()) * self.config.runs.truncation

    def theta(self) -> dict[str, Tensor]:
        """The weights as they would be used: the average."""
        return self.vector.leaves(self.average)

    def state_dict(self) -> dict[str, Any]:
        """Everything, of all processes; to be called on each of them."""
        states = {
            name: {"estimator": estimator.state_dict(), "runs": estimator.runs.state_dict()}
            for name, estimator in self.estimators.items()
        }
        saved = {"steps": self.steps, "theta": self.center.detach().clone(), "average": self.average.clone()}
        return saved | {"outer": self.optimizer.state_dict(), "tasks": _states(states)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.steps = saved["steps"]
        with torch.no_grad():
            self.center.copy_(saved["theta"])
        self.average = saved["average"].clone()
        self.optimizer.load_state_dict(saved["outer"])
        for name, estimator in self.estimators.items():
            estimator.load_state_dict(saved["tasks"][name]["estimator"])
            estimator.runs.load_state_dict(saved["tasks"][name]["runs"])


class MixtureSearch:
    """CMA-ES over mixing weights of features: whole runs, the same ones for all candidates of a generation.

    Only ratios matter to a rule that normalises its output, so the mixing weights are scaled to the norm of the
    start; the scale of other rules is a number of its own (:mod:`hf_lopt.meta.mixtures`). For VeLO the numbers are
    those of a head on the scheduler (:mod:`hf_lopt.meta.head`). The runs of a task have one length, which is drawn
    anew in every generation; the lengths of the tasks are spread evenly between the limits.

    Attributes:
        steps: generations done.
        steps_per_call: particle-steps of the last one, over all processes; at first of the longest possible.
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu", graphs: bool = True):
        self.config, self.device, self.graphs = config, torch.device(device), graphs
        self.start = starting_weights(config.rule, config.start)
        self.names = list(config.mixture)
        self.first = torch.tensor(list(config.mixture.values()), dtype=torch.float64)
        network = config.rule in MIXTURES
        self._direction = torch.tensor([network and name not in SCHEDULE for name in self.names], dtype=torch.bool)
        self.steps_per_call = config.population * sum(config.tasks.values()) * config.runs.longest
        mixture_leaves(config.rule, self.start, config.mixture)  # refuses what there is not
        self.steps = 0
        self.history: list[dict[str, Tensor]] = []
        self._cma = self._fresh()

    def _fresh(self) -> Any:
        try:
            from cmaes import CMA
        except ImportError as error:
            raise ImportError("CMA-ES comes from the package cmaes: pip install 'hf_lopt[meta]'") from error
        seed = int(torch.randint(2**31, (), generator=seeded(self.config.seed, "cma"), dtype=torch.int64))
        sigma = self.config.perturbation.std
        return CMA(self.first.numpy(), sigma, seed=seed, population_size=self.config.population)

    def _scaled(self, points: Tensor) -> Tensor:
        """Points (N, numbers) with mixing weights of the norm of the start."""
        norms = (points * self._direction).norm(dim=1, keepdim=True)
        return torch.where(self._direction, points * ((self.first * self._direction).norm() / norms), points)

    def _leaves(self, points: Tensor) -> list[dict[str, Tensor]]:
        return [
            mixture_leaves(self.config.rule, self.start, dict(zip(self.names, row, strict=True)))
            for row in self._scaled(points).tolist()
        ]

    def _lengths(self) -> list[int]:
        """Steps of the runs of each task in this generation."""
        generator, count = seeded(self.config.seed, "lengths", self.steps), len(self.config.tasks)
        low, high = math.log(self.config.runs.shortest), math.log(self.config.runs.longest)
        order = torch.randperm(count, generator=generator, dtype=torch.int64)
        places = (order + torch.rand(count, generator=generator, dtype=torch.float32)) / count
        return [round(x) for x in torch.exp(low + (high - low) * places.double()).tolist()]

    def step(self) -> dict[str, float]:
        """One generation; numbers for a log."""
        config, names, lengths = self.config, list(self.config.tasks), self._lengths()
        points = torch.tensor([self._cma.ask().tolist() for _ in range(config.population)], dtype=torch.float64)
        candidates = self._leaves(points)
        if config.rule in MIXTURES:  # units that are not in use cost time only
            candidates = [narrowed(config.rule, leaves) for leaves in candidates]
        vectors = [Vector(config.rule, leaves, config.trained) for leaves in candidates]
        results = {}
        for i, name in _own_tasks(config):
            count = config.tasks[name]
            steps = lengths[i]
            whole = replace(config.runs, truncation=steps, shortest=steps, longest=steps, growth=0)
            runs = TaskRuns(
                *(tasks.named(name), vectors[0], config.rule, count, whole, config.objective),
                *(seeded(config.seed, "generation", self.steps, name), config.settings, self.device),
                *(config.population, self.graphs),
            )
            starts = torch.stack([vector.start() for vector in vectors])
            losses = runs.unroll(starts.repeat_interleave(count, 0)).cpu()
            results[i] = losses.view(config.population, count).mean(1).double()
        rows = _gathered(results, len(names), config.population, self.device)
        values = told = rows.mean(0)
        if config.balance:
            spread = rows.std(1, keepdim=True) + config.balance
            told = ((rows - rows.mean(1, keepdim=True)) / spread).mean(0)
        self._tell(points, told)
        self.history.append({"points": points, "values": told})
        self.steps += 1
        per_candidate = sum(config.tasks[name] * length for name, length in zip(names, lengths, strict=True))
        self.steps_per_call = config.population * per_candidate
        mean = self._mean()
        metrics = {"meta_loss": values.mean().item(), "best": values.min().item()}
        return metrics | {f"mixture/{name}": value for name, value in zip(self.names, mean.tolist(), strict=True)}

    def _tell(self, points: Tensor, values: Tensor) -> None:
        self._cma.tell([(point.numpy(), value.item()) for point, value in zip(points, values, strict=True)])

    def _mean(self) -> Tensor:
        return self._scaled(torch.tensor(self._cma.mean, dtype=torch.float64).unsqueeze(0))[0]

    def theta(self) -> dict[str, Tensor]:
        """The weights of the mean of the distribution."""
        return self._leaves(self._mean().unsqueeze(0))[0]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "history": self.history}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Tell a fresh search what the saved one was told: its own state is no plain data."""
        self.steps, self.history, self._cma = saved["steps"], list(saved["history"]), self._fresh()
        for generation in self.history:
            for _ in range(self.config.population):
                self._cma.ask()
            self._tell(generation["points"], generation["values"])


def search(config: Config, device: torch.device | str = "cpu", graphs: bool = True) -> GradientSearch | MixtureSearch:
    """The search that ``config`` describes; ``graphs``: with CUDA graphs on a CUDA device."""
    make: Callable = MixtureSearch if config.perturbation.method == "cma_es" else GradientSearch
    return make(config, device, graphs)
