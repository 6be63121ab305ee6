"""VeLO: a scheduler (LSTM) per tensor mixes a bank of small per-element networks.

Metz et al. 2022, "VeLO: Training Versatile Learned Optimizers by Scaling Up", section 3 and appendix A;
google/learned_optimization, general_lopt hyper_v2.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from hf_lopt.rules import base


PREFIX = "ff_mod_stack/~/"
UNITS = (sum(VELO.widths()), 4, 4, 3)
STEP_MULT = EXP_MULT = 0.001


def _shapes() -> dict[str, tuple[int | str, ...]]:
    shapes: dict[str, tuple[int | str, ...]] = {
        f"{PREFIX}w0__{k}": ("K", width, UNITS[1]) for k, width in enumerate(VELO.widths())
    }
    for layer, (n_in, n_out) in enumerate(zip(UNITS, UNITS[1:], strict=False)):
        shapes[f"{PREFIX}b{layer}"] = ("K", n_out)
        if layer:
            shapes[f"{PREFIX}w{layer}"] = ("K", n_in, n_out)
    shapes |= {f"lstm_init_state/{name}": (1, "H") for name in ("hidden", "cell")}
    dense = {"linear": (30, "H"), "linear_1": (30, "H"), "linear_2": (30, "H"), "rnn/linear": ("2H", "4H")}
    dense |= {"rnn_to_controls": ("H", "K"), "step_size": ("H", 1)}
    for name, shape in dense.items():
        shapes |= {f"rnn_params/{name}/w": shape, f"rnn_params/{name}/b": shape[1:]}
    return shapes


def init_state(p: Tensor, axis_order: str, theta: Theta) -> dict[str, Tensor]:
    """Accumulators and the scheduler's state, (H,) each, which starts at learned values."""
    state = accumulators.init(p, axis_order, VELO.decays)
    for key, leaf in (("lstm_hidden", "hidden"), ("lstm_cell", "cell")):
        state[key] = theta[f"lstm_init_state/{leaf}"][0].to(p.device, copy=True)
    return state


def prepare(theta: Theta, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The bank as one matrix (K, P), times bank_scale / K: the reference takes the mean over the bank, not the sum."""
    bank = networks.flatten_bank(theta, PREFIX, len(VELO.names), len(UNITS) - 1)
    return {"bank": bank * (settings["bank_scale"] / bank.shape[0]), "theta": theta}


def update(
    batch: base.Batch,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor,
    per_group: Mapping[str, Tensor],
) -> base.Outcome:
    """One step. Inputs of the scheduler come from the state before this step, its loss features from after."""
    horizon, layout, theta = settings["num_training_steps"], batch.layout, weights["theta"]
    row_sums, col_sums, stats = base.sums(batch, VELO)
    factors = base.factors(batch, VELO, row_sums, col_sums)
    mean_squares = base.mean_squares(batch, VELO, factors)
    loss, skip = base.agree(stats, mean_squares, loss)
    mean_p2 = mean_squares[:, VELO.column("p")]

    loss_buffer, loss_features = update_loss_buffer(run, loss, run["step"], horizon)
    shared = torch.cat([time_features(run["step"], horizon), loss_features])
    if "ranks" not in layout.cache:
        layout.cache["ranks"] = rank_one_hot(layout.shapes, layout.device)
    own = velo_tensor_features(stats, mean_p2, layout.numel, layout.cache["ranks"], VELO.decays)
    inputs = torch.cat([shared.expand(len(own), -1), own], 1)
    hidden, cell = (torch.stack(batch.tensors(key)) for key in ("lstm_hidden", "lstm_cell"))
    hidden, cell = networks.lstm(networks.mix(inputs, theta), hidden, cell, theta)
    controls = networks.linear(hidden, theta, "rnn_params/rnn_to_controls")
    lr_mult = networks.linear(hidden, theta, "rnn_params/step_size").squeeze(1)

    network = networks.split_layers(controls @ weights["bank"], UNITS).first_outputs(2)  # the third is unused
    network = network.scaled(VELO.scales(mean_squares))
    rms = (mean_p2 + 1e-9).sqrt().to(torch.float32)
    scale = batch.lr * lr_mult * torch.maximum(rms, per_group["min_param_scale"]) * STEP_MULT
    sums = base.apply_network(batch, VELO, factors, network, scale, EXP_MULT, skip)

    base.store(
        batch,
        skip,
        factored_row=factors.rows,
        factored_col=factors.cols,
        lstm_hidden=hidden.unbind(),
        lstm_cell=cell.unbind(),
    )
    new_run = base.keep_if(skip, run, loss_buffer)
    report = {
        "lr_mult": lr_mult,
        "update_rms": (sums[:, 0].sum() / layout.numel.sum()).sqrt(),
        "scheduler_inputs": inputs,
        "loss_features": loss_features,
        "controls": controls,
    }
    return base.Outcome(new_run, skip, report)


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
    },
    per_group=("axis_order", "min_param_scale"),
    shapes=_shapes(),
    init_state=init_state,
    init_run=init_loss_buffer,
    prepare=prepare,
    update=update,
    finetune_lr=0.05,
)

RULES = (VELO_RULE,)
