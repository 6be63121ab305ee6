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

from hf_lopt._plain import STAT_NONFINITE, STAT_PAIRS


# Time scales of the features of the step count.
STEP_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 30000.0, 100000.0)
# Fractions of the run at which the time features switch.
TIME_FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
LOSS_DECAYS = 10
# Places of the features that ``advance`` returns; the corrections come after them.
TIME, LOSS, STEP = slice(0, 9), slice(9, 18), slice(18, 29)
SHARED_INPUTS = 18
LR_MULT = 0.1  # of Celo's exponential


def _filled(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.cat([torch.full((1,), x, dtype=torch.float32, device=like.device) for x in values])


def _constant(values: Sequence[float], like: Tensor) -> Tensor:
    """Float32 numbers on the device of ``like``; on an accelerator made there, since a copy would wait."""
    return like.new_tensor(values, dtype=torch.float32) if like.device.type == "cpu" else _filled(values, like)


def step_features(step: Tensor) -> Tensor:
    """tanh(step / tau - 1), shape (11,), or (T, 11) for a step of each tensor; it counts those done, from 0."""
    return torch.tanh(step.to(torch.float32).unsqueeze(-1) / _constant(STEP_SCALES, step) - 1.0)


def time_features(step: Tensor, num_training_steps: float) -> Tensor:
    """tanh(10 (step / num_training_steps - tau)), shape (9,); ``step`` counts the steps done, 0 at the first."""
    fractions = _constant(TIME_FRACTIONS, step)
    return torch.tanh(10.0 * (step.to(torch.float32) / num_training_steps - fractions))


def loss_decays(num_training_steps: float, like: Tensor) -> Tensor:
    """exp(-1/h) for ten h, spaced evenly in log from 10 steps to ``num_training_steps``; (10,) float64."""
    horizons = torch.logspace(
        1.0, math.log10(num_training_steps), LOSS_DECAYS, dtype=torch.float64, device=like.device
    )
    return torch.exp(-1.0 / horizons)


def update_loss_buffer(
    means: Tensor, minimum: Tensor, loss: Tensor, step: Tensor, num_training_steps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """New means and their new running minimum (10,), and the loss features (9,), each in [-1, 1]; see
    :func:`next_loss_buffer`."""
    return next_loss_buffer(means, minimum, loss, step, loss_decays(num_training_steps, means))


def next_loss_buffer(
    means: Tensor, minimum: Tensor, loss: Tensor, step: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with given decays (10,). Or of many runs: (R, 10) each, and ``loss`` and ``step`` (R, 1).

    The loss is clipped at twice the largest bias-corrected mean so far. A feature compares two
    neighbouring means, both above the running minimum of the faster one; all are 0 in the first two steps. The
    corrections 1 - d^n are small next to 1, so the arithmetic is in float64 and rounded once.
    """
    means, minimum, loss = means.double(), minimum.double(), loss.double()
    correction = 1.0 - decay ** (step + 1)
    largest = torch.where(step > 0, (means / correction).amax(-1, keepdim=loss.dim() > 0), loss)
    loss = torch.minimum(loss, 2.0 * largest.abs())
    means = decay * means + (1.0 - decay) * loss
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


def advance(
    stats: Sequence[Tensor],
    sums: Sequence[Tensor],
    bad: Tensor | None,
    loss: Tensor | None,
    counters: Tensor,
    loss_buffer: Sequence[Tensor],
    horizon: float,
    corrected: Sequence[float],
    own: Sequence[Tensor],
    p_column: int,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decides whether to skip the step, and takes the run one step further, in place.

    A step is skipped (bool, 0-d) if ``bad`` says so, if a gradient was not finite by the statistics ``stats`` (T, S),
    or if a sum of squares of a feature (T, F) or the ``loss`` is not. ``counters`` (3,) int64 count steps, skipped
    ones and those in a row; ``loss_buffer`` holds nothing, or the means and their minimum (10,), which a skipped step
    leaves alone. ``horizon`` is the number of steps of the run.

    Also returns features of the run, float32: of the time (9,) and of the loss (9,) (zeros without a loss buffer), of
    the step count (11,), and 1 / (1 - d^n) for the decays ``corrected``, with n the number of this step from 1. And
    the inputs of the scheduler, one of ``rows`` for each tensor: time, loss, and VeLO's features of each tensor where
    ``own`` has (statistics with moments (T, S), sums of squares with Σp² in ``p_column`` (T, F), numel (T,), ranks
    (T, 5)).
    """
    step = counters[0].clone()
    decisions = [(x[:, STAT_NONFINITE] > 0).any() for x in stats] + [~torch.isfinite(x).all() for x in sums]
    decisions += [] if bad is None else [bad]
    decisions += [] if loss is None else [~torch.isfinite(loss)]
    skip = torch.stack(decisions).any() if decisions else torch.zeros_like(step, dtype=torch.bool)
    skipped = skip.to(torch.int64)
    counters.copy_(torch.stack([step + 1 - skipped, counters[1] + skipped, (counters[2] + 1) * skipped]))

    zeros = torch.zeros(9, device=step.device)
    times = time_features(step, horizon) if horizon > 0 else zeros
    losses = zeros
    if loss_buffer:
        assert loss is not None
        *new, losses = update_loss_buffer(*loss_buffer, loss, step, horizon)
        assign(loss_buffer, new, skip)
    n = (step + 1).double()
    corrections = [(1.0 / (1.0 - decay**n)).float().reshape(1) for decay in corrected]
    features = torch.cat([times, losses, step_features(step), *corrections])
    inputs = features[:SHARED_INPUTS].repeat(rows, 1)
    if own:
        moments, totals, numel, ranks = own
        second_moments = (moments.shape[1] - STAT_PAIRS) // 2 - 3
        mean_p2 = totals[:, p_column] / numel
        inputs = torch.cat([inputs, velo_tensor_features(moments, mean_p2, numel, ranks, second_moments)], 1)
    return skip, features, inputs


def pool(mixed: Tensor, hidden: Sequence[Tensor]) -> Tensor:
    """The LSTM's input and hidden state side by side, (T, 2H): the mixing layer adds to the second half of ``mixed``
    (T, 2H) the largest over all rows of the rectified first half. ``hidden`` are T vectors (H,)."""
    first, second = mixed.chunk(2, 1)
    return torch.cat([second + torch.relu(first).max(0, keepdim=True).values, torch.stack(tuple(hidden))], 1)


def lstm_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden and cell state from the gates (T, 4H): input, candidate, forget (with 1 added), output."""
    i, g, f, o = gates.chunk(4, 1)
    cell = torch.sigmoid(f + 1.0) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def lstm_step(
    gates: Tensor,
    hidden: Sequence[Tensor],
    cell: Sequence[Tensor],
    heads: Tensor,
    heads_bias: Tensor,
    bank: Tensor,
    celo: bool,
    skip: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The LSTM's new state, in place unless ``skip``, and what its heads say: controls (T, K), the multiplier of the
    step size (T,), and the mixture of the bank (K, P) of networks (T, P).

    ``heads`` (H, K + 1): the last column is the multiplier. Celo takes the softmax of the controls and 0.1 times the
    exponential of the multiplier, VeLO both as they are.
    """
    new_hidden, new_cell = lstm_cell(gates, torch.stack(tuple(cell)))
    out = torch.addmm(heads_bias, new_hidden, heads)
    controls, lr_mult = out[:, :-1].contiguous(), out[:, -1].clone()
    networks = (torch.softmax(controls, 1) if celo and controls.shape[1] else controls) @ bank
    assign((*hidden, *cell), (*new_hidden.unbind(), *new_cell.unbind()), skip)
    return controls, LR_MULT * torch.exp(lr_mult) if celo else lr_mult, networks


def fold_network(
    networks: Tensor,
    sizes: Sequence[int],
    outputs: int,
    constants: Tensor | None,
    sums: Tensor,
    numel: Tensor,
    norm_eps: float,
    lr: Tensor,
    weight_decay: Tensor,
    factors: Sequence[Tensor],
    floor: Tensor | None,
    step_mult: float,
    p_column: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Networks on features that are not normalised, the size of the step and the decay.

    ``networks`` (T or 1, P) are flat, layer by layer the matrix and then the bias; ``sizes`` are the widths. The
    result is like it, (T, P'), with the normaliser 1 / sqrt(eps + mean square) in the first matrix and without the
    last inputs, whose values ``constants`` (C,) or (T, C) are part of the first bias instead, and with the first
    ``outputs`` only. ``sums`` (T, F) are sums of squares over ``numel`` (T,) elements. No ``sizes``: no networks.

    scale = lr * factors * step_mult, with ``floor`` (T,) times max(rms of p, floor), where Σp² is the column
    ``p_column`` of ``sums``; decay = lr * weight_decay; both (T,).
    """
    mean_squares = sums / numel.unsqueeze(1) if sums.numel() else sums
    scale = lr
    for factor in factors:
        scale = scale * factor
    if floor is not None:
        rms = (mean_squares[:, p_column] + 1e-9).sqrt().to(torch.float32)
        scale = scale * torch.maximum(rms, floor)
    scale, decay = scale * step_mult, lr * weight_decay
    if not sizes:
        return networks.new_empty(len(numel), 0), scale, decay
    layers, start = [], 0
    for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        w = networks[:, start : start + n_in * n_out].unflatten(1, (n_in, n_out))
        b = networks[:, start + n_in * n_out : start + (n_in + 1) * n_out]
        start += (n_in + 1) * n_out
        if i == 0 and constants is not None:
            count = constants.shape[-1]
            b = b + (torch.atleast_2d(constants).unsqueeze(1) @ w[:, -count:]).squeeze(1)
            w = w[:, :-count]
        if i == 0:
            w = w * (mean_squares + norm_eps).rsqrt().to(torch.float32).unsqueeze(2)
        if i == len(sizes) - 2:
            w, b = w[:, :, :outputs], b[:, :outputs]
        layers += [w.flatten(1), b]
    return torch.cat([x.expand(len(numel), -1) for x in layers], 1), scale, decay


def assign(targets: Sequence[Tensor], values: Sequence[Tensor], skip: Tensor) -> None:
    """Writes ``values`` into ``targets`` unless ``skip`` (bool, 0-d)."""
    if not targets:
        return
    if skip.device.type == "cpu":
        if skip:
            return
    else:  # on an accelerator asking for the decision would wait for it
        values = [torch.where(skip, target, value) for target, value in zip(targets, values, strict=True)]
    torch._foreach_copy_(list(targets), list(values))


def zero_nan(tensors: Sequence[Tensor]) -> None:
    """Writes 0 where there is NaN, and leaves infinities."""
    for x in tensors:
        x.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
