"""What is told of a run after a step: skipped steps, a length that was too short, and numbers for a logger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_lopt import notices
from hf_lopt.run_state import LENGTH_MULTIPLIER


class RunMonitor:
    """Warns and raises by the counters of a run. An accelerator's are read one step late, without waiting."""

    def __init__(self, name: str):
        self.name = name
        self.warned_horizon = False
        self._reported: int | None = None  # skipped steps that have been warned about
        self._host: Tensor | None = None  # counters as an accelerator last sent them

    def start(self, skipped_before: Tensor) -> None:
        """Take the steps that were skipped before this monitor's first step, 0-d, as known. Later calls do nothing."""
        if self._reported is None:
            self._reported = int(skipped_before)

    def check(self, counters: Tensor, limit: int, horizon: int) -> None:
        """Look at the run after a step.

        Args:
            counters: (3,) int64, the :data:`hf_lopt.run_state.COUNTERS`.
            limit: steps skipped in a row that are an error.
            horizon: length of the run in updates, 0 for none.

        Raises:
            RuntimeError: when ``limit`` steps in a row have been skipped.
        """
        if counters.device.type == "cpu":
            step, skipped, in_a_row = counters.tolist()
        else:
            if self._host is None:
                self._host = counters.cpu().pin_memory()
            step, skipped, in_a_row = self._host.tolist()
            self._host.copy_(counters, non_blocking=True)
        if skipped > (self._reported or 0):
            self._reported = skipped
            self._report_skipped(skipped, in_a_row, limit)
        if horizon and step > horizon and not self.warned_horizon:
            self.warned_horizon = True
            notices.warn(
                f"{self.name} has taken {step} steps, more than num_training_steps={horizon}: its schedule ended and "
                "it goes on with the last stretch of it. Set the length of the whole run.",
            )

    def _report_skipped(self, skipped: int, in_a_row: int, limit: int) -> None:
        if in_a_row >= limit:
            raise RuntimeError(
                f"{in_a_row} steps in a row had a non-finite loss, gradient or parameter and were skipped "
                f"(max_nonfinite_steps={limit}). Nothing was changed by them: lower lr, check the data and the loss, "
                "or raise max_nonfinite_steps."
            )
        notices.warn(
            f"skipped a step with a non-finite loss, gradient or parameter ({skipped} so far, {in_a_row} in a row; an "
            f"error follows at {limit} in a row)",
            RuntimeWarning,
        )


def step_metrics(report: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, float]:
    """Numbers for a logger from what the last step reported and the first group. Waits for the device."""
    numbers = {}
    if "lr_mult" in report:
        numbers = {f"lr_mult_{name}": getattr(report["lr_mult"], name)().item() for name in ("mean", "min", "max")}
    numbers["update_rms"] = report["update_rms"].item()
    if LENGTH_MULTIPLIER in group:
        numbers[LENGTH_MULTIPLIER] = group[LENGTH_MULTIPLIER]
    return numbers | {"nonfinite_steps": float(group["nonfinite_steps"])}
