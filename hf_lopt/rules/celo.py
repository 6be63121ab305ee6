"""Celo and Celo-Adam: a scheduler that sees only the run, over VeLO's per-element network or over Adam.

Moudgil et al. 2025, "Celo: Training Versatile Learned Optimizers on a Compute Diet"; github.com/amoudgl/celo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from hf_lopt import _ops, _plain_scheduler, accumulators, networks
from hf_lopt.accumulators import Decays
from hf_lopt.features import CLIP_GRADIENT, VELO
from hf_lopt.networks import Theta
from hf_lopt.rules import base, batches, passes, velo


SHARED_INPUTS, LR_MULT = _plain_scheduler.SHARED_INPUTS, _plain_scheduler.LR_MULT
STEP_MULT = 0.001
ADAM = Decays(momentum=(0.9,), second_moment=(0.999,), factored=())
INNER_EPS, OUTER_EPS = 1e-10, 1e-8


def prepare(theta: Theta, settings: Mapping[str, Any]) -> dict[str, Any]:
    bank = networks.flatten_bank(theta, velo.PREFIX, len(VELO.names), len(velo.UNITS) - 1)
    return velo.pack_scheduler(theta, bank)


def update(
    batch: batches.Batch,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor,
) -> base.Outcome:
    """One step of Celo: VeLO's passes, with a softmax over the bank. The published bank holds one network."""
    (reading,), turn = passes.read([(batch, VELO)], run, loss, horizon=settings["num_training_steps"])
    return velo.finish(batch, reading, turn, velo.schedule(batch, turn, weights, celo=True))


def init_adam_state(p: Tensor, group: Mapping[str, Any], theta: Theta) -> dict[str, Tensor]:
    """Adam's moments and the scheduler's state. Nothing uses the factored accumulators of the reference."""
    return accumulators.init(p, group["axis_order"], ADAM) | velo.init_scheduler(p, theta)


def update_adam(
    batch: batches.Batch,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor,
) -> base.Outcome:
    """One step of Celo-Adam: p <- p - 0.001 lr_mult mhat / (sqrt(vhat + 1e-10) + 1e-8), gradients in +-1000."""
    _, turn = passes.read(
        [],
        run,
        loss,
        horizon=settings["num_training_steps"],
        others=[batch],
        corrected=(*ADAM.momentum, *ADAM.second_moment),
    )
    plan = velo.schedule(batch, turn, weights, celo=True)
    steps = passes.fold(batch, None, None, plan.networks, (), factors=[plan.lr_mult], step_mult=STEP_MULT)
    sums = _ops.adam_step(
        *(batch.params, batch.grads, *batch.accumulators()),
        *(*ADAM.momentum, *ADAM.second_moment, CLIP_GRADIENT),
        *(steps.scale, steps.decay, *turn.corrections, INNER_EPS, OUTER_EPS, turn.skip),
    )
    return base.Outcome({}, turn.skip, velo.report(batch, turn, plan, sums))


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
    prepare=lambda theta, settings: velo.pack_scheduler(theta),
    update=update_adam,
)

RULES = (CELO_RULE, CELO_ADAM_RULE)
