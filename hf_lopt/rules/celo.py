"""Celo and Celo-Adam: a scheduler that sees only the run, over VeLO's per-element network or over Adam.

Moudgil et al. 2025, "Celo: Training Versatile Learned Optimizers on a Compute Diet"; github.com/amoudgl/celo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_lopt import _ops, accumulators, networks
from hf_lopt.accumulators import Decays
from hf_lopt.features import CLIP_GRADIENT, VELO
from hf_lopt.networks import Theta
from hf_lopt.rules import base, passes, velo


SHARED_INPUTS = 18
LR_MULT = 0.1
STEP_MULT = 0.001
ADAM = Decays(momentum=(0.9,), second_moment=(0.999,), factored=())
INNER_EPS, OUTER_EPS = 1e-10, 1e-8


def lr_multiplier(hidden: Tensor, theta: Theta) -> Tensor:
    """0.1 exp(linear(h)), (T,); all tensors have the same inputs and therefore the same multiplier."""
    return LR_MULT * torch.exp(networks.linear(hidden, theta, "rnn_params/step_size").squeeze(1))


def prepare(theta: Theta, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"bank": networks.flatten_bank(theta, velo.PREFIX, len(VELO.names), len(velo.UNITS) - 1), "theta": theta}


def update(
    batch: passes.Batch,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor,
) -> base.Outcome:
    """One step of Celo: VeLO's passes, with a softmax over the bank. The published bank holds one network."""
    theta = weights["theta"]
    (reading,), loss, skip = passes.read([(batch, VELO)], loss)
    plan = velo.schedule(batch, run, theta, settings["num_training_steps"], loss, own=None)
    controls = networks.linear(plan.hidden, theta, "rnn_params/rnn_to_controls")
    mixture = torch.softmax(controls, 1) @ weights["bank"]
    lr_mult = lr_multiplier(plan.hidden, theta)
    outcome = velo.finish(batch, run, plan, mixture, lr_mult, reading, skip)
    outcome.report["controls"] = controls
    return outcome


def init_adam_state(p: Tensor, group: Mapping[str, Any], theta: Theta) -> dict[str, Tensor]:
    """Adam's moments and the scheduler's state. Nothing uses the factored accumulators of the reference."""
    return accumulators.init(p, group["axis_order"], ADAM) | velo.init_scheduler(p, theta)


def update_adam(
    batch: passes.Batch,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor,
) -> base.Outcome:
    """One step of Celo-Adam: p <- p - 0.001 lr_mult mhat / (sqrt(vhat + 1e-10) + 1e-8), gradients in +-1000."""
    theta = weights["theta"]
    _, loss, skip = passes.read([], loss, others=[batch])
    plan = velo.schedule(batch, run, theta, settings["num_training_steps"], loss, own=None)
    lr_mult = lr_multiplier(plan.hidden, theta)
    t = (run["step"] + 1).double()
    sums = _ops.adam_step(
        *(batch.params, batch.grads, *batch.accumulators()),
        *(*ADAM.momentum, *ADAM.second_moment, CLIP_GRADIENT),
        *(batch["lr"] * lr_mult * STEP_MULT, batch["lr"] * batch["weight_decay"]),
        *((1.0 / (1.0 - decay**t)).float() for decay in (*ADAM.momentum, *ADAM.second_moment)),
        *(INNER_EPS, OUTER_EPS, skip),
    )
    passes.store(batch, skip, lstm_hidden=plan.hidden.unbind(), lstm_cell=plan.cell.unbind())
    report = {
        "lr_mult": lr_mult,
        "update_rms": passes.update_rms(batch, sums),
        "scheduler_inputs": plan.inputs,
        "loss_features": plan.loss_features,
    }
    return base.Outcome(passes.keep_if(skip, run, plan.loss_buffer), skip, report)


_DEFAULTS = {key: value for key, value in velo.VELO_RULE.defaults.items() if key != "bank_scale"}

CELO_RULE = replace(
    velo.VELO_RULE,
    name="celo",
    class_name="Celo",
    summary="Celo (Moudgil et al. 2025): one small network and a light LSTM schedule. Needs the loss and the horizon.",
    defaults=_DEFAULTS,
    shapes=velo.bank_shapes() | velo.scheduler_shapes(SHARED_INPUTS, {"rnn_to_controls": "K", "step_size": 1}),
    prepare=prepare,
    update=update,
)
CELO_ADAM_RULE = replace(
    CELO_RULE,
    name="celo_adam",
    class_name="CeloAdam",
    summary="Celo-Adam (Moudgil et al. 2025): Celo's LSTM schedule over Adam. Needs the loss and the horizon.",
    defaults={key: value for key, value in _DEFAULTS.items() if key != "min_param_scale"},
    per_group=("axis_order",),
    shapes=velo.scheduler_shapes(SHARED_INPUTS, {"step_size": 1}),
    init_state=init_adam_state,
    prepare=lambda theta, settings: {"theta": theta},
    update=update_adam,
)

RULES = (CELO_RULE, CELO_ADAM_RULE)
