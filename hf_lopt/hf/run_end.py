"""The end of a run: one that used much less of its schedule than that was made for, or outran it, is told so.

Trainer's callback, Lightning, ``Accelerator.end_training`` and ``hf_lopt.launch`` know where a run ends. A loop of
torch does not; what such a loop outruns, the step itself tells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from hf_lopt import notices
from hf_lopt.feed import unwrap


_FULL = 0.9  # of the horizon: a run that takes less of it is told so


def fits(steps: int, horizon: int) -> bool:
    """Whether a schedule that is made for ``horizon`` steps suits a run that took ``steps``."""
    return _FULL * horizon <= steps <= horizon


def length_text(name: str, steps: int, horizon: int, advice: str) -> str:
    """The words for a run of ``steps`` steps whose schedule was made for ``horizon`` steps."""
    start = f"training ended after {steps} steps, and {name}'s schedule is made for {horizon} (num_training_steps)"
    if steps > horizon:
        return f"{start}: the steps beyond were taken with the last stretch of it. {advice}"
    share = 100 * steps / horizon
    return f"{start}: it used {share:.2g} % of it and never came to the end, where steps get small. {advice}"


def _tell(optimizers: Iterable[Any]) -> None:
    """Compare those that have taken steps here with their horizons. Waits for the device."""
    for optimizer in filter(None, map(unwrap, optimizers)):
        horizon, compared = optimizer.num_training_steps, optimizer.run_policy is not None or optimizer._checks_length
        if not horizon or compared or not optimizer._has_begun:
            continue
        group = optimizer.param_groups[0]
        updates = int(group["step"]) + int(group["nonfinite_steps"])
        steps = updates * optimizer._run_state.calls_per_update + group.get("accumulated", 0)
        if not fits(steps, horizon):
            advice = "Give num_training_steps the number of optimizer steps of the run."
            notices.warn(length_text(optimizer.rule.class_name, steps, horizon, advice))


def wrap_end_training(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Accelerator.end_training`` that compares."""

    @functools.wraps(original)
    def end_training(self: Any) -> Any:
        if self.is_main_process:
            _tell(self._optimizers)
        return original(self)

    return end_training


def wrap_on_train_end(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Strategy.on_train_end`` of Lightning that compares, unless the run is a trial of a few batches."""

    @functools.wraps(original)
    def on_train_end(self: Any) -> Any:
        trainer = getattr(self.lightning_module, "trainer", None)
        if trainer is not None and trainer.is_global_zero and not trainer.fast_dev_run:
            _tell(self.optimizers)
        return original(self)

    return on_train_end
