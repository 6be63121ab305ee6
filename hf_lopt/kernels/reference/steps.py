"""The operators beside the three passes, in plain PyTorch: whole steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lopt.kernels.arguments import AdamStep, Descend
from hf_lopt.kernels.reference import formats
from hf_lopt.kernels.reference.passes import (
    block_indices,
    block_of,
    block_size,
    ema,
    slice_indices,
    store_parameter,
    store_unless,
    sum_of_squares,
)


def descend(arguments: Descend) -> None:
    """p <- p - lr (step / rms + weight_decay p), rounded once.

    rms = sqrt(squares / numel + norm_eps); 1 without ``squares``. With ``slice_axes`` each slice is a tensor of its
    own, in the order of the results of ``apply_network``; then ``lr`` and ``weight_decay`` are (T,) or have a number
    for each slice."""
    x = arguments
    store = store_unless(x.skip)
    if store is None:
        return
    indices: list[Sequence[tuple[slice, ...]]] = [((),)] * len(x.params)
    if x.slice_axes:
        indices = [slice_indices(p.shape, x.slice_axes[2 * t : 2 * t + 2]) for t, p in enumerate(x.params)]
    inverse_rms = None
    if x.squares is not None and x.numel is not None:
        inverse_rms = (x.squares / x.numel + x.norm_eps).rsqrt().float()
    slices = [(t, i) for t, indices_of_tensor in enumerate(indices) for i in indices_of_tensor]

    def setting(values: Tensor, t: int, number: int) -> Tensor:
        return values[0 if len(values) == 1 else number if len(values) == len(slices) else t]

    places = formats.read_places(x.places, x.params)
    for number, (t, i) in enumerate(slices):
        p, step, rate = x.params[t][i], x.steps[t][i], setting(x.lr, t, number)
        shrink = rate * setting(x.weight_decay, t, number)
        rate = rate if inverse_rms is None else rate * inverse_rms[number]
        for index in block_indices(p.shape, block_size(p)):
            value, noise = p[index].float(), None
            if x.step is not None and x.round_params:
                noise = formats.Noise(places[t].of_slice(i), index, value.shape, x.step)
            new = torch.addcmul(value, value, shrink, value=-1) - step[index] * rate
            store_parameter(p[index], new, store, noise)


def _slice_numbers(values: Tensor, t: int, params: Sequence[Tensor], index: tuple[slice, ...]) -> Tensor:
    """The numbers of a block of tensor ``t``: one for all, or one for each place along the first axis."""
    slices = values.numel() // len(params)
    if slices == 1:
        return values[t]
    of_tensor = values.view(len(params), slices)[t].view(1, -1, *[1] * (params[t].dim() - 1))
    return block_of(of_tensor, index)[0]


def adam_step(arguments: AdamStep) -> Tensor:
    """One pass of Adam with the variations of the learned rules.

    step = scale[t] * momentum_correction * m / (sqrt(second_correction * v + inner_eps) + outer_eps),
    p <- p - decay[t] * p - step. Returns Σ step², (T,) float64.
    """
    x = arguments
    out = torch.zeros(len(x.params), dtype=torch.float64, device=x.scale.device)
    store = store_unless(x.skip)
    if store is None:
        return out
    momenta = formats.accumulators(x.momenta, x.momentum_scales)
    second_moments = formats.accumulators(x.second_moments, x.second_scales)
    places = formats.read_places(x.places, x.params)
    for t, (p, g) in enumerate(zip(x.params, x.grads, strict=True)):
        for index in block_indices(p.shape, block_size(p), momenta[t].row_axis):
            gradient, value = g[index].float(), p[index].float()
            gradient = gradient.clamp(-x.clip, x.clip) if x.clip < math.inf else gradient
            m = ema(momenta[t].load(index), gradient, [x.momentum_decay])
            v = ema(second_moments[t].load(index), gradient * gradient, [x.second_decay])
            root = (v[0] * x.second_correction + x.inner_eps).sqrt_().add_(x.outer_eps)
            rate, shrink = (_slice_numbers(values, t, x.params, index) for values in (x.scale, x.decay))
            step = m[0] * x.momentum_correction / root * rate
            out[t] += sum_of_squares(step)
            noise = None if x.step is None else formats.Noise(places[t], index, value.shape, x.step)
            momenta[t].put(index, m, store, noise, 0)
            second_moments[t].put(index, v, store, noise, 1)
            new = torch.addcmul(value, value, shrink, value=-1) - step
            store_parameter(p[index], new, store, noise if x.round_params else None)
    return out
