"""What a step works on: lists of tensors with their state, and what about them stays the same from step to step.

`Layout` is what is fixed about a list, `StepCache` what one step leaves for the next, `TensorList` the tensors of one
step, `PreparedStep` all that is kept for as long as the same parameters are trained.

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
from hf_lopt.step.accumulators import factored_axes, matrix_view, without_view
from hf_lopt.step.held import StateLists


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


class _PickedSettings(dict[str, Tensor]):
    """Settings of some of the parameters, picked when they are asked for: each is a launch."""

    def __init__(self, source: Mapping[str, Tensor], count: int, indices: Tensor):
        super().__init__()
        self.source, self.count, self.indices = source, count, indices

    def __missing__(self, name: str) -> Tensor:
        self[name] = self.source[name].unflatten(0, (self.count, -1)).index_select(0, self.indices).flatten()
        return self[name]


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

        if name not in self._lists.picked:
            lists = StateLists({key: pick(xs) for key, xs in self.state.items()})
            labels = {key: pick(xs) for key, xs in self.labels.items()}
            self._lists.picked[name] = pick(self.params), lists, labels
        params, state, labels = self._lists.picked[name]
        return TensorList(
            layout=found.layout,
            cache=found.cache,
            root=self.root,
            params=params,
            grads=pick(self.grads),
            state=state,
            settings=self.settings if everything else _PickedSettings(self.settings, len(self), found.indices),
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
        if own is None:
            return numbers.nan_to_num(0.0)
        floors = [self.layout.one.new_zeros(()) if x is None else x for x in own]
        return torch.where(numbers.isnan(), torch.stack(floors), numbers)

    def accumulator_versions(self) -> list[int]:
        """Version counters of momenta and second moments, which every change in place moves."""
        return [x._version for x in (*self.momenta, *self.second_moments)]


class PreparedStep:
    """What a step needs and need not be rebuilt while the list of parameters stays the same. Derived, never saved."""

    def __init__(
        self,
        key: tuple[Hashable, ...],
        params: Sequence[Tensor],
        groups: Sequence[Mapping[str, Any]],
        rule: Any,
        theta: Mapping[str, Tensor],
    ):
        devices = sorted({str(p.device) for p in params})
        if len(devices) > 1:
            raise ValueError(
                f"parameters are on several devices ({', '.join(devices)}): the scheduler couples all of them. "
                "Put the model on one device, or give each device's parameters an optimizer of its own."
            )
        self.key = key
        # From here on a step sees matrices: tensors in the shape that their axis order gives them.
        orders = [group["axis_order"] for group in groups]
        seen = [matrix_view(p, order) for p, order in zip(params, orders, strict=True)]
        self._shapes = {i: distributed.local(x).shape for i, x in enumerate(seen) if x is not params[i]}
        self.layout = make_layout(seen, [without_view(order) for order in orders])
        self.cache = StepCache()
        self.weights = rule.prepare({name: leaf.to(self.layout.device) for name, leaf in theta.items()}, groups[0])
        self._settings: dict[str, Tensor] = {}
        self._settings_of: dict[str, list[Any]] = {}  # the numbers in them, of each group
        # Of many tensors few are in groups of their own: the groups, the place of each parameter's group among them.
        self._given: Sequence[Mapping[str, Any]] = ()
        self._distinct: list[Mapping[str, Any]] = []
        self._places: list[int] = []
        self._places_there: Tensor | None = None

    def in_view(self, tensors: list[Tensor], copy: bool = False) -> list[Tensor]:
        """Local shards in the shapes that the step sees, in their own memory; with ``copy`` in another if need be."""
        if not self._shapes:
            return tensors
        views = list(tensors)
        for i, shape in self._shapes.items():
            views[i] = tensors[i].reshape(shape) if copy else tensors[i].view(shape)
        return views

    def settings(
        self, names: Sequence[str], groups: Sequence[Mapping[str, Any]], lr_factor: float
    ) -> dict[str, Tensor]:
        """The settings of each parameter's group by name, (T,) each, with the lr times ``lr_factor``."""
        return {name: self.setting(name, groups, lr_factor if name == "lr" else 1.0) for name in names}

    def setting(self, name: str, groups: Sequence[Mapping[str, Any]], factor: float = 1.0) -> Tensor:
        """Setting ``name`` of each parameter's group, times ``factor``, as a float32 tensor (T,), copied only when it
        has changed."""
        if groups is not self._given:
            self._given, self._distinct = groups, list({id(group): group for group in groups}.values())
            numbered = {id(group): i for i, group in enumerate(self._distinct)}
            places = [numbered[id(group)] for group in groups]
            if places != self._places:
                self._places, self._places_there = places, None
                self._settings_of.clear()
        values = [group[name] if factor == 1.0 else group[name] * factor for group in self._distinct]
        values = [math.nan if value is None else value for value in values]  # the tensor has its own, in its state
        device = self.layout.device
        self.cache.device_settings.pop(name, None)
        if any(isinstance(value, Tensor) for value in values):
            numbers = [torch.as_tensor(v, dtype=torch.float32, device=device).reshape(1) for v in values]
            joined = numbers[0] if len(numbers) == 1 else torch.cat(numbers)
            if device.type != "cpu":
                # Reading them would wait: like a gradient that is not finite they make the device skip the step.
                own = torch.tensor([value is math.nan for value in values]).to(device)
                self.cache.device_settings[name] = joined.double().masked_fill(own, 0.0).unsqueeze(1)
            if len(numbers) == 1:
                return joined.expand(len(groups))
            if self._places_there is None:
                self._places_there = to_device(self._places, torch.int64, device)
            return joined[self._places_there]
        if self._settings_of.get(name) != values:
            self._settings_of[name] = values
            of_all = [values[i] for i in self._places]
            if name not in self._settings:
                self._settings[name] = to_device(of_all, torch.float32, device)
            else:  # in place, where a graph that has been captured reads it
                self._settings[name].copy_(on_host(of_all, torch.float32, device), non_blocking=True)
        return self._settings[name]


def on_host(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor on the host that can be copied to the device without waiting."""
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory() if device.type == "cuda" else host


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number, a list or a tensor on the device, without waiting for it."""
    if isinstance(values, Tensor):
        return values.to(device, dtype, non_blocking=True)
    if isinstance(values, (int, float)):
        return torch.full((), values, dtype=dtype, device=device)
    return on_host(values, dtype, device).to(device, non_blocking=True)
