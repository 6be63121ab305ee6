"""Momenta, second moments and factored accumulators: which decays, which axes, which shapes, how they are updated.

Axes of the state: D decays, then those of the parameter (all, or without the one that an accumulator averages over).
Element-wise accumulators are updated inside the passes of :mod:`hf_lopt.kernels.ops`; the factored ones are small
vectors, updated here, between pass 0 and pass 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_lopt import distributed
from hf_lopt.features import FACTORED_EPS, Decays
from hf_lopt.kernels import ops
from hf_lopt.kernels.arguments import UpdateFactored
from hf_lopt.kernels.reference.passes import ema


AXIS_ORDERS = ("torch", "jax", "torch_transposed", "torch_stacked")


def reference_axes(rank: int, axis_order: str) -> list[int]:
    """The axes of a tensor in the order in which the reference stores them, (*kernel, in, out) or (*stack, in, out).

    ``axis_order`` says how the tensor holds them: "torch" (out, in, *kernel), "torch_transposed" (in, out, *kernel),
    which are torch.nn's convolutions and transposed convolutions, "torch_stacked" (*stack, out, in), and "jax" as the
    reference does.
    """
    if axis_order not in AXIS_ORDERS:
        raise ValueError(f"axis_order must be one of {', '.join(AXIS_ORDERS)}, got {axis_order!r}")
    if axis_order == "jax" or rank < 2:
        return list(range(rank))
    if axis_order == "torch":
        return [*range(2, rank), 1, 0]
    if axis_order == "torch_transposed":
        return [*range(2, rank), 0, 1]
    return [*range(rank - 2), rank - 1, rank - 2]


def reference_shape(shape: Sequence[int], axis_order: str) -> tuple[int, ...]:
    """The shape as the reference stores it."""
    return tuple(shape[axis] for axis in reference_axes(len(shape), axis_order))


def factored_axes(shape: Sequence[int], axis_order: str = "torch") -> tuple[int, int]:
    """The largest axis A and the second largest axis B of ``shape``, as indices into it; ``(-1, -1)`` for rank < 2.

    Ties go to the later axis in the reference's layout (:func:`reference_axes`), by a stable sort of the sizes.
    Adafactor's factored second moment: Shazeer & Stern 2018, section 3.
    """
    if len(shape) < 2:
        return -1, -1
    axes = reference_axes(len(shape), axis_order)
    axes.sort(key=lambda axis: shape[axis])  # list.sort is stable; NumPy's default argsort is not
    return axes[-1], axes[-2]


def init(p: Tensor, axis_order: str, decays: Decays) -> dict[str, Tensor]:
    """Zero accumulators of one parameter, float32, on its device and sharded as it is.

    ``momentum`` (D, *shape), ``second_moment`` (D, *shape); for rank >= 2 ``factored_row`` (D, *shape without A) and
    ``factored_col`` (D, *shape without B), otherwise ``factored_diag`` (D, *shape).
    """
    state = {
        "momentum": distributed.zeros(p, len(decays.momentum)),
        "second_moment": distributed.zeros(p, len(decays.second_moment)),
    }
    if decays.factored:
        a, b = factored_axes(p.shape, axis_order)
        if a < 0:
            state["factored_diag"] = distributed.zeros(p, len(decays.factored))
        else:
            state["factored_row"] = distributed.zeros(p, len(decays.factored), dropped=a)
            state["factored_col"] = distributed.zeros(p, len(decays.factored), dropped=b)
    return state


@dataclass(frozen=True)
class Factors:
    """Updated factored accumulators and the factors formed from them, one entry per tensor; empty for rank < 2."""

    rows: list[Tensor]
    cols: list[Tensor]
    row_factors: list[Tensor]
    col_factors: list[Tensor]


def update_factored(
    rows: Sequence[Tensor],
    cols: Sequence[Tensor],
    row_sums: Sequence[Tensor],
    col_sums: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    row_axes: Sequence[int],
    col_axes: Sequence[int],
    decays: Sequence[float],
    shardings: Sequence[distributed.Sharding | None] | None = None,
) -> Factors:
    """New row and column accumulators and their inverse-root factors, from the sums of g² over the whole tensor.

    The arithmetic is that of the operator ``update_factored``. ``shapes`` are the global shapes. Returns new tensors;
    the arguments stay as they are.

    With ``shardings`` the arguments are local: sums over the shard, accumulators sharded along the axes that they
    keep. The sums are completed in one reduction. It also brings mean_B(R) where B is sharded, which is linear in R
    and in the sums.
    """
    shardings = shardings or [None] * len(row_axes)
    row_means: dict[int, Tensor] = {}
    if any(sharding is not None for sharding in shardings):
        row_sums, col_sums, row_means = _sum_over_shards(
            rows, row_sums, col_sums, shapes, row_axes, col_axes, decays, shardings
        )
    if not any(a >= 0 for a in row_axes):
        return Factors(*(list(row_sums) for _ in range(4)))
    empty = row_sums[0].new_empty(0)

    def sizes(axes: Sequence[int]) -> list[int]:
        return [shape[axis] if axis >= 0 else 1 for shape, axis in zip(shapes, axes, strict=True)]

    return Factors(
        *ops.update_factored(
            UpdateFactored(
                rows=rows,
                cols=cols,
                row_sums=row_sums,
                col_sums=col_sums,
                row_means=[row_means.get(i, empty) for i in range(len(row_axes))],
                row_sizes=sizes(row_axes),
                col_sizes=sizes(col_axes),
                row_axes=row_axes,
                col_axes=col_axes,
                decays=decays,
            )
        )
    )


def _axis_of_b(a: int, b: int) -> int:
    """Axis B in the row accumulator, which has lost axis A and gained the decays in front."""
    return b + 1 if b < a else b


def _sum_over_shards(
    rows: Sequence[Tensor],
    row_sums: Sequence[Tensor],
    col_sums: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    row_axes: Sequence[int],
    col_axes: Sequence[int],
    decays: Sequence[float],
    shardings: Sequence[distributed.Sharding | None],
) -> tuple[list[Tensor], list[Tensor], dict[int, Tensor]]:
    """Row and column sums over all shards, and mean_B of the new row accumulators where B is sharded."""
    row_sums, col_sums = list(row_sums), list(col_sums)
    items, places = [], []
    for i, (a, b, sharding) in enumerate(zip(row_axes, col_axes, shardings, strict=True)):
        if sharding is None or a < 0:
            continue
        items += [(row_sums[i], sharding.groups([a])), (col_sums[i], sharding.groups([b]))]
        places += [("row", i), ("col", i)]
        if sharding.groups([b]):
            axis = _axis_of_b(a, b)
            # The accumulator from before the step holds means over all of A; the sums of this step do not yet.
            items.append((rows[i].sum(axis, keepdim=True), sharding.groups([b])))
            items.append((row_sums[i].sum(axis - 1, keepdim=True), sharding.groups([a, b])))
            places += [("old", i), ("new", i)]
    totals: dict[tuple[str, int], Tensor] = dict(zip(places, distributed.sum_over(items), strict=True))
    means = {}
    for (kind, i), total in totals.items():
        if kind in ("row", "col"):
            (row_sums if kind == "row" else col_sums)[i] = total
        elif kind == "new":
            n_a, n_b = shapes[i][row_axes[i]], shapes[i][col_axes[i]]
            means[i] = ema(totals["old", i] / n_b, total / (n_a * n_b) + FACTORED_EPS, decays)
    return row_sums, col_sums, means
