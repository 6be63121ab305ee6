"""The scheduler of VeLO and Celo: an LSTM per tensor whose heads mix a bank of per-element networks.

Metz et al. 2022, "VeLO: Training Versatile Learned Optimizers by Scaling Up", section 3 and appendix A;
google/learned_optimization, general_lopt hyper_v2. Celo's version of it: Moudgil et al. 2025.

Axes: T tensors, I inputs, H hidden units, K networks in the bank, P weights of a network, R replicas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lopt.features import LOSS_DECAYS, LOSS_MIN_START, VELO
from hf_lopt.kernels import ops
from hf_lopt.kernels.arguments import Assign, LstmStep, Pool
from hf_lopt.kernels.reference import scheduler as reference
from hf_lopt.step import networks, passes
from hf_lopt.step.measure import Measurements, StepDecision
from hf_lopt.step.networks import Theta
from hf_lopt.step.tensors import TensorList


BANK = "ff_mod_stack/~/"  # where the leaves of the bank are in the weights
UNITS = (sum(VELO.widths()), 4, 4, 3)  # of the networks in the bank; the third output is unused


@dataclass
class Schedule:
    """What the scheduler gives for one step."""

    controls: Tensor  # (T, K)
    lr_mult: Tensor  # (T,)
    networks: Tensor  # (T, P), flat


def scheduler_shapes(inputs: int, heads: Mapping[str, int | str]) -> dict[str, tuple[int | str, ...]]:
    """Leaves of the scheduler: mixing layer, LSTM, its initial state, and linear heads with their widths."""
    shapes: dict[str, tuple[int | str, ...]] = {f"lstm_init_state/{name}": (1, "H") for name in ("hidden", "cell")}
    dense: dict[str, tuple[int | str, int | str]] = {
        name: (inputs, "H") for name in ("linear", "linear_1", "linear_2")
    }
    dense |= {"rnn/linear": ("2H", "4H")} | {name: ("H", width) for name, width in heads.items()}
    for name, shape in dense.items():
        shapes |= {f"rnn_params/{name}/w": shape, f"rnn_params/{name}/b": shape[1:]}
    return shapes


def bank_shapes() -> dict[str, tuple[int | str, ...]]:
    """Leaves of the bank of per-element networks."""
    shapes: dict[str, tuple[int | str, ...]] = {
        f"{BANK}w0__{k}": ("K", width, UNITS[1]) for k, width in enumerate(VELO.widths())
    }
    for layer, (n_in, n_out) in enumerate(zip(UNITS, UNITS[1:], strict=False)):
        shapes[f"{BANK}b{layer}"] = ("K", n_out)
        if layer:
            shapes[f"{BANK}w{layer}"] = ("K", n_in, n_out)
    return shapes


def flat_bank(theta: Theta) -> Tensor:
    """The bank as one matrix (K, P)."""
    return networks.flatten_bank(theta, BANK, len(VELO.names), len(UNITS) - 1)


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


def init_scheduler(p: Tensor, theta: Theta) -> dict[str, Tensor]:
    """The scheduler's state of one tensor, (H,) each, which starts at learned values."""
    leaves = {"lstm_hidden": "hidden", "lstm_cell": "cell"}
    return {key: theta[f"lstm_init_state/{leaf}"][0].to(p.device, copy=True) for key, leaf in leaves.items()}


def init_loss_buffer() -> dict[str, Tensor]:
    """Empty loss buffer: averages (10,) over horizons from 10 steps to the whole run, their running minimum (10,)."""
    return {
        "loss_means": torch.zeros(LOSS_DECAYS, dtype=torch.float32),
        "loss_min": torch.full((LOSS_DECAYS,), LOSS_MIN_START, dtype=torch.float32),
    }


def means_of_equal_losses(loss: Tensor, count: Tensor, horizon: int) -> Tensor:
    """The averages (10,) after ``count`` (0-d) losses that were all equal to ``loss`` (1,), float64."""
    return (1.0 - reference.loss_decays(horizon, loss) ** count) * loss


