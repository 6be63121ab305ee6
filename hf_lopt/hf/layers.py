"""What an optimizer does with each tensor, for the rows that a Trainer logs.

The learned step size of a tensor is in the optimizer's report. How far a step moves it needs the tensor before and
after: copies are kept for the steps that are logged, and only they are paid for. Everything stays on the device until
a row is written.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_lopt import distributed
from hf_lopt.optimizer import LearnedOptimizer


LEARNED_STEP, UPDATE_RATIO = "lr_mult", "update_ratio"
_TINY = 1e-12  # the size of a tensor of zeros


class LayerLog:
    """Per-tensor numbers of one optimizer step at a time: ``before`` it, ``after`` it, then ``read``."""

    def __init__(self, model: nn.Module):
        self._names = {id(p): name.replace("_orig_mod.", "") for name, p in model.named_parameters()}
        self._taken: list[tuple[str, Tensor, Tensor]] = []
        self._numbers: dict[str, tuple[list[str], Tensor]] = {}

    def before(self, optimizer: LearnedOptimizer) -> None:
        """Keep what the step is about to change."""
        active = [
            p
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad and p.grad is not None and p.numel()
        ]
        self._taken = [(self._names.get(id(p), f"tensor{i}"), p, p.detach().clone()) for i, p in enumerate(active)]

    @torch.no_grad()
    def after(self, optimizer: LearnedOptimizer) -> None:
        """Compare. Sharded tensors are summed over their shards, so that all ranks have to call this."""
        if not self._taken:
            return
        names = [name for name, _, _ in self._taken]
        shardings = [distributed.sharding_of(p) for _, p, _ in self._taken]
        groups = [() if sharding is None else sharding.groups() for sharding in shardings]
        moved = [_squares(p.detach() - old) for _, p, old in self._taken]
        sizes = [_squares(old) for _, _, old in self._taken]
        sums = distributed.sum_over(list(zip([*moved, *sizes], [*groups, *groups], strict=True)))
        moved, sizes = torch.stack(sums[: len(names)]), torch.stack(sums[len(names) :])
        ratio = (moved / sizes.clamp_min(_TINY)).sqrt()
        self._numbers = {UPDATE_RATIO: (names, ratio)}
        learned = optimizer.report.get(LEARNED_STEP)
        if learned is not None and learned.numel() == len(names):
            self._numbers[LEARNED_STEP] = (names, learned)
        self._taken = []

    def read(self) -> dict[str, float]:
        """``lr_mult/NAME``, the learned step size, where the rule has one, and ``update_ratio/NAME``, the root mean
        square of the step over that of the tensor before it. Waits for the device; {} if nothing was compared."""
        found = {
            f"{kind}/{name}": value
            for kind, (names, values) in self._numbers.items()
            for name, value in zip(names, values.tolist(), strict=True)
        }
        self._numbers = {}
        return found


def _squares(x: Tensor) -> Tensor:
    """Sum of squares of the local shard, 0-d float32."""
    return distributed.local(x).float().square().sum()
