"""Short trainings of small models, and their losses over seeds, for benchmarks that compare settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hf_lopt
from benchmarks.storing import rounded
from hf_lopt import rules
from hf_lopt.pretrained import OF_POOLER, new_tensors, set_scales


def train(
    model: nn.Module,
    batches: Iterable[Any],
    loss_of: Callable[[Any], Tensor],
    steps: int,
    rule: str,
    lr: float,
    weights: str = "bundled",
    new_layers: float = 1.0,
    poolers: float = OF_POOLER,
    **settings: Any,
) -> None:
    """``steps`` steps on the ``batches``; of "adamw" the rate decays linearly to 0.

    Args:
        new_layers: what the lr of tensors counts that the model's checkpoint does not have.
        poolers: how far poolers in front of new layers count as new, from 0 to 1.
        settings: further keywords of a learned optimizer.
    """
    schedule = None
    if rule == "adamw":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    else:
        needs = {"num_training_steps": steps} if rules.get(rule).needs_horizon else {}
        groups = hf_lopt.param_groups(model, rule)
        if new_layers != 1.0:
            new = {i: x for i, x in new_tensors(model).items() if x.share == 1.0 or poolers}
            new = {i: x._replace(share=max(x.share, poolers)) for i, x in new.items()}
            set_scales(groups, new, new_layers)
        optimizer = hf_lopt.LearnedOptimizer(groups, rule, lr=lr, weights=weights, **needs, **settings)
    for batch in batches:
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        if schedule is None:
            optimizer.step(loss)
        else:
            optimizer.step()
            schedule.step()


def mean(what: str, losses: Sequence[float]) -> dict[str, float]:
    """The mean over seeds and, of several, two standard errors of it, ``two_se``; printed, too."""
    values = torch.tensor(losses)
    found = {"loss": values.mean().item()}
    if len(losses) > 1:
        found["two_se"] = rounded(2 * values.std().item() / math.sqrt(len(values)), 2)
    print(f"{what}: {' ± '.join(f'{x:.4f}' for x in found.values())}", flush=True)
    return found
