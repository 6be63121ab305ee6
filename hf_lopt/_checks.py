"""Checks of hyperparameters, and of how a run goes, shared by all rules."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_lopt import distributed
from hf_lopt.step.accumulators import AXIS_ORDERS


_NON_NEGATIVE = (
    *("lr", "weight_decay", "min_param_scale", "bank_scale", "step_mult", "exp_mult", "step_scale"),
    *("adam_lr_mult", "max_grad_norm"),
)
# What the Newton-Schulz iteration may run in.
NS_DTYPES = ("float32", "bfloat16")


def positive_int(name: str, value: Any) -> int:
    """``value`` as an int above 0; ValueError otherwise."""
    try:
        number = operator.index(value)
    except TypeError:
        number = int(value) if isinstance(value, float) and value.is_integer() else 0
    if number <= 0 or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number of optimizer steps above 0, got {value!r}")
    return number


def check_settings(settings: Mapping[str, Any]) -> None:
    """Range checks for the settings of a constructor or of a group.

    Raises:
        ValueError: naming the setting, its value and what it may be.
    """
    for name in _NON_NEGATIVE:
        value = settings.get(name, 0.0)
        if isinstance(value, Tensor):  # a schedule on the device; reading it would synchronise
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    if settings.get("axis_order", "torch") not in AXIS_ORDERS:
        raise ValueError(f"axis_order must be one of {', '.join(AXIS_ORDERS)}, got {settings['axis_order']!r}")
    if settings.get("ns_dtype", "float32") not in NS_DTYPES:
        raise ValueError(f"ns_dtype must be one of {', '.join(NS_DTYPES)}, got {settings['ns_dtype']!r}")
    longest = settings.get("max_training_steps", 0)
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 0:
        raise ValueError(f"max_training_steps must be a whole number of steps, 0 for no limit, got {longest!r}")
    if "max_nonfinite_steps" in settings:
        positive_int("max_nonfinite_steps", settings["max_nonfinite_steps"])


def check_ranks(
    run: Mapping[str, Any],
    parameters: Sequence[tuple[Tensor, Mapping[str, Any]]],
    active: set[int],
    names: Sequence[str],
) -> None:
    """Compare over all ranks the settings of the run and the list of trainable parameters.

    ``parameters`` come with their groups, of which ``names`` are compared; ``active``: the ids of those that have a
    gradient in this step.

    Raises:
        ValueError: on all ranks, naming what differs.
    """
    paths = ("weights_source", "weights_origin")  # may differ from machine to machine; the content may not
    own = {k: str(v) for k, v in run.items() if k not in paths and isinstance(v, (str, int, float))}
    for i, (p, group) in enumerate(parameters):
        own[f"parameter {i}"] = f"{distributed.describe(p)} {'with' if id(p) in active else 'without'} a gradient"
        own |= {f"{name} of parameter {i}": str(group[name]) for name in names}
    distributed.check_agreement(own, parameters[0][0].device)


class Watch:
    """Warns and raises by the counters of a run. An accelerator's are read one step late, without waiting."""

    def __init__(self, name: str):
        self.name = name
        self.warned_horizon = False
        self._reported: int | None = None  # skipped steps that have been warned about
        self._host: Tensor | None = None  # counters as an accelerator last sent them

    def start(self, skipped_before: Tensor) -> None:
        """Skipped steps of an earlier part of the run are known."""
        if self._reported is None:
            self._reported = int(skipped_before)

    def look(self, counters: Tensor, limit: int, horizon: int) -> None:
        """``counters`` (3,): steps taken, steps skipped, steps skipped in a row; ``horizon`` 0 for none.

        Raises:
            RuntimeError: when ``limit`` steps in a row have been skipped.
        """
        if counters.device.type == "cpu":
            step, total, in_a_row = counters.tolist()
        else:
            if self._host is None:
                self._host = counters.cpu().pin_memory()
            step, total, in_a_row = self._host.tolist()
            self._host.copy_(counters, non_blocking=True)
        if total > self._reported:
            self._reported = total
            self._complain(total, in_a_row, limit)
        if horizon and step > horizon and not self.warned_horizon:
            self.warned_horizon = True
            warnings.warn(
                f"{self.name} has taken {step} steps, more than num_training_steps={horizon}: its schedule ended and "
                "it goes on with the last stretch of it. Set the length of the whole run.",
                stacklevel=2,
            )

    def _complain(self, total: int, in_a_row: int, limit: int) -> None:
        if in_a_row >= limit:
            raise RuntimeError(
                f"{in_a_row} steps in a row had a non-finite loss, gradient or parameter and were skipped "
                f"(max_nonfinite_steps={limit}). Nothing was changed by them: lower lr, check the data and the loss, "
                "or raise max_nonfinite_steps."
            )
        warnings.warn(
            f"skipped a step with a non-finite loss, gradient or parameter ({total} so far, {in_a_row} in a row; an "
            f"error follows at {limit} in a row)",
            RuntimeWarning,
            stacklevel=2,
        )
