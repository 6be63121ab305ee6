"""Muon of torch for matrices, AdamW for the rest, as ``optim="muon"``: what Celo2 is compared with.

The tensors are divided as :func:`hf_lopt.param_groups` divides them for Celo2; of its matrices those of two axes go to
Muon, which takes no others. With ``adjust_lr_fn="match_rms_adamw"`` (Liu et al. 2025, "Muon is Scalable for LLM
Training") both have steps of the size of AdamW's, so one learning rate serves both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

import hf_lopt


NAME = "muon"


class MuonAndAdamW(Optimizer):
    """Both as one optimizer: they share its groups, which schedulers write to.

    Args:
        groups: parameter groups, each with a ``muon`` that is true or false.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float = 0.0):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        mine = {muon: [group for group in self.param_groups if group["muon"] == muon] for muon in (True, False)}
        self._both = [
            torch.optim.Muon(mine[True], lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(mine[False], lr=lr, weight_decay=weight_decay),
        ]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for optimizer in self._both:
            optimizer.step()


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The model's trainable parameters in two groups."""
    found = hf_lopt.param_groups(model, "celo2")
    pairs = [(p, group["branch"] == "network" and p.dim() == 2) for group in found for p in group["params"]]
    return [{"params": [p for p, muon in pairs if muon == kind], "muon": kind} for kind in (True, False)]


def register() -> None:
    """Make the name an ``optim=`` choice of transformers in this process."""
    from transformers import trainer_optimizer
    from transformers.training_args import OptimizerNames

    from hf_lopt.hf.register import extend_enum

    def handler(context: Any) -> tuple[type[Optimizer], dict[str, Any]]:
        return MuonAndAdamW, {"params": groups_of(context.model), "lr": context.args.learning_rate}

    extend_enum(OptimizerNames, NAME)
    trainer_optimizer._OPTIMIZER_HANDLERS[NAME] = handler
