"""Celo and Celo-Adam: a scheduler that sees only the run, over VeLO's per-element network or over Adam.

Moudgil et al. 2025, "Celo: Training Versatile Learned Optimizers on a Compute Diet"; github.com/amoudgl/celo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from hf_lopt.features import CLIP_GRADIENT, SHARED_INPUTS, VELO, Decays
from hf_lopt.kernels import ops
from hf_lopt.kernels.arguments import AdamStep
from hf_lopt.rules.base import FROM_SCRATCH, NEW_LAYERS, RUN_LENGTHS, Rule, UpdateResult
from hf_lopt.step import accumulators, scheduler
from hf_lopt.step.measure import measure
from hf_lopt.step.networks import Theta, specialize_networks
from hf_lopt.step.tensors import TensorList


STEP_MULT = EXP_MULT = 0.001
ADAM = Decays(momentum=(0.9,), second_moment=(0.999,), factored=())
INNER_EPS, OUTER_EPS = 1e-10, 1e-8


def init_state(p: Tensor, group: Mapping[str, Any], theta: Theta) -> dict[str, Tensor]:
    """Accumulators and scheduler state."""
    return accumulators.init(p, group["axis_order"], VELO.decays, group["state_dtype"]) | scheduler.init_scheduler(
        p, theta
    )


def init_run(theta: Theta) -> dict[str, Tensor]:
    """The loss buffer."""
    return scheduler.init_loss_buffer()


def prepare(theta: Theta, settings: Mapping[str, Any]) -> dict[str, Any]:
    return scheduler.pack_scheduler(theta, scheduler.flat_bank(theta))


def update(
    tensors: TensorList,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor,
) -> UpdateResult:
    """One step of Celo: VeLO's passes, with a softmax over the bank. The published bank holds one network."""
    (measured,), decision = measure([(tensors, VELO)], run, loss, horizon=settings["num_training_steps"])
    schedule = scheduler.run_scheduler(tensors, decision, weights, softmax=True)
    report = scheduler.apply_schedule(tensors, measured, decision, schedule, step_mult=STEP_MULT, exp_mult=EXP_MULT)
    return UpdateResult({}, decision.skip, report)


def init_adam_state(p: Tensor, group: Mapping[str, Any], theta: Theta) -> dict[str, Tensor]:
    """Adam's moments and the scheduler's state. Nothing uses the factored accumulators of the reference."""
    return accumulators.init(p, group["axis_order"], ADAM, group["state_dtype"]) | scheduler.init_scheduler(p, theta)


def prepare_adam(theta: Theta, settings: Mapping[str, Any]) -> dict[str, Any]:
    return scheduler.pack_scheduler(theta)


def update_adam(
    tensors: TensorList,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor,
) -> UpdateResult:
    """One step of Celo-Adam: p <- p - 0.001 lr_mult mhat / (sqrt(vhat + 1e-10) + 1e-8), gradients in +-1000."""
    (momentum_decay,), (second_decay,) = ADAM.momentum, ADAM.second_moment
    _, decision = measure(
        [],
        run,
        loss,
        horizon=settings["num_training_steps"],
        others=[tensors],
        others_clip=CLIP_GRADIENT,
        correction_decays=(momentum_decay, second_decay),
    )
    schedule = scheduler.run_scheduler(tensors, decision, weights, softmax=True)
    steps = specialize_networks(
        tensors, None, None, schedule.networks, (), factors=[schedule.lr_mult], step_mult=STEP_MULT
    )
    momentum_correction, second_correction = decision.corrections
    sums = ops.adam_step(
        AdamStep(
            params=tensors.params,
            grads=tensors.grads,
            momenta=tensors.momenta,
            second_moments=tensors.second_moments,
            momentum_decay=momentum_decay,
            second_decay=second_decay,
            clip=CLIP_GRADIENT,
            scale=steps.scale,
            decay=steps.decay,
            momentum_correction=momentum_correction,
            second_correction=second_correction,
            inner_eps=INNER_EPS,
            outer_eps=OUTER_EPS,
            skip=decision.skip,
            **tensors.scales,
            **tensors.rounding,
        )
    )
    return UpdateResult({}, decision.skip, scheduler.report(tensors, decision, schedule, sums))


_SCRATCH = RUN_LENGTHS[FROM_SCRATCH]
# With published weights a T5 and a BART end at half their loss or less with half the step, whatever the length of the
# run; a language model that reaches as far gains 15 % or loses 4.
_CELO = replace(_SCRATCH, others={**_SCRATCH.others, "smallest": 0.7})

CELO_RULE = Rule(
    name="celo",
    class_name="Celo",
    summary="Celo (Moudgil et al. 2025): one small network and a light LSTM schedule. Needs the loss and the horizon.",
    defaults={
        "lr": 1.0,
        "num_training_steps": None,
        "weights": "auto",
        "weight_decay": 0.0,
        "axis_order": "torch",
        "min_param_scale": None,
        "max_nonfinite_steps": 10,
        "max_training_steps": 0,
        "state_dtype": "float32",
        "stochastic_rounding": False,
    },
    per_group=("axis_order", "min_param_scale", "state_dtype"),
    shapes=scheduler.bank_shapes()
    | scheduler.scheduler_shapes(SHARED_INPUTS, {"rnn_to_controls": "K", "step_size": 1}),
    init_state=init_state,
    init_run=init_run,
    prepare=prepare,
    update=update,
    own_schedule=True,
    finetune_lr=0.05,
    needs_horizon=True,
    needs_loss=True,
    run_lengths={**RUN_LENGTHS, FROM_SCRATCH: _CELO},
)

# Adam's step is not relative: at 200 and 300 longer ones cost a deep language model up to a tenth.
_ADAM = replace(RUN_LENGTHS[NEW_LAYERS], steps=200)
_ADAM_LENGTHS = {FROM_SCRATCH: replace(_SCRATCH, steps=200, power=0.9, others={}), NEW_LAYERS: _ADAM}

CELO_ADAM_RULE = Rule(
    name="celo_adam",
    class_name="CeloAdam",
    summary="Celo-Adam (Moudgil et al. 2025): Celo's LSTM schedule over Adam. Needs the loss and the horizon.",
    defaults={
        "lr": 1.0,
        "num_training_steps": None,
        "weights": "auto",
        "weight_decay": 0.0,
        "axis_order": "torch",
        "max_nonfinite_steps": 10,
        "max_training_steps": 0,
        "state_dtype": "float32",
        "stochastic_rounding": False,
    },
    per_group=("axis_order", "state_dtype"),
    shapes=scheduler.scheduler_shapes(SHARED_INPUTS, {"step_size": 1}),
    init_state=init_adam_state,
    init_run=init_run,
    prepare=prepare_adam,
    update=update_adam,
    own_schedule=True,
    finetune_lr=0.05,
    needs_horizon=True,
    needs_loss=True,
    run_lengths={**RUN_LENGTHS, **_ADAM_LENGTHS},
)

RULES = (CELO_RULE, CELO_ADAM_RULE)
