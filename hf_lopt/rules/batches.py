"""What a step works on: lists of tensors with their state, and what about them stays the same from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lopt import accumulators, distributed
from hf_lopt.accumulators import factored_axes


class Layout:
    """What is fixed for a list of parameters: axes, shapes, sizes, shards. Built once and reused for the same list.

    ``runs``: every tensor is a stack of as many copies, one for each of several independent runs, in the axis order
    "jax" and of rank 1 or 2 without that axis. Each copy counts as a tensor of its own: settings of the groups are
    (T runs,), networks may differ between runs. Rules for which only the tensor matters work on such stacks unchanged.
    """

    def __init__(self, params: Sequence[Tensor], axis_orders: Sequence[str], sliced: bool = False, runs: int = 0):
        self.wholes = list(params)
        self.cuts = [distributed.sharding(p) for p in params]
        self.sharded = any(cut is not None for cut in self.cuts)
        self.device = params[0].device
        self.axis_orders = list(axis_orders)
        self.shapes = [tuple(p.shape) for p in params]
        self.runs = runs
        axes = [factored_axes(shape, order) for shape, order in zip(self.shapes, axis_orders, strict=True)]
        if runs:
            assert all(len(shape) in (2, 3) and shape[0] == runs for shape in self.shapes), self.shapes
            axes = [tuple(a + (a >= 0) for a in factored_axes(shape[1:], "jax")) for shape in self.shapes]
        self.row_axes, self.col_axes = [a for a, _ in axes], [b for _, b in axes]
        self.numel = torch.tensor([p.numel() for p in params], dtype=torch.float64, device=self.device)
        # Stacks of matrices that are normalised one by one count each matrix as a tensor of its own.
        self.slice_axes: list[int] = []
        self.slices = [1] * len(self.shapes)  # of the local shard
        self.slice_numel = self.numel
        if runs:
            self.slice_axes = [axis for shape in self.shapes for axis in (len(shape) - 2 or 1, len(shape) - 1)]
            self.slices = [runs] * len(self.shapes)
            self.slice_numel = (self.numel / runs).repeat_interleave(runs)
        elif sliced:
            pairs = [matrix_axes(len(shape), order) for shape, order in zip(self.shapes, axis_orders, strict=True)]
            self.slice_axes = [axis for pair in pairs for axis in pair]
            local_shapes = [distributed.local(p).shape for p in params]
            self.slices = [
                math.prod(n for axis, n in enumerate(shape) if axis not in pair) if len(shape) > 1 else 1
                for shape, pair in zip(local_shapes, pairs, strict=True)
            ]
            sizes = [
                [s[a] * s[b] if len(s) > 1 else math.prod(s)] * count
                for s, (a, b), count in zip(self.shapes, pairs, self.slices, strict=True)
            ]
            self.slice_numel = torch.tensor([n for ns in sizes for n in ns], dtype=torch.float64, device=self.device)
        self.nothing = torch.empty(0, device=self.device)
        self.one = torch.ones(1, device=self.device)
        self.root = self  # of a subset: the layout of the whole list
        self.replicas = torch.tensor([_replicas(cut) for cut in self.cuts], dtype=torch.float64, device=self.device)
        self.cache: dict[Any, Any] = {}  # what the next step of a rule can take from this one
        self.versions: list[int] = []  # of the accumulators, when the cached statistics were taken

    def rank(self, i: int) -> int:
        """Number of axes of a tensor, without that of the runs."""
        return len(self.shapes[i]) - (self.runs > 0)


class Plan:
    """What a step needs and need not be rebuilt while the list of parameters stays the same. Derived, never saved."""

    def __init__(
        self, key: tuple, params: list[Tensor], groups: list[dict[str, Any]], rule: Any, theta: Mapping[str, Tensor]
    ):
        devices = sorted({str(p.device) for p in params})
        if len(devices) > 1:
            raise ValueError(
                f"parameters are on several devices ({', '.join(devices)}): the scheduler couples all of them. "
                "Put the model on one device, or give each device's parameters an optimizer of its own."
            )
        self.key = key
        self.layout = Layout(params, [group["axis_order"] for group in groups])
        self.weights = rule.prepare({name: leaf.to(self.layout.device) for name, leaf in theta.items()}, groups[0])
        self._numbers: dict[str, tuple[list, Tensor]] = {}
        self._groups: Tensor | None = None  # the place of each parameter's group among the groups

    def per_tensor(self, name: str, groups: Sequence[Mapping[str, Any]]) -> Tensor:
        """Setting ``name`` of each parameter's group as a float32 tensor (T,), copied only when it has changed."""
        values, device = [group[name] for group in groups], self.layout.device
        if any(isinstance(value, Tensor) for value in values):
            distinct = {id(group): group[name] for group in groups}
            numbers = [torch.as_tensor(v).to(device, torch.float32).reshape(1) for v in distinct.values()]
            if len(numbers) == 1:
                return numbers[0].expand(len(values))
            places = {key: i for i, key in enumerate(distinct)}
            if self._groups is None:
                self._groups = to_device([places[id(group)] for group in groups], torch.int64, device)
            return torch.cat(numbers)[self._groups]
        known = self._numbers.get(name)
        if known is None:
            known = self._numbers[name] = (values, to_device(values, torch.float32, device))
        elif known[0] != values:
            # In place, where a graph that has been captured reads it.
            self._numbers[name] = (values, known[1].copy_(_pinned(values, torch.float32, device), non_blocking=True))
        return self._numbers[name][1]


