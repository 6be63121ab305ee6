"""What becomes of the learning-rate schedulers of a script whose optimizer :mod:`hf_lopt.hf.replace` has replaced.

They are where the script says how long it trains, and what they do to the learning rate is meant for the optimizer
that the script named. A rule with a schedule of its own would decay twice under them.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from hf_lopt.hf import constructor, messages
from hf_lopt.hf.import_hook import when_imported
from hf_lopt.hf.loss_feed import unwrap
from hf_lopt.hf.run_end import fits
from hf_lopt.optimizer import LearnedOptimizer
from hf_lopt.rules.base import Rule


# Arguments of torch's schedulers that are learning rates, not factors.
_ABSOLUTE = {
    "OneCycleLR": ("max_lr",),
    "CyclicLR": ("base_lr", "max_lr"),
    "CosineAnnealingLR": ("eta_min",),
    "CosineAnnealingWarmRestarts": ("eta_min",),
    "ReduceLROnPlateau": ("min_lr",),
}
_LENGTH = "num_training_steps"
# From get_scheduler down to the constructor of a scheduler it is three calls.
_DEPTH = 8


class ConstantSchedule(LRScheduler):
    """Stands for the script's scheduler on an optimizer that decides the course of its step size itself."""

    def get_lr(self) -> list[Any]:
        """The learning rates as they are."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Count. ``ReduceLROnPlateau`` is given a metric here, others an epoch."""
        super().step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the count only: learning rates may be those of another optimizer's run."""
        self.__dict__.update({key: state_dict[key] for key in ("last_epoch", "_step_count") if key in state_dict})


def _accumulated_batches() -> int:
    """Batches of one optimizer step, as far as Accelerate knows; 1 where it is not in use."""
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    return int(state().num_steps) if state is not None and state._shared_state else 1


