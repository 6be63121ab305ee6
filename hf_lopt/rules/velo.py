"""VeLO: a scheduler (LSTM) per tensor mixes a bank of small per-element networks.

Metz et al. 2022, "VeLO: Training Versatile Learned Optimizers by Scaling Up", section 3 and appendix A;
google/learned_optimization, general_lopt hyper_v2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_lopt import _ops, _plain_scheduler, accumulators, networks
from hf_lopt.features import VELO, init_loss_buffer
from hf_lopt.networks import Theta
from hf_lopt.rules import base, batches, passes


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
    """What the scheduler gives for one step."""

    controls: Tensor  # (T, K)
    lr_mult: Tensor  # (T,)
    networks: Tensor  # (T, P), flat


def pack_scheduler(theta: Theta, bank: Tensor | None = None) -> dict[str, Tensor]:
    """The scheduler's matrices, those side by side that take the same input, and the bank (K, P) if there is one."""
    pairs = {
        "mix": ("linear_1", "linear_2"),
        "gates": ("rnn/linear",),
        "heads": (("rnn_to_controls",) if bank is not None else ()) + ("step_size",),
    }
    packed = {
        f"{name}_{kind}": torch.cat([theta[f"rnn_params/{leaf}/{kind}"] for leaf in leaves], -1)
        for name, leaves in pairs.items()
        for kind in "wb"
    }
    return packed | {"bank": packed["heads_w"].new_empty(0, 0) if bank is None else bank}


def schedule(batch: batches.Batch, turn: passes.Turn, weights: Mapping[str, Tensor], celo: bool) -> Schedule:
    """One step of the LSTM of each tensor, whose state is stored unless the step is skipped."""
    hidden, cell = batch.tensors("lstm_hidden"), batch.tensors("lstm_cell")
    mixed = torch.addmm(weights["mix_b"], turn.inputs, weights["mix_w"])
    gates = torch.addmm(weights["gates_b"], _ops.pool(mixed, hidden), weights["gates_w"])
    heads = (weights["heads_w"], weights["heads_b"], weights["bank"])
    return Schedule(*_ops.lstm_step(gates, hidden, cell, *heads, celo, turn.skip))


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
    return pack_scheduler(theta, bank * (settings["bank_scale"] / bank.shape[0]))


def update(
    batch: batches.Batch,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor,
) -> base.Outcome:
    """One step. Inputs of the scheduler come from the state before this step, its loss features from after."""
    (reading,), turn = passes.read(
        [(batch, VELO)], run, loss, horizon=settings["num_training_steps"], tensor_inputs=True
    )
    return finish(batch, reading, turn, schedule(batch, turn, weights, celo=False))


def update_runs(
    batch: batches.Batch,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    horizons: Sequence[int],
    losses: Tensor,
) -> base.Outcome:
    """One step of R independent runs of models with the same shapes, at once.

    ``batch`` has the N tensors of the first run, then those of the second, ...; ``run`` holds "step" (R,), the steps
    done, and the loss buffers (R, 10), which change in place; ``weights`` are what :func:`prepare` gives, each with a
    leading axis R; ``losses`` (R,). A value that is not finite anywhere makes all runs skip the step.
    """
    count = len(horizons)
    steps, like = run["step"].unsqueeze(1), run["loss_means"]
    known = batch.layout.cache.get("horizons")
    if known is None or known[0] != horizons:
        decays = torch.stack([_plain_scheduler.loss_decays(horizon, like) for horizon in horizons])
        known = horizons, decays, torch.tensor(horizons, device=like.device).unsqueeze(1)
        batch.layout.cache["horizons"] = known
    # Without a horizon and a loss the first inputs are zeros, and nothing is stored.
    (reading,), turn = passes.read([(batch, VELO)], {"step": steps[0, 0]}, tensor_inputs=True)
    buffer = [run["loss_means"], run["loss_min"]]
    *new, slopes = _plain_scheduler.next_loss_buffer(*buffer, losses.unsqueeze(1), steps, known[1])
    _ops.assign(buffer, new, turn.skip)
    times = _plain_scheduler.time_features(steps, known[2])
    inputs = turn.inputs.unflatten(0, (count, -1)).clone()
    inputs[:, :, _plain_scheduler.TIME] = times.unsqueeze(1)
    inputs[:, :, _plain_scheduler.LOSS] = slopes.unsqueeze(1)

    hidden, cell = batch.tensors("lstm_hidden"), batch.tensors("lstm_cell")
    first, second = torch.baddbmm(weights["mix_b"].unsqueeze(1), inputs, weights["mix_w"]).chunk(2, 2)
    mixed = second + torch.relu(first).amax(1, keepdim=True)
    mixed = torch.cat([mixed, torch.stack(hidden).view_as(mixed)], 2)
    gates = torch.baddbmm(weights["gates_b"].unsqueeze(1), mixed, weights["gates_w"])
    new_hidden, new_cell = _plain_scheduler.lstm_cell(gates.flatten(0, 1), torch.stack(cell))
    rows = new_hidden.view(count, -1, new_hidden.shape[1])
    heads = torch.baddbmm(weights["heads_b"].unsqueeze(1), rows, weights["heads_w"])
    _ops.assign([*hidden, *cell], [*new_hidden.unbind(), *new_cell.unbind()], turn.skip)
    controls, lr_mult = heads[:, :, :-1], heads[:, :, -1].flatten()
    plan = Schedule(controls.flatten(0, 1), lr_mult, torch.bmm(controls, weights["bank"]).flatten(0, 1))
    return finish(batch, reading, replace(turn, inputs=inputs.flatten(0, 1)), plan)


def finish(batch: batches.Batch, reading: passes.Reading, turn: passes.Turn, plan: Schedule) -> base.Outcome:
    """Pass 2 of VeLO and Celo: evaluate the networks and store everything. The third output is unused."""
    network = passes.fold(
        *(batch, VELO, reading, plan.networks, UNITS), factors=[plan.lr_mult], step_mult=STEP_MULT, p_scale=True
    )
    sums = passes.apply_network(batch, VELO, reading, network, EXP_MULT, turn.skip)
    return base.Outcome({}, turn.skip, report(batch, turn, plan, sums.select(1, 0)) | {"controls": plan.controls})


def report(batch: batches.Batch, turn: passes.Turn, plan: Schedule, sums: Tensor) -> dict[str, Any]:
    """What is worth a look about a step of a scheduler."""
    return {
        "lr_mult": plan.lr_mult,
        "update_rms": passes.update_rms(batch, sums),
        "scheduler_inputs": turn.inputs,
        "loss_features": turn.loss_features,
    }


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
)

# The 64-unit network of the Celo paper's repository: the same rule with the bank taken as it is.
VELO_S_RULE = replace(
    VELO_RULE,
    name="velo_s",
    summary="VeLO with an LSTM of 64 units and a bank of 32 networks. Needs the loss and the horizon.",
    defaults=dict(VELO_RULE.defaults) | {"bank_scale": 1.0},
)

RULES = (VELO_RULE, VELO_S_RULE)
