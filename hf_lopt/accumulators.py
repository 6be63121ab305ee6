"""Momenta, second moments and factored accumulators: which decays, which axes, which shapes, how they are updated.

Axes of the state: D decays, then those of the parameter (all, or without the one that an accumulator averages over).
Element-wise accumulators are updated inside the passes of :mod:`hf_lopt._ops`; the factored ones are small vectors,
updated here, between pass 0 and pass 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lopt._ops import FACTORED_EPS, complement


AXIS_ORDERS = ("torch", "jax")


def reference_axes(rank: int, axis_order: str) -> list[int]:
    """The axes of a tensor in the order in which the reference stores them."""
    if axis_order not in AXIS_ORDERS:
        raise ValueError(f"axis_order must be one of {', '.join(AXIS_ORDERS)}, got {axis_order!r}")
    return [*range(2, rank), 1, 0] if axis_order == "torch" and rank >= 2 else list(range(rank))


def reference_shape(shape: Sequence[int], axis_order: str) -> tuple[int, ...]:
    """The shape as the reference stores it."""
    return tuple(shape[axis] for axis in reference_axes(len(shape), axis_order))


def factored_axes(shape: Sequence[int], axis_order: str = "torch") -> tuple[int, int]:
    """The largest axis A and the second largest axis B of ``shape``, as indices into it; ``(-1, -1)`` for rank < 2.

    Ties go to the later axis in the reference's layout, by a stable sort of the sizes. ``axis_order="jax"`` takes the
    axes as they stand; ``"torch"`` reads two axes as (out, in) and more as (out, in, *kernel), which the reference
    stores as (*kernel, in, out). Adafactor's factored second moment: Shazeer & Stern 2018, section 3.
    """
    if len(shape) < 2:
        return -1, -1
    axes = reference_axes(len(shape), axis_order)
    axes.sort(key=lambda axis: shape[axis])  # list.sort is stable; NumPy's default argsort is not
    return axes[-1], axes[-2]


@dataclass(frozen=True)
class Decays:
    """The decays of a rule's accumulators; () where the rule has none of a kind."""

    momentum: tuple[float, ...] = (0.9, 0.99, 0.999)
    second_moment: tuple[float, ...] = (0.999,)
    factored: tuple[float, ...] = (0.9, 0.99, 0.999)


def init(p: Tensor, axis_order: str, decays: Decays) -> dict[str, Tensor]:
    """Zero accumulators of one parameter, float32, on its device.

    ``momentum`` (D, *shape), ``second_moment`` (D, *shape); for rank >= 2 ``factored_row`` (D, *shape without A) and
    ``factored_col`` (D, *shape without B), otherwise ``factored_diag`` (D, *shape).
    """

    def zeros(count: int, skip: int = -1) -> Tensor:
        shape = [n for axis, n in enumerate(p.shape) if axis != skip]
        return torch.zeros(count, *shape, dtype=torch.float32, device=p.device)

    state = {"momentum": zeros(len(decays.momentum)), "second_moment": zeros(len(decays.second_moment))}
    if decays.factored:
        a, b = factored_axes(p.shape, axis_order)
        if a < 0:
            state["factored_diag"] = zeros(len(decays.factored))
        else:
            state["factored_row"], state["factored_col"] = (zeros(len(decays.factored), axis) for axis in (a, b))
    return state


@dataclass(frozen=True)
class Factors:
    """Updated factored accumulators and the factors formed from them, one entry per tensor; empty for rank < 2."""

    rows: list[Tensor]
    cols: list[Tensor]
    row_factors: list[Tensor]
    col_factors: list[Tensor]


def update_factored(
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    row_sums: Sequence[Tensor],
    col_sums: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    row_axes: Sequence[int],
    col_axes: Sequence[int],
    decays: Sequence[float],
) -> Factors:
    """New row and column accumulators and their inverse-root factors, from the sums of g² over the whole tensor.

    R <- b R + (1-b) mean_A(g² + 1e-30), C <- b C + (1-b) mean_B(g² + 1e-30); row factor
    1/sqrt(max(R / (mean_B(R) + 1e-9), 1e-9)), column factor 1/sqrt(max(C, 1e-9)). ``shapes`` are the
    global shapes. Returns new tensors; the arguments stay as they are.
    """
    out: tuple[list[Tensor], ...] = ([], [], [], [])
    for i, (a, b) in enumerate(zip(row_axes, col_axes, strict=True)):
        if a < 0:
            for part in out:
                part.append(row_sums[i])
            continue
        row = ema(rows[i], row_sums[i] / shapes[i][a] + FACTORED_EPS, decays)
        col = ema(cols[i], col_sums[i] / shapes[i][b] + FACTORED_EPS, decays)
        # Axis B in the row accumulator, which has lost axis A and gained the decays in front.
        mean = row.mean(b + 1 if b < a else b, keepdim=True)
        row_factor = (row / (mean + 1e-9)).clamp_min_(1e-9).rsqrt_()
        for part, x in zip(out, (row, col, row_factor, col.clamp_min(1e-9).rsqrt_()), strict=True):
            part.append(x)
    return Factors(*out)


def ema(old: Tensor, new: Tensor, decays: Sequence[float]) -> Tensor:
    """``decay * old + (1 - decay) * new`` for ``old`` (D, *s) and ``new`` (*s), as a new tensor."""
    shape = (-1, *[1] * new.dim())
    keep = old.new_tensor(decays).view(shape)
    add = old.new_tensor([complement(d) for d in decays]).view(shape)
    return old * keep + add * new
