"""Orthogonal steps: Newton-Schulz iteration of the matrices in a list of tensors, sharded or not.

Jordan et al. 2024, "Muon". Axes: R rows and C columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lopt.kernels import ops
from hf_lopt.kernels.arguments import Orthogonalize
from hf_lopt.ownership import Ownership
from hf_lopt.step.tensors import Layout, TensorList, matrix_axes


COEFFICIENTS, STEPS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-8

# How many elements are made orthogonal in one batch: on the CPU few, so that they stay in cache, elsewhere as many as
# memory allows.
_BATCH_CPU, _BATCH_OTHER = 1 << 20, 1 << 27


def newton_schulz(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (..., R, C) with their singular values moved to about 1, float32.

    Five steps of a quintic iteration, in ``dtype``; three batched matrix products and a sum each.
    """
    return ops.orthogonalize(Orthogonalize(x, dtype, COEFFICIENTS, STEPS, EPS, norm_eps=None))[0]


def orthogonal(x: Tensor, norm_eps: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Matrices (..., R, C) with equal singular values and a mean square of 1, and what it was before, (...).

    The iteration runs in ``dtype``; ``norm_eps`` is added to the mean square.
    """
    return ops.orthogonalize(Orthogonalize(x, dtype, COEFFICIENTS, STEPS, EPS, norm_eps))


@dataclass(frozen=True)
class OrthogonalSteps:
    """Steps of a list of tensors, shaped like its local parameters, and a function for Σ step² of each, (T,)
    float64, computed when it is asked for."""

    steps: list[Tensor]
    squares: Callable[[], Tensor]


def axes_of_matrices(layout: Layout) -> list[tuple[int, int]]:
    """The two axes of each tensor that hold its matrices; (-1, -1) for rank < 2."""
    pairs = zip(layout.shapes, layout.axis_orders, strict=True)
    return [matrix_axes(len(shape), order) for shape, order in pairs]


def orthogonalize_steps(
    lists: Sequence[TensorList], steps: Sequence[Sequence[Tensor]], norm_eps: float, dtype: torch.dtype
) -> list[OrthogonalSteps]:
    """The ``steps`` of each list with orthogonal matrices. Of sharded tensors each goes to one owner, and back."""
    layouts = [tensors.layout for tensors in lists]
    if any(layout.sharded for layout in layouts):
        return _orthogonalize_shards(lists, steps, norm_eps, dtype)
    axes = [pair for layout in layouts for pair in axes_of_matrices(layout)]
    flat = [step for steps_of_list in steps for step in steps_of_list]
    done, mean_squares = _orthogonalize(axes, flat, norm_eps, dtype)

    def squares(span: slice) -> Callable[[], Tensor]:
        """The mean square was brought to 1, up to norm_eps."""
        before = mean_squares[span]
        sizes = [x.numel() / max(y.numel(), 1) for x, y in zip(flat[span], before, strict=True)]
        return lambda: torch.stack(
            [(y.double() / (y + norm_eps)).sum() * n for y, n in zip(before, sizes, strict=True)]
        )

    return [OrthogonalSteps(done[span], squares(span)) for span in _spans(steps)]


def _spans(steps: Sequence[Sequence[Tensor]]) -> list[slice]:
    """Where each list of steps is, once they are all in one."""
    spans, start = [], 0
    for steps_of_list in steps:
        spans.append(slice(start, start + len(steps_of_list)))
        start += len(steps_of_list)
    return spans


def _orthogonalize_shards(
    lists: Sequence[TensorList], steps: Sequence[Sequence[Tensor]], norm_eps: float, dtype: torch.dtype
) -> list[OrthogonalSteps]:
    layouts, root = [tensors.layout for tensors in lists], lists[0].root
    axes = [pair for layout in layouts for pair in axes_of_matrices(layout)]
    if root.ownership is None:
        shapes = [shape for layout in layouts for shape in layout.shapes]
        shardings = [sharding for layout in layouts for sharding in layout.shardings]
        costs = [math.prod(s) * min(s[axis] for axis in pair) for s, pair in zip(shapes, axes, strict=True)]
        root.ownership = Ownership(shardings, shapes, costs)

    def whole(i: int, step: Tensor) -> Tensor:
        return _orthogonalize([axes[i]], [step], norm_eps, dtype)[0][0]

    done = root.ownership.apply(whole, [step for steps_of_list in steps for step in steps_of_list])
    found = []
    for span in _spans(steps):
        squares = torch.stack(torch._foreach_norm(done[span])).double().square()
        found.append(OrthogonalSteps(done[span], lambda squares=squares: squares))
    return found


def _orthogonalize(
    axes: Sequence[tuple[int, int]], steps: Sequence[Tensor], norm_eps: float, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Steps whose matrices, over two ``axes`` of each, are orthogonal, and mean squares, see :func:`orthogonal`.

    Tensors of one shape go in batches. A matrix is taken as it lies in memory, transposed or not: the result is the
    same."""
    pairs = [tuple(sorted(pair)) for pair in axes]
    alike: dict[tuple[torch.Size, tuple[int, ...]], list[int]] = {}
    for i, (step, pair) in enumerate(zip(steps, pairs, strict=True)):
        alike.setdefault((step.shape, pair), []).append(i)
    done, mean_squares = list(steps), list(steps)
    for (shape, pair), members in alike.items():
        size = _BATCH_CPU if steps[0].device.type == "cpu" else _BATCH_OTHER
        count, places = max(1, size // max(shape.numel(), 1)), [axis + 1 for axis in pair]
        for k in range(0, len(members), count):
            batch = members[k : k + count]
            # One alone needs no copy.
            x = steps[batch[0]].unsqueeze(0) if len(batch) == 1 else torch.stack([steps[i] for i in batch])
            result, before = orthogonal(x.movedim(places, (-2, -1)), norm_eps, dtype)
            result = result.movedim((-2, -1), places)
            result = result if result.is_contiguous() else result.clone(memory_format=torch.contiguous_format)
            for i, x, y in zip(batch, result.unbind(), before.unbind(), strict=True):
                done[i], mean_squares[i] = x, y
    return done, mean_squares
