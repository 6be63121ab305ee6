"""Plain-PyTorch kernels of what lies between the passes: the decision about a step, the scheduler, the networks.

All of it is small: vectors of a run and rows per tensor. Axes: T tensors, S statistics, F feature columns, I inputs
of the scheduler, H hidden units, K networks in the bank, P weights of a network, C inputs that are constant over a
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lopt.features import (
    LOSS_DECAYS,
    LOSS_MIN_START,
    SHARED_INPUTS,
    STAT_NONFINITE,
    STAT_PAIRS,
    STEP_SCALES,
    TIME_FRACTIONS,
)
from hf_lopt.kernels.arguments import Advance, Assign, LstmStep, Pool, SpecializeNetworks, ZeroNan


CELO_LR_MULT = 0.1  # what Celo multiplies the exponential of its multiplier with


def _filled(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.cat([torch.full((1,), x, dtype=torch.float32, device=like.device) for x in values])


def _constant(values: Sequence[float], like: Tensor) -> Tensor:
    """Float32 numbers on the device of ``like``; on an accelerator made there, since a copy would wait."""
    return like.new_tensor(values, dtype=torch.float32) if like.device.type == "cpu" else _filled(values, like)


def step_features(step: Tensor) -> Tensor:
    """tanh(step / tau - 1), shape (11,), or (T, 11) for a step of each tensor; it counts those done, from 0."""
    return torch.tanh(step.to(torch.float32).unsqueeze(-1) / _constant(STEP_SCALES, step) - 1.0)


def time_features(step: Tensor, num_training_steps: float | Tensor) -> Tensor:
    """tanh(10 (step / num_training_steps - tau)), shape (9,); ``step`` counts the steps done, 0 at the first."""
    fractions = _constant(TIME_FRACTIONS, step)
    return torch.tanh(10.0 * (step.to(torch.float32) / num_training_steps - fractions))


def loss_decays(num_training_steps: float, like: Tensor) -> Tensor:
    """exp(-1/h) for ten h, spaced evenly in log from 10 steps to ``num_training_steps``; (10,) float64."""
    horizons = torch.logspace(
        1.0, math.log10(num_training_steps), LOSS_DECAYS, dtype=torch.float64, device=like.device
    )
    return torch.exp(-1.0 / horizons)


def next_loss_buffer(
    means: Tensor, minimum: Tensor, loss: Tensor, step: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """New means and their new running minimum (10,) with the decays (10,), and the loss features (9,), each in
    [-1, 1]. Of R replicas: (R, 10) each, with ``loss`` and ``step`` (R, 1).

    The loss is clipped at twice the largest bias-corrected mean so far. A feature compares two
    neighbouring means, both above the running minimum of the faster one; all are 0 in the first two steps. The
    corrections 1 - d^n are small next to 1, so the arithmetic is in float64 and rounded once.

    Two cases that the references do not have in mind. Means of 0, after losses of exactly 0, are no measure for a
    clip, which would make every later loss 0: there is none then. A buffer that is still empty at a later step, in a
    run that goes on without its state, begins as if all losses before had been this one.
    """
    empty = (step > 0) & (minimum >= LOSS_MIN_START)
    means, minimum, loss = means.double(), minimum.double(), loss.double()
    correction = 1.0 - decay ** (step + 1)
    largest = torch.where(step > 0, (means / correction).amax(-1, keepdim=loss.dim() > 0), loss)
    loss = torch.where(largest == 0.0, loss, torch.minimum(loss, 2.0 * largest.abs()))
    means = torch.where(empty, correction * loss, decay * means + (1.0 - decay) * loss)
    corrected = means / correction
    minimum = torch.minimum(minimum, corrected)
    slower = corrected[..., 1:] - minimum[..., :-1]
    slope = (corrected[..., :-1] - minimum[..., :-1]) / slower.clamp_min(1e-8) - 1.0
    features = torch.where(step + 1 > 2, slope.clamp(-1.0, 1.0), 0.0)
    return means.float(), minimum.float(), features.float()


def _log_magnitude(x: Tensor) -> Tensor:
    return 0.5 * torch.log(1e-8 + (10.0 * x).abs()).clamp(-5.0, 5.0)


def velo_tensor_features(stats: Tensor, mean_p2: Tensor, numel: Tensor, ranks: Tensor, second_moments: int) -> Tensor:
    """Per-tensor inputs of VeLO's scheduler, (T, 12): L(mean v), rank one-hot (5), L(var m) (3), L(var v) (3).

    ``stats`` are the sums (T, S) of pass 0, taken before the accumulators are updated, ``mean_p2`` and ``numel`` (T,),
    all float64. The tensor is rescaled to unit mean square first, and "var v" uses the momentum means, as in the
    reference. Sums are combined in float64, since a variance is their difference.
    """
    scale = mean_p2.clamp_min(1e-9).rsqrt().unsqueeze(1)
    pairs = (stats[:, STAT_PAIRS:] / numel.unsqueeze(1)).unflatten(1, (-1, 2))
    v, v2 = pairs[:, :second_moments, 0], pairs[:, :second_moments, 1]
    m, m2 = pairs[:, second_moments:, 0], pairs[:, second_moments:, 1]
    var_m = scale.square() * (m2 - m.square())
    var_v = scale.square() * (v2 - 2.0 * m * v + m.square())
    parts = (_log_magnitude(scale * v), ranks, _log_magnitude(var_m), _log_magnitude(var_v))
    return torch.cat([x.to(torch.float32) for x in parts], 1)


def advance(arguments: Advance) -> tuple[Tensor, Tensor, Tensor]:
    """Decides whether to skip the step, and takes the run one step further, in place.

    A step is skipped (bool, 0-d) if ``nonfinite`` says so, if a gradient was not finite by the statistics, or if a sum
    of squares of a feature or the loss is not. The counters count steps, skipped ones and those in a row; a skipped
    step leaves the loss buffer alone.

    Also returns features of the run, float32: of the time (9,) and of the loss (9,) (zeros without a loss buffer), of
    the step count (11,), and 1 / (1 - d^n) for the decays ``correction_decays``, with n the number of this step from
    1. And the inputs of the scheduler, one of ``rows`` for each tensor: time, loss, and VeLO's features of each tensor
    where there are ``tensor_inputs``.
    """
    x, step = arguments, arguments.counters[0].clone()
    decisions = [(y[:, STAT_NONFINITE] > 0).any() for y in x.stats] + [~torch.isfinite(y).all() for y in x.sums]
    decisions += [] if x.nonfinite is None else [x.nonfinite]
    decisions += [] if x.loss is None else [~torch.isfinite(x.loss)]
    skip = torch.stack(decisions).any() if decisions else torch.zeros_like(step, dtype=torch.bool)
    skipped = skip.to(torch.int64)
    counters = x.counters
    counters.copy_(torch.stack([step + 1 - skipped, counters[1] + skipped, (counters[2] + 1) * skipped]))

    zeros = torch.zeros(9, dtype=torch.float32, device=step.device)
    times = time_features(step, x.horizon) if x.horizon > 0 else zeros
    losses = zeros
    if x.loss_buffer:
        assert x.loss is not None
        means, minimum = x.loss_buffer
        *new, losses = next_loss_buffer(means, minimum, x.loss, step, loss_decays(x.horizon, means))
        assign(Assign(x.loss_buffer, new, skip))
    n = (step + 1).double()
    corrections = [(1.0 / (1.0 - decay**n)).float().reshape(1) for decay in x.correction_decays]
    features = torch.cat([times, losses, step_features(step), *corrections])
    inputs = features[:SHARED_INPUTS].repeat(x.rows, 1)
    if x.tensor_inputs:
        stats, sums, numel, ranks = x.tensor_inputs
        second_moments = (stats.shape[1] - STAT_PAIRS) // 2 - 3
        mean_p2 = sums[:, x.p_column] / numel
        inputs = torch.cat([inputs, velo_tensor_features(stats, mean_p2, numel, ranks, second_moments)], 1)
    return skip, features, inputs


def pool(arguments: Pool) -> Tensor:
    """The LSTM's input and hidden state side by side, (T, 2H): the mixing layer adds to the second half of ``mixed``
    the largest over all rows of the rectified first half."""
    first, second = arguments.mixed.chunk(2, 1)
    mixed = second + torch.relu(first).max(0, keepdim=True).values
    return torch.cat([mixed, torch.stack(tuple(arguments.hidden))], 1)


def lstm_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden and cell state from the gates (T, 4H): input, candidate, forget (with 1 added), output."""
    i, g, f, o = gates.chunk(4, 1)
    cell = torch.sigmoid(f + 1.0) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def lstm_step(arguments: LstmStep) -> tuple[Tensor, Tensor, Tensor]:
    """The LSTM's new state, in place unless the step is skipped, and what its heads say: controls (T, K), the
    multiplier of the step size (T,), and the mixture of the bank (K, P) of networks (T, P).

    Celo takes the softmax of the controls and 0.1 times the exponential of the multiplier, VeLO both as they are.
    """
    x = arguments
    new_hidden, new_cell = lstm_cell(x.gates, torch.stack(tuple(x.cell)))
    out = torch.addmm(x.heads_bias, new_hidden, x.heads)
    controls, lr_mult = out[:, :-1].contiguous(), out[:, -1].clone()
    networks = (torch.softmax(controls, 1) if x.softmax and controls.shape[1] else controls) @ x.bank
    assign(Assign((*x.hidden, *x.cell), (*new_hidden.unbind(), *new_cell.unbind()), x.skip))
    return controls, CELO_LR_MULT * torch.exp(lr_mult) if x.softmax else lr_mult, networks


