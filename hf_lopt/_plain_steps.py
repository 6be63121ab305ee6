"""The steps that stand beside the three passes, in plain PyTorch: the specification of the kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lopt._plain import block_size, blocks, cut, ema, slice_indices, store_unless, sum_of_squares


def descend(params, steps, lr, weight_decay, squares, numel, norm_eps, slice_axes, skip):
    """p <- p - lr (step / rms + weight_decay p), rounded once; ``steps`` float32, shaped like the parameters.

    rms = sqrt(squares / numel + norm_eps), of float64 (T,); 1 without ``squares``. With ``slice_axes`` each slice is a
    tensor of its own, in the order of the results of ``apply_network``; then ``lr`` and ``weight_decay`` are (T,) or
    have a number for each slice. Nothing is changed where ``skip`` (bool, 0-d) is true."""
    store = store_unless(skip)
    if store is None:
        return
    indices = [((),)] * len(params)
    if slice_axes:
        indices = [slice_indices(p.shape, slice_axes[2 * t : 2 * t + 2]) for t, p in enumerate(params)]
    unit = None if squares is None else (squares / numel + norm_eps).rsqrt().float()
    slices = [(t, i) for t, own in enumerate(indices) for i in own]

    def of(x: Tensor, t: int, number: int) -> Tensor:
        return x[0 if len(x) == 1 else number if len(x) == len(slices) else t]

    for number, (t, i) in enumerate(slices):
        p, step, rate = params[t][i], steps[t][i], of(lr, t, number)
        shrink = rate * of(weight_decay, t, number)
        rate = rate if unit is None else rate * unit[number]
        for index in blocks(p.shape, block_size(p)):
            value = p[index].float()
            store(p[index], torch.addcmul(value, value, shrink, value=-1) - step[index] * rate)


def orthogonalize(x, dtype, coefficients, steps, eps, norm_eps):
    """Matrices (..., R, C) with their singular values moved to about 1, float32, by a quintic iteration in ``dtype``.

    x <- x / (|x| + eps), and ``steps`` times x <- c0 x + (c1 A + c2 A²) x with A = x x^T, of the shorter side: three
    batched matrix products and a sum. At the end each matrix gets a mean square of 1 (``norm_eps`` is added to what it
    was), unless ``norm_eps`` is None. Returns the matrices, contiguous, and what their mean squares were, (...).
    """
    shape, transposed = x.shape, x.shape[-2] > x.shape[-1]
    x = x.reshape(-1, *shape[-2:])
    x = x.mT if transposed else x
    x = (x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + eps)).to(dtype)
    c0, c1, c2 = coefficients
    for _ in range(steps):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.add(a @ a, a, alpha=c1 / c2), x, beta=c0, alpha=c2)
    x = x.float()
    mean_squares = x.square().mean((1, 2))
    if norm_eps is not None:
        x = x * (mean_squares + norm_eps).rsqrt().view(-1, 1, 1)
    x = (x.mT if transposed else x).reshape(shape)
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format), mean_squares.view(shape[:-2])


def _slice_numbers(x: Tensor, t: int, params: Sequence[Tensor], index: tuple[slice, ...]) -> Tensor:
    """The numbers of a block of tensor ``t``: one for all, or one for each place along the first axis."""
    slices = x.numel() // len(params)
    if slices == 1:
        return x[t]
    own = x.view(len(params), slices)[t].view(1, -1, *[1] * (params[t].dim() - 1))
    return cut(own, index)[0]


def adam_step(
    params,
    grads,
    momenta,
    second_moments,
    momentum_decay,
    second_decay,
    clip,
    scale,
    decay,
    momentum_correction,
    second_correction,
    inner_eps,
    outer_eps,
    skip,
):
    """One pass of Adam with the variations of the learned rules, momenta and second moments of shape (1, *s) in place.

    step = scale[t] * momentum_correction * m / (sqrt(second_correction * v + inner_eps) + outer_eps),
    p <- p - decay[t] * p - step. Corrections are 0-d. ``scale`` and ``decay`` (T,), or (T S,) for numbers of each of
    the S slices of a tensor along its first axis. Returns Σ step², (T,) float64. Nothing changes where ``skip``.
    """
    out = torch.zeros(len(params), dtype=torch.float64, device=scale.device)
    store = store_unless(skip)
    if store is None:
        return out
    for t, (p, g) in enumerate(zip(params, grads, strict=True)):
        for index in blocks(p.shape, block_size(p)):
            x, value = g[index].float(), p[index].float()
            x = x.clamp(-clip, clip) if clip < math.inf else x
            m = ema(cut(momenta[t], index), x, [momentum_decay])
            v = ema(cut(second_moments[t], index), x * x, [second_decay])
            root = (v[0] * second_correction + inner_eps).sqrt_().add_(outer_eps)
            rate, shrink = (_slice_numbers(x, t, params, index) for x in (scale, decay))
            step = m[0] * momentum_correction / root * rate
            out[t] += sum_of_squares(step)
            store(cut(momenta[t], index), m)
            store(cut(second_moments[t], index), v)
            store(p[index], torch.addcmul(value, value, shrink, value=-1) - step)
    return out