def _pinned(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor on the host that can be copied to the device without waiting."""
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory() if device.type == "cuda" else host


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number, a list or a tensor on the device, without waiting for it."""
    if isinstance(values, Tensor):
        return values.to(device, dtype, non_blocking=True)
    if isinstance(values, (int, float)):
        return torch.full((), values, dtype=dtype, device=device)
    return _pinned(values, dtype, device).to(device, non_blocking=True)


def _replicas(cut: distributed.Sharding | None) -> int:
    """Ranks that hold the same shard."""
    shards = 1 if cut is None else math.prod(cut.mesh.size(d) for d, axis in enumerate(cut.axes) if axis >= 0)
    return distributed.world_size() // shards


def matrix_axes(rank: int, axis_order: str) -> tuple[int, int]:
    """The last two axes in the reference's layout, which hold the matrix of a linear or convolution kernel."""
    axes = accumulators.reference_axes(rank, axis_order)
    return (axes[-2], axes[-1]) if rank >= 2 else (-1, -1)


class _Picked(dict):
    """Settings of some of the parameters, picked when they are asked for: each is a launch."""

    def __init__(self, source: Mapping[str, Tensor], count: int, index: Tensor):
        super().__init__()
        self.source, self.count, self.places = source, count, index

    def __missing__(self, name: str) -> Tensor:
        self[name] = self.source[name].unflatten(0, (self.count, -1)).index_select(0, self.places).flatten()
        return self[name]


@dataclass
class Batch:
    """All tensors of one step. Lists have one entry per parameter; ``(T,)`` tensors one element."""

    layout: Layout
    params: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor | None]]  # key -> the state of each parameter; None where it has no such accumulator
    settings: dict[str, Tensor]  # numbers of each parameter's group, (T,) float32: lr, weight_decay, …
    labels: dict[str, list[str]]  # words of each parameter's group: axis_order, …
    index: Tensor | None = None  # of a subset: its places in the whole list

    def __getitem__(self, name: str) -> Tensor:
        return self.settings[name]

    def subset(self, key: Any, indices: Sequence[int], sliced: bool = False) -> Batch:
        """The batch of some of the parameters; ``key`` names the selection, whose layout is kept."""

        everything = list(indices) == list(range(len(self.params)))
        if everything and sliced == bool(self.layout.slice_axes and not self.layout.runs):
            return self

        def pick(xs: Sequence) -> list:
            return [xs[i] for i in indices]

        if key not in self.layout.cache:
            wholes, orders = pick(self.layout.wholes), pick(self.layout.axis_orders)
            layout = Layout(wholes, orders, sliced, self.layout.runs)
            layout.root = self.layout.root
            index = torch.tensor(indices, device=self.layout.device)
            self.layout.cache[key] = layout, index, index if self.index is None else self.index[index]
        layout, index, places = self.layout.cache[key]
        return Batch(
            layout,
            pick(self.params),
            pick(self.grads),
            {name: pick(xs) for name, xs in self.state.items()},
            self.settings if everything else _Picked(self.settings, len(self.params), index),
            {name: pick(xs) for name, xs in self.labels.items()},
            self.index if everything else places,
        )

    def tensors(self, key: str) -> list[Tensor]:
        """The state ``key`` of every parameter, an empty tensor where it has none."""
        nothing = self.layout.nothing
        return [nothing if x is None else x for x in self.state.get(key, [None] * len(self.params))]

    def accumulators(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.tensors("momentum"), self.tensors("second_moment")
