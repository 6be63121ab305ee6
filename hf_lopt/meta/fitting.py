"""Least squares that, rounded to a grid, is the same on every machine: Python floats and correctly rounded sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul


def ridge_regression(columns: Sequence[Sequence[float]], target: Sequence[float], ridge: float) -> list[float]:
    """Coefficients c that minimise |sum_j c_j column_j - target|² + ridge n |c|² over n points, by Cholesky."""
    size = len(columns)
    gram = [[math.fsum(map(mul, columns[i], columns[j])) for j in range(i + 1)] for i in range(size)]
    right = [math.fsum(map(mul, column, target)) for column in columns]
    factor: list[list[float]] = []
    for i in range(size):
        row: list[float] = []
        for j in range(i):
            row.append((gram[i][j] - math.fsum(map(mul, row, factor[j]))) / factor[j][j])
        row.append(math.sqrt(gram[i][i] + ridge * len(target) - math.fsum(v * v for v in row)))
        factor.append(row)
    half: list[float] = []
    for i in range(size):
        half.append((right[i] - math.fsum(map(mul, factor[i], half))) / factor[i][i])
    solution = [0.0] * size
    for i in reversed(range(size)):
        tail = math.fsum(factor[k][i] * solution[k] for k in range(i + 1, size))
        solution[i] = (half[i] - tail) / factor[i][i]
    return solution


def nudged(columns: Sequence[Sequence[float]]) -> list[list[float]]:
    """The columns with about a third of the numbers moved up one unit in the last place, and a third down."""
    return [
        [value * (1.0 + ((7 * i + 13 * j + i * j) % 3 - 1) * 2.0**-52) for i, value in enumerate(column)]
        for j, column in enumerate(columns)
    ]


def to_grid(values: Sequence[float], disturbed: Sequence[float], grid: float) -> list[float]:
    """``values`` rounded to multiples of ``grid``.

    Args:
        values: the numbers.
        disturbed: the same numbers computed from inputs with other last digits, as another machine's library may give.
        grid: a power of two.

    Raises:
        RuntimeError: a value lies so near the middle between two multiples that ten such disturbances could move it
            across.
    """
    rounded = []
    for value, other in zip(values, disturbed, strict=True):
        steps, shift = value / grid, abs(value - other) / grid
        margin = 0.5 - abs(steps - round(steps))
        if margin <= 10.0 * shift:
            raise RuntimeError(
                f"{value!r} lies {margin:.1e} steps of the grid {grid:g} from a rounding boundary and moves by "
                f"{shift:.1e} steps with the last digits of its inputs; choose a coarser grid or a larger ridge"
            )
        rounded.append(round(steps) * grid)
    return rounded
