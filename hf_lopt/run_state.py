"""What belongs to a run as a whole: how far it has come, what it has skipped, the losses it has seen, its length.

``state_dict`` saves tensors per parameter and settings per group, and nothing for the optimizer as a whole. So these
values stand in every parameter group, the same in all of them, and :class:`RunState` is the view that reads and writes
them. Two things of a run are not saved: the loss that waits for the next step (:mod:`hf_lopt.pending`), and what
:mod:`hf_lopt.run_monitor` has already warned about.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lopt import distributed, notices
from hf_lopt.accumulation import add_gradients, set_mean_gradients
from hf_lopt.length_multiplier import Chosen, LengthMultiplier
from hf_lopt.pending import PendingLoss
from hf_lopt.reach import is_here
from hf_lopt.rules.base import Rule
from hf_lopt.settings import number_of_epochs, positive_int
from hf_lopt.step.scheduler import means_of_equal_losses
from hf_lopt.weights import Weights, earlier


# int64, 0-d: steps taken, steps skipped, steps skipped in a row up to now.
COUNTERS = ("step", "nonfinite_steps", "nonfinite_in_a_row")
# What lr is multiplied with because of the length of the run; 0: not decided yet.
LENGTH_MULTIPLIER = "length_multiplier"
# How often the run sees each sample, as somebody said it or as it was when the multiplier was decided; there if known.
NUM_EPOCHS = "num_epochs"
# In fine-tuning, how many times that it is for layers that start from random numbers; there once it is decided.
MORE_FOR_NEW_LAYERS = "more_for_new_layers"


class RunState:
    """The values of a run in the parameter groups of its optimizer.

    Beside the :data:`COUNTERS` these are ``num_training_steps``, the length of the run in calls of ``step()`` (0: not
    set); ``length_multiplier``, where the rule has one; the rule's own tensors, such as its buffer of losses; and for
    rules with ``max_training_steps`` the calls and the loss (0-d float32) that the next update has so far.

    ``owner`` is the optimizer, held weakly. Its list of groups is read anew each time: torch replaces the list when it
    restores a checkpoint, and a wrapper that copied the ``__dict__`` of the optimizer has the old one.
    """

    def __init__(self, owner: Optimizer, rule: Rule, weights: Weights):
        self._owner = ref(owner)
        self._rule, self._weights = rule, weights
        self.chosen = Chosen()
        self._tensor_names = tuple(rule.init_run(weights.theta))
        # All counters in one tensor (3,), and views of its elements.
        self._counters: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self._starts_late = False
        self._length = LengthMultiplier(owner)

    @property
    def owner(self) -> Any:
        """The optimizer itself, whichever wrapper asks."""
        return self._owner()

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the optimizer."""
        return self.owner.param_groups

    # ---- storage ----------------------------------------------------------------------------------------------------

    def initial_values(self) -> dict[str, Any]:
        """The values of a run that has not begun, settings aside."""
        values: dict[str, Any] = {}
        if "max_training_steps" in self._rule.defaults:
            values |= {"accumulated": 0, "accumulated_loss": torch.zeros((), dtype=torch.float32)}
        return values | self._initial_tensors()

    def _initial_tensors(self) -> dict[str, Tensor]:
        counters = {name: torch.zeros((), dtype=torch.int64) for name in COUNTERS}
        return counters | self._rule.init_run(self._weights.theta)

    def keys(self, defaults: Mapping[str, Any]) -> tuple[str, ...]:
        """Those of the optimizer's ``defaults`` that have one value for the whole run, the same in all groups."""
        # torch adds "differentiable" to the defaults, not to the groups, when a state is loaded.
        per_group = {"lr", "weight_decay", "differentiable", *self._rule.per_group}
        first = self.groups[0] if self.groups else defaults  # that of an old checkpoint has fewer
        return tuple(key for key in defaults if key in first and key not in per_group)

    def without_run_settings(
        self, group: Mapping[str, Any], defaults: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """What a new group sets for itself; and the settings of the run that it would have otherwise."""
        keys = self.keys(defaults)
        own = {key: value for key, value in group.items() if key not in keys}
        return own, [k for k in self._rule.defaults if k in group and k in keys and group[k] != defaults[k]]

    def write(self, values: Mapping[str, Any]) -> None:
        """Set values in all groups."""
        for group in self.groups:
            group.update(values)

    def reset(self) -> None:
        """Back to the first step: counters, what an update has gathered, the rule's tensors. Settings stay."""
        self.write(self.initial_values())
        self.forget_counters()

    def forget_counters(self) -> None:
        """Do not rely on the counters of earlier steps: the groups have been written by someone else."""
        self._counters, self._starts_late = None, False

    def check_saved(self, groups: Sequence[Mapping[str, Any]]) -> Weights:
        """See that the ``param_groups`` of a checkpoint are of this rule and these weights.

        Returns:
            the weights to go on with: where these are embedded ones, those that were when the checkpoint was made.

        Raises:
            ValueError: if they are of another optimizer, another rule or other weights.
        """
        rule, weights = self._rule.name, self._weights
        first = str(groups[0].get("weights_sha256")) if groups else ""
        if weights.origin == "bundled" and first != weights.sha256:
            weights = earlier(rule, first, self._rule.shapes) or weights
        for group in groups:
            saved_rule, saved_weights = group.get("rule"), group.get("weights_sha256")
            if not isinstance(saved_rule, str) or saved_rule != rule:
                got = (
                    f"the rule {saved_rule!r}"
                    if isinstance(saved_rule, str)
                    else "another optimizer, which names no rule"
                )
                raise ValueError(f"this checkpoint is of {got}; this optimizer is {rule!r}. Use the same one.")
            if not isinstance(saved_weights, str) or saved_weights != weights.sha256:
                raise ValueError(
                    f"this checkpoint was made with the weights {group.get('weights_source')!r} (sha256 "
                    f"{str(saved_weights)[:12]}), but {weights.source!r} (sha256 "
                    f"{weights.sha256[:12]}) are loaded. Pass weights=... of the checkpoint, or start afresh."
                )
        return weights

    def adopt(self, weights: Weights) -> None:
        """Go on with these weights, of a checkpoint that has been loaded, and with a length that somebody set."""
        if weights is not self._weights:
            notices.LOG.info(
                "%s goes on with the weights of the checkpoint, %s", self._rule.class_name, weights.source
            )
            owner, self._weights = self.owner, weights
            owner._weights = weights
            owner._inputs.use(weights.theta)
            for values in (owner.defaults, *self.groups):
                values |= {"weights_source": weights.source, "weights_sha256": weights.sha256}
        self._keep_chosen()

    # ---- length -----------------------------------------------------------------------------------------------------

    @property
    def num_training_steps(self) -> int:
        """Length of the run in calls of ``step()``; 0 while it is not set, and for rules without one."""
        return self.groups[0].get("num_training_steps", 0)

    @num_training_steps.setter
    def num_training_steps(self, value: int) -> None:
        self.chosen = self.chosen._replace(steps=positive_int("num_training_steps", value))
        self._set_length(self.chosen.steps)

    @property
    def num_epochs(self) -> float:
        """How often the run sees each sample; 0: not known."""
        said, a_pass = self.groups[0].get(NUM_EPOCHS, 0.0), self._length.steps_per_epoch
        return said or (self.num_training_steps / a_pass if a_pass else 0.0)

    @num_epochs.setter
    def num_epochs(self, value: float) -> None:
        self.chosen = self.chosen._replace(epochs=number_of_epochs(value))
        self._set_epochs(self.chosen.epochs)

    def _set_epochs(self, value: float) -> None:
        before = self.num_epochs
        self.write({NUM_EPOCHS: value})
        if value and self.is_decided and not math.isclose(value, before, rel_tol=1e-6):
            self._decide_multiplier(self.num_updates)

    def observe_epoch(self, steps: Callable[[], float]) -> None:
        """Note how many steps a pass of the training loop takes: it tells the epochs, where nobody has said them.

        ``steps`` is asked until the multiplier is decided, and of rules that have none never.
        """
        if self.awaits_epochs:
            self._length.steps_per_epoch = steps()

    @property
    def awaits_epochs(self) -> bool:
        """Whether the epochs, once they are known, still decide about the multiplier."""
        return self.groups[0].get(LENGTH_MULTIPLIER) == 0.0 or self._length.lacks_epochs

    @property
    def is_decided(self) -> bool:
        """Whether there is a multiplier: from the first step on."""
        return bool(self.groups[0].get(LENGTH_MULTIPLIER))

    def _keep_chosen(self) -> None:
        """After a checkpoint has been loaded: what somebody set of the length counts more than the checkpoint's."""
        saved, chosen = self.num_training_steps, self.chosen.steps
        if chosen and saved != chosen:
            self._set_length(chosen)
            if saved:
                notices.warn(
                    f"the checkpoint is of a run with num_training_steps={saved}; this {self._rule.class_name} was "
                    f"set to {chosen} and keeps that: its schedule goes on as one of {chosen} steps.",
                )
        if self.chosen.epochs:
            self._set_epochs(self.chosen.epochs)

    def _set_length(self, steps: int) -> None:
        old, before = self.num_training_steps, self.num_updates
        self.write({"num_training_steps": steps})
        if old != steps and self.is_decided:
            # A run that becomes longer goes on as one that was so from the start, as its schedule does.
            if old and not self.chosen.epochs and NUM_EPOCHS in self.groups[0]:
                self.write({NUM_EPOCHS: self.num_epochs * steps / old})
            self._decide_multiplier(before)

    @property
    def length_multiplier(self) -> float:
        """What lr is multiplied with because of the length of the run; while undecided, what it would be, of sharded
        tensors without their reach, which other ranks have to be asked for."""
        decided = self.groups[0].get(LENGTH_MULTIPLIER, 1.0)
        if decided:
            return decided
        return self._wanted_multipliers(self.num_updates, ask=is_here(p for p, _ in self.owner._trainable()))[0]

    def decide_multiplier(self) -> bool:
        """Decide the multiplier before the first step; a checkpoint keeps the one it has, or has none. Once more where
        the length changed before the epochs were known.

        Returns:
            whether new layers have another ``lr_scales`` from now on.
        """
        if not self.awaits_epochs or (self._length.lacks_epochs and not self.num_epochs):
            return False
        self._length.agree()
        if self.num_epochs:
            self.write({NUM_EPOCHS: self.num_epochs})
        return self._decide_multiplier(self.num_updates if self.is_decided else 0)

    def _wanted_multipliers(self, updates: int, ask: bool = True) -> tuple[float, float]:
        """See :meth:`hf_lopt.length_multiplier.LengthMultiplier.wanted`."""
        return self._length.wanted(updates, self.num_epochs, self.is_decided, ask)

    def _decide_multiplier(self, before: int) -> bool:
        """``before``: the updates of the run for which it was decided last; 0: never."""
        self._length.lacks_epochs = bool(before) and not self.num_epochs
        had = self.groups[0].get(MORE_FOR_NEW_LAYERS) or self._wanted_multipliers(before)[1]  # of an old checkpoint
        multiplier, more = self._wanted_multipliers(self.num_updates)
        self.write({LENGTH_MULTIPLIER: multiplier})
        if self.owner.is_fine_tuning:
            self.write({MORE_FOR_NEW_LAYERS: more})
        stretched = self.owner._stretch_new_layers(had, more)
        if multiplier != 1.0 or stretched:
            run = f"{self._rule.class_name}: in {self.length_in_words(multiplier)}"
            new = f", {multiplier * more:.3g} times for new layers" if stretched else ""
            notices.LOG.info("%s lr counts %.3g times%s (length_multiplier), none was given", run, multiplier, new)
        return stretched

    def length_in_words(self, multiplier: float) -> str:
        """What a length multiplier is due to."""
        shorter = multiplier < 1.0 or self._length.for_epochs
        epochs = f", {self.num_epochs:.3g} epochs," if shorter and self.num_epochs else ""
        return f"a run of {self.num_training_steps} steps{epochs}"

    @property
    def more_for_new_layers(self) -> float:
        """How much more lr counts for new layers of a pretrained model; 1 while it is undecided."""
        if not self.is_decided:
            return 1.0
        return self.groups[0].get(MORE_FOR_NEW_LAYERS) or self._wanted_multipliers(self.num_updates)[1]

    @property
    def calls_per_update(self) -> int:
        """Calls of ``step()`` for one update: more than 1 in a run of more than ``max_training_steps``."""
        longest = self.groups[0].get("max_training_steps", 0)
        return max(math.ceil(self.num_training_steps / longest), 1) if longest else 1

    @property
    def num_updates(self) -> int:
        """Length of the run in updates; 0 while it is not set."""
        return self.num_training_steps // self.calls_per_update

    # ---- progress ---------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps taken so far, skipped ones left out. Reading it waits for the device.

        Setting it while the loss buffer is empty starts the buffer late, see :meth:`first_losses`.
        """
        return int(self.groups[0]["step"])

    @step.setter
    def step(self, value: int) -> None:
        first = self.groups[0]
        self.write({"step": torch.full_like(first["step"], operator.index(value))})
        self._starts_late = value > 0 and "loss_means" in first and not bool(first["loss_means"].any())

    def first_losses(self, run: Mapping[str, Tensor], loss: Tensor | None) -> None:
        """Fill the averages of the loss before the first step of a run that goes on without its state.

        The averages after n steps are divided by 1 - d^n, as in the reference, which undoes their start at 0 if they
        have seen n losses. With none of them, a loss counts as twice the largest average at most, which is 0: the
        buffer would stay at 0 to the end of the run. The reference does not say what to do. Here the averages become
        what n losses equal to the first one would have made them. A loss of 0, or one that is not finite, tells
        nothing and leaves it to the next.

        Args:
            run: the tensors of the run, see :meth:`tensors`; "loss_means" (10,) changes in place.
            loss: of this rank, 0-d float32, on the device of the parameters.
        """
        if not self._starts_late or loss is None:
            return
        size = distributed.world_size()
        (total,) = distributed.sum_over([(loss.double().reshape(1), distributed.world_groups(()))])
        mean = total / size
        if not bool(torch.isfinite(mean)) or not bool(mean):  # waits for the device, once in such a run
            return
        self._starts_late = False
        run["loss_means"].copy_(means_of_equal_losses(mean, run["step"], self.num_updates))

    def check_ready(self, pending: PendingLoss) -> None:
        """See that the rule has what it needs for a step.

        Raises:
            RuntimeError: without a loss or a horizon, where the rule needs them.
        """
        name = self._rule.class_name
        if self._rule.needs_loss and not pending.is_set:
            dropped = (
                "zero_grad() has dropped the one that it was given, with the gradients: " if pending.dropped else ""
            )
            raise RuntimeError(
                f"{name} needs the training loss: {dropped}call optimizer.observe_loss(loss) between zero_grad() and "
                "optimizer.step(), or optimizer.step(loss); on wrapper.optimizer where a wrapper lacks these methods. "
                "Under Trainer, Accelerate and Lightning `import hf_lopt` delivers it from "
                "accelerator.backward(loss), manual_backward(loss) or fabric.backward(loss). A loop of a library, "
                "which calls loss.backward() itself, can run in `with hf_lopt.feed_loss(optimizer):`. The rules celo2 "
                "and small_fc_lopt need no loss."
            )
        if self._rule.needs_horizon and not self.num_training_steps:
            raise RuntimeError(
                f"{name} needs the length of the run: pass num_training_steps=... or set "
                "optimizer.num_training_steps before the first step. Trainer's callback does it by itself."
            )

    def accumulate(
        self,
        active: Sequence[Tensor],
        trainable: Iterable[Tensor],
        state: Mapping[Tensor, dict[str, Any]],
        loss: Tensor | float,
        check: Callable[[], object],
    ) -> Tensor | None:
        """Add up gradients and losses where one update takes several calls of ``step()``.

        The last of these calls sets the gradients to their means and returns the mean loss, 0-d. The others return
        None. For the other arguments see :func:`hf_lopt.accumulation.set_mean_gradients`.
        """
        first, calls = self.groups[0], self.calls_per_update
        count = first["accumulated"] + 1
        total = first["accumulated_loss"].to(active[0].device if active else "cpu") + loss
        if count < calls:
            add_gradients(active, state)
            self.write({"accumulated": count, "accumulated_loss": total})
            return None
        set_mean_gradients(active, trainable, state, calls, check)
        self.write({"accumulated": 0, "accumulated_loss": torch.zeros_like(total)})
        return total / calls

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors of the run on ``device``, which a step changes in place; ``counters`` (3,) holds all counters.

        On an accelerator they stay where they are, so that a CUDA graph that has been captured goes on with them. On
        the CPU each step gets new ones, and what a caller holds keeps its values.
        """
        group, is_cpu = self.groups[0], device.type == "cpu"
        held = self._counters if self._counters is not None and self._holds(self._counters[1]) else None
        if is_cpu or held is None:
            of_group = (group[name].to(device, non_blocking=True) for name in COUNTERS)
            counters = torch.stack(list(of_group)) if held is None else held[0].to(device, copy=True)
            self._counters = counters, counters.unbind()
            self.write(dict(zip(COUNTERS, self._counters[1], strict=True)))
        values = {name: group[name].to(device, non_blocking=True, copy=is_cpu) for name in self._tensor_names}
        self.write(values)
        return values | {name: group[name] for name in COUNTERS} | {"counters": self._counters[0]}

    def _holds(self, counters: tuple[Tensor, ...]) -> bool:
        """Whether the groups still hold these very tensors: a caller may have set others."""
        return all(self.groups[0][name] is x for name, x in zip(COUNTERS, counters, strict=True))
