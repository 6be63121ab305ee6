"""VeLO: a scheduler (LSTM) per tensor mixes a bank of small per-element networks.

Metz et al. 2022, "VeLO: Training Versatile Learned Optimizers by Scaling Up", section 3 and appendix A;
google/learned_optimization, general_lopt hyper_v2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_lopt import accumulators, networks
from hf_lopt.features import (
    VELO,
    init_loss_buffer,
    rank_one_hot,
    time_features,
    update_loss_buffer,
    velo_tensor_features,
)
from hf_lopt.networks import Theta
from hf_lopt.rules import base, passes


PREFIX = "ff_mod_stack/~/"
UNITS = (sum(VELO.widths()), 4, 4, 3)
STEP_MULT = EXP_MULT = 0.001


def scheduler_shapes(inputs: int, heads: Mapping[str, int | str]) -> dict[str, tuple[int | str, ...]]:
    """Leaves of the scheduler: mixing layer, LSTM, its initial state, and linear heads with their widths."""
    shapes: dict[str, tuple[int | str, ...]] = {f"lstm_init_state/{name}": (1, "H") for name in ("hidden", "cell")}
    dense = {name: (inputs, "H") for name in ("linear", "linear_1", "linear_2")} | {"rnn/linear": ("2H", "4H")}
    dense |= {name: ("H", width) for name, width in heads.items()}
    for name, shape in dense.items():
        shapes |= {f"rnn_params/{name}/w": shape, f"rnn_params/{name}/b": shape[1:]}
    return shapes


def bank_shapes() -> dict[str, tuple[int | str, ...]]:
    """Leaves of the bank of per-element networks."""
    shapes: dict[str, tuple[int | str, ...]] = {
        f"{PREFIX}w0__{k}": ("K", width, UNITS[1]) for k, width in enumerate(VELO.widths())
    }
    for layer, (n_in, n_out) in enumerate(zip(UNITS, UNITS[1:], strict=False)):
        shapes[f"{PREFIX}b{layer}"] = ("K", n_out)
        if layer:
            shapes[f"{PREFIX}w{layer}"] = ("K", n_in, n_out)
    return shapes


@dataclass
class Schedule:
    """What the scheduler gives for one step, beside the internals worth a look."""

    hidden: Tensor  # (T, H)
    cell: Tensor  # (T, H)
    loss_buffer: dict[str, Tensor]
    inputs: Tensor  # (T, I)
    loss_features: Tensor  # (9,)


def schedule(
    batch: passes.Batch, run: Mapping[str, Tensor], theta: Theta, horizon: int, loss: Tensor, own: Tensor | None
) -> Schedule:
    """One step of the LSTM of each tensor, from features of the run and ``own`` features of each tensor (T, ...)."""
    loss_buffer, loss_features = update_loss_buffer(run, loss, run["step"], horizon)
    shared = torch.cat([time_features(run["step"], horizon), loss_features]).expand(len(batch.params), -1)
    inputs = shared if own is None else torch.cat([shared, own], 1)
    hidden, cell = (torch.stack(batch.tensors(key)) for key in ("lstm_hidden", "lstm_cell"))
    hidden, cell = networks.lstm(networks.mix(inputs, theta), hidden, cell, theta)
    return Schedule(hidden, cell, loss_buffer, inputs, loss_features)


def init_scheduler(p: Tensor, theta: Theta) -> dict[str, Tensor]:
    """The scheduler's state of one tensor, (H,) each, which starts at learned values."""
    leaves = {"lstm_hidden": "hidden", "lstm_cell": "cell"}
    return {key: theta[f"lstm_init_state/{leaf}"][0].to(p.device, copy=True) for key, leaf in leaves.items()}


def init_state(p: Tensor, group: Mapping[str, Any], theta: Theta) -> dict[str, Tensor]:
    """Accumulators and scheduler state."""
    return accumulators.init(p, group["axis_order"], VELO.decays) | init_scheduler(p, theta)


