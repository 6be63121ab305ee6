"""What an update rule is: data, and one short function over lists of tensors.

A rule names its features, the shapes of its weights, its per-tensor and per-run state and its defaults; its ``update``
strings the functions of :mod:`hf_lopt.step` together. It does not loop over parameters and keeps no state.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class RunLength:
    """How much longer the steps of short runs are: (steps / N)^power in a run of N updates, from 1 to ``largest``.

    A step that is relative to the size of a tensor moves it by a share of itself, whatever the length of the run: a
    short one ends before anything has moved far. Measured by ``python -m benchmarks.run_length``.

    Attributes:
        steps: runs of at least so many updates take the rule's own step size.
        power: without unit.
        largest: the largest multiplier.
    """

    steps: float
    power: float
    largest: float

    def multiplier(self, updates: int) -> float:
        """The multiplier for a run of so many updates; 1 for 0, a run whose length is not known."""
        if not updates:
            return 1.0
        return min(max((self.steps / updates) ** self.power, 1.0), self.largest)


# Of all rules whose schedule is that of a horizon. At 300 steps the best multiplier is 1 on some tasks and 2.8 on
# others, for 3 % of the loss on average; and 1.7 cost a sequence-to-sequence model a third. So it ends there.
RUN_LENGTH = RunLength(steps=300, power=0.9, largest=5.0)
# Of the same rules where a pretrained model is fine-tuned (benchmarks/new_layers.py).
FINETUNE_RUN_LENGTH = RunLength(steps=150, power=0.9, largest=2.0)
# Where both end with weights that are not embedded: published Celo goes further by itself.
STEPS_OF_OTHERS, FINETUNE_STEPS_OF_OTHERS = 200, 100


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
        run_length: how the step size follows the length of the run where nobody chose an lr, with embedded weights;
            None: it does not.
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
    run_length: RunLength | None = None
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

    def length_multiplier(self, weights: weights.Weights, fine_tuning: bool, updates: int) -> float:
        """What an lr that nobody chose counts in a run of so many updates; 1 for rules that do not follow its length.

        New layers of a pretrained model follow it as those of a model from scratch do, ``fine_tuning`` false.
        """
        if self.run_length is None:
            return 1.0
        found, most = self.run_length, STEPS_OF_OTHERS
        if fine_tuning:
            found, most = FINETUNE_RUN_LENGTH, FINETUNE_STEPS_OF_OTHERS
        if weights.origin != "bundled":
            found = replace(found, steps=min(found.steps, most))
        return found.multiplier(updates)

    def load_weights(self, spec: Any = "auto", **settings: Any) -> weights.Weights:
        """The weights that ``spec`` names; see :func:`hf_lopt.weights.load`."""
        hints = {k: v for k, v in settings.items() if k == "bank_scale"}
        with notices.collecting():  # the first step, or the integration that sees it coming, tells
            return weights.load(self.name, spec, self.shapes, **hints)
