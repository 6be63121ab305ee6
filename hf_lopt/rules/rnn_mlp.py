"""rnn_mlp: a per-tensor LSTM and a per-parameter network that send messages to each other.

Metz et al. 2020, "Tasks, stability, architecture, and compute: Training more effective learned optimizers, and using
them to train themselves"; google/learned_optimization, rnn_mlp_lopt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_lopt import distributed
from hf_lopt.features import RNN_MLP, STEP_SCALES
from hf_lopt.kernels.reference.formats import accumulators as accumulators_of
from hf_lopt.kernels.reference.passes import block_indices, block_size, ema
from hf_lopt.rules.base import Rule, UpdateResult
from hf_lopt.step import accumulators, networks, passes
from hf_lopt.step.measure import measure
from hf_lopt.step.networks import Theta, specialize_networks
from hf_lopt.step.scheduler import init_scheduler
from hf_lopt.step.tensors import TensorList


STEP_MULT = EXP_MULT = 0.001
FROM_LSTM, FROM_MLP, TO_MLP = 18, 16, 17
LOSS_DECAY, CLIP_DECAY, CLIP_FACTOR = 0.9, 0.99, 10.0
# The original has 1e-8, which rounds away next to 1 in float32 and leaves 0 / 0.
CORRECTION_EPS = 1e-7


def _shapes() -> dict[str, tuple[int | str, ...]]:
    inputs = sum(RNN_MLP.widths()) + len(STEP_SCALES) + 3 + TO_MLP
    shapes: dict[str, tuple[int | str, ...]] = {
        "initial_from_lstm": (FROM_LSTM,),
        "initial_from_mlp": (FROM_MLP,),
        "lstm_init_state/hidden": (1, "H"),
        "lstm_init_state/cell": (1, "H"),
        "rnn_params/rnn/linear/w": ("R", "4H"),  # R = 18 + from_lstm + from_mlp inputs, and H of the state
        "rnn_params/rnn/linear/b": ("4H",),
        "rnn_to_ff_params/rnn_to_ff/w": ("H", TO_MLP),
        "rnn_to_ff_params/rnn_to_ff/b": (TO_MLP,),
        "rnn_to_in_params/rnn_to_in/w": ("H", FROM_LSTM),
        "rnn_to_in_params/rnn_to_in/b": (FROM_LSTM,),
    }
    for layer, (n_in, n_out) in enumerate(((inputs, "U"), ("U", "V"), ("V", 2 + FROM_MLP))):
        shapes[f"ffmod_params/mlp/~/linear_{layer}/w"] = (n_in, n_out)
        shapes[f"ffmod_params/mlp/~/linear_{layer}/b"] = (n_out,)
    return shapes


def init_state(p: Tensor, group: Mapping[str, Any], theta: Theta) -> dict[str, Tensor]:
    """Accumulators, scheduler state and the message from the network, (16,).

    Raises:
        ValueError: for a tensor of rank above 4: the LSTM has four inputs for the shape.
    """
    if p.dim() > 4:
        raise ValueError(
            f"rnn_mlp has inputs for at most 4 axes, got a parameter of shape {tuple(p.shape)}; take another rule"
        )
    state = accumulators.init(p, group["axis_order"], RNN_MLP.decays, group["state_dtype"]) | init_scheduler(p, theta)
    return state | {"from_mlp": theta["initial_from_mlp"].to(p.device, copy=True)}


def init_run(theta: Theta) -> dict[str, Tensor]:
    """The message from the LSTM (18,), the normaliser of the loss, and the gradient clipper's average."""
    return {
        "from_lstm": theta["initial_from_lstm"].clone(),
        "loss_mean": torch.zeros((), dtype=torch.float32),
        "loss_var": torch.zeros((), dtype=torch.float32),
        "clip_value": torch.tensor(1.0 - CLIP_DECAY, dtype=torch.float32),
    }


def prepare(theta: Theta, settings: Mapping[str, Any]) -> dict[str, Any]:
    layers = [[theta[f"ffmod_params/mlp/~/linear_{i}/{kind}"].unsqueeze(0) for i in range(3)] for kind in "wb"]
    sizes = (layers[0][0].shape[1], *(b.shape[1] for b in layers[1]))
    return {"network": networks.flatten_network(*layers), "sizes": sizes, "theta": theta}


