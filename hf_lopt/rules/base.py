"""What an update rule is: data, and one short function over lists of tensors.

A rule names its features, the shapes of its weights, its per-tensor and per-run state and its defaults; its ``update``
strings the functions of :mod:`hf_lopt.step` together. It does not loop over parameters and keeps no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from hf_lopt import notices, weights
from hf_lopt.step.networks import Theta


@dataclass
class UpdateResult:
    """What a rule's ``update`` gives back, beside what it changed in place.

    Attributes:
        run: new tensors of the run, by name.
        skipped: bool, 0-d.
        report: what is worth logging: device tensors, or functions that compute them when they are asked for.
    """

    run: dict[str, Tensor]
    skipped: Tensor
    report: dict[str, Tensor | Callable[[], Tensor]] = field(default_factory=dict)


_POWER_OF_REACH = 1.5


@dataclass(frozen=True)
class RunLength:
    """How much longer the steps of short runs are: (steps / N)^power in a run of N updates, from 1 to ``largest``.

    A step that is relative to the size of a tensor moves it by a share of itself, whatever the length of the run: a
    short one ends before anything has moved far. But where a model's reach is large (:mod:`hf_lopt.reach`), a small
    share of each tensor changes already what the model does: above R, ``reach``, (R / reach)^1.5 times that. Measured
    by ``python -m benchmarks.run_length``.

    A pretrained model that reaches far needs that only once it sees the same samples again and again, and then learns
    them by heart: its steps are as much shorter as the epochs ask for, (E / epochs)^power_of_epochs above E,
    ``epochs``, but not more than (R / reach)^1.5. Measured by ``python -m benchmarks.epochs``.

    Attributes:
        steps: runs of at least so many updates take the rule's own step size.
        power: without unit.
        largest: the largest multiplier.
        reach: of a model; from here on steps become shorter.
        smallest: the smallest multiplier, of a model that reaches far.
        epochs: from here on steps become shorter; 0: the reach counts whatever the epochs.
        power_of_epochs: without unit.
        others: what is different with weights that are not embedded.
    """

    steps: float
    power: float
    largest: float
    reach: float = math.inf
    smallest: float = 1.0
    epochs: float = 0.0
    power_of_epochs: float = 1.0
    others: Mapping[str, float] = field(default_factory=dict)

    def with_weights(self, embedded: bool) -> RunLength:
        """The same for embedded weights, or for others."""
        return self if embedded else replace(self, **self.others)

    def multiplier(self, updates: int, reach: float = 0.0, epochs: float = 0.0) -> float:
        """The multiplier for a run of so many updates; 1 for 0, a run whose length is not known.

        Args:
            epochs: how often it sees each sample; 0: not known.
        """
        if not updates:
            return 1.0
        found = max((self.steps / updates) ** self.power, 1.0)
        if reach > self.reach:
            of_epochs = (self.epochs / max(epochs, self.epochs)) ** self.power_of_epochs if self.epochs else 0.0
            found *= max((self.reach / reach) ** _POWER_OF_REACH, of_epochs)
        return min(max(found, self.smallest), self.largest)


# What trains, and how its steps follow the length, of all rules whose schedule is that of a horizon. Of the others
# published Celo was measured: it goes further by itself.
FROM_SCRATCH, FINE_TUNING, NEW_LAYERS, ADAPTERS = "from scratch", "fine-tuning", "new layers", "adapters"
_PRETRAINED = RunLength(steps=150, power=0.9, largest=2.0, reach=20.0, smallest=0.1, epochs=4.0, others={"steps": 100})
RUN_LENGTHS: Mapping[str, RunLength] = {
    FROM_SCRATCH: RunLength(steps=1000, power=0.5, largest=5.0, reach=20.0, others={"steps": 300}),
    # The tensors that a pretrained model was loaded with, and layers that its checkpoint lacks
    # (benchmarks/new_layers.py).
    FINE_TUNING: _PRETRAINED,
    NEW_LAYERS: replace(_PRETRAINED, steps=300, largest=5.0, power_of_epochs=2.0, others={"steps": 200}),
    # Times that from scratch, of a model that is taken to reach far: they have no reach of their own.
    ADAPTERS: RunLength(steps=0, power=1.0, largest=1.0, reach=0.0, smallest=0.1, epochs=4.0),
}


@dataclass(frozen=True)
class Rule:
    """A published update rule.

    Attributes:
        name: the ``optim=`` name; also names the embedded weights.
        class_name: the public class.
        summary: one sentence with the source.
        defaults: constructor keywords after ``params`` and their defaults, in order.
        per_group: the keywords that a parameter group may set for itself, beside lr and weight_decay.
        shapes: leaves of the weights and their shapes; letters stand for sizes that the file decides.
        init_state: (parameter, its group, weights) -> the state of one parameter.
        init_run: (weights) -> the tensors that belong to the run as a whole.
        prepare: (weights, settings) -> the tensors that ``update`` takes, packed once. Rules that take stacked
            replicas also take leaves of networks with an axis of replicas in front.
        update: (tensors, run, prepared weights, settings, loss) -> result: the step itself.
        own_schedule: the rule decides its step size over the run: lr is a multiplier, 1.0 by default.
        finetune_lr: the ``lr`` for a pretrained model, whatever the weights: steps that are as large as a random
            parameter needs undo its training.
        finetune_settings: settings that go with ``finetune_lr``.
        new_layer_lr: the ``lr`` for layers of a pretrained model that its checkpoint lacks; None: that from scratch.
        needs_horizon, needs_loss: whether a step is undefined without them.
        nan_to_zero: NaN in a gradient counts as 0, as in the reference, instead of skipping the step.
        run_lengths: how the step size follows the length of the run where nobody chose an lr; none: it does not.
    """

    name: str
    class_name: str
    summary: str
    defaults: Mapping[str, Any]
    per_group: tuple[str, ...]
    shapes: Mapping[str, tuple[int | str, ...]]
    init_state: Callable[[Tensor, Mapping[str, Any], Theta], dict[str, Tensor]]
    init_run: Callable[[Theta], dict[str, Tensor]]
    prepare: Callable[[Theta, Mapping[str, Any]], dict[str, Any]]
    update: Callable[..., UpdateResult]
    own_schedule: bool
    finetune_lr: float
    needs_horizon: bool
    needs_loss: bool
    nan_to_zero: bool = False
    run_lengths: Mapping[str, RunLength] = field(default_factory=dict)
    finetune_settings: Mapping[str, float] = field(default_factory=dict)
    new_layer_lr: float | None = None

    @property
    def lr_of_new_layers(self) -> float:
        """See ``new_layer_lr``."""
        return self.defaults["lr"] if self.new_layer_lr is None else self.new_layer_lr

    @property
    def words(self) -> tuple[str, ...]:
        """The settings of a group that are words, such as axis_order; they decide about the state of a parameter."""
        return tuple(name for name in self.per_group if isinstance(self.defaults[name], str))

    def fine_tuning(self, weights: weights.Weights) -> tuple[float, Mapping[str, float]]:
        """The lr for a pretrained model, and the settings that go with it; of weights that say nothing the rule's."""
        if weights.finetune_lr is None:
            return self.finetune_lr, self.finetune_settings
        return weights.finetune_lr, weights.finetune_settings

    def length_multiplier(
        self, weights: weights.Weights, what: str, updates: int, reach: float = 0.0, epochs: float = 0.0
    ) -> float:
        """What an lr that nobody chose counts in a run of so many updates; 1 for rules that do not follow its length.

        Args:
            what: a key of :data:`RUN_LENGTHS`.
            reach: of the model, before its first step.
            epochs: how often the run sees each sample; 0: not known.
        """
        if what not in self.run_lengths:
            return 1.0
        return self.run_lengths[what].with_weights(weights.origin == "bundled").multiplier(updates, reach, epochs)

    def load_weights(self, spec: Any = "auto", **settings: Any) -> weights.Weights:
        """The weights that ``spec`` names; see :func:`hf_lopt.weights.load`."""
        hints = {k: v for k, v in settings.items() if k == "bank_scale"}
        with notices.collecting():  # the first step, or the integration that sees it coming, tells
            return weights.load(self.name, spec, self.shapes, **hints)
