"""The scheduler of a run: none on top of a rule that has a schedule of its own, unless the user asked for one.

``Trainer.create_scheduler`` reads ``args.lr_scheduler_type``, "linear" by default. It is the one method that every way
to an optimizer leads through, from ``optim=`` and ``optimizers=`` to a subclass with its own ``create_optimizer``, in
transformers from 4.57 on: after the optimizer exists, and before a scheduler and a checkpoint refer to its groups. So
it is wrapped, on the class, once; a subclass that overrides it and calls it is included. The groups are settled
(:mod:`hf_lopt.hf.group_settings`), and where the rule decides the course of the step size itself and nobody asked for
another scheduler, a constant one is there before Trainer would make its own. The arguments are only read. Where a
scheduler is made without this method, the callback settles what is left when training begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from hf_lopt.hf.loss_feed import unwrap


def wrap_create_scheduler(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Trainer.create_scheduler`` that gives a learned optimizer what its run needs."""

    @functools.wraps(original)
    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        learned = unwrap(self.optimizer if optimizer is None else optimizer)
        if learned is None:
            return original(self, num_training_steps, optimizer)
        from transformers import get_scheduler

        from hf_lopt.hf.group_settings import settle

        policy = settle(learned, self.args, self.model, self.lr_scheduler)
        current = str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type))
        if self.lr_scheduler is None and policy.schedule.value != current:
            self.lr_scheduler = get_scheduler(
                policy.schedule.value,
                optimizer=self.optimizer if optimizer is None else optimizer,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
            )
            self._created_lr_scheduler = True  # Trainer makes a new one for the next train()
        return original(self, num_training_steps, optimizer)

    return create_scheduler