def _log_magnitude(x: Tensor) -> Tensor:
    return torch.log(1e-8 + x.abs()).clamp(-5.0, 5.0)


def loss_features(run: Mapping[str, Tensor], loss: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The new normaliser, and the normalised training and validation losses (2,); the latter is taken as 0."""
    mean = LOSS_DECAY * run["loss_mean"] + (1.0 - LOSS_DECAY) * loss
    var = LOSS_DECAY * run["loss_var"] + (1.0 - LOSS_DECAY) * (mean - loss).square()
    correction = 1.0 / (1.0 - LOSS_DECAY ** (run["step"] + 1).double() + CORRECTION_EPS)
    losses = torch.stack([loss, torch.zeros_like(loss)])
    normalised = (losses - mean * correction) * (var * correction + 1e-8).rsqrt()
    return {"loss_mean": mean, "loss_var": var}, normalised.clamp(-5.0, 5.0).float()


def _moments(x: Tensor) -> Tensor:
    """(Σx, Σx²) in float64."""
    x = x.double()
    return torch.stack([x.sum(), x.square().sum()])


def tensor_sums(tensors: TensorList) -> Tensor:
    """(Σx, Σx²) of the gradient, the updated momenta, the updated second moments and the parameter: (T, 8) float64, of
    the whole tensors."""
    d = RNN_MLP.decays
    rows = []
    scales = tensors.scales
    momenta = accumulators_of(tensors.momenta, scales["momentum_scales"])
    second_moments = accumulators_of(tensors.second_moments, scales["second_scales"])
    for p, g, m, v in zip(tensors.params, tensors.grads, momenta, second_moments, strict=True):
        # State in float32 is there as a whole; what has to be decoded is decoded some rows at a time.
        indices = [()] if m.values.dtype == torch.float32 else block_indices(p.shape, block_size(p), m.row_axis)
        row = None
        for index in indices:
            part, param = (g[index], p[index]) if index else (g, p)
            new = ema(m.load(index), part, d.momentum), ema(v.load(index), part.square(), d.second_moment)
            found = torch.cat([_moments(x) for x in (part, *new, param)])
            row = found if row is None else row + found
        rows.append(torch.zeros(8, dtype=torch.float64, device=p.device) if row is None else row)
    return torch.stack(distributed.sum_over(list(zip(rows, _shard_groups(tensors), strict=True))))


def _shard_groups(tensors: TensorList) -> list[tuple[Any, ...]]:
    """The process groups over which each tensor is spread."""
    return [sharding.groups() if sharding else () for sharding in tensors.layout.shardings]


def tensor_features(sums: Tensor, numel: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Inputs of the LSTM from each tensor: (T, 13) before the two losses, (T, 3) after them. The trained order is
    alphabetical: gradient norm, is-scalar, mean of m, v and p (size and sign each), norm of p, shape (4); variances of
    m, v, p. ``shapes`` are the reference's."""
    count = torch.stack(
        [numel, *[len(d) * numel for d in (RNN_MLP.decays.momentum, RNN_MLP.decays.second_moment)], numel]
    )
    total, square = sums.unflatten(1, (4, 2)).unbind(2)
    mean = (total / count.T)[:, 1:]
    variance = ((square / count.T)[:, 1:] - mean.square()).clamp_min(0.0)
    norms = _log_magnitude(square[:, [0, 3]].sqrt())
    scalar = [1.0 if not shape else -1.0 for shape in shapes]
    sizes = [[math.log(n) - 1.0 for n in (*shape, *[1] * (4 - len(shape)))] for shape in shapes]
    means = torch.stack([_log_magnitude(mean), torch.sign(mean)], 2).flatten(1)
    before = [norms[:, :1], sums.new_tensor(scalar).unsqueeze(1), means, norms[:, 1:], sums.new_tensor(sizes)]
    return torch.cat(before, 1).float(), _log_magnitude(variance).float()


def update(
    tensors: TensorList,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor,
) -> UpdateResult:
    """One step. The LSTM sees accumulators that are already updated, the network what the LSTM says in this step."""
    theta, layout, numel = weights["theta"], tensors.layout, tensors.layout.numel
    run = {**run, "step": run["step"].clone()}  # measuring counts the step
    k = (run["step"] + 1).double()
    bound = (CLIP_FACTOR * run["clip_value"] / (1.0 - CLIP_DECAY**k)).float()
    # NaN stays NaN, infinity would not.
    clipped = [torch.where(g.isfinite(), g, math.nan).float().clamp(-bound, bound) for g in tensors.grads]
    tensors = replace(tensors, grads=clipped)
    moments = tensor_sums(tensors)
    (measured,), decision = measure([(tensors, RNN_MLP)], run, loss)
    assert decision.loss is not None
    loss_state, losses = loss_features(run, decision.loss)
    mean_square = (moments[:, 1] / numel).mean().float()
    clip_value = CLIP_DECAY * run["clip_value"] + (1.0 - CLIP_DECAY) * (1e-8 + mean_square).sqrt()

    shapes = [accumulators.reference_shape(s, o) for s, o in zip(layout.shapes, layout.axis_orders, strict=True)]
    before, after = tensor_features(moments, numel, shapes)
    rows = len(tensors)
    from_mlp = torch.stack(tensors.tensors("from_mlp"))
    inputs = torch.cat([run["from_lstm"].expand(rows, -1), from_mlp, before, losses.expand(rows, -1), after], 1)
    hidden, cell = (torch.stack(tensors.tensors(key)) for key in ("lstm_hidden", "lstm_cell"))
    hidden, cell = networks.lstm(inputs, hidden, cell, theta)
    from_lstm = networks.linear(hidden, theta, "rnn_to_in_params/rnn_to_in").mean(0)
    to_mlp = networks.linear(hidden, theta, "rnn_to_ff_params/rnn_to_ff")

    network = specialize_networks(
        tensors,
        RNN_MLP,
        measured,
        weights["network"],
        weights["sizes"],
        constants=_constants(tensors, run["step"], measured.mean_squares[:, RNN_MLP.column("p")], to_mlp),
        outputs=weights["sizes"][-1],
        step_mult=STEP_MULT,
    )
    sums = passes.apply_network(tensors, RNN_MLP, measured, network, EXP_MULT, decision.skip)

    messages = torch.stack(distributed.sum_over(list(zip(sums[:, 1:], _shard_groups(tensors), strict=True))))
    passes.store(
        tensors,
        decision.skip,
        lstm_hidden=hidden.unbind(),
        lstm_cell=cell.unbind(),
        from_mlp=(messages / numel.unsqueeze(1)).float().unbind(),
    )
    new_run = passes.keep_if(decision.skip, run, loss_state | {"from_lstm": from_lstm, "clip_value": clip_value})
    report = {"update_rms": passes.update_rms(tensors, sums.select(1, 0)), "scheduler_inputs": inputs}
    return UpdateResult(new_run, decision.skip, report)


def _constants(tensors: TensorList, step: Tensor, mean_p2: Tensor, to_mlp: Tensor) -> Tensor:
    """Inputs of the network that are constant over a tensor, (T, 31): sines of the step count, the number of tensors,
    norm and size of the tensor, and the message of the LSTM (T, 17)."""
    rows, numel = len(tensors), tensors.layout.numel
    scales = torch.tensor(STEP_SCALES, dtype=torch.float32, device=tensors.layout.device)
    times = torch.sin(step.float() / (scales * math.pi))
    norm = torch.log((mean_p2 * numel).sqrt() + 1e-8)
    count = torch.full_like(norm, math.log(rows) - 1.0)
    per_tensor = torch.stack([count, norm, torch.log(numel)], 1).float()
    return torch.cat([times.expand(rows, -1), per_tensor, to_mlp], 1)


RNN_MLP_RULE = Rule(
    name="rnn_mlp",
    class_name="RNNMLP",
    summary="rnn_mlp (Metz et al. 2020): an LSTM per tensor and a network per parameter. Needs the loss.",
    defaults={
        "lr": 1.0,
        "weights": "auto",
        "weight_decay": 0.0,
        "axis_order": "torch",
        "max_nonfinite_steps": 10,
        "state_dtype": "float32",
        "stochastic_rounding": False,
    },
    per_group=("axis_order", "state_dtype"),
    shapes=_shapes(),
    init_state=init_state,
    init_run=init_run,
    prepare=prepare,
    update=update,
    own_schedule=True,
    finetune_lr=0.05,
    needs_horizon=False,
    needs_loss=True,
)

RULES = (RNN_MLP_RULE,)
