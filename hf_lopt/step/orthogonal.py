"""Orthogonal steps: Newton-Schulz iteration of the matrices in a list of tensors, sharded or not.

Jordan et al. 2024, "Muon". Axes: R rows and C columns of a matrix.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lopt.kernels import ops
from hf_lopt.kernels.arguments import Orthogonalize
from hf_lopt.ownership import Ownership
from hf_lopt.step.layout import Layout, matrix_axes
from hf_lopt.step.tensors import TensorList


COEFFICIENTS, STEPS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-8

# How many elements are made orthogonal in one batch: on the CPU few, so that they stay in cache, elsewhere as many as
# memory allows.
_BATCH_CPU, _BATCH_OTHER = 1 << 20, 1 << 27
# Devices on which a batch costs no more than its matrices, so that those of the transposed shape need not be turned.
_ALONE = frozenset(("cpu",))


def newton_schulz(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (..., R, C) with their singular values moved to about 1, float32.

    Five steps of a quintic iteration, in ``dtype``.
    """
    return ops.orthogonalize(Orthogonalize(x, dtype, COEFFICIENTS, STEPS, EPS, norm_eps=None))[0]


def orthogonal(x: Tensor, norm_eps: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Matrices (..., R, C) with equal singular values and a mean square of 1, and what it was before, (...).

    The iteration runs in ``dtype``; ``norm_eps`` is added to the mean square.
    """
    return ops.orthogonalize(Orthogonalize(x, dtype, COEFFICIENTS, STEPS, EPS, norm_eps))


def precision(setting: str, dtype: torch.dtype, device: torch.device) -> str:
    """What the iteration runs in, "float32", "tf32" or "bfloat16", for a ``setting`` of ``ns_dtype``.

    "auto" is TF32 on CUDA, and bfloat16 there for parameters of that ``dtype``. A device without TF32 takes float32.
    """
    if setting == "auto":
        setting = "bfloat16" if device.type == "cuda" and dtype == torch.bfloat16 else "tf32"
    return "float32" if setting == "tf32" and device.type != "cuda" else setting


@contextlib.contextmanager
def _products_in(kind: str) -> Iterator[None]:
    """A context in which products of float32 matrices on CUDA round their factors to TF32, where ``kind`` is that."""
    if kind != "tf32":
        yield
        return
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


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
    lists: Sequence[TensorList], steps: Sequence[Sequence[Tensor]], norm_eps: float, ns_dtype: str
) -> list[OrthogonalSteps]:
    """The ``steps`` of each list with orthogonal matrices. Of sharded tensors each goes to one owner, and back.

    ``ns_dtype`` is the setting of that name, see :func:`precision`."""
    layouts = [tensors.layout for tensors in lists]
    axes = [pair for layout in layouts for pair in axes_of_matrices(layout)]
    kinds = [precision(ns_dtype, p.dtype, p.device) for tensors in lists for p in tensors.params]
    flat = [step for steps_of_list in steps for step in steps_of_list]
    if any(layout.sharded for layout in layouts):
        return _orthogonalize_shards(lists, axes, kinds, flat, _spans(steps), norm_eps)
    done, mean_squares = _orthogonalize(axes, kinds, flat, norm_eps)

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
    lists: Sequence[TensorList],
    axes: Sequence[tuple[int, int]],
    kinds: Sequence[str],
    steps: Sequence[Tensor],
    spans: Sequence[slice],
    norm_eps: float,
) -> list[OrthogonalSteps]:
    layouts, root = [tensors.layout for tensors in lists], lists[0].root
    if root.ownership is None:
        shapes = [shape for layout in layouts for shape in layout.shapes]
        shardings = [sharding for layout in layouts for sharding in layout.shardings]
        costs = [math.prod(s) * min(s[axis] for axis in pair) for s, pair in zip(shapes, axes, strict=True)]
        root.ownership = Ownership(shardings, shapes, costs)

    def whole(i: int, step: Tensor) -> Tensor:
        return _orthogonalize([axes[i]], [kinds[i]], [step], norm_eps)[0][0]

    done = root.ownership.apply(whole, steps)
    found = []
    for span in spans:
        squares = torch.stack(torch._foreach_norm(done[span])).double().square()
        found.append(OrthogonalSteps(done[span], lambda squares=squares: squares))
    return found


def _orthogonalize(
    axes: Sequence[tuple[int, int]], kinds: Sequence[str], steps: Sequence[Tensor], norm_eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Steps whose matrices, over two ``axes`` of each, are orthogonal, and mean squares, see :func:`orthogonal`.

    Tensors of one shape go in batches; where a batch is a launch, matrices of the transposed shape, too. A matrix is
    taken as it lies in memory, transposed or not: the result is the same."""
    pairs = [tuple(sorted(pair)) for pair in axes]
    is_cpu = steps[0].device.type == "cpu"
    alike: dict[Hashable, list[int]] = {}
    for i, (step, pair, kind) in enumerate(zip(steps, pairs, kinds, strict=True)):
        apart = step.dim() > 2 or step.device.type in _ALONE
        shape = tuple(step.shape) if apart else tuple(sorted(step.shape))
        alike.setdefault((shape, pair, kind), []).append(i)
    done, mean_squares = list(steps), list(steps)
    for members in alike.values():
        count = max(1, (_BATCH_CPU if is_cpu else _BATCH_OTHER) // max(steps[members[0]].numel(), 1))
        places, kind = [axis + 1 for axis in pairs[members[0]]], kinds[members[0]]
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        for k in range(0, len(members), count):
            batch = members[k : k + count]
            first = [i for i in batch if steps[i].shape == steps[batch[0]].shape]
            others = [i for i in batch if steps[i].shape != steps[batch[0]].shape]
            x = _joined([steps[i] for i in first]).movedim(places, (-2, -1))
            if others:
                x = torch.cat([x, _joined([steps[i] for i in others]).mT])
            with _products_in(kind):
                result, before = orthogonal(x, norm_eps, dtype)
            results = _contiguous(result.narrow(0, 0, len(first)).movedim((-2, -1), places)).unbind()
            if others:
                results += _contiguous(result.narrow(0, len(first), len(others)).mT).unbind()
            for i, x, y in zip([*first, *others], results, before.unbind(), strict=True):
                done[i], mean_squares[i] = x, y
    return done, mean_squares


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def new_stacks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Empty float32 tensors like these; those of one shape, which are neighbours of each other in memory, are a stack
    that :func:`_joined` finds again without a copy."""
    alike: dict[torch.Size, list[int]] = {}
    for i, x in enumerate(tensors):
        alike.setdefault(x.shape, []).append(i)
    out = list(tensors)
    for shape, members in alike.items():
        stack = tensors[members[0]].new_empty(len(members), *shape, dtype=torch.float32)
        for i, x in zip(members, stack.unbind(), strict=True):
            out[i] = x
    return out


def _joined(steps: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as a stack: the one that they are neighbouring slices of, or a new one."""
    if len(steps) == 1:
        return steps[0].unsqueeze(0)
    stack = steps[0]._base
    if stack is not None and stack.dim() == steps[0].dim() + 1 and stack.is_contiguous():
        start, rest = divmod(steps[0].storage_offset() - stack.storage_offset(), max(steps[0].numel(), 1))
        places = (stack.storage_offset() + (start + k) * steps[0].numel() for k in range(len(steps)))
        if rest == 0 and all(
            x._base is stack and x.is_contiguous() and x.storage_offset() == place
            for x, place in zip(steps, places, strict=True)
        ):
            return stack.narrow(0, start, len(steps))
    return torch.stack(list(steps))