def specialize_networks(arguments: SpecializeNetworks) -> tuple[Tensor, Tensor, Tensor]:
    """Networks (T, P') on features that are not normalised, the size of the step (T,) and the decay (T,).

    The networks have the normaliser 1 / sqrt(eps + mean square) in the first matrix; they are without the last inputs,
    whose values ``constants`` are part of the first bias instead, and have the first ``outputs`` only.

    scale = lr * factors * step_mult, with ``floor`` times max(rms of p, floor); decay = lr * weight_decay.
    """
    x = arguments
    mean_squares = x.sums / x.numel.unsqueeze(1) if x.sums.numel() else x.sums
    scale = x.lr
    for factor in x.factors:
        scale = scale * factor
    if x.floor is not None:
        rms = (mean_squares[:, x.p_column] + 1e-9).sqrt().to(torch.float32)
        scale = scale * torch.maximum(rms, x.floor)
    scale, decay = scale * x.step_mult, x.lr * x.weight_decay
    if not x.sizes:
        return x.networks.new_empty(len(x.numel), 0), scale, decay
    layers, start = [], 0
    for i, (n_in, n_out) in enumerate(zip(x.sizes, x.sizes[1:], strict=False)):
        w = x.networks[:, start : start + n_in * n_out].unflatten(1, (n_in, n_out))
        b = x.networks[:, start + n_in * n_out : start + (n_in + 1) * n_out]
        start += (n_in + 1) * n_out
        if i == 0 and x.constants is not None:
            count = x.constants.shape[-1]
            b = b + (torch.atleast_2d(x.constants).unsqueeze(1) @ w[:, -count:]).squeeze(1)
            w = w[:, :-count]
        if i == 0:
            w = w * (mean_squares + x.norm_eps).rsqrt().to(torch.float32).unsqueeze(2)
        if i == len(x.sizes) - 2:
            w, b = w[:, :, : x.outputs], b[:, : x.outputs]
        layers += [w.flatten(1), b]
    return torch.cat([y.expand(len(x.numel), -1) for y in layers], 1), scale, decay


def assign(arguments: Assign) -> None:
    """Writes ``values`` into ``targets`` unless ``skip``."""
    targets, values, skip = arguments.targets, arguments.values, arguments.skip
    if not targets:
        return
    if skip.device.type == "cpu":
        if skip:
            return
    else:  # on an accelerator asking for the decision would wait for it
        values = [torch.where(skip, target, value) for target, value in zip(targets, values, strict=True)]
    torch._foreach_copy_(list(targets), list(values))


def zero_nan(arguments: ZeroNan) -> None:
    """Writes 0 where there is NaN, and leaves infinities."""
    for x in arguments.tensors:
        x.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
