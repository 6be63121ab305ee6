"""The Trainer callback: tells the optimizer how long the run is, and the loggers what the optimizer does."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_lopt import distributed, notices, pretrained
from hf_lopt.description import weights_name
from hf_lopt.given_settings import warn_once
from hf_lopt.hf import limits, loss_feed
from hf_lopt.hf.arguments import read_optim_args, wants_layers
from hf_lopt.hf.epochs import batches_in, steps_per_epoch
from hf_lopt.hf.group_settings import name_new_layers, settle
from hf_lopt.hf.layers import LayerLog
from hf_lopt.hf.policy import Choice, in_short, told
from hf_lopt.hf.provenance import facts, trackers_take_text
from hf_lopt.hf.run_end import fits, length_text
from hf_lopt.optimizer import LearnedOptimizer


_LOGGED = ("lr_mult_mean", "lr_mult_min", "lr_mult_max", "update_rms")
_ADVICE = "Give the run its length: max_steps, or optim_args='num_training_steps=...'."


def _length_multiplier(optimizer: LearnedOptimizer) -> Choice[float]:
    """What the lr counts because of the length of the run, with the words for it."""
    value = optimizer.length_multiplier
    run = optimizer._run_state.length_in_words(value)
    said = f"in {run} lr counts {value:.3g} times (length_multiplier); an lr that you set stays"
    return Choice(value, "" if value == 1.0 else said)


def epochs_of(steps: int, args: TrainingArguments, loader: Any) -> float:
    """How often a run of so many steps sees each sample; 0 where the loader does not know how many there are.

    A collective: loaders of several ranks may differ by a batch, and the step must not.
    """
    in_one = steps_per_epoch(batches_in(loader), args.gradient_accumulation_steps)
    return distributed.mean_over_ranks(steps / in_one if in_one else 0.0)


def _warn(state: TrainerState, text: str) -> None:
    if state.is_world_process_zero:  # the others would say the same
        notices.warn(text)


class LearnedOptimizerCallback(TrainerCallback, ExportableState):
    """Attaches itself to every Trainer; without a learned optimizer it does nothing.

    When training begins it settles what is not settled yet (:mod:`hf_lopt.hf.group_settings`), sets
    ``num_training_steps`` from ``state.max_steps``, unless ``optim_args`` give one, and ``num_epochs``, and tells what
    was chosen. When it ends it says so if the run was much shorter than that, or longer. To every row of logs it adds
    ``lopt/lr_mult_mean``, ``lopt/lr_mult_min``, ``lopt/lr_mult_max`` and ``lopt/update_rms``;
    ``lopt/nonfinite_steps`` once there are any; and in the first row what does not change:
    ``lopt/length_multiplier``, where the rule has one, and ``lopt/weights``, a text, which goes to trackers only if
    all of them take texts. Only then does it read from the device.

    ``optim_args="log_layers=true"`` adds ``lopt/lr_mult/NAME`` and ``lopt/update_ratio/NAME`` of every tensor
    (:mod:`hf_lopt.hf.layers`), which ``python -m hf_lopt.plot`` draws.

    The values join the row that Trainer is logging, so that they share its step and reach whatever ``report_to``
    names. This works because Trainer puts default callbacks before those of the trackers.
    """

    def __init__(self) -> None:
        self._weights_logged = False
        self._layers: LayerLog | None = None
        self._told: set[str] = set()
        self._begins = False
        self._first_step = 0
        self._facts: dict[str, str | float] = {}

    def state(self) -> dict[str, Any]:
        """What ``trainer_state.json`` keeps of this callback: optimizer, version, weights, multipliers."""
        return {"args": {}, "attributes": {"trained_with": self._facts} if self._facts else {}}

    def _tell(self, optimizer: LearnedOptimizer, args: TrainingArguments, state: TrainerState) -> None:
        """One warning for what was chosen and what else is good to know, once; the texts in full are logged."""
        if not state.is_world_process_zero:
            notices.discard()
            return
        policy = optimizer.run_policy
        chosen, *conflicts = told(policy, args.max_grad_norm) if policy.reasons() else ("", *told(policy, None))
        if chosen and chosen not in self._told:
            self._told.add(chosen)
            notices.LOG.info(chosen)
            warn_once(optimizer, *in_short(policy))
        else:
            warn_once(optimizer)
        for text in conflicts:
            if text not in self._told:
                self._told.add(text)
                _warn(state, text)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Runs before anything wraps or shards the model."""
        pretrained.note(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        model: Any = None,
        lr_scheduler: Any = None,
        train_dataloader: Any = None,
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
        if learned.run_policy is None:
            settle(learned, args, model, lr_scheduler)
        self._set_horizon(learned, args, state, train_dataloader)
        name_new_layers(learned, learned.run_policy, model)
        self._align_steps(learned, state)
        self._begins, self._first_step = True, state.global_step
        self._facts = facts(learned)
        self._tell(learned, args, state)
        # Of an optimizer that was passed in, the arguments may be for another one.
        if learned.run_policy.named and wants_layers(args.optim_args):
            self._layers = LayerLog(model)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """The length again, before the first step: another callback may have changed it when training began."""
        learned = loss_feed.unwrap(optimizer) if self._begins else None
        self._begins = False
        if learned is not None:
            self._set_horizon(learned, args, state, train_dataloader)
            name_new_layers(learned, learned.run_policy, model)
            self._facts = facts(learned)

    def _align_steps(self, optimizer: LearnedOptimizer, state: TrainerState) -> None:
        """See that the optimizer stands where training stands.

        Whether a checkpoint had its state is known from the loading of it. Its count of steps does not tell: skipped
        steps and accumulated updates make it smaller than Trainer's, down to 0.
        """
        name, done, global_step = optimizer.rule.class_name, optimizer.steps_done, state.global_step
        loaded, optimizer.state_was_loaded = optimizer.state_was_loaded, False
        if global_step == 0 and done > 0:
            _warn(
                state,
                f"train() starts at step 0 with a {name} that has already taken {done} steps: its schedule, "
                "accumulators and loss history start afresh. Pass resume_from_checkpoint to go on, or model_init to "
                "make another optimizer each time.",
            )
            optimizer.reset_state()
        elif global_step > 0 and not loaded:
            _warn(
                state,
                f"training resumes at step {global_step}, but {name}'s state is of step {done} (no optimizer state in "
                f"the checkpoint?): its schedule goes on from step {global_step}. Its accumulators start afresh, and "
                "its loss history as if all losses so far had been equal to the next one.",
            )
            optimizer.reset_state()
            optimizer.steps_done = global_step // optimizer._run_state.calls_per_update

    def _set_horizon(
        self, optimizer: LearnedOptimizer, args: TrainingArguments, state: TrainerState, loader: Any
    ) -> None:
        """The run's length, or the one of optim_args: a checkpoint's is of the run that wrote it; and its epochs."""
        policy = optimizer.run_policy
        if not optimizer.rule.needs_horizon or state.max_steps <= 0:  # a run without steps needs none
            return
        name, before, wanted = optimizer.rule.class_name, optimizer.num_training_steps, state.max_steps
        reason = "the length of the run"
        if policy.named:
            explicit = read_optim_args(optimizer.rule, args.optim_args)[0].get("num_training_steps")
            if explicit is not None:
                wanted, reason = explicit, "num_training_steps of optim_args"
        elif before not in (0, wanted) and state.global_step == 0 and policy.horizon.value in (0, wanted):
            _warn(state, f"{name}'s num_training_steps={before} gives way to this run's length, {wanted} steps.")
        optimizer.num_training_steps = wanted
        epochs = epochs_of(state.max_steps, args, loader)
        if optimizer.num_epochs or optimizer._run_state.awaits_epochs:  # older checkpoints keep what they have
            optimizer.num_epochs = epochs
        optimizer._run_state.decide_multiplier()  # at this door nothing changes it any more
        policy.horizon = Choice(wanted, reason)
        policy.length_multiplier = _length_multiplier(optimizer)

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
        if not self._weights_logged and "length_multiplier" in metrics:
            extra["lopt/length_multiplier"] = metrics["length_multiplier"]
        text = {} if self._weights_logged else {"lopt/weights": weights_name(learned.weights)}
        self._weights_logged = True
        logs.update(extra | (text if trackers_take_text(args.report_to) else {}))
        extra |= text
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
        """Compare the run with its horizon. A loop without Trainer may use the optimizer next."""
        learned = loss_feed.unwrap(optimizer)
        if learned is None:
            return
        loss_feed.set_trainer(learned, False)
        policy, steps = learned.run_policy, state.global_step
        horizon = 0 if policy is None else policy.horizon.value
        if horizon and self._first_step < steps and not fits(steps, horizon):
            _warn(state, length_text(learned.rule.class_name, steps, horizon, _ADVICE))
