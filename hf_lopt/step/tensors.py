"""What a step works on: lists of tensors with their state, and what about them stays the same from step to step.

`Layout` is what is fixed about a list, `StepCache` what one step leaves for the next, `TensorList` the tensors of one
step; :mod:`hf_lopt.step.prepared` makes it.

Axes: T tensors, M results (one for each tensor, or for each of its slices), R replicas.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_lopt import distributed, ownership
from hf_lopt.step import accumulators
from hf_lopt.step.accumulators import factored_axes
from hf_lopt.step.held import PickedSettings, StateLists


@dataclass(frozen=True, eq=False)
class Layout:
    """What is fixed for a list of parameters: axes, shapes, sizes, shards. Built once by :func:`make_layout`.

    Replicas: in meta-training many copies of a model are trained at once. Where ``stacked``, every tensor is a stack
    of R copies with the replicas as its first axis, and each copy counts as a tensor of its own: numbers of the
    settings are (T R,), networks may differ between replicas. Otherwise the list holds the tensors of the first
    replica, then those of the second, and so on.

    Attributes:
        params: the parameters as they were given, DTensors included.
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

    @property
    def sharded(self) -> bool:
        """Whether any tensor is a DTensor."""
        return any(sharding is not None for sharding in self.shardings)

    @functools.cached_property
    def one_hot_ranks(self) -> Tensor:
        """One-hot (T, 5) float32 of the number of axes longer than 1; a row of zeros for more than four, as in the
        reference."""
        ranks = torch.tensor([sum(n > 1 for n in s) for s in self.shapes], dtype=torch.int64, device=self.device)
        return (ranks.unsqueeze(1) == torch.arange(5, dtype=torch.int64, device=self.device)).to(torch.float32)

    def rank(self, t: int) -> int:
        """Number of axes of a tensor, without that of the replicas."""
        return len(self.shapes[t]) - self.stacked