def prepare(theta: Theta, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The bank as one matrix (K, P), times bank_scale / K: the reference takes the mean over the bank, not the sum."""
    bank = networks.flatten_bank(theta, PREFIX, len(VELO.names), len(UNITS) - 1)
    return {"bank": bank * (settings["bank_scale"] / bank.shape[0]), "theta": theta}


def update(
    batch: passes.Batch,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor,
) -> base.Outcome:
    """One step. Inputs of the scheduler come from the state before this step, its loss features from after."""
    layout, theta = batch.layout, weights["theta"]
    (reading,), loss, skip = passes.read([(batch, VELO)], loss, moments=True)
    if "ranks" not in layout.cache:
        layout.cache["ranks"] = rank_one_hot(layout.shapes, layout.device)
    mean_p2 = reading.mean_squares[:, VELO.column("p")]
    own = velo_tensor_features(reading.stats, mean_p2, layout.numel, layout.cache["ranks"], VELO.decays)
    plan = schedule(batch, run, theta, settings["num_training_steps"], loss, own)
    controls = networks.linear(plan.hidden, theta, "rnn_params/rnn_to_controls")
    lr_mult = networks.linear(plan.hidden, theta, "rnn_params/step_size").squeeze(1)
    outcome = finish(batch, run, plan, controls @ weights["bank"], lr_mult, reading, skip)
    outcome.report["controls"] = controls
    return outcome


def finish(
    batch: passes.Batch,
    run: Mapping[str, Tensor],
    plan: Schedule,
    networks_: Tensor,
    lr_mult: Tensor,
    reading: passes.Reading,
    skip: Tensor,
) -> base.Outcome:
    """Pass 2 of VeLO and Celo: evaluate the networks (T or 1, P) and store everything. The third output is unused."""
    network = networks.split_layers(networks_, UNITS).first_outputs(2)
    rms = (reading.mean_squares[:, VELO.column("p")] + 1e-9).sqrt().to(torch.float32)
    scale = batch["lr"] * lr_mult * torch.maximum(rms, batch["min_param_scale"]) * STEP_MULT
    sums = passes.apply_network(batch, VELO, reading, network, scale, EXP_MULT, skip)
    passes.store(batch, skip, lstm_hidden=plan.hidden.unbind(), lstm_cell=plan.cell.unbind())
    report = {
        "lr_mult": lr_mult,
        "update_rms": passes.update_rms(batch, sums[:, 0]),
        "scheduler_inputs": plan.inputs,
        "loss_features": plan.loss_features,
    }
    return base.Outcome(passes.keep_if(skip, run, plan.loss_buffer), skip, report)


VELO_RULE = base.Rule(
    name="velo",
    class_name="VeLO",
    summary="VeLO (Metz et al. 2022): an LSTM per tensor mixes a bank of networks. Needs the loss and the horizon.",
    defaults={
        "lr": 1.0,
        "num_training_steps": None,
        "weights": "auto",
        "weight_decay": 0.0,
        "axis_order": "torch",
        "min_param_scale": 0.0,
        "bank_scale": 100.0,
        "max_nonfinite_steps": 10,
        "max_training_steps": 0,  # the reference's wrapper: 150,000; beyond it, gradients are accumulated
    },
    per_group=("axis_order", "min_param_scale"),
    shapes=bank_shapes() | scheduler_shapes(30, {"rnn_to_controls": "K", "step_size": 1}),
    init_state=init_state,
    init_run=lambda theta: init_loss_buffer(),
    prepare=prepare,
    update=update,
    finetune_lr=0.05,
)

# The 64-unit network of the Celo paper's repository: the same rule with the bank taken as it is.
VELO_S_RULE = replace(
    VELO_RULE,
    name="velo_s",
    summary="VeLO with an LSTM of 64 units and a bank of 32 networks. Needs the loss and the horizon.",
    defaults=dict(VELO_RULE.defaults) | {"bank_scale": 1.0},
)

RULES = (VELO_RULE, VELO_S_RULE)
