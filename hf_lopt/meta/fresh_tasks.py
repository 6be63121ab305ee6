"""Test tasks of other kinds than those of :mod:`hf_lopt.meta.tasks`, for weights that have been on its test tasks.

No configuration knows them by name, so that nothing is trained or chosen on them. Axes as there; T places of a
sequence, S states of a channel.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lopt.meta import data
from hf_lopt.meta.tasks import Params, Task, _dense, _dense_parameters, _normed, cross_entropy, squared_error


# ---- data -----------------------------------------------------------------------------------------------------------


def signals(part: str, seed: int = 0, window: int = 24, samples: int = 4096) -> data.Data:
    """Noise (N, T), and what a filter with a slow and a fast memory and an echo makes of it, unit variance."""
    generator = torch.Generator().manual_seed(seed)
    echo = 3 + seed % 4
    x = torch.randn(samples, window, generator=generator, dtype=torch.float32)
    slow, fast, outputs = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]), []
    for t in range(window):
        slow, fast = 0.9 * slow + x[:, t], 0.5 * fast + x[:, t]
        outputs.append(slow * torch.tanh(fast) + (1.5 * x[:, t - echo] if t >= echo else 0.0))
    y = torch.stack(outputs, 1)
    return data.split_dataset(x, (y - y.mean()) / y.std(), part)


def views(part: str, seed: int = 0, width: int = 16, samples: int = 8192) -> data.Data:
    """Two noisy views (N, 2 width) of the same six hidden numbers, through other waves each. No targets: zeros."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(samples, 6, generator=generator, dtype=torch.float32)
    seen = []
    for _ in range(2):
        direction = torch.randn(6, width, generator=generator, dtype=torch.float32)
        phase = 3.0 * torch.randn(width, generator=generator, dtype=torch.float32)
        seen.append(1.4 * torch.sin(0.6 * hidden @ direction + phase))
    x = torch.cat(seen, 1)
    x = x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float32)
    return data.split_dataset(x, torch.zeros(samples, dtype=torch.int64), part)


def noised_points(part: str, seed: int = 0, arms: int = 2, samples: int = 8192) -> data.Data:
    """Points of spirals (N, 2), mixed with noise by an angle, and that angle, (N, 3); the noise is to be found."""
    generator = torch.Generator().manual_seed(seed)
    turn = 0.3 + torch.rand(samples, generator=generator, dtype=torch.float32)
    arm = torch.randint(arms, (samples,), generator=generator, dtype=torch.int64)
    angle = 4.0 * turn + 2.0 * math.pi * arm / arms
    points = 1.4 * torch.stack([turn * angle.cos(), turn * angle.sin()], 1)
    noise = torch.randn(points.shape, generator=generator, dtype=torch.float32)
    mixed = 0.5 * math.pi * torch.rand(samples, 1, generator=generator, dtype=torch.float32)
    return data.split_dataset(torch.cat([mixed.cos() * points + mixed.sin() * noise, mixed], 1), noise, part)


# ---- models ---------------------------------------------------------------------------------------------------------


def state_space(name: str, width: int, states: int, blocks: int, window: int, seed: int) -> Task:
    """A signal to a signal: blocks of diagonal linear recurrences, each computed as the convolution that it is, behind
    a gate and around a shortcut."""
    layers = {"in": (1, width)}
    for i in range(blocks):
        layers |= {f"{i}.gate": (width, width), f"{i}.out": (width, width)}
    shapes, scales = _dense_parameters(layers | {"head": (width, 1)}, 1.0)
    for i in range(blocks):
        shapes |= {f"{i}.norm": (width,), f"{i}.skip": (width,), f"{i}.log_rate": (width, states)}
        shapes |= {f"{i}.c": (width, states)}
        scales |= {f"{i}.norm": None, f"{i}.skip": None, f"{i}.log_rate": 1.0, f"{i}.c": states**-0.5}
    ages = torch.arange(window, dtype=torch.float32)
    places = torch.arange(window, dtype=torch.int64)
    differences = places.view(-1, 1) - places
    past = differences >= 0

    def recurrence(params: Params, i: int, x: Tensor) -> Tensor:
        rates = torch.exp(params[f"{i}.log_rate"] - 1.0).unsqueeze(-1)
        kernel = (params[f"{i}.c"].unsqueeze(-1) * torch.exp(-rates * ages.to(x))).sum(2)  # (P, width, T)
        matrix = kernel[:, :, differences.clamp(min=0).to(x.device)] * past.to(x)
        mixed = matrix.flatten(0, 1) @ x.permute(0, 3, 2, 1).flatten(0, 1)  # (P width, T, B)
        mixed = mixed.unflatten(0, kernel.shape[:2]).permute(0, 3, 2, 1)
        return mixed + params[f"{i}.skip"].view(len(x), 1, 1, -1) * x

    def model(params: Params, x: Tensor) -> Tensor:
        batch = x.shape[1:]
        h = _dense(params, "in", x.flatten(1).unsqueeze(-1))
        for i in range(blocks):
            normed = _normed(h, params[f"{i}.norm"])
            mixed = recurrence(params, i, normed.unflatten(1, batch)).flatten(1, 2)
            h = h + _dense(params, f"{i}.out", mixed * F.silu(_dense(params, f"{i}.gate", normed)))
        return _dense(params, "head", h).view(len(x), *batch)

    return Task(
        name, shapes, scales, model, squared_error, partial(signals, seed=seed, window=window), part="test", batch=16
    )