def make_layout(
    params: Sequence[Tensor],
    axis_orders: Sequence[str],
    *,
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


@dataclass
class Subset:
    """A selection of the tensors of a list, kept from step to step.

    Attributes:
        indices: their places in the list that they were picked from, on the device.
        root_indices: their places in the list of the whole step.
    """

    layout: Layout
    cache: StepCache
    indices: Tensor
    root_indices: Tensor


@dataclass
class StepCache:
    """What a step leaves for the next one over the same list of tensors. Derived, never saved.

    Attributes:
        moments: statistics of parameters and accumulators as the last update left them, (T, S) float64.
        versions: versions of the accumulators then; if they are others now, the statistics are taken afresh.
        local_update: Σ step² of the last step over this rank's share, 0-d float64, which is summed over ranks in the
            next step's reduction.
        whole_update: that sum, one step late.
        subsets: selections by the names that their users gave them.
        chunks: first and last place of neighbouring tensors that are worked on together.
        branches: what is done to the tensors -> their places, where a rule treats them differently.
        network_rows: weights and, made from them, a row for each result, where tensors have different networks.
        ownership: who works on which whole matrix.
        selection: a number for the parameters of the step, which has to be the same on all ranks.
        device_settings: settings that lie on an accelerator, which nobody has looked at yet: (G, 1) float64 by name.
        loss_decays: horizons of the replicas, and made from them the decays (R, 10) and the horizons (R, 1).
        floors: settings of the groups with their version and the tensors' own, and made from them the least sizes.
    """

    moments: Tensor | None = None
    versions: list[int] = field(default_factory=list)
    local_update: Tensor | None = None
    whole_update: Tensor | None = None
    subsets: dict[Hashable, Subset] = field(default_factory=dict)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    branches: dict[str, list[int]] = field(default_factory=dict)
    network_rows: tuple[Mapping[str, Any], Tensor] | None = None
    ownership: ownership.Ownership | None = None
    selection: int = 0
    device_settings: dict[str, Tensor] = field(default_factory=dict)
    loss_decays: tuple[Sequence[int], Tensor, Tensor] | None = None
    floors: tuple[Tensor, int, Sequence[Tensor | None] | None, Tensor] | None = None


@dataclass
class TensorList:
    """All tensors of one step, as local shards. Lists have one entry per parameter.

    Attributes:
        layout: what is fixed about them.
        cache: what the last step has left for this one; ``root``: the one of the whole step's list.
        params, grads: float32, bfloat16 or float16.
        state: key -> the state of each parameter; None where a parameter has no such accumulator.
        settings: numbers of each parameter's group, (T,) float32 by name: lr, weight_decay, …
        labels: settings of the groups that are text, such as axis_order: name -> that of each parameter's group.
        root_indices: places in the list of the whole step, None for that list itself.
    """

    layout: Layout
    cache: StepCache
    root: StepCache
    params: list[Tensor]
    grads: list[Tensor]
    state: Mapping[str, list[Tensor | None]]
    settings: Mapping[str, Tensor]
    labels: dict[str, list[str]]
    root_indices: Tensor | None = None

    def __post_init__(self) -> None:
        self._lists = self.state if isinstance(self.state, StateLists) else StateLists(self.state)
        self.state = self._lists

    def __len__(self) -> int:
        return len(self.params)

    def __getitem__(self, name: str) -> Tensor:
        return self.settings[name]

    def subset(self, name: Hashable, indices: Sequence[int], sliced: bool = False) -> TensorList:
        """Some of the tensors; ``name`` identifies the selection, whose layout is kept."""
        everything = list(indices) == list(range(len(self)))
        if everything and sliced == bool(self.layout.slice_axes and not self.layout.stacked):
            return self
        found = self.cache.subsets.get(name)
        if found is None:
            found = self.cache.subsets[name] = self._new_subset(indices, sliced)

        def pick(xs: Sequence[Any]) -> list[Any]:
            return [xs[i] for i in indices]

        picked = self._lists.picked.get(name)
        if picked is None or picked[0] is not self.params:  # views of parameters are others in each step
            lists = StateLists({key: pick(xs) for key, xs in self.state.items()})
            labels = {key: pick(xs) for key, xs in self.labels.items()}
            picked = self._lists.picked[name] = self.params, pick(self.params), lists, labels
        _, params, state, labels = picked
        return TensorList(
            layout=found.layout,
            cache=found.cache,
            root=self.root,
            params=params,
            grads=pick(self.grads),
            state=state,
            settings=self.settings if everything else PickedSettings(self.settings, len(self), found.indices),
            labels=labels,
            root_indices=self.root_indices if everything else found.root_indices,
        )

    def _new_subset(self, indices: Sequence[int], sliced: bool) -> Subset:
        whole = self.layout
        layout = make_layout(
            [whole.params[i] for i in indices],
            [whole.axis_orders[i] for i in indices],
            sliced=sliced,
            replicas=whole.replicas,
            stacked=whole.stacked,
        )
        places = torch.tensor(indices, dtype=torch.int64, device=whole.device)
        return Subset(layout, StepCache(), places, places if self.root_indices is None else self.root_indices[places])

    def chunks(self, elements: int) -> Iterator[tuple[int, int, TensorList]]:
        """Neighbouring tensors of about so many elements at a time, for work that needs memory for each of them; with
        the places of the first one and after the last one."""
        if not self.cache.chunks:
            starts, size = [0], 0
            for t, p in enumerate(self.params):
                if size and size + p.numel() > elements:
                    starts, size = [*starts, t], 0
                size += p.numel()
            self.cache.chunks = list(itertools.pairwise([*starts, len(self)]))
        if len(self.cache.chunks) == 1:
            yield 0, len(self), self
            return
        for start, stop in self.cache.chunks:
            yield start, stop, self.subset(("chunk", start), range(start, stop), sliced=self.is_sliced)

    @property
    def is_sliced(self) -> bool:
        return bool(self.layout.slice_axes)

    def tensors(self, key: str) -> list[Tensor]:
        """The state ``key`` of every parameter, an empty tensor where it has none."""
        return self._lists.filled(key, self.layout.empty, len(self))

    @property
    def momenta(self) -> list[Tensor]:
        """(D, *shape) each."""
        return self.tensors("momentum")

    @property
    def second_moments(self) -> list[Tensor]:
        """(D, *shape) each."""
        return self.tensors("second_moment")

    def least_sizes(self) -> Tensor:
        """``min_param_scale`` of each tensor, (T,) or, of stacked replicas, (T R,): of its group, or its own."""
        own = self.state.get("min_param_scale")
        numbers = self["min_param_scale"]
        made = self.cache.floors
        if made is None or made[0] is not numbers or made[1] != numbers._version or made[2] is not own:
            floors = [self.layout.one.new_zeros(()) if x is None else x for x in own or ()]
            of_tensors = torch.stack(floors) if floors else torch.zeros_like(numbers)
            least = torch.where(numbers.isnan(), of_tensors, numbers)
            made = self.cache.floors = (numbers, numbers._version, own, least)
        return made[3]

    def accumulator_versions(self) -> list[int]:
        """Version counters of momenta and second moments, which every change in place moves."""
        return [x._version for x in (*self.momenta, *self.second_moments)]
