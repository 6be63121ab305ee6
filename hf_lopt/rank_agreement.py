"""Whether all ranks train the same parameters, at the first step and in every later one.

The first step compares everything in a collective of its own. Later a rank may lose or gain a gradient alone, and must
not wait in a collective that the others do not enter: a number for the parameters with a gradient rides along in the
reduction that every step has (:mod:`hf_lopt.step.reduction`). Where parameters are sharded, other reductions
come before that one, whose sizes depend on the parameters; there each new selection has a collective of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_lopt import distributed
from hf_lopt.settings import check_ranks_agree
from hf_lopt.step.reduction import reduce_without_step


Parameters = Sequence[tuple[Tensor, Mapping[str, Any]]]  # each with its group
Groups = Sequence[Mapping[str, Any]]
State = Mapping[Tensor, Mapping[str, Any]]


class RankAgreement:
    """What the ranks have agreed on so far.

    Args:
        per_group: settings that a group may have for itself.
    """

    def __init__(self, per_group: Sequence[str]):
        self._per_group = ("lr", "weight_decay", *per_group)
        self._agreed: set[int] = set()  # selections of parameters

    def forget(self) -> None:
        """Compare everything anew at the next step."""
        self._agreed.clear()

    def check(self, run: Callable[[], Mapping[str, Any]], groups: Groups, active: Parameters, state: State) -> None:
        """Compare at the first step, and of sharded parameters each new selection. ``run`` makes the settings of the
        run, which one process does not need.

        Raises:
            ValueError: on all ranks, naming what differs.
        """
        if distributed.world_size() == 1:
            return
        number = selection(groups, [p for p, _ in active])
        sharded = any(distributed.is_dtensor(p) for group in groups for p in group["params"])
        if not self._agreed or (sharded and number not in self._agreed):
            self.compare(run, groups, active, state)
            self._agreed.add(number)

    def without_gradients(self, groups: Groups) -> None:
        """What a rank without any gradient does instead of a step: it takes part in the reduction of the others.

        Raises:
            SelectionsDifferError: on all ranks, if others have gradients.
        """
        params = [p for group in groups for p in group["params"]]
        if distributed.world_size() > 1 and not any(distributed.is_dtensor(p) for p in params):
            reduce_without_step(params[0].device, selection(groups, []))

    def compare(self, run: Callable[[], Mapping[str, Any]], groups: Groups, active: Parameters, state: State) -> None:
        """Compare everything, in a collective of its own that all ranks have to enter.

        Raises:
            ValueError: on all ranks, naming what differs.
        """
        trainable = [(p, group) for group in groups for p in group["params"] if p.requires_grad]
        check_ranks_agree(run(), trainable, {id(p) for p, _ in active}, self._per_group, state)


def selection(groups: Groups, active: Sequence[Tensor]) -> int:
    """A number for the parameters in ``active``, below 2^20, by their places in the groups. The same on every rank."""
    chosen = {id(p) for p in active}
    flags = bytes(id(p) in chosen for group in groups for p in group["params"])
    return zlib.crc32(flags) % (1 << 20)
