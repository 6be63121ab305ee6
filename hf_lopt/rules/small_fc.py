"""small_fc_lopt, μLO and ELO: one per-element network for all tensors, with features of the step count.

Metz et al. 2022, "Practical tradeoffs between memory, compute, and performance in learned optimizers" (small_fc_lopt;
google/learned_optimization, adafac_mlp_lopt); Therien et al. 2024, "μLO: Compute-Efficient Meta-Generalization of
Learned Optimizers".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_lopt.features import SMALL_FC, STEP_SCALES, Decays
from hf_lopt.rules.base import Rule, UpdateResult
from hf_lopt.step import accumulators, networks, passes
from hf_lopt.step.measure import measure
from hf_lopt.step.networks import Theta, specialize_networks
from hf_lopt.step.tensors import TensorList


PREFIX = "nn/~/"
OFFSETS = {"momentum": "momentum_decays", "second_moment": "rms_decays", "factored": "adafactor_decays"}


def _shapes() -> dict[str, tuple[int | str, ...]]:
    d, inputs = SMALL_FC.decays, sum(SMALL_FC.widths()) + len(STEP_SCALES)
    shapes: dict[str, tuple[int | str, ...]] = {leaf: (len(getattr(d, kind)),) for kind, leaf in OFFSETS.items()}
    for layer, (n_in, n_out) in enumerate(((inputs, "U"), ("U", "V"), ("V", 2))):
        shapes |= {f"{PREFIX}w{layer}": (n_in, n_out), f"{PREFIX}b{layer}": (n_out,)}
    return shapes


def learned_decays(decays: tuple[float, ...], offsets: Tensor, clip: bool) -> tuple[float, ...]:
    """1 - (1 - b) exp(10 theta) in float32, as the reference computes it; not every kind is kept inside [0, 1]."""
    new = 1.0 - (1.0 - torch.tensor(decays, dtype=torch.float32)) * torch.exp(10.0 * offsets.cpu())
    return tuple((new.clamp(0.0, 1.0) if clip else new).tolist())


def prepare(theta: Theta, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Features with the learned decays, and the network, flat (1, P), which all tensors share; or one for each of
    several networks side by side."""
    initial = SMALL_FC.decays
    decays = {
        kind: learned_decays(getattr(initial, kind), theta[leaf], clip=kind != "momentum")
        for kind, leaf in OFFSETS.items()
    }
    weights, biases = ([theta[f"{PREFIX}{kind}{layer}"] for layer in range(3)] for kind in "wb")
    return {
        "features": replace(SMALL_FC, decays=Decays(**decays)),
        "network": networks.flatten_network(weights, biases),
        "sizes": (weights[0].shape[-2], *(b.shape[-1] for b in biases)),
    }


def init_state(p: Tensor, group: Mapping[str, Any], theta: Theta) -> dict[str, Tensor]:
    return accumulators.init(p, group["axis_order"], SMALL_FC.decays, group["state_dtype"])


def init_run(theta: Theta) -> dict[str, Tensor]:
    return {}


def update(
    tensors: TensorList,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor | None,
) -> UpdateResult:
    """One step: o0 exp(exp_mult o1) step_mult, times lr and the step_scale of the group."""
    features = weights["features"]
    (measured,), decision = measure([(tensors, features)], run, loss)
    network = specialize_networks(
        tensors,
        features,
        measured,
        weights["network"],
        weights["sizes"],
        constants=decision.step_features,
        factors=[tensors["step_scale"]],
        step_mult=settings["step_mult"],
    )
    tf32 = settings["precision"] == "tf32"
    sums = passes.apply_network(tensors, features, measured, network, settings["exp_mult"], decision.skip, tf32)
    return UpdateResult({}, decision.skip, {"update_rms": passes.update_rms(tensors, sums.select(1, 0))})


SMALL_FC_RULE = Rule(
    name="small_fc_lopt",
    class_name="SmallFC",
    summary="small_fc_lopt (Metz et al. 2022): one per-element network 39-32-32-2 with features of the step count.",
    defaults={
        "lr": 1.0,
        "weights": "auto",
        "weight_decay": 0.0,
        "axis_order": "torch",
        "step_mult": 0.001,
        "exp_mult": 0.001,
        "step_scale": 1.0,
        "precision": "exact",
        "max_grad_norm": 0.0,
        "max_nonfinite_steps": 10,
        "state_dtype": "float32",
        "stochastic_rounding": False,
    },
    per_group=("axis_order", "step_scale", "state_dtype"),
    shapes=_shapes(),
    init_state=init_state,
    init_run=init_run,
    prepare=prepare,
    update=update,
    own_schedule=True,
    finetune_lr=0.03,
    new_layer_lr=0.1,  # more undoes an encoder of 6 layers
    needs_horizon=False,
    needs_loss=False,
)
MULO_RULE = Rule(
    name="mulo",
    class_name="MuLO",
    summary="μLO (Therien et al. 2024): small_fc_lopt with a width multiplier for each tensor, its step_scale.",
    defaults={
        "lr": 1.0,
        "weights": "auto",
        "weight_decay": 0.0,
        "axis_order": "torch",
        "step_mult": 0.01,
        "exp_mult": 0.001,
        "step_scale": 1.0,
        "precision": "exact",
        "max_grad_norm": 0.0,
        "max_nonfinite_steps": 10,
        "state_dtype": "float32",
        "stochastic_rounding": False,
    },
    per_group=("axis_order", "step_scale", "state_dtype"),
    shapes=_shapes(),
    init_state=init_state,
    init_run=init_run,
    prepare=prepare,
    update=update,
    own_schedule=True,
    finetune_lr=0.03,
    new_layer_lr=0.1,  # more undoes an encoder of 6 layers
    needs_horizon=False,
    needs_loss=False,
    nan_to_zero=True,
)
# Published as a plain optimizer: the schedule is the caller's, lr is the step size.
ELO_RULE = Rule(
    name="elo",
    class_name="ELO",
    summary="ELO: the small_fc network without decay offsets, under an ordinary learning-rate schedule.",
    defaults={
        "lr": 1e-3,
        "weights": "auto",
        "weight_decay": 0.0,
        "axis_order": "torch",
        "step_mult": 1.0,
        "exp_mult": 0.001,
        "step_scale": 1.0,
        "precision": "exact",
        "max_grad_norm": 0.0,
        "max_nonfinite_steps": 10,
        "state_dtype": "float32",
        "stochastic_rounding": False,
    },
    per_group=("axis_order", "step_scale", "state_dtype"),
    shapes=_shapes(),
    init_state=init_state,
    init_run=init_run,
    prepare=prepare,
    update=update,
    own_schedule=False,
    finetune_lr=5e-5,
    needs_horizon=False,
    needs_loss=False,
    nan_to_zero=True,
)

RULES = (SMALL_FC_RULE, MULO_RULE, ELO_RULE)