def two_towers(name: str, width: int, out: int, seed: int, batch: int) -> Task:
    """Which second view belongs to which first one: a perceptron for each, cosines as logits, with a temperature."""
    inputs = 16
    layers = {f"{side}.{k}": size for side in "ab" for k, size in enumerate(((inputs, width), (width, out)))}
    shapes, scales = _dense_parameters(layers, 1.0)
    shapes |= {"log_scale": (1,)}
    scales |= {"log_scale": None}

    def model(params: Params, x: Tensor) -> Tensor:
        seen = []
        for side, view in zip("ab", x.split(inputs, -1), strict=True):
            h = _dense(params, f"{side}.1", F.gelu(_dense(params, f"{side}.0", view)))
            seen.append(F.normalize(h, dim=-1))
        return torch.bmm(seen[0], seen[1].mT) * torch.exp(params["log_scale"] + 1.0).unsqueeze(-1)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        own = torch.arange(outputs.shape[1], device=outputs.device, dtype=torch.int64).expand_as(targets)
        return 0.5 * (cross_entropy(outputs, own) + cross_entropy(outputs.mT, own))

    return Task(name, shapes, scales, model, loss, partial(views, seed=seed, width=inputs), part="test", batch=batch)


def diffusion(name: str, width: int, blocks: int, arms: int, seed: int) -> Task:
    """The noise in points: residual perceptrons, whose norms are scaled and shifted by projections of the amount of
    noise that start at zero."""
    waves = 4
    layers = {"in": (2, width)}
    for i in range(blocks):
        layers |= {f"{i}.up": (width, 2 * width), f"{i}.down": (2 * width, width)}
    shapes, scales = _dense_parameters(layers | {"head": (width, 2)}, 1.0)
    for i in range(blocks):
        shapes |= {
            f"{i}.norm": (width,),
            f"{i}.modulation.w": (2 * waves, 2 * width),
            f"{i}.modulation.b": (2 * width,),
        }
        scales |= {f"{i}.norm": None, f"{i}.modulation.w": 0.0, f"{i}.modulation.b": 0.0}

    def model(params: Params, x: Tensor) -> Tensor:
        angles = x[..., 2:] * torch.arange(1, waves + 1, device=x.device, dtype=x.dtype)
        amount = torch.cat([angles.sin(), angles.cos()], -1)
        h = _dense(params, "in", x[..., :2])
        for i in range(blocks):
            scale, shift = _dense(params, f"{i}.modulation", amount).chunk(2, -1)
            normed = _normed(h, params[f"{i}.norm"]) * (1.0 + scale) + shift
            h = h + _dense(params, f"{i}.down", F.silu(_dense(params, f"{i}.up", normed)))
        return _dense(params, "head", h)

    return Task(
        name, shapes, scales, model, squared_error, partial(noised_points, seed=seed, arms=arms), part="test", batch=64
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        state_space("filter_states", 16, 4, 1, 24, seed=1),
        state_space("filter_states_deep", 24, 8, 2, 20, seed=2),
        two_towers("views_towers", 32, 12, seed=3, batch=32),
        two_towers("views_towers_wide", 64, 24, seed=4, batch=64),
        diffusion("spirals_diffusion", 32, 2, 2, seed=5),
        diffusion("spirals_diffusion_deep", 24, 4, 3, seed=6),
    )
}