def run_scheduler(
    tensors: TensorList, decision: StepDecision, weights: Mapping[str, Tensor], *, softmax: bool
) -> Schedule:
    """One step of the LSTM of each tensor, whose state is stored unless the step is skipped.

    ``weights`` are those of :func:`pack_scheduler`; of replicas that are not stacked each has a leading axis R.
    ``softmax``: controls and multiplier are read as in Celo, see the operator ``lstm_step``.
    """
    if tensors.layout.replicas:
        return _run_replicas(tensors, decision, weights, softmax)
    hidden, cell = tensors.tensors("lstm_hidden"), tensors.tensors("lstm_cell")
    mixed = torch.addmm(weights["mix_b"], decision.inputs, weights["mix_w"])
    gates = torch.addmm(weights["gates_b"], ops.pool(Pool(mixed, hidden)), weights["gates_w"])
    return Schedule(
        *ops.lstm_step(
            LstmStep(
                gates=gates,
                hidden=hidden,
                cell=cell,
                heads=weights["heads_w"],
                heads_bias=weights["heads_b"],
                bank=weights["bank"],
                softmax=softmax,
                skip=decision.skip,
            )
        )
    )


def _run_replicas(
    tensors: TensorList, decision: StepDecision, weights: Mapping[str, Tensor], softmax: bool
) -> Schedule:
    """The same for R replicas, each with weights of its own: the maximum over tensors is taken within a replica."""
    replicas = tensors.layout.replicas
    hidden, cell = tensors.tensors("lstm_hidden"), tensors.tensors("lstm_cell")
    inputs = decision.inputs.unflatten(0, (replicas, -1))
    first, second = torch.baddbmm(weights["mix_b"].unsqueeze(1), inputs, weights["mix_w"]).chunk(2, 2)
    mixed = second + torch.relu(first).amax(1, keepdim=True)
    mixed = torch.cat([mixed, torch.stack(hidden).view_as(mixed)], 2)
    gates = torch.baddbmm(weights["gates_b"].unsqueeze(1), mixed, weights["gates_w"])
    new_hidden, new_cell = reference.lstm_cell(gates.flatten(0, 1), torch.stack(cell))
    rows = new_hidden.view(replicas, -1, new_hidden.shape[1])
    heads = torch.baddbmm(weights["heads_b"].unsqueeze(1), rows, weights["heads_w"])
    ops.assign(Assign([*hidden, *cell], [*new_hidden.unbind(), *new_cell.unbind()], decision.skip))
    controls, lr_mult = heads[:, :, :-1], heads[:, :, -1].flatten()
    mixture = torch.bmm(torch.softmax(controls, 2) if softmax and controls.shape[2] else controls, weights["bank"])
    lr_mult = reference.CELO_LR_MULT * torch.exp(lr_mult) if softmax else lr_mult
    return Schedule(controls.flatten(0, 1), lr_mult, mixture.flatten(0, 1))


def apply_schedule(
    tensors: TensorList,
    measurements: Measurements,
    decision: StepDecision,
    schedule: Schedule,
    *,
    step_mult: float,
    exp_mult: float,
) -> dict[str, Any]:
    """Pass 2 of VeLO and Celo: evaluate the networks and store everything. Returns what is worth logging.

    A step is relative to the size of its tensor."""
    specialized = networks.specialize_networks(
        tensors,
        VELO,
        measurements,
        schedule.networks,
        UNITS,
        factors=[schedule.lr_mult],
        step_mult=step_mult,
        relative=True,
    )
    sums = passes.apply_network(tensors, VELO, measurements, specialized, exp_mult, decision.skip)
    return report(tensors, decision, schedule, sums.select(1, 0)) | {"controls": schedule.controls}


def report(tensors: TensorList, decision: StepDecision, schedule: Schedule, sums_of_squares: Tensor) -> dict[str, Any]:
    """What is worth a look about a step of a scheduler; ``sums_of_squares``: Σ step² of each tensor, (T,)."""
    return {
        "lr_mult": schedule.lr_mult,
        "update_rms": passes.update_rms(tensors, sums_of_squares),
        "scheduler_inputs": decision.inputs,
        "loss_features": decision.loss_features,
    }
