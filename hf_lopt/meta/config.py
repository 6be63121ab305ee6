"""The configuration of a meta-training: plain data, read from YAML, checked before anything is computed."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lopt.meta import head, tasks
from hf_lopt.meta.estimators import ESTIMATORS
from hf_lopt.meta.mixtures import MIXTURES
from hf_lopt.meta.particles import supported
from hf_lopt.meta.runs import Objective, RunSettings


METHODS = (*ESTIMATORS, "cma_es")


@dataclass(frozen=True)
class Perturbation:
    """How theta is disturbed.

    Attributes:
        method: "pes", "truncated_es" (which with truncations as long as the runs is full-length ES), or "cma_es",
            which searches for mixing weights.
        std: standard deviation of a perturbation.
        clip: bound on the difference of the meta-losses of a pair; inf for none.
    """

    method: str = "pes"
    std: float = 0.01
    clip: float = math.inf

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"perturbation.method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not (self.std > 0 and self.clip > 0):
            raise ValueError(f"perturbation.std and clip must be positive, got {self.std} and {self.clip}")


@dataclass(frozen=True)
class Outer:
    """The optimizer of theta: Adam on the estimated gradient, under a cosine to a tenth of lr.

    Attributes:
        steps: outer steps; generations of CMA-ES.
        lr, betas, weight_decay: of Adam (decoupled decay, towards the start).
        clip: bound on the norm of the gradient; inf for none.
        average: decay of the moving average of theta, which is what is evaluated and exported; 0: theta itself.
    """

    steps: int = 200
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = math.inf
    average: float = 0.95

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.clip <= 0 or not 0 <= self.average < 1 or self.weight_decay < 0:
            raise ValueError(
                "outer needs steps >= 1, lr > 0, clip > 0, weight_decay >= 0 and average in [0, 1), got "
                f"{self.steps}, {self.lr}, {self.clip}, {self.weight_decay}, {self.average}"
            )


@dataclass(frozen=True)
class Selection:
    """How the average of theta is judged while it is trained, always on the same runs of tasks it is not trained on.

    Attributes:
        every: outer steps between two looks; 0: never.
        tasks: names; () for all validation tasks.
        seeds: runs per task and learning rate.
        steps: length of a run.
        lr: learning rates; the best of each task counts.
    """

    every: int = 0
    tasks: tuple[str, ...] = ()
    seeds: int = 4
    steps: int = 300
    lr: tuple[float, ...] = (1e-3, 3e-3)

    def __post_init__(self) -> None:
        for name in self.tasks:
            if tasks.named(name).part == "test":
                raise ValueError(f"selection.tasks names {name}, a test task: choose among the validation tasks")


@dataclass(frozen=True)
class Config:
    """Everything that a meta-training depends on.

    Attributes:
        rule: name of the rule whose weights are trained.
        tasks: task name -> pairs of particles; for CMA-ES runs per candidate.
        start: "constructed", "bundled", or the path of weights.
        trained: leaves to train, shell patterns; () for the rule's own choice.
        units: hidden units of the start's network, where those that are not in use get random inputs and no effect
            (:func:`hf_lopt.meta.mixtures.with_spare_units`); 0: as it is.
        settings: constructor keywords of the rule.
        mixture: a few numbers to train instead of leaves, with their first values: "feature[column]", mixing weights;
            for VeLO see :mod:`hf_lopt.meta.head`. CMA-ES needs it.
        population: for CMA-ES: candidates of a generation.
        balance: for CMA-ES: if not 0, the losses of each task count in units of their standard deviation over the
            candidates, plus this; so that no task rules.
        checkpoint_every: outer steps between two checkpoints.
        seed: of everything that is drawn.
    """

    rule: str
    tasks: Mapping[str, int]
    start: str = "constructed"
    trained: tuple[str, ...] = ()
    units: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    runs: RunSettings = field(default_factory=RunSettings)
    objective: Objective = field(default_factory=Objective)
    perturbation: Perturbation = field(default_factory=Perturbation)
    outer: Outer = field(default_factory=Outer)
    selection: Selection = field(default_factory=Selection)
    mixture: Mapping[str, float] = field(default_factory=dict)
    population: int = 12
    balance: float = 0.0
    checkpoint_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        supported(self.rule)
        if not self.tasks:
            raise ValueError(f"tasks must name at least one task and its pairs; there are {', '.join(tasks.TASKS)}")
        for name, pairs in self.tasks.items():
            if tasks.named(name).part == "test":
                raise ValueError(f"{name} is a test task: train on others, or the table of results means nothing")
            if not isinstance(pairs, int) or pairs < 1:
                raise ValueError(f"tasks.{name} must be a positive number of pairs, got {pairs!r}")
        if self.perturbation.method == "cma_es" and not self.mixture:
            raise ValueError("perturbation.method cma_es needs a mixture, the numbers to search for")
        if self.mixture and self.perturbation.method != "cma_es" and self.rule not in head.RULES:
            raise ValueError(f"a mixture by gradients is for {', '.join(head.RULES)}: use perturbation.method cma_es")
        if self.mixture and self.trained:
            raise ValueError("trained names leaves and mixture numbers to train instead: give one of them")
        if self.units and (self.mixture or self.rule not in MIXTURES):
            raise ValueError(f"units are for the gradients of {', '.join(sorted(MIXTURES))}: leave them out")
        if self.population < 4 or self.checkpoint_every < 1 or self.balance < 0:
            raise ValueError(
                "population must be at least 4, checkpoint_every at least 1 and balance not negative, got "
                f"{self.population}, {self.checkpoint_every} and {self.balance}"
            )


def _convert(kind: Any, value: Any, where: str) -> Any:
    """``value`` as YAML gives it as a field of type ``kind``."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if kind is float:
        if isinstance(value, str) and re.fullmatch(r"[+-]?[\d.]+e[+-]?\d+|inf", value):  # 3e-4 is text to YAML
            return float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif kind is str:
        if isinstance(value, str):
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        inner = typing.get_args(kind)[0]
        return tuple(_convert(inner, x, f"{where}[{i}]") for i, x in enumerate(value))
    elif origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        inner = typing.get_args(kind)[1]
        return {
            str(key): value[key] if inner is Any else _convert(inner, value[key], f"{where}.{key}") for key in value
        }
    name = kind.__name__ if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) else str(kind)
    raise ValueError(f"{where} must be of type {name}, got {value!r}")


def _build(kind: type, values: Any, where: str = "") -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'the configuration'} must be a mapping of settings, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(map(str, set(values) - set(fields)))
    if unknown:
        raise ValueError(f"no setting {where}{'.' if where else ''}{unknown[0]}; there are {', '.join(fields)}")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"the configuration lacks {', '.join(prefix + name for name in missing)}")
    return kind(**{str(name): _convert(hints[name], value, prefix + name) for name, value in values.items()})


def from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration of nested mappings.

    Raises:
        ValueError: a setting that there is not, or one with a value of another type or out of bounds.
    """
    return _build(Config, values)


def read(path: str | Path) -> Config:
    """The configuration in a YAML file; ValueError names the file and what is wrong with it."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError("configurations are YAML files: pip install 'hf_lopt[meta]'") from error
    try:
        return from_dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"the configuration {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain mappings and lists, as JSON and YAML hold them."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(x) for key, x in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(x) for x in value]
        return str(value) if isinstance(value, float) and math.isinf(value) else value

    return plain(dataclasses.asdict(config))
