"""Whole tensors for work that needs one: shards are gathered at one owner, and the results go back to all.

Newton-Schulz iteration of a sharded matrix needs all of it. Each tensor has one owner among the ranks of its mesh, so
that no work is done twice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_lopt import distributed
from hf_lopt.distributed import Sharding


class Ownership:
    """Who works on which whole tensor: each tensor has one owner among the ranks of its mesh.

    Work is balanced by ``costs`` (any unit), the same on every rank. :meth:`apply` brings the shards of each tensor to
    its owner and the results back: two all-to-alls per distinct set of ranks, whatever the number of tensors. A tensor
    that is not sharded is worked on where it is, by every rank that has it.
    """

    def __init__(
        self, shardings: Sequence[Sharding | None], shapes: Sequence[Sequence[int]], costs: Sequence[float]
    ) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        self.alone = [i for i, sharding in enumerate(shardings) if sharding is None or not sharding.groups()]
        by_ranks: dict[tuple[int, ...], list[int]] = {}
        for i, sharding in enumerate(shardings):
            if sharding is not None and sharding.groups():
                by_ranks.setdefault(tuple(sorted(sharding.mesh.mesh.flatten().tolist())), []).append(i)
        self.routes = [_Route(members, shardings, self.shapes, costs) for members in by_ranks.values()]

    def apply(self, function: Callable[[int, Tensor], Tensor], shards: Sequence[Tensor]) -> list[Tensor]:
        """``function(i, tensor)``, which keeps shape and dtype, of each whole tensor, sharded like ``shards``."""
        out = list(shards)
        for i in self.alone:
            out[i] = function(i, shards[i])
        for route in self.routes:
            route.apply(function, shards, out)
        return out


class _Route:
    """The way of some tensors to their owners and back, within one set of ranks.

    Where a mesh replicates, an owner gathers from the replica that it is in, and sends the result to all of them.
    """

    def __init__(
        self,
        members: Sequence[int],
        shardings_of_all: Sequence[Sharding | None],
        shapes: Sequence[tuple[int, ...]],
        costs: Sequence[float],
    ) -> None:
        shardings = {i: sharding for i in members if (sharding := shardings_of_all[i]) is not None}
        self.group = distributed.whole_group(shardings[members[0]].mesh)
        ranks = dist.get_process_group_ranks(self.group)
        me = dist.get_rank()
        load = dict.fromkeys(ranks, 0.0)
        owner = {}
        for i in sorted(members, key=lambda i: (-costs[i], i)):
            owner[i] = min(ranks, key=lambda rank: (load[rank], rank))
            load[owner[i]] += costs[i]
        place = {rank: k for k, rank in enumerate(ranks)}
        coordinates = {id(shardings[i].mesh): _coordinates(shardings[i].mesh) for i in members}

        def at(i: int, rank: int) -> tuple[int, ...]:
            """The place of a rank in the mesh of tensor i."""
            return coordinates[id(shardings[i].mesh)][rank]

        def serves(i: int, source: int, target: int) -> bool:
            """Whether the shard of ``source`` goes to ``target``: both are in the same replica of tensor i."""
            pairs = zip(shardings[i].axes, at(i, source), at(i, target), strict=True)
            return all(axis >= 0 or a == b for axis, a, b in pairs)

        self.owned = sorted(i for i in members if owner[i] == me)
        self.shapes = {i: shapes[i] for i in self.owned}
        by_owner = sorted(members, key=lambda i: (place[owner[i]], i))
        extent = {i: _extent(shardings[i].piece(shapes[i], at(i, me))) for i in members}
        # Shards out to owners and in from all ranks; results out to all ranks and in from owners.
        self.sent = [i for i in by_owner if serves(i, me, owner[i])]
        self.arriving = [
            (i, shardings[i].piece(shapes[i], at(i, rank)))
            for rank in ranks
            for i in self.owned
            if serves(i, rank, me)
        ]
        self.returned = [(i, shardings[i].piece(shapes[i], at(i, rank))) for rank in ranks for i in self.owned]
        self.received = by_owner
        count = [[0] * len(ranks) for _ in range(4)]
        for i in self.sent:
            count[0][place[owner[i]]] += math.prod(extent[i])
        for i in self.received:
            count[3][place[owner[i]]] += math.prod(extent[i])
        for rank in ranks:
            for i in self.owned:
                size = math.prod(_extent(shardings[i].piece(shapes[i], at(i, rank))))
                count[1][place[rank]] += size * serves(i, rank, me)
                count[2][place[rank]] += size
        self.out_there, self.in_there, self.out_back, self.in_back = count

    def apply(self, function: Callable[[int, Tensor], Tensor], shards: Sequence[Tensor], out: list[Tensor]) -> None:
        """Fill ``out`` at the places of this route's tensors."""
        like = shards[self.received[0]]
        parts = self._exchange([shards[i] for i in self.sent], like, self.out_there, self.in_there)
        wholes = {i: like.new_empty(shape) for i, shape in self.shapes.items()}
        for (i, piece), part in zip(
            self.arriving, _unpack(parts, [_extent(p) for _, p in self.arriving]), strict=True
        ):
            wholes[i][piece] = part
        del parts
        for i in self.owned:
            wholes[i] = function(i, wholes[i])
        parts = self._exchange([wholes[i][piece] for i, piece in self.returned], like, self.out_back, self.in_back)
        shapes = [shards[i].shape for i in self.received]
        for i, part in zip(self.received, _unpack(parts, shapes), strict=True):
            out[i] = part

    def _exchange(self, tensors: Sequence[Tensor], like: Tensor, out: list[int], into: list[int]) -> Tensor:
        device = distributed.device_of(self.group, like.device)
        packed = torch.cat([like.new_empty(0), *(x.reshape(-1) for x in tensors)]).to(device)
        result = packed.new_empty(sum(into))
        dist.all_to_all_single(result, packed, into, out, group=self.group)
        return result.to(like.device)


def _extent(piece: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in piece)


def _unpack(packed: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    parts = packed.split([math.prod(shape) for shape in shapes])
    return [part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]


def _coordinates(mesh: Any) -> dict[int, tuple[int, ...]]:
    """Rank -> its place in the mesh."""
    return {mesh.mesh[index].item(): index for index in itertools.product(*map(range, mesh.mesh.shape))}
