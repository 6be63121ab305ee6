"""The optimizer class: the only owner of state, parameter groups and checkpoints. The arithmetic is in the rules."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_lopt import distributed, least_sizes, notices, rules
from hf_lopt.description import describe
from hf_lopt.given_settings import GivenSettings
from hf_lopt.pending import PendingLoss
from hf_lopt.rank_agreement import RankAgreement, selection
from hf_lopt.rules.base import Rule
from hf_lopt.run_monitor import RunMonitor, step_metrics
from hf_lopt.run_state import LENGTH_MULTIPLIER, Chosen, RunState
from hf_lopt.saved_state import check_saved_state, checked_groups, with_later_settings
from hf_lopt.settings import check_parameter, check_settings, complete_settings
from hf_lopt.state_formats import put_back, without_cast
from hf_lopt.step.held import HeldTensors
from hf_lopt.step.passes import ready_gradients
from hf_lopt.step.prepared import PreparedStep, to_device, without_autocast
from hf_lopt.step_inputs import StepInputs
from hf_lopt.weights import Weights, push_to_hub


_Loss = TypeVar("_Loss", bound=Tensor | float)


class LearnedOptimizer(GivenSettings):
    """A learned optimizer for any rule of :mod:`hf_lopt.rules`.

    Arithmetic and, unless ``state_dtype`` says otherwise, state are float32 whatever the dtype of a parameter, which
    is rounded once when it is stored. State is created for all trainable parameters at the first step. Parameters
    without a gradient are left out of that step, as in ``torch.optim``; tensors without elements always are.

    Args:
        params: parameters or parameter groups, float32, bfloat16 or float16.
        rule: name of the rule.
        hyperparameters: the rule's own keywords; ``lr``, ``weight_decay`` and those in ``rule.per_group`` may be set
            per group.

    Raises:
        ValueError: for an empty parameter list, a keyword or value that the rule does not take, parameters of
            other dtypes, and weights that cannot be loaded.
    """

    _monitor: RunMonitor
    _prepared: PreparedStep | None

    def __init__(self, params: ParamsT, rule: str, **hyperparameters: Any) -> None:
        rule_ = rules.get(rule)
        settings = complete_settings(rule_, hyperparameters)
        source = settings.pop("weights")
        weights = rule_.load_weights(source, **settings)
        self._attach(rule_, weights)
        self._run_state.chosen = Chosen(settings.get("num_training_steps", 0))
        found = {"weights_source": weights.source, "weights_sha256": weights.sha256, "weights_origin": weights.origin}
        found |= {LENGTH_MULTIPLIER: 0.0} if rule_.run_lengths else {}
        super().__init__(params, settings | {"rule": rule_.name} | found | self._run_state.initial_values())
        self._count_as_fine_tuning(rule_, weights)
        if not isinstance(source, Weights):  # whoever loaded them before tells later
            self._tell_what_begins(rule_, constructed=True)

    def __repr__(self) -> str:
        return describe(self, type(self).__name__, self._weights)

    def _attach(self, rule: Rule, weights: Weights) -> None:
        self._rule, self._weights = rule, weights
        # Objects that a wrapper shares which copies the __dict__: none of these attributes is ever replaced.
        self._pending = PendingLoss()
        self._run_state = RunState(self, rule, weights)
        self._inputs = StepInputs(rule, weights.theta)
        self._report: dict[str, Tensor | Callable[[], Tensor]] = {}
        self._ranks = RankAgreement(rule.per_group)
        self._start_over()

    def _start_over(self) -> None:
        """Drop what is derived or transient; what has to survive lives in state and param_groups."""
        self._pending.discard()
        self._run_state.forget_counters()
        self._report.clear()
        self._inputs.forget()
        self._ranks.forget()
        owner = self._run_state.owner  # not a wrapper
        owner._monitor, owner._prepared = RunMonitor(self._rule.class_name), None

    def __getstate__(self) -> dict[str, Any]:
        own = {"_rule": self._rule.name, "_weights": self._weights, "_chosen": self._run_state.chosen}
        return super().__getstate__() | own | {"_chose_lr": self._chose_lr(), "is_fine_tuning": self.is_fine_tuning}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_rule" in state:
            self._attach(rules.get(state.pop("_rule")), state.pop("_weights"))
            self._run_state.chosen = state.pop("_chosen", Chosen())
            self.lr_is_chosen = state.pop("_chose_lr", None)
        super().__setstate__(state)

    @property
    def rule(self) -> Rule:
        """The update rule."""
        return self._rule

    @property
    def weights(self) -> Weights:
        """The meta-trained weights in use."""
        return self._weights

    # ---- parameter groups -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it joins the run where the run stands. See ``torch.optim.Optimizer.add_param_group``.

        Settings of the run as a whole belong to the constructor; a group that brings its own is told so.
        """
        own, dropped = self._run_state.without_run_settings(param_group, self.defaults)
        super().add_param_group(own)
        group = self.param_groups[-1]
        try:
            check_settings(group)
            for p in group["params"]:
                check_parameter(p, group["axis_order"])
        except ValueError:
            self.param_groups.pop()
            raise
        group.update({key: self.param_groups[0][key] for key in self._run_state.keys(self.defaults)})
        if dropped:
            notices.warn(f"{', '.join(dropped)} of a parameter group is one setting for all groups: dropped")

    @property
    def num_training_steps(self) -> int:
        """Length of the run in optimizer steps, 0 while it is not set."""
        return self._run_state.num_training_steps

    @num_training_steps.setter
    def num_training_steps(self, value: int) -> None:
        self._run_state.num_training_steps = value
        self._monitor.warned_horizon = False

    @property
    def steps_done(self) -> int:
        """Steps taken so far, skipped ones left out. Reading it waits for the device."""
        return self._run_state.step

    @steps_done.setter
    def steps_done(self, value: int) -> None:
        self._run_state.step = value

    def reset_state(self) -> None:
        """Forget all accumulators, counters and observed losses, as if no step had been taken; settings stay."""
        self.state.clear()
        self._run_state.reset()
        self._start_over()

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def observe_loss(self, loss: Tensor | float) -> None:
        """Give the next step its loss; several calls before a step add up.

        ``loss`` is a scalar tensor, kept on its device and detached, or a number: what was back-propagated on this
        rank. The mean over ranks is taken in the step.

        Raises:
            ValueError: if it holds more than one number.
        """
        self._pending.add(loss)

    @property
    def has_observed_loss(self) -> bool:
        """Whether a loss waits for the next step."""
        return self._pending.is_set

    def scale_observed_loss(self, factor: float) -> None:
        """Multiply the waiting loss, if there is one: a sum over micro-batches becomes their mean."""
        self._pending.scale(factor)

    def discard_loss(self) -> None:
        """Forget the waiting loss."""
        self._pending.discard()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, see ``torch.optim.Optimizer.zero_grad``, and the waiting loss, which belongs to them."""
        super().zero_grad(set_to_none)
        self._pending.discard(by_zero_grad=True)

    # ---- the step ---------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], _Loss]) -> _Loss: ...
    @overload
    def step(self, closure: _Loss) -> _Loss: ...
    @overload
    def step(self, closure: Callable[[], Any] | None = None, *, loss: _Loss) -> _Loss: ...
    @torch.no_grad()
    def step(self, closure: Any = None, *, loss: Tensor | float | None = None) -> Tensor | float | None:
        """One update of all parameters that have a gradient. Without any it does nothing, and drops the loss.

        Args:
            closure: as in ``torch.optim``, a function that evaluates the model and returns the loss, called once with
                gradients enabled; or the loss itself, a 0-d tensor or a number. It replaces those given to
                :meth:`observe_loss`. What a function returns does not count if it delivered losses of its own.
            loss: the loss itself, also beside a function, whose own then does not count.

        Returns the loss that ``closure`` returned or was, or ``loss``; None without one.

        Raises:
            ValueError: for two losses, one as ``closure`` and one as ``loss``.
            RuntimeError: without a loss or a horizon (unless every lr is 0: then state is allocated and nothing else
                happens, which is how checkpoints are loaded), for sparse gradients, where parameters, gradients and
                state do not fit each other, and after ``max_nonfinite_steps`` steps in a row with a non-finite loss,
                gradient or parameter. Such steps change nothing.
        """
        result = self._pending.of_step(closure, loss)
        with self._inputs:  # which let go of gradients and parameters in the end
            self._step()
        return result

    def _step(self) -> None:
        active = self._inputs.unchanged(self.param_groups, self.state)
        if self._only_allocates(created=active is None and self._create_state()):
            return
        if not self._has_begun:
            self._tell_what_begins(self._rule)
        active = active or self._active()
        if active.params:
            self._run_state.check_ready(self._pending)
            active = self._active() if self._run_state.decide_multiplier() else active
        self._ranks.check(self._run_settings, self.param_groups, active.pairs, self.state)
        loss = self._pending.take()
        if active.params and self._run_state.calls_per_update > 1:
            trainable = (p for p, _ in self._trainable())
            loss = self._run_state.accumulate(active.params, trainable, self.state, loss, self._active)
            if loss is None:  # the update takes more calls
                return
            active = self._active()
        try:
            if active.params:
                self._update(active, self._inputs.key(active), loss)
            elif self._run_state.calls_per_update == 1:
                self._ranks.without_gradients(self.param_groups)
        except distributed.SelectionsDifferError:
            self._ranks.compare(self._run_settings, self.param_groups, active.pairs, self.state)
            raise

    def _run_settings(self) -> dict[str, Any]:
        """What has one value for the whole run, by name."""
        return {name: self.param_groups[0][name] for name in self._run_state.keys(self.defaults)}

    def _create_state(self) -> bool:
        """Make the state of all trainable parameters, the same on every rank. Whether there was none before."""
        created = not self.state
        for p, group in self._trainable():
            if p.numel() and not self.state[p]:
                self.state[p] = self._rule.init_state(p, group, self._weights.theta)
            if p.numel() and group.get("max_training_steps", 0) and "gradient_sum" not in self.state[p]:
                # Also where the run is short: the horizon may come later, and a checkpoint fills what it finds.
                self.state[p] |= {"gradient_sum": distributed.zeros(p, None), "gradients_summed": 0}
        least_sizes.decide(self._trainable(), self.state, self._rule.class_name)
        return created

    def _only_allocates(self, created: bool) -> bool:
        """Whether this is a step of checkpoint loading, which creates state for the checkpoint to fill.

        Such a step comes with an lr of 0, no loss and zero gradients. With a rule that needs no loss it has to be told
        from the first step of a warm-up, by the gradients, and all ranks have to see it alike.
        """
        needs_loss = self._rule.needs_loss
        if self._pending.is_set or not (needs_loss or created):
            return False
        if any(float(group["lr"]) != 0.0 for group in self.param_groups):
            return False
        return needs_loss or distributed.all_zero(self._active().grads)

    def _trainable(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """All parameters that may be updated, with their groups."""
        return ((p, group) for group in self.param_groups for p in group["params"] if p.requires_grad)

    def _active(self) -> HeldTensors:
        """What takes part in this step."""
        return self._inputs.active(self.param_groups, self.state)

    def _update(self, held: HeldTensors, key: tuple[Hashable, ...], loss: Tensor | float | None) -> None:
        """Let the rule change parameters, state and run; keep what it reports, and warn of what went wrong."""
        rule, first, device = self._rule, self.param_groups[0], held.params[0].device
        # A surrounding autocast would run the meta-network in half precision.
        with without_autocast(device):
            if self._prepared is None or self._prepared.key != key:
                self._prepared = PreparedStep(key, held, rule, self._weights.theta)
                self._prepared.cache.selection = selection(self.param_groups, held.params)
            run = self._run_state.tensors(device)
            self._monitor.start(run["nonfinite_steps"])
            grads = ready_gradients(held, rule.nan_to_zero, first.get("max_grad_norm", 0.0))
            tensors = self._prepared.tensors(held, grads, self._inputs.numbers, self._run_state.length_multiplier)
            tensors.step, tensors.round_params = run["step"], first["stochastic_rounding"]
            loss = None if loss is None else to_device(loss, torch.float32, device)
            self._run_state.first_losses(run, loss)
            settings = first | {"num_training_steps": self._run_state.num_updates}
            result = rule.update(tensors, run, self._prepared.weights, settings, loss)
            self._run_state.write(result.run)
            self._report.clear()
            self._report.update(result.report)
            self._monitor.check(run["counters"], first["max_nonfinite_steps"], self._run_state.num_updates)

    @property
    def report(self) -> dict[str, Tensor]:
        """Internals of the last step, device tensors by name (``lr_mult`` (T,), …); {} before the first. Not saved."""
        return {name: value() if callable(value) else value for name, value in self._report.items()}

    def metrics(self) -> dict[str, float]:
        """Numbers of the last step for a logger; {} before the first. Waits for the device.

        ``lr_mult_mean``, ``lr_mult_min``, ``lr_mult_max`` over tensors, ``update_rms`` of the network's step over all
        elements (of several ranks one step late), ``length_multiplier``, ``nonfinite_steps`` so far.
        """
        return step_metrics(self.report, self.param_groups[0]) if self._report else {}

    def push_to_hub(self, repo_id: str, **options: Any) -> dict[str, str]:
        """Publish the weights in use, see :func:`hf_lopt.weights.push_to_hub`; the commit of each repository."""
        return push_to_hub(self, repo_id, **options)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See ``torch.optim.Optimizer.state_dict``. What was added or unfrozen since the last step has state too."""
        if self.state:
            self._create_state()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state dict. See ``torch.optim.Optimizer.load_state_dict``; state keeps its dtypes.

        A ``num_training_steps`` that was set and the formats of state stay, with a warning where the checkpoint has
        others. Embedded weights give way to those of the checkpoint, where an earlier version embedded others.

        Raises:
            ValueError: if it is of another optimizer, rule or weights, or does not fit. The optimizer stays as it was.
        """
        weights = self._run_state.check_saved(checked_groups(state_dict))
        check_saved_state(self._rule, weights.theta, self.param_groups, self._run_state.initial_values(), state_dict)
        super().load_state_dict(without_cast(with_later_settings(state_dict, self.param_groups), self.param_groups))
        self._run_state.adopt(weights)
        put_back(self.state, self.param_groups, state_dict, self._rule, self._weights.theta)
        self._start_over()
