"""Schedules, and their least-squares fits by functions that a meta-network can compute.

Legend: x fraction of the run done before a step (0 at the first).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

from hf_lopt import features
from hf_lopt.meta import fitting


WARMUP, WARMUP_START = 0.05, 0.001  # fractions of the run
GRID = 2.0**-16  # fitted numbers are multiples of this
FLOOR = 0.01  # of the peak: errors of smaller values of lr_mult are taken relative to this
LOG_FLOOR = 0.001  # of the peak: where lr_mult is an exponential it cannot reach 0, this is left of it

Units = tuple[tuple[float, float, float], ...]  # (tau, gain, offset): tanh(gain * tanh(10 (x - tau)) + offset)

# The units were picked once, one at a time, each the one that helps a least-squares fit most, out of a coarse grid:
# 5 gains x 17 offsets per tau for the schedule itself, 7 gains x 17 offsets for its logarithm, where the start of the
# warm-up is steeper (65 offsets for the largest gains at the first tau).
UNITS: Units = (
    *((0.03, 8, 1), (0.03, 16, -4), (0.03, 16, -2), (0.03, 16, 0), (0.03, 16, 2), (0.03, 16, 4), (0.03, 16, 6)),
    *((0.2, 1, 0.25), (0.2, 2, 0.5)),
    *((0.4, 1, -0.375), (0.4, 2, -0.5), (0.4, 8, 2)),
    *((0.6, 2, -1.5), (0.6, 4, -2.5), (0.6, 4, 2), (0.6, 8, -5)),
    *((0.8, 4, -2.5), (0.8, 8, 3)),
    *((0.9, 1, 1), (0.9, 8, -7), (0.9, 16, -14)),
    *((1.0, 1, -0.125), (1.0, 8, 4)),
)
LOG_UNITS: Units = (
    *((0.03, 4, -1), (0.03, 8, 0), (0.03, 16, 0), (0.03, 16, 4), (0.03, 64, -10), (0.03, 64, 20)),
    *((0.1, 4, -2), (0.1, 16, 14)),
    *((0.4, 2, 2), (0.4, 4, 3), (0.4, 8, -8), (0.4, 8, -2)),
    *((0.6, 1, 0.625), (0.6, 8, -6)),
    *((0.8, 1, 1), (0.8, 2, 1.25), (0.8, 4, -3), (0.8, 32, 32)),
    *((0.9, 1, -0.125), (0.9, 8, -2), (0.9, 16, -10), (0.9, 32, -20)),
    *((1.0, 4, -2), (1.0, 8, 2), (1.0, 8, 6), (1.0, 16, 4)),
    (1.1, 16, 16),
)


def schedule(x: float) -> float:
    """Wanted lr_mult as a fraction of its peak, at the fraction ``x`` of the run: linear warm-up, cosine decay."""
    if x >= 1.0:
        return 0.0
    return min(1.0, (x + WARMUP_START) / WARMUP) * 0.5 * (1.0 + math.cos(math.pi * x))


def floored_schedule(x: float) -> float:
    """The schedule moved up so that it ends at ``LOG_FLOOR``, with the peak in place."""
    return (schedule(x) + LOG_FLOOR) / (1.0 + LOG_FLOOR)


def unit_outputs(units: Units, x: Sequence[float]) -> list[list[float]]:
    """Outputs of the units at the fractions ``x``, unit by unit; the last unit is the constant 1."""
    outputs = [[math.tanh(a * math.tanh(10.0 * (t - tau)) + b) for t in x] for tau, a, b in units]
    return [*outputs, [1.0] * len(x)]


def fit(columns: Sequence[Sequence[float]], target: Sequence[float], ridge: float) -> list[float]:
    """Coefficients of the columns that fit ``target``, on the grid: the same on every machine."""
    values, disturbed = (fitting.ridge_regression(c, target, ridge) for c in (columns, fitting.nudged(columns)))
    return fitting.to_grid(values, disturbed, GRID)


def coefficients() -> list[float]:
    """Coefficients of ``UNITS`` and the constant for the schedule; that of the constant makes the limit past the end 0
    or just above.

    A negative limit would be ascent in a run that goes on past its horizon.
    """
    x = [i / 2000 for i in range(240)] + [0.12 + i / 250 for i in range(195)] + [0.9 + i / 1000 for i in range(100)]
    x += [1.0 + i / 500 for i in range(100)] + [1.2 + i / 50 for i in range(40)] + [3.0, 10.0, 100.0]
    weights = [1.0 / max(schedule(t), FLOOR) for t in x]
    target = [schedule(t) * w for t, w in zip(x, weights, strict=True)]
    found = fit([list(map(mul, column, weights)) for column in unit_outputs(UNITS, x)], target, ridge=1e-6)[:-1]
    limit = math.fsum(c * math.tanh(a + b) for c, (_, a, b) in zip(found, UNITS, strict=True))
    return [*found, math.ceil(-limit / GRID) * GRID]


def log_coefficients() -> list[float]:
    """Coefficients of ``LOG_UNITS`` and the constant for the logarithm of the floored schedule."""
    x = (
        [i / 40000 for i in range(100)]
        + [0.0025 + i / 8000 for i in range(60)]
        + [0.01 + i / 2000 for i in range(160)]
    )
    x += [0.09 + i / 500 for i in range(375)] + [0.84 + i / 1000 for i in range(160)]
    x += [1.0 + i / 500 for i in range(150)] + [1.3 + i / 20 for i in range(40)] + [5.0, 10.0, 100.0]
    return fit(unit_outputs(LOG_UNITS, x), [math.log(floored_schedule(t)) for t in x], ridge=1e-8)


# ---- Functions of the number of steps, for rules without a horizon --------------------------------------------------


def step_log_multiplier(step: float, warmup: float, decay: float, power: float = 0.5) -> float:
    """Wanted log of the step size, as a fraction of its peak: warm-up over the first steps, then step ** -power."""
    return math.log(min(1.0, (step + 1.0) / warmup)) - power * math.log1p(step / decay)


def step_outputs(steps: Sequence[float]) -> list[list[float]]:
    """The features tanh(step / tau - 1) of the step count, feature by feature, and the constant 1."""
    return [*[[math.tanh(i / tau - 1.0) for i in steps] for tau in features.STEP_SCALES], [1.0] * len(steps)]


def step_points() -> list[float]:
    """Step counts for a fit: every one at first, then evenly in the logarithm, up to a million."""
    return [*map(float, range(64)), *(float(round(64 * 10 ** (i / 40))) for i in range(168))]


def _step_problem(warmup: float, decay: float, power: float) -> tuple[list[list[float]], list[float], float]:
    """Columns, target and ridge of the fit of :func:`step_log_multiplier`, held after 10⁵ steps."""
    steps = step_points()
    target = [step_log_multiplier(min(i, features.STEP_SCALES[-1]), warmup, decay, power) for i in steps]
    return step_outputs(steps), target, 1e-7


def step_coefficients(warmup: float, decay: float, power: float = 0.5) -> list[float]:
    """Coefficients of the step features and the constant for :func:`step_log_multiplier`, on the grid."""
    return fit(*_step_problem(warmup, decay, power))


def step_fit(warmup: float, decay: float, power: float = 0.5) -> list[float]:
    """The same as they come, for numbers that need not be the same on every machine."""
    return fitting.ridge_regression(*_step_problem(warmup, decay, power))
