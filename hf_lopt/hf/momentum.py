"""Schedulers of torch that cycle a momentum, on optimizers that have none to cycle."""

from __future__ import annotations

import functools
from typing import Any

from hf_lopt.hf.loss_feed import unwrap
from hf_lopt.hf.wrapping import wrap_once


_CYCLES = ("OneCycleLR", "CyclicLR")


def name_the_argument(module: Any) -> None:
    """Have the error of ``OneCycleLR`` and ``CyclicLR`` of ``torch.optim.lr_scheduler`` name the argument to pass."""
    for name in _CYCLES:
        wrap_once(getattr(module, name), "__init__", functools.partial(_wrapped, name))


def _wrapped(name: str, original: Any) -> Any:
    @functools.wraps(original)
    def init(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, optimizer, *args, **kwargs)
        except ValueError as error:
            learned = unwrap(optimizer)
            if learned is None or "momentum" not in str(error):
                raise
            raise ValueError(
                f"{learned.rule.class_name} has no momentum for {name} to cycle, its momenta are learned: pass "
                f"cycle_momentum=False to {name}"
            ) from error

    return init
