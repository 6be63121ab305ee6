"""What an lr that nobody chose counts, by the length of the run and by how often it sees its samples.

The numbers are those of the rule (:class:`hf_lopt.rules.base.RunLength`); here is which of them a model takes, and
what has to be known about it. :class:`hf_lopt.run_state.RunState` says when, and keeps what was decided.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple
from weakref import ref

from torch.optim import Optimizer

from hf_lopt import distributed, lr_scales
from hf_lopt.live_modules import trains_adapters
from hf_lopt.reach import reach_of
from hf_lopt.rules.base import ADAPTERS, FINE_TUNING, FROM_SCRATCH, NEW_LAYERS


class Chosen(NamedTuple):
    """What somebody set of the length of the run, 0 what nobody has: a checkpoint has it, too."""

    steps: int = 0
    epochs: float = 0.0


class LengthMultiplier:
    """The multipliers that an optimizer wants, which it holds weakly.

    Attributes:
        steps_per_epoch: of the training loop, before the multiplier is decided; 0: not known.
        for_epochs: whether the last multipliers that were asked for are smaller for the epochs.
        lacks_epochs: whether the multiplier is of a changed length whose epochs were not known then.
    """

    def __init__(self, owner: Optimizer):
        self._owner = ref(owner)
        self._reach: float | None = None  # of the model before its first step, see hf_lopt.reach; None: not asked yet
        self.steps_per_epoch, self.for_epochs, self.lacks_epochs = 0.0, False, False

    def agree(self) -> None:
        """Have all ranks count the same: their loaders may differ by a batch. A collective."""
        if self.steps_per_epoch:
            self.steps_per_epoch = distributed.mean_over_ranks(self.steps_per_epoch)

    def wanted(self, updates: int, epochs: float, decided: bool, ask: bool = True) -> tuple[float, float]:
        """The multiplier in a run of so many updates; and how much more lr counts for layers that start from random
        numbers while the others do not.

        Args:
            epochs: in which it sees each sample so often; 0: not known.
            decided: whether the optimizer has one already; until then the values of its model may still change.
            ask: whether to ask for the reach, of sharded tensors a collective.
        """
        owner: Any = self._owner()
        # Whoever brings a network as arrays wants its steps as they are.
        if owner._weights.source == "mapping" or owner._chose_lr():
            return 1.0, 1.0
        if not owner.is_fine_tuning and any(lr_scales.KEY in group for group in owner.param_groups):  # somebody's
            return 1.0, 1.0
        kinds = (FINE_TUNING, NEW_LAYERS) if owner.is_fine_tuning else (FROM_SCRATCH,)

        def multipliers(reach: float, epochs: float) -> list[float]:
            return [owner._rule.length_multiplier(owner._weights, kind, updates, reach, epochs) for kind in kinds]

        reach = 0.0
        if ask and multipliers(0.0, epochs) != multipliers(math.inf, epochs):
            reach = self._initial_reach(decided)
        found, of_adapters = multipliers(reach, epochs), self._of_adapters(updates, epochs)
        self.for_epochs = of_adapters != 1.0 or found != multipliers(reach, 0.0)
        return found[0] * of_adapters, found[-1] / found[0]

    def _of_adapters(self, updates: int, epochs: float) -> float:
        """What the step from scratch counts of adapters; 1 where none are trained."""
        owner: Any = self._owner()
        found = owner._rule.length_multiplier(owner._weights, ADAPTERS, updates, math.inf, epochs)
        if found == 1.0 or owner.is_fine_tuning:  # before the search for the model
            return 1.0
        return found if trains_adapters(p for p, _ in owner._trainable()) else 1.0

    def _initial_reach(self, decided: bool) -> float:
        """Of a run that was resumed, and whose length changes, the reach of its matrices as they are."""
        if self._reach is None or not decided:
            self._reach = reach_of(self._owner()._trainable())
        return self._reach