@dataclass
class Run:
    """What is known of the run of one optimizer that took the place of another.

    Attributes:
        script_class: the class that the script names.
        rule: of the learned optimizer.
        lr, script_lr: base learning rates, ours and the script's.
        constant: whether the script's schedule is left out.
        lrs: of the parameter groups.
        total: steps of the script's scheduler in the run, as the script told it; None while it did not.
        scheduler: weak reference to the one that was told so, which holds the optimizer.
        scheduler_steps: how far it moves in one optimizer step.
        calls: of ``step()``, the allocation of state for a checkpoint left out.
        length: the horizon at the last call, 0 for rules without one.
    """

    script_class: str
    rule: Rule
    lr: float
    script_lr: float | None
    constant: bool
    lrs: list[float]
    total: int | None = None
    scheduler: Callable[[], Any] = lambda: None
    scheduler_steps: int = 1
    calls: int = 0
    length: int = 0
    _feed: Any = None
    _from_scheduler: bool = False
    _seen: list[int] = field(default_factory=list)
    _told_lr: bool = False

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def feed(self, optimizer: LearnedOptimizer) -> None:
        """Take the loss from ``Tensor.backward``, until Accelerate delivers it."""
        feed_loss = getattr(sys.modules.get("hf_lopt"), "feed_loss", None)
        self._feed = None if feed_loss is None else feed_loss(optimizer)

    def stop_feeding(self) -> None:
        """Leave the loss to Accelerate."""
        if self._feed is not None:
            self._feed.remove()
        self._feed = None

    # ---- the schedule -----------------------------------------------------------------------------------------------

    @property
    def ratio(self) -> float:
        """Our learning rate in units of the script's."""
        return self.lr / self.script_lr if self.script_lr else 1.0

    def note(self, scheduler: LRScheduler, total: int | None) -> None:
        """The script has built ``scheduler``, for ``total`` of its steps. The last one that says so counts."""
        if total is not None:
            self.scheduler, self.total = weakref.ref(scheduler), total

    def before_step(self, optimizer: LearnedOptimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Hook of ``optimizer.step``: sees to the horizon and, where it is ours, to the lr.

        Raises:
            RuntimeError: without a horizon, where the rule needs one.
        """
        groups = optimizer.param_groups
        if all(group["lr"] == 0.0 for group in groups) and not (args or kwargs or optimizer.has_observed_loss):
            return  # how checkpoints are loaded
        self.calls += 1
        if self.rule.needs_horizon:
            self._set_horizon(optimizer)
            self.length = optimizer.num_training_steps
        if self.constant:
            self._hold_lr(groups)

    def _hold_lr(self, groups: list[dict[str, Any]]) -> None:
        for group in groups[len(self.lrs) :]:  # added by the script after construction
            self.lrs.append(float(group["lr"]) * self.ratio)
            group["lr"] = self.lrs[-1]
        written = [group["lr"] for group, lr in zip(groups, self.lrs, strict=True) if group["lr"] != lr]
        if written and not self._told_lr:
            self._told_lr = True
            messages.say(
                f"the script sets lr to {float(written[0]):g} by itself, which is meant for {self.script_class}: "
                f"{self.rule.class_name} keeps {self.lr:g}"
            )
        for group, lr in zip(groups, self.lrs, strict=True):
            group["lr"] = lr

    # ---- the horizon ------------------------------------------------------------------------------------------------

    def _set_horizon(self, optimizer: LearnedOptimizer) -> None:
        if not optimizer.num_training_steps:
            if self.total is None:
                raise RuntimeError(
                    f"{self.rule.class_name}, in place of {self.script_class}, has to know the length of the run, and "
                    "no scheduler of the script was told it: give the number of optimizer steps with --steps N before "
                    "the script's name. Of the rules, celo2 and small_fc_lopt need none."
                )
            self._from_scheduler = True
            self._take(optimizer, self.scheduler_steps)
        if self._from_scheduler and self.calls <= 3:
            scheduler = self.scheduler()
            self._seen += [] if scheduler is None else [scheduler.last_epoch]
            if len(self._seen) == 3:
                self._check_pace(optimizer)

    def _take(self, optimizer: LearnedOptimizer, scheduler_steps: int) -> None:
        assert self.total is not None
        self.scheduler_steps = scheduler_steps
        optimizer.num_training_steps = -(-self.total // scheduler_steps)
        pace = f", which moves {scheduler_steps} times in each" if scheduler_steps > 1 else ""
        length = f"{self.rule.class_name} trains for {optimizer.num_training_steps} steps"
        window = _accumulated_batches()
        hint = f" (it accumulates {window} batches: if it counted those, --steps {-(-self.total // window)})"
        hint = hint if window > 1 and scheduler_steps == 1 else ""
        messages.say(f"{length}, as the script told its scheduler{pace}; --steps N says otherwise{hint}")

    def _check_pace(self, optimizer: LearnedOptimizer) -> None:
        """The scheduler's steps are the optimizer's only if the script moves both together."""
        moved = [after - before for before, after in zip(self._seen, self._seen[1:], strict=False)]
        if not any(moved):
            raise RuntimeError(
                f"the script's scheduler was told {self.total} steps but has not moved in the first "
                f"{self.calls} steps of {self.rule.class_name}: it seems to count epochs, so the length of the run is "
                "not known. Give the number of optimizer steps with --steps N before the script's name."
            )
        # A step that a gradient scaler skipped moves the scheduler alone: the smaller number is the script's pace.
        if min(moved) >= 1 and min(moved) != self.scheduler_steps:
            self._take(optimizer, min(moved))

    @property
    def length_mismatch(self) -> str:
        """What to tell at the end of a run that was not as long as its horizon; "" otherwise."""
        if not self.length or fits(self.calls, self.length):
            return ""
        return (
            f"{self.rule.class_name} took {self.calls} steps of a run of {self.length}: its schedule was for the "
            f"latter. --steps {self.calls} fits this run."
        )


def told_steps(cls: type, optimizer: LearnedOptimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """How many steps the scheduler ``cls``, about to be made with these arguments, is told to last.

    Functions that build schedulers, in transformers, diffusers or the script, have an argument ``num_training_steps``
    beside the optimizer; torch's classes name it differently.
    """
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None:
            break
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if _LENGTH in names and any(frame.f_locals.get(name) is not None for name in names):
            steps = frame.f_locals.get(_LENGTH)
            same = any(unwrap_optimizer(frame.f_locals.get(name)) is optimizer for name in names)
            if same and isinstance(steps, int):
                return steps
        frame = frame.f_back
    return _steps_of_class(cls, args, kwargs)


def _steps_of_class(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    try:
        bound = inspect.signature(cls.__init__).bind(None, *args, **kwargs)
    except TypeError:  # the constructor will say so
        return None
    bound.apply_defaults()
    given = bound.arguments
    names = {base.__name__ for base in cls.__mro__}
    if "LinearLR" in names:  # upwards it is a warm-up
        return given["total_iters"] if given["end_factor"] < given["start_factor"] else None
    if "OneCycleLR" in names and given["total_steps"] is None:
        epochs, steps = given["epochs"], given["steps_per_epoch"]
        return epochs * steps if epochs and steps else None
    inner = [getattr(scheduler, _LENGTH, None) for scheduler in given.get("schedulers", ())]
    if "SequentialLR" in names and inner:
        return given["milestones"][-1] + inner[-1] if inner[-1] is not None and given["milestones"] else inner[-1]
    if "ChainedScheduler" in names:
        return max((steps for steps in inner if steps is not None), default=None)
    if "PolynomialLR" in names:
        return given["total_iters"]
    return next((given[k] for k in (_LENGTH, "T_max", "total_steps") if isinstance(given.get(k), int)), None)


def unwrap_optimizer(value: Any) -> LearnedOptimizer | None:
    """The learned optimizer in an argument of a scheduler: itself, wrapped, or that of schedulers to be chained."""
    if isinstance(value, (list, tuple)):
        return unwrap_optimizer(value[0]) if value else None
    if isinstance(value, LRScheduler):
        return unwrap_optimizer(getattr(value, "optimizer", None))
    return unwrap(value) if hasattr(value, "param_groups") else None


class Patches:
    """Changes to classes of schedulers, which only those on replaced optimizers feel.

    Args:
        run_of: gives the run of an optimizer, None for others.
    """

    def __init__(self, run_of: Callable[[Any], Run | None]):
        self._run_of = run_of
        self._undo: list[tuple[Any, str, Any]] = []

    def new(self, cls: type, *args: Any, **kwargs: Any) -> Any:
        """``LRScheduler.__new__`` while the changes are in force."""
        found = (unwrap_optimizer(value) for value in (*args, *kwargs.values()))
        optimizer = next((x for x in found if x is not None), None)
        run = None if optimizer is None else self._run_of(optimizer)
        if optimizer is None or run is None:
            return object.__new__(cls)
        total = told_steps(cls, optimizer, args, kwargs)
        # A constant one is not an instance of cls, so Python does not call cls.__init__ on it.
        scheduler: Any = object.__new__(ConstantSchedule if run.constant else cls)
        if run.constant:
            LRScheduler.__init__(scheduler, optimizer)
        scheduler.num_training_steps = total
        run.note(scheduler, total)
        return scheduler

    def apply(self) -> None:
        """Make the changes."""
        constructor.intercept(LRScheduler, self.new)
        for name, arguments in _ABSOLUTE.items():
            cls = getattr(lr_scheduler, name)
            self.restore(cls, "__init__", cls.__init__)
            cls.__init__ = self._rescaled(cls.__init__, arguments)
        when_imported("accelerate.scheduler", self._watch_accelerate)

    def restore(self, owner: Any, name: str, original: Any) -> None:
        """Have :meth:`remove` set ``owner.name`` to ``original``."""
        self._undo.append((owner, name, original))

    def remove(self) -> None:
        """Undo the changes."""
        constructor.release(LRScheduler)
        while self._undo:
            setattr(*self._undo.pop())

    def _rescaled(self, original: Callable[..., None], names: tuple[str, ...]) -> Callable[..., None]:
        """A constructor whose learning rates are taken in units of the script's."""
        signature = inspect.signature(original)

        @functools.wraps(original)
        def init(scheduler: Any, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(scheduler, *args, **kwargs)
            run = self._run_of(bound.arguments.get("optimizer"))
            if run is not None:
                for name in names:
                    value = bound.arguments.get(name, 0.0)
                    scaled = [x * run.ratio for x in value] if isinstance(value, (list, tuple)) else value * run.ratio
                    bound.arguments[name] = scaled
                if "cycle_momentum" in signature.parameters:  # there are no betas to cycle
                    bound.arguments["cycle_momentum"] = False
            original(*bound.args, **bound.kwargs)

        return init

    def _watch_accelerate(self, module: Any) -> None:
        """Accelerate moves a scheduler once for every process, unless batches are split."""
        original = module.AcceleratedScheduler.__init__

        @functools.wraps(original)
        def init(wrapper: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
            from accelerate.state import AcceleratorState

            original(wrapper, scheduler, *args, **kwargs)
            run = self._run_of(getattr(scheduler, "optimizer", None))
            if run is not None and wrapper.step_with_optimizer and not wrapper.split_batches:
                run.scheduler_steps = AcceleratorState().num_processes

        self.restore(module.AcceleratedScheduler, "__init__", original)
        module.AcceleratedScheduler.__init__ = init
