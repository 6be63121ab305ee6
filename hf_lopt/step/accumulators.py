"""Momenta, second moments and factored accumulators: which decays, which axes, which shapes, how they are updated.

Axes of the state: D decays, then those of the parameter (all, or without the one that an accumulator averages over).
Element-wise accumulators are updated inside the passes of :mod:`hf_lopt.kernels.ops`; the factored ones are small
vectors, updated here, between pass 0 and pass 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lopt import distributed
from hf_lopt.features import FACTORED_EPS, Decays
from hf_lopt.kernels import ops
from hf_lopt.kernels.arguments import UpdateFactored
from hf_lopt.kernels.reference import formats
from hf_lopt.kernels.reference.passes import ema


STATE_DTYPES = ("float32", "bfloat16", "int8")
# The parts of an accumulator of 8-bit codes, after its name.
CODES, SCALES = "_codes", "_scales"
CODE_DTYPES = {"momentum": torch.int8, "second_moment": torch.uint8}
# Below them, fewer bits save nothing worth the rounding; scales would take more than 4.3 bytes per element.
_LEAST_ELEMENTS, _LEAST_COLUMNS = 4096, 64
AXIS_ORDERS = ("torch", "jax", "torch_transposed", "torch_stacked", "torch_merged", "jax_merged")
# What a tensor is once :func:`matrix_shape` has merged its axes, or has divided the first one.
_MERGED = {"torch_merged": "torch", "jax_merged": "jax"}
_DIVIDED = ("torch_stacked", "jax")


def check_axis_order(axis_order: Any) -> None:
    """ValueError for anything but one of ``AXIS_ORDERS``, or "torch_stacked/E" and "jax/E" with a whole number E."""
    text = str(axis_order)
    base, slash, count = text.partition("/")
    good = text in AXIS_ORDERS if not slash else base in _DIVIDED and count.isdigit() and int(count) > 0
    if not good:
        divided = ", ".join(f"{name}/E (E matrices in the first axis)" for name in _DIVIDED)
        raise ValueError(f"axis_order must be one of {', '.join(AXIS_ORDERS)}, {divided}, got {axis_order!r}")


def without_view(axis_order: str) -> str:
    """The axis order of what :func:`matrix_shape` makes of a tensor."""
    return _MERGED.get(axis_order) or axis_order.partition("/")[0]


def matrix_shape(shape: Sequence[int], axis_order: str) -> tuple[int, ...]:
    """The shape in which a step sees a tensor: its own, but for matrices whose axes are merged or divided.

    "torch_merged" is (out, *in) and "jax_merged" (in, *out): one matrix, whose second axis is several of the tensor's,
    such as (d_model, heads, d_head). "torch_stacked/E" is (E out, in) and "jax/E" (E in, out): E matrices, one below
    the other, such as fused experts.

    Raises:
        ValueError: if E does not divide the first axis, or the tensor has not two axes.
    """
    check_axis_order(axis_order)
    count = axis_order.partition("/")[2]
    if axis_order in _MERGED and len(shape) > 2:
        return shape[0], math.prod(shape[1:])
    if count:
        if len(shape) != 2 or shape[0] % int(count):
            raise ValueError(f"axis_order={axis_order!r} is for ({count} n, m) tensors, got shape {tuple(shape)}")
        return int(count), shape[0] // int(count), shape[1]
    return tuple(shape)


def matrix_view(p: Tensor, axis_order: str) -> Tensor:
    """``p`` in its :func:`matrix_shape`, sharing its memory; ``p`` itself where that is its own shape.

    Raises:
        ValueError: for a tensor whose memory, or whose shards, cannot be seen so.
    """
    shape = matrix_shape(p.shape, axis_order)
    return p if shape == tuple(p.shape) else distributed.view(p, shape)


def reference_axes(rank: int, axis_order: str) -> list[int]:
    """The axes of a tensor in the order in which the reference stores them, (*kernel, in, out) or (*stack, in, out).

    ``axis_order`` says how the tensor holds them: "torch" (out, in, *kernel), "torch_transposed" (in, out, *kernel),
    which are torch.nn's convolutions and transposed convolutions, "torch_stacked" (*stack, out, in), and "jax" as the
    reference does. The others are one of these in another shape, see :func:`matrix_shape`, and no longer come here.
    """
    if axis_order not in AXIS_ORDERS or axis_order in _MERGED:
        check_axis_order(axis_order)
        raise ValueError(f"axis_order={axis_order!r} is of a tensor in its matrix_shape, and names no order of axes")
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


def row_axis(shape: Sequence[int], axis_order: str) -> int:
    """The first axis of the rows that kernels read, and that blocks of codes lie in, of the :func:`matrix_shape`; 0
    for rank < 2."""
    return max(*factored_axes(matrix_shape(shape, axis_order), without_view(axis_order)), 0)


def stored_as(p: Tensor, axis_order: str, state_dtype: str) -> str:
    """The format of a parameter's momenta and second moments, one of `STATE_DTYPES`, where ``state_dtype`` is wanted.

    Vectors and tensors of fewer than 4,096 elements are float32. With "int8", tensors whose rows are shorter than 64
    elements, several axes joined or an axis of a convolution's kernel, or cut by shards elsewhere than between two
    blocks are bfloat16: each rank has whole blocks, and blocks are the same however a tensor is sharded. Celo2's
    matrices, which have no axis of a kernel, have whole rows.
    """
    p, axis_order = matrix_view(p, axis_order), without_view(axis_order)
    if state_dtype == "float32" or p.dim() < 2 or p.numel() < _LEAST_ELEMENTS:
        return "float32"
    axis = row_axis(p.shape, axis_order)
    columns = math.prod(p.shape[axis:])
    has_rows = columns == p.shape[axis] >= _LEAST_COLUMNS and axis in reference_axes(p.dim(), axis_order)[-2:]
    whole = has_rows and not _cuts_blocks(distributed.sharding_of(p), axis, columns)
    return "int8" if state_dtype == "int8" and whole else "bfloat16"


def _cuts_blocks(sharding: distributed.Sharding | None, axis: int, columns: int) -> bool:
    """Whether shards end within a block of a row along ``axis``, or have their scales elsewhere than their codes."""
    if sharding is None:
        return False
    sizes = [sharding.mesh.size(d) for d, sharded in enumerate(sharding.axes) if sharded >= axis]
    if math.prod(sizes) == 1:
        return False
    blocks, shard = formats.block_count(columns), -(-columns // sizes[0])
    return len(sizes) > 1 or shard % formats.BLOCK != 0 or -(-blocks // sizes[0]) * formats.BLOCK != shard


def init(p: Tensor, axis_order: str, decays: Decays, state_dtype: str = "float32") -> dict[str, Tensor]:
    """Zero accumulators of one parameter, on its device and sharded as it is, in its :func:`matrix_shape`.

    ``momentum`` (D, *shape), ``second_moment`` (D, *shape), in the format that :func:`stored_as` says; as 8-bit codes
    ``momentum_codes`` and ``second_moment_codes`` (D, *shape), and ``momentum_scales`` and ``second_moment_scales``
    (D, *rows, blocks), float32, of the blocks of each row (:mod:`hf_lopt.kernels.reference.formats`). For rank >= 2
    ``factored_row`` (D, *shape without A) and ``factored_col`` (D, *shape without B), otherwise ``factored_diag``
    (D, *shape), float32.
    """
    p, axis_order = matrix_view(p, axis_order), without_view(axis_order)
    state, kind = {}, stored_as(p, axis_order, state_dtype)
    for name, count in (("momentum", len(decays.momentum)), ("second_moment", len(decays.second_moment))):
        if kind != "int8":
            state[name] = distributed.zeros(p, count, dtype=getattr(torch, kind))
            continue
        blocks = row_axis(p.shape, axis_order), formats.BLOCK
        state[name + CODES] = distributed.zeros(p, count, dtype=CODE_DTYPES[name])
        state[name + SCALES] = distributed.zeros(p, count, blocks=blocks)
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

    rows: Sequence[Tensor]
    cols: Sequence[Tensor]
    row_factors: Sequence[Tensor]
    col_factors: Sequence[Tensor]


def axis_sizes(shapes: Sequence[Sequence[int]], axes: Sequence[int]) -> list[int]:
    """The length of an axis of each shape, 1 where that is negative."""
    return [shape[axis] if axis >= 0 else 1 for shape, axis in zip(shapes, axes, strict=True)]


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
    sizes: tuple[Sequence[int], Sequence[int]] | None = None,
    nothing: Sequence[Tensor] | None = None,
) -> Factors:
    """New row and column accumulators and their inverse-root factors, from the sums of g² over the whole tensor.

    The arithmetic is that of the operator ``update_factored``. ``shapes`` are the global shapes; ``sizes``, their
    :func:`axis_sizes`, and ``nothing``, an empty tensor for each, may be given where they are known. Returns new
    tensors; the arguments stay as they are.

    With ``shardings`` the arguments are local: sums over the shard, accumulators sharded along the axes that they
    keep. The sums are completed in one reduction. It also brings mean_B(R) where B is sharded, which is linear in R
    and in the sums.
    """
    row_means: dict[int, Tensor] = {}
    if shardings is not None and any(sharding is not None for sharding in shardings):
        row_sums, col_sums, row_means = _sum_over_shards(
            rows, row_sums, col_sums, shapes, row_axes, col_axes, decays, shardings
        )
    if max(row_axes) < 0:
        return Factors(*(list(row_sums) for _ in range(4)))
    row_sizes, col_sizes = sizes or (axis_sizes(shapes, row_axes), axis_sizes(shapes, col_axes))
    means: Sequence[Tensor] | None = None if row_means else nothing
    if means is None:
        empty = row_sums[0].new_empty(0)
        means = [row_means.get(i, empty) for i in range(len(row_axes))]
    return Factors(
        *ops.update_factored(
            UpdateFactored(
                rows=rows,
                cols=cols,
                row_sums=row_sums,
                col_sums=col_sums,
                row_means=means,
                row_sizes=row_sizes,
                col_sizes=col_sizes,
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
