"""What is fixed about the tensors of a step: axes, shapes, sizes, shards. See :mod:`hf_lopt.step.tensors`.

Axes: T tensors, M results (one for each tensor, or for each of its slices), R replicas.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lopt import distributed
from hf_lopt.kernels.held import HeldList
from hf_lopt.kernels.reference.formats import tensor_key
from hf_lopt.step import accumulators
from hf_lopt.step.accumulators import factored_axes


@dataclass(frozen=True, eq=False)
class Layout:
    """What is fixed for a list of parameters: axes, shapes, sizes, shards. Built once by :func:`make_layout`.

    Replicas: in meta-training many copies of a model are trained at once. Where ``stacked``, every tensor is a stack
    of R copies with the replicas as its first axis, and each copy counts as a tensor of its own: numbers of the
    settings are (T R,), networks may differ between replicas. Otherwise the list holds the tensors of the first
    replica, then those of the second, and so on.

    Attributes:
        params: the parameters as they were given, DTensors included.
        numbers: their places among all parameters of the optimizer.
        shardings: how each of them is sharded over ranks; None for an ordinary tensor.
        shapes: global shapes.
        axis_orders: see :func:`hf_lopt.step.accumulators.reference_axes`.
        row_axes, col_axes: axes A and B of each tensor, -1 for rank < 2.
        numel: global sizes, (T,) float64.
        slice_axes: two axes of each tensor whose matrices count as tensors of their own; empty: none do.
        slices: numbers of slices in the local shards.
        slice_numel: sizes of what is normalised together, (M,) float64.
        holders: number of ranks that hold the same shard of each tensor, (T,) float64.
        replicas: number of replicas; 0 outside of meta-training.
        stacked: whether each tensor is a stack of replicas.
    """

    params: tuple[Tensor, ...]
    numbers: tuple[int, ...]
    shardings: tuple[distributed.Sharding | None, ...]
    device: torch.device
    shapes: tuple[tuple[int, ...], ...]
    axis_orders: tuple[str, ...]
    row_axes: list[int]
    col_axes: list[int]
    numel: Tensor
    slice_axes: list[int]
    slices: list[int]
    slice_numel: Tensor
    holders: Tensor
    replicas: int
    stacked: bool
    empty: Tensor  # (0,), in the place of what a tensor does not have
    one: Tensor  # (1,)

    @functools.cached_property
    def sharded(self) -> bool:
        """Whether any tensor is a DTensor."""
        return any(sharding is not None for sharding in self.shardings)

    @functools.cached_property
    def one_hot_ranks(self) -> Tensor:
        """One-hot (T, 5) float32 of the number of axes longer than 1; a row of zeros for more than four, as in the
        reference."""
        ranks = torch.tensor([sum(n > 1 for n in s) for s in self.shapes], dtype=torch.int64, device=self.device)
        return (ranks.unsqueeze(1) == torch.arange(5, dtype=torch.int64, device=self.device)).to(torch.float32)

    @functools.cached_property
    def places(self) -> list[int]:
        """Where the local tensors lie in the whole ones, as ``read_places`` of the kernels' formats reads it."""
        found: list[int] = []
        for number, shape, order, sharding in zip(
            self.numbers, self.shapes, self.axis_orders, self.shardings, strict=True
        ):
            starts = sharding.start(shape) if sharding else (0,) * len(shape)
            found += [tensor_key(number), accumulators.row_axis(shape, order), *starts, *shape]
        return found

    @functools.cached_property
    def factored_sizes(self) -> tuple[list[int], list[int]]:
        """Lengths of the axes A and B of each tensor, 1 where there is none."""
        return accumulators.axis_sizes(self.shapes, self.row_axes), accumulators.axis_sizes(self.shapes, self.col_axes)

    @functools.cached_property
    def nothing(self) -> HeldList:
        """An empty tensor for each."""
        return HeldList([self.empty] * len(self.shapes))

    def rank(self, t: int) -> int:
        """Number of axes of a tensor, without that of the replicas."""
        return len(self.shapes[t]) - self.stacked


def make_layout(
    params: Sequence[Tensor],
    axis_orders: Sequence[str],
    *,
    numbers: Sequence[int] | None = None,
    sliced: bool = False,
    replicas: int = 0,
    stacked: bool = False,
) -> Layout:
    """The layout of a list of parameters.

    ``sliced``: tensors of more than two axes are stacks of matrices that are normalised one by one. Stacks of
    replicas are of rank 1 or 2 without the axis of replicas, in the axis order "jax".
    """
    device, shapes = params[0].device, tuple(tuple(p.shape) for p in params)
    shardings = tuple(distributed.sharding_of(p) for p in params)
    numel = torch.tensor([p.numel() for p in params], dtype=torch.float64, device=device)
    axes = [factored_axes(shape, order) for shape, order in zip(shapes, axis_orders, strict=True)]
    slice_axes: list[int] = []
    slices, slice_numel = [1] * len(shapes), numel
    if stacked:
        assert all(len(shape) in (2, 3) and shape[0] == replicas for shape in shapes), shapes
        pairs = [factored_axes(shape[1:], "jax") for shape in shapes]
        axes = [(a + (a >= 0), b + (b >= 0)) for a, b in pairs]
        slice_axes = [axis for shape in shapes for axis in (len(shape) - 2 or 1, len(shape) - 1)]
        slices = [replicas] * len(shapes)
        slice_numel = (numel / replicas).repeat_interleave(replicas)
    elif sliced:
        matrices = [matrix_axes(len(shape), order) for shape, order in zip(shapes, axis_orders, strict=True)]
        slice_axes = [axis for pair in matrices for axis in pair]
        local_shapes = [distributed.local(p).shape for p in params]
        slices = [
            math.prod(n for axis, n in enumerate(shape) if axis not in pair) if len(shape) > 1 else 1
            for shape, pair in zip(local_shapes, matrices, strict=True)
        ]
        sizes = [
            [s[a] * s[b] if len(s) > 1 else math.prod(s)] * count
            for s, (a, b), count in zip(shapes, matrices, slices, strict=True)
        ]
        slice_numel = torch.tensor([n for ns in sizes for n in ns], dtype=torch.float64, device=device)
    return Layout(
        params=tuple(params),
        numbers=tuple(range(len(params)) if numbers is None else numbers),
        shardings=shardings,
        device=device,
        shapes=shapes,
        axis_orders=tuple(axis_orders),
        row_axes=[a for a, _ in axes],
        col_axes=[b for _, b in axes],
        numel=numel,
        slice_axes=slice_axes,
        slices=slices,
        slice_numel=slice_numel,
        holders=torch.tensor([_holders(sharding) for sharding in shardings], dtype=torch.float64, device=device),
        replicas=replicas,
        stacked=stacked,
        empty=torch.empty(0, dtype=torch.float32, device=device),
        one=torch.ones(1, dtype=torch.float32, device=device),
    )


def _holders(sharding: distributed.Sharding | None) -> int:
    """Ranks that hold the same shard."""
    shards = 1
    if sharding is not None:
        shards = math.prod(sharding.mesh.size(d) for d, axis in enumerate(sharding.axes) if axis >= 0)
    return distributed.world_size() // shards


def matrix_axes(rank: int, axis_order: str) -> tuple[int, int]:
    """The last two axes in the reference's layout, which hold the matrix of a linear or convolution kernel."""
    axes = accumulators.reference_axes(rank, axis_order)
    return (axes[-2], axes[-1]) if rank >= 2 else (-1, -1)
