"""VeLO: a scheduler (LSTM) per tensor mixes a bank of small per-element networks.

Metz et al. 2022, "VeLO: Training Versatile Learned Optimizers by Scaling Up", section 3 and appendix A;
google/learned_optimization, general_lopt hyper_v2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_lopt.features import VELO
from hf_lopt.rules.base import RUN_LENGTHS, Rule, UpdateResult
from hf_lopt.step import accumulators, scheduler
from hf_lopt.step.measure import measure
from hf_lopt.step.networks import Theta
from hf_lopt.step.tensors import TensorList


INPUTS = 30  # of the scheduler: time 9, loss 9, the tensor itself 12
STEP_MULT = EXP_MULT = 0.001


def init_state(p: Tensor, group: Mapping[str, Any], theta: Theta) -> dict[str, Tensor]:
    """Accumulators and scheduler state."""
    return accumulators.init(p, group["axis_order"], VELO.decays, group["state_dtype"]) | scheduler.init_scheduler(
        p, theta
    )


def init_run(theta: Theta) -> dict[str, Tensor]:
    """The loss buffer."""
    return scheduler.init_loss_buffer()


def prepare(theta: Theta, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The bank as one matrix (K, P), times bank_scale / K: the reference takes the mean over the bank, not the sum."""
    bank = scheduler.flat_bank(theta)
    return scheduler.pack_scheduler(theta, bank * (settings["bank_scale"] / bank.shape[0]))


def update(
    tensors: TensorList,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor,
) -> UpdateResult:
    """One step. Inputs of the scheduler come from the state before this step, its loss features from after."""
    (measured,), decision = measure(
        [(tensors, VELO)], run, loss, horizon=settings["num_training_steps"], tensor_inputs=True
    )
    schedule = scheduler.run_scheduler(tensors, decision, weights, softmax=False)
    report = scheduler.apply_schedule(tensors, measured, decision, schedule, step_mult=STEP_MULT, exp_mult=EXP_MULT)
    return UpdateResult({}, decision.skip, report)


_SHAPES = scheduler.bank_shapes() | scheduler.scheduler_shapes(INPUTS, {"rnn_to_controls": "K", "step_size": 1})

VELO_RULE = Rule(
    name="velo",
    class_name="VeLO",
    summary="VeLO (Metz et al. 2022): an LSTM per tensor mixes a bank of networks. Needs the loss and the horizon.",
    defaults={
        "lr": 1.0,
        "num_training_steps": None,
        "weights": "auto",
        "weight_decay": 0.0,
        "axis_order": "torch",
        "min_param_scale": None,
        "bank_scale": 100.0,
        "max_nonfinite_steps": 10,
        "max_training_steps": 0,  # the reference's wrapper: 150,000; beyond it, gradients are accumulated
        "state_dtype": "float32",
        "stochastic_rounding": False,
    },
    per_group=("axis_order", "min_param_scale", "state_dtype"),
    shapes=_SHAPES,
    init_state=init_state,
    init_run=init_run,
    prepare=prepare,
    update=update,
    own_schedule=True,
    finetune_lr=0.05,
    needs_horizon=True,
    needs_loss=True,
    run_lengths=RUN_LENGTHS,
)

# The 64-unit network of the Celo paper's repository: the same rule with the bank taken as it is.
VELO_S_RULE = Rule(
    name="velo_s",
    class_name="VeLO",
    summary="VeLO with an LSTM of 64 units and a bank of 32 networks. Needs the loss and the horizon.",
    defaults={
        "lr": 1.0,
        "num_training_steps": None,
        "weights": "auto",
        "weight_decay": 0.0,
        "axis_order": "torch",
        "min_param_scale": None,
        "bank_scale": 1.0,
        "max_nonfinite_steps": 10,
        "max_training_steps": 0,
        "state_dtype": "float32",
        "stochastic_rounding": False,
    },
    per_group=("axis_order", "min_param_scale", "state_dtype"),
    shapes=_SHAPES,
    init_state=init_state,
    init_run=init_run,
    prepare=prepare,
    update=update,
    own_schedule=True,
    finetune_lr=0.05,
    needs_horizon=True,
    needs_loss=True,
    run_lengths=RUN_LENGTHS,
)

RULES = (VELO_RULE, VELO_S_RULE)
