"""What a step works on: lists of tensors with their state, and what about them stays the same from step to step.

`Layout` (:mod:`hf_lopt.step.layout`) is what is fixed about a list, `StepCache` what one step leaves for the next,
`TensorList` the tensors of one step; :mod:`hf_lopt.step.prepared` makes it.

Axes: T tensors, M results (one for each tensor, or for each of its slices), R replicas.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_lopt import ownership
from hf_lopt.kernels.held import HeldList
from hf_lopt.step.held import PickedSettings, StateLists
from hf_lopt.step.layout import Layout, make_layout


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
        branches: what is done to the tensors -> their places, and whether these have matrices that are normalised one
            by one, where a rule treats them differently.
        network_rows: weights and, of them, the network of all tensors, or a row for each result where they differ.
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
    branches: dict[str, tuple[list[int], bool]] = field(default_factory=dict)
    network_rows: tuple[Mapping[str, Any], Tensor] | None = None
    ownership: ownership.Ownership | None = None
    selection: int = 0
    device_settings: dict[str, Tensor] = field(default_factory=dict)
    loss_decays: tuple[Sequence[int], Tensor, Tensor] | None = None
    floors: tuple[Tensor, int, Sequence[Tensor | None] | None, Tensor] | None = None


_version = operator.attrgetter("_version")
# What passes take that round nothing at random.
_TO_NEAREST: Mapping[str, Any] = {"step": None, "places": [], "round_params": False}


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
        step: number of the step, 0-d int64, once it has been counted; for what is rounded at random.
        round_params: whether bfloat16 parameters are.
    """

    layout: Layout
    cache: StepCache
    root: StepCache
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    state: Mapping[str, list[Tensor | None]]
    settings: Mapping[str, Tensor]
    labels: dict[str, list[str]]
    root_indices: Tensor | None = None
    step: Tensor | None = None
    round_params: bool = False

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
            step=self.step,
            round_params=self.round_params,
        )

    def _new_subset(self, indices: Sequence[int], sliced: bool) -> Subset:
        whole = self.layout
        layout = make_layout(
            [whole.params[i] for i in indices],
            [whole.axis_orders[i] for i in indices],
            numbers=[whole.numbers[i] for i in indices],
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

    def tensors(self, key: str) -> HeldList:
        """The state ``key`` of every parameter, an empty tensor where it has none."""
        return self._lists.filled(key, self.layout.empty, len(self))

    @property
    def momenta(self) -> HeldList:
        """(D, *shape) each, as they are stored."""
        return self._lists.stored("momentum", self.layout.empty, len(self))

    @property
    def second_moments(self) -> HeldList:
        """(D, *shape) each, as they are stored."""
        return self._lists.stored("second_moment", self.layout.empty, len(self))

    @property
    def scales(self) -> dict[str, Sequence[Tensor]]:
        """What the passes take beside the accumulators, for those that are 8-bit codes."""
        return self._lists.scales(self.layout.empty, len(self))

    @property
    def rounding(self) -> Mapping[str, Any]:
        """What the passes that write take for what is rounded at random; nothing where all is rounded to nearest."""
        of_params = self.round_params and any(p.dtype == torch.bfloat16 for p in self.params)
        if self._lists.all_float32 and not of_params:
            return _TO_NEAREST
        return {"step": self.step, "places": self.layout.places, "round_params": of_params}

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
        return list(map(_version, itertools.chain(self.momenta, self.second_moments)))
