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

from hf_lopt import distributed, lr_scales
from hf_lopt.kernels import ops
from hf_lopt.kernels.held import HeldList, Kinds
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
        lr_scales: of each parameter, see :mod:`hf_lopt.lr_scales`; None if it is 1 for all.
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
        self.params: list[Tensor] = [p for p, _ in pairs]
        self.groups = [group for _, group in pairs]
        self.own_groups = list({id(group): group for group in self.groups}.values())
        self.grads: Sequence[Any] = [p.grad for p in self.params]
        self.local_params = HeldList(distributed.local(p) for p in self.params)
        self.state = local_state([state[p] for p in self.params])
        self.key: tuple[Hashable, ...] | None = None
        self.labels = {word: [group[word] for group in self.groups] for word in words}
        # What `unchanged` compares. Objects are kept, so that none can take the place of another with its address.
        # What the state of a parameter depends on, and its lr.
        self._names = (*words, "max_training_steps", lr_scales.KEY)
        self._groups = list(groups)
        self._words, self._counts = self._words_of(groups), self._counts_of(groups)
        self._listed = [p for group in groups for p in group["params"]]
        scales = lr_scales.of_all(groups)
        self.lr_scales = scales and [scales[i] for i in self.numbers]
        self._trainable = [p.requires_grad for p in self._listed]
        active = set(map(id, self.params))
        self._without = [p for p in self._listed if p.requires_grad and p.numel() and id(p) not in active]
        self._owners, self._states = list(state), list(state.values())
        self._keys, self._values = list(_flat(self._states)), list(_flat(map(_values, self._states)))
        in_state = self._in_state = HeldList(x for x in self._values if isinstance(x, Tensor))
        self._sharded = [x for x in [*self._listed, *in_state] if distributed.is_dtensor(x)]
        self._shards = list(map(distributed.local, self._sharded))
        # What the library compares: the state, and of many ordinary tensors also parameters and gradients.
        self._library = Kinds(in_state[0].device) if ops.holds(in_state) and not _is_watched() else None
        grads = HeldList(self.grads)
        self._compares_all = bool(
            self._library and not self._sharded and ops.holds(self.local_params) and ops.holds(grads)
        )
        if self._library:
            self._library.same(*self._lists(grads))
        # The others are compared here.
        compared = active if self._compares_all else set()
        self._tensors = [p for p in self._listed if id(p) not in compared] + ([] if self._library else [*in_state])
        self._kinds = list(map(_kind, self._tensors))
        one_by_one = () if self._compares_all else grads
        self._grad_types, self._strides = list(map(type, one_by_one)), list(map(Tensor.stride, one_by_one))
        self._grad_kinds = list(map(_grad_kind, one_by_one))
        self._grad_dtypes = grads.dtypes

    @property
    def numbers(self) -> list[int]:
        places = {id(p): i for i, p in enumerate(self._listed)}
        return [places[id(p)] for p in self.params]

    def unchanged(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Whether groups, parameters and state are those of before, and gradients of the same kinds; takes these."""
        self.release()
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
            and list(_flat(states)) == self._keys
            and all(map(operator.is_, _flat(map(_values, states)), self._values))
        ):
            return False
        if any(p.grad is not None for p in self._without):
            return False
        found: list[Any] = [p.grad for p in self.params]
        grads = HeldList(found)
        if not (
            (self._can_be_held(grads) if self._compares_all else self._same_one_by_one(grads))
            and all(map(operator.eq, map(_kind, self._tensors), self._kinds))
            and all(map(operator.is_, map(distributed.local, self._sharded), self._shards))
            and (self._library is None or (not _is_watched() and self._library.same(*self._lists(grads))))
        ):
            self.release()
            return False
        vars(grads)["dtypes"] = self._grad_dtypes  # which are known by now
        self.grads = grads
        return True

    def _lists(self, grads: HeldList) -> tuple[list[HeldList], list[HeldList]]:
        """What the library compares, and that of which it compares strides too."""
        return ([self._in_state, self.local_params], [grads]) if self._compares_all else ([self._in_state], [])

    def _can_be_held(self, grads: HeldList) -> bool:
        """Whether parameters and gradients are where the state is; no gradient is None, or stands for another one."""
        device = self._in_state[0].device.type
        return grads.can_be_held and grads.all_on(device) and self.local_params.all_on(device)

    def _same_one_by_one(self, grads: HeldList) -> bool:
        """Whether gradients are of the kinds of before, where they are few, or such as the library cannot hold."""
        return (
            all(map(operator.is_, map(type, grads), self._grad_types))  # of None, too
            and all(map(operator.eq, map(_grad_kind, grads), self._grad_kinds))
            and all(map(operator.eq, map(Tensor.stride, grads), self._strides))
        )

    def release(self) -> None:
        """Keep no gradient alive beyond its step, and have nobody else hold a parameter: its owner may exchange it."""
        self.grads = []
        self.local_params.let_go()

    def local_gradients(self) -> Sequence[Tensor]:
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


def _is_watched() -> bool:
    """Whether somebody looks at the calls on their way, as a mode does, and has to see lists whole."""
    return bool(torch._C._len_torch_dispatch_stack())


def _same(xs: Collection[Any], ys: Collection[Any]) -> bool:
    """Whether these are the very same objects in the same order."""
    return len(xs) == len(ys) and all(map(operator.is_, xs, ys))
