"""Lists of tensors that stay the same from step to step, and a cheap look at whether they still do.

A step over many small tensors is mostly Python: what is found out about every tensor is kept here for as long as each
of them is the same object of the same shape, type and device.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lopt import distributed
from hf_lopt.kernels import ops
from hf_lopt.kernels.held import HeldList
from hf_lopt.step.accumulators import CODES, SCALES


class StateLists(dict[str, list[Tensor | None]]):
    """Name -> this rank's shard of that state of each parameter, None where a parameter has none.

    Attributes:
        picked: by what they were picked for: the parameters that were picked from, and of those that were their list,
            state and words.
    """

    def __init__(self, lists: Mapping[str, list[Any]]):
        super().__init__(lists)
        self._filled: dict[str, HeldList] = {}
        self._stored: dict[str, HeldList] = {}
        self._scales: dict[str, Sequence[Tensor]] | None = None
        self.picked: dict[Any, tuple[list[Tensor], list[Tensor], StateLists, dict[str, list[str]]]] = {}

    @functools.cached_property
    def all_float32(self) -> bool:
        """Whether momenta are stored in float32 only; second moments are as they are."""
        if any(name.startswith("momentum_") for name in self):
            return False
        return all(x is None or x.dtype == torch.float32 for x in self.get("momentum", ()))

    def stored(self, name: str, empty: Tensor, count: int) -> HeldList:
        """The accumulator ``name`` of ``count`` parameters as each has it stored. The same object each time."""
        found = self._stored.get(name)
        if found is None:
            codes, values = self.get(name + CODES), self.filled(name, empty, count)
            found = values
            if codes is not None:
                found = HeldList(x if c is None else c for x, c in zip(values, codes, strict=True))
            self._stored[name] = found
        return found

    def scales(self, empty: Tensor, count: int) -> dict[str, Sequence[Tensor]]:
        """What the passes take beside the accumulators, for those that are 8-bit codes. The same object each time."""
        if self._scales is None:
            names = (("momentum_scales", "momentum" + SCALES), ("second_scales", "second_moment" + SCALES))
            self._scales = {key: self.filled(name, empty, count) if name in self else [] for key, name in names}
        return self._scales

    def filled(self, key: str, empty: Tensor, count: int) -> HeldList:
        """The list ``key`` of ``count`` parameters with ``empty`` for None. The same object each time."""
        found = self._filled.get(key)
        if found is None:
            values = self.get(key, [None] * count)
            found = self._filled[key] = HeldList(empty if x is None else x for x in values)
        return found


class PickedSettings(dict[str, Tensor]):
    """Settings of some of the parameters, picked when they are asked for: each is a launch."""

    def __init__(self, source: Mapping[str, Tensor], count: int, indices: Tensor):
        super().__init__()
        self.source, self.count, self.indices = source, count, indices

    def __missing__(self, name: str) -> Tensor:
        self[name] = self.source[name].unflatten(0, (self.count, -1)).index_select(0, self.indices).flatten()
        return self[name]


def local_state(states: Sequence[Mapping[str, Any]]) -> StateLists:
    """The state of several parameters as lists of local shards."""
    shards = [{name: distributed.local(value) for name, value in state.items()} for state in states]
    names = dict.fromkeys(name for state in shards for name in state)
    return StateLists({name: [state.get(name) for state in shards] for name in names})


class HeldTensors:
    """Everything that an optimizer holds, as a step has found it to be in order.

    Attributes:
        pairs: parameters with a gradient, each with its group.
        params, groups: the same, apart; ``own_groups``: each of these groups once.
        numbers: places of these parameters among all of the optimizer's groups.
        grads: their gradients in this step; :meth:`release` lets go of them.
        local_params: this rank's shards of them.
        state: this rank's shards of their state.
        labels: settings of the groups that are words: name -> that of each parameter's group.
        key: a place for what is prepared for these tensors.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, dict[str, Any]]],
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, Mapping[str, Any]],
        words: Sequence[str],
    ):
        self.pairs = list(pairs)
        self.params, self.groups = [p for p, _ in pairs], [group for _, group in pairs]
        self.own_groups = list({id(group): group for group in self.groups}.values())
        self.grads = [p.grad for p in self.params]
        self.local_params = HeldList(distributed.local(p) for p in self.params)
        self.state = local_state([state[p] for p in self.params])
        self.key: tuple[Hashable, ...] | None = None
        self.labels = {word: [group[word] for group in self.groups] for word in words}
        # What `unchanged` compares. Objects are kept, so that none can take the place of another with its address.
        self._names = (*words, "max_training_steps")  # what the state of a parameter depends on
        self._groups = list(groups)
        self._words, self._counts = self._words_of(groups), self._counts_of(groups)
        self._listed = [p for group in groups for p in group["params"]]
        self._trainable = [p.requires_grad for p in self._listed]
        active = set(map(id, self.params))
        self._without = [p for p in self._listed if p.requires_grad and p.numel() and id(p) not in active]
        self._owners, self._states = list(state), list(state.values())
        self._keys, self._values = list(_flat(self._states)), list(_flat(map(_values, self._states)))
        in_state = HeldList(x for x in self._values if isinstance(x, Tensor))
        # Parameters are looked at here: one that somebody else holds cannot be exchanged by its owner.
        self._in_library = in_state if ops.holds(in_state) and in_state.same_kinds() else None
        self._tensors = self._listed if self._in_library else [*self._listed, *in_state]
        self._kinds = list(map(_kind, self._tensors))
        self._sharded = [x for x in [*self._listed, *in_state] if distributed.is_dtensor(x)]
        self._shards = list(map(distributed.local, self._sharded))
        self._grad_types, self._strides = list(map(type, self.grads)), list(map(Tensor.stride, self.grads))
        self._grad_kinds = list(map(_grad_kind, self.grads))

    @property
    def numbers(self) -> list[int]:
        places = {id(p): i for i, p in enumerate(self._listed)}
        return [places[id(p)] for p in self.params]

    def unchanged(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Whether groups, parameters and state are those of before, and gradients of the same kinds; takes these."""
        self.grads = []
        if not (
            _same(groups, self._groups)
            and self._counts_of(groups) == self._counts
            and self._words_of(groups) == self._words
            and _same([p for group in groups for p in group["params"]], self._listed)
            and list(map(_requires_grad, self._listed)) == self._trainable
        ):
            return False
        states = state.values()
        if not (
            _same(state, self._owners)
            and _same(states, self._states)
            and sum(map(len, states)) == len(self._values)
            and all(map(operator.is_, _flat(states), self._keys))
            and all(map(operator.is_, _flat(map(_values, states)), self._values))
        ):
            return False
        grads = [p.grad for p in self.params]
        if (
            (self._in_library is None or self._in_library.same_kinds())
            and all(map(operator.eq, map(_kind, self._tensors), self._kinds))
            and all(map(operator.is_, map(distributed.local, self._sharded), self._shards))
            and all(map(operator.is_, map(type, grads), self._grad_types))  # of None, too
            and all(map(operator.eq, map(_grad_kind, grads), self._grad_kinds))
            and all(map(operator.eq, map(Tensor.stride, grads), self._strides))
            and not any(p.grad is not None for p in self._without)
        ):
            self.grads = grads
            return True
        return False

    def release(self) -> None:
        """Keep no gradient alive beyond its step, and have nobody else hold a parameter."""
        self.grads = []
        self.local_params.let_go()

    def local_gradients(self) -> list[Tensor]:
        """This rank's shards of the gradients, sharded as the parameters. A collective where they come otherwise."""
        return [distributed.local_gradient(p) for p in self.params] if self._sharded else self.grads

    def _words_of(self, groups: Iterable[Mapping[str, Any]]) -> list[Any]:
        return [group.get(name) for group in groups for name in self._names]

    def _counts_of(self, groups: Iterable[Mapping[str, Any]]) -> list[int]:
        return [len(group["params"]) for group in groups]


# One look at a tensor: with many of them, most of the time goes into bringing each into the cache.
_kind = operator.attrgetter("shape", "dtype", "device")
_grad_kind = operator.attrgetter("layout", "shape", "dtype", "device")
_requires_grad, _values = operator.attrgetter("requires_grad"), operator.methodcaller("values")
_flat = itertools.chain.from_iterable


def _same(xs: Collection[Any], ys: Collection[Any]) -> bool:
    """Whether these are the very same objects in the same order."""
    return len(xs) == len(ys) and all(map(operator.is_, xs, ys))
