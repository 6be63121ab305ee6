"""The Trainer callback: tells the optimizer how long the run is, and the loggers what the optimizer does."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lopt.hf import limits, loss_feed
from hf_lopt.hf.arguments import optim_name, read_optim_args, wants_layers
from hf_lopt.hf.layers import LayerLog
from hf_lopt.optimizer import LearnedOptimizer
from hf_lopt.weights import Weights


_LOGGED = ("lr_mult_mean", "lr_mult_min", "lr_mult_max", "update_rms")
_MAX_SOURCE = 60  # progress bars hide texts of more than 100 characters


def describe_weights(weights: Weights) -> str:
    """``source@sha256``, short enough for progress bars."""
    source = weights.source if len(weights.source) <= _MAX_SOURCE else "…" + weights.source[-_MAX_SOURCE:]
    return f"{source}@{weights.sha256[:12]}"


def _warn(state: TrainerState, text: str) -> None:
    if state.is_world_process_zero:  # the others would say the same
        warnings.warn(text, stacklevel=3)


class LearnedOptimizerCallback(TrainerCallback):
    """Attaches itself to every Trainer; without a learned optimizer it does nothing.

    At the start of training it sets ``num_training_steps`` from ``state.max_steps``, unless ``optim_args`` give one;
    the optimizer itself warns when training goes on after that. With every row of training logs it adds
    ``lopt/lr_mult_mean``, ``lopt/lr_mult_min``, ``lopt/lr_mult_max`` and ``lopt/update_rms``;
    ``lopt/nonfinite_steps`` once there are any; and in the first row ``lopt/weights``, a text, which does not change
    and which some trackers answer with a warning each time. Only then does it read from the device.

    ``optim_args="log_layers=true"`` adds ``lopt/lr_mult/NAME`` and ``lopt/update_ratio/NAME`` of every tensor
    (:mod:`hf_lopt.hf.layers`), which ``python -m hf_lopt.plot`` draws.

    The values join the row that Trainer is logging, so that they share its step and reach whatever ``report_to``
    names. This works because Trainer puts default callbacks before those of the trackers.
    """

    def __init__(self) -> None:
        self._weights_logged = False
        self._layers: LayerLog | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Runs after a checkpoint's optimizer state has been loaded and before the first step."""
        self._weights_logged, self._layers = False, None
        learned = loss_feed.unwrap(optimizer)
        if learned is None:
            return
        limits.check_arguments(learned.rule.class_name, args)  # optimizers given by hand pass no handler
        loss_feed.set_trainer(learned, True)
        loss_feed.forget(learned)
        self._align_steps(learned, state)
        if learned.rule.needs_horizon:
            self._set_horizon(learned, args, state)
        # Of an optimizer that was passed in, the arguments may be for another one.
        if optim_name(args) == learned.rule.name and wants_layers(args.optim_args):
            self._layers = LayerLog(model)

    def _align_steps(self, optimizer: LearnedOptimizer, state: TrainerState) -> None:
        """Make the optimizer's count of steps agree with Trainer's. Steps that were skipped make it smaller."""
        name, done, global_step = optimizer.rule.class_name, optimizer.steps_done, state.global_step
        if global_step == 0 and done > 0:
            _warn(
                state,
                f"train() starts at step 0 with a {name} that has already taken {done} steps: its schedule, "
                "accumulators and loss history start afresh. Pass resume_from_checkpoint to go on, or model_init to "
                "make another optimizer each time.",
            )
            optimizer.reset_state()
        elif global_step > 0 and not 0 < done <= global_step:
            _warn(
                state,
                f"training resumes at step {global_step}, but {name}'s state is of step {done} (no optimizer state in "
                f"the checkpoint?): its schedule goes on from step {global_step}, its accumulators as they are.",
            )
            optimizer.steps_done = global_step

    def _set_horizon(self, optimizer: LearnedOptimizer, args: TrainingArguments, state: TrainerState) -> None:
        """The run's length, or the one of optim_args: a checkpoint's is of the run that wrote it."""
        name, before, wanted = optimizer.rule.class_name, optimizer.num_training_steps, state.max_steps
        if optim_name(args) == optimizer.rule.name:
            wanted = read_optim_args(optimizer.rule, args.optim_args)[0].get("num_training_steps", wanted)
            if wanted < state.max_steps:
                _warn(
                    state,
                    f"optim_args give num_training_steps={wanted}, but this run has {state.max_steps} steps: {name}'s "
                    "schedule ends early, and later steps are taken with the last stretch of it.",
                )
        elif before not in (0, wanted) and state.global_step == 0:
            _warn(state, f"{name}'s num_training_steps={before} gives way to this run's length, {wanted} steps.")
        optimizer.num_training_steps = wanted

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Keep what a step changes, if it will be logged."""
        if self._layers is not None and self._will_log(args, state):
            self._layers.before(loss_feed.unwrap(optimizer))

    @staticmethod
    def _will_log(args: TrainingArguments, state: TrainerState) -> bool:
        step = state.global_step + 1
        if str(getattr(args.logging_strategy, "value", args.logging_strategy)) != "steps":
            return True  # which step ends an epoch is not known here
        return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Compare, while gradients still say which tensors took part."""
        if self._layers is not None:
            self._layers.after(loss_feed.unwrap(optimizer))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add the optimizer's numbers to a row of training logs, for the trackers and for ``state.log_history``."""
        if not logs or "loss" not in logs:  # evaluation and the summary at the end
            return
        learned = loss_feed.unwrap(optimizer)
        if learned is None:
            return
        metrics = learned.metrics()
        extra: dict[str, float | str] = {f"lopt/{key}": metrics[key] for key in _LOGGED if key in metrics}
        if metrics.get("nonfinite_steps"):
            extra["lopt/nonfinite_steps"] = metrics["nonfinite_steps"]
        if self._layers is not None:
            extra |= {f"lopt/{key}": value for key, value in self._layers.read().items()}
        if not self._weights_logged:
            extra["lopt/weights"] = describe_weights(learned.weights)
            self._weights_logged = True
        logs.update(extra)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(extra)  # Trainer appended a copy of the row before it called

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """A loop without Trainer may use the optimizer next."""
        learned = loss_feed.unwrap(optimizer)
        if learned is not None:
            loss_feed.set_trainer(learned, False)
