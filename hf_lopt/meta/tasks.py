"""What the optimizers are trained and judged on: small models, each for many particles in one call.

A particle is one copy of a model. The copies are independent, so that the gradient of the sum of their losses holds
the gradient of each. Axes: P particles, B samples, I inputs and O outputs of a layer. Weight matrices are (P, I, O); a
convolution kernel is the matrix (P, height * width * channels, O).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lopt.meta import data


Params = Mapping[str, Tensor]
FEW_CLASSES = 16
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "gelu": F.gelu}


@dataclass(frozen=True)
class Task:
    """A model, its data and its loss.

    Attributes:
        name: for tables and error messages.
        shapes: parameter name -> shape of one copy.
        scales: standard deviation of the starting values; 0: zeros, None: ones.
        model: (parameters with a leading axis P, inputs (P, B, ...)) -> outputs (P, B, ..., O).
        loss: (outputs, targets) -> (P,), the mean over everything else.
        data: part ("train", "validation" or "test") -> samples.
        part: the part in use.
        batch: samples per step.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    scales: Mapping[str, float | None]
    model: Callable[[Params, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    data: Callable[[str], data.Data]
    part: str = "train"
    batch: int = 32

    def samples(self) -> data.Data:
        """The data of the part in use."""
        return self.data(self.part)

    def start(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Starting values of ``count`` copies, drawn on the CPU."""
        out = {}
        for name, shape in self.shapes.items():
            scale = self.scales[name]
            fixed = 1.0 if scale is None else 0.0
            if scale:
                out[name] = torch.randn(count, *shape, generator=generator, dtype=torch.float32) * scale
            else:
                out[name] = torch.full((count, *shape), fixed, dtype=torch.float32)
        return out

    def losses(self, params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of every copy on its samples, (P,). A batch of fewer streams than copies is repeated in turn."""
        copies = len(next(iter(params.values()))) // len(batch[0])
        if copies > 1:
            batch = tuple(x.repeat(copies, *[1] * (x.dim() - 1)) for x in batch)
        inputs, targets = batch
        return self.loss(self.model(params, inputs), targets)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).mean(1)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs, targets = outputs.flatten(1, -2), targets.flatten(1)
    if outputs.shape[-1] <= FEW_CLASSES:
        # The classes in front of the samples: over a short last axis PyTorch's softmax takes five times as long.
        return F.cross_entropy(outputs.mT, targets, reduction="none").mean(1)
    losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(len(outputs), -1).mean(1)


def _dense(params: Params, name: str, x: Tensor) -> Tensor:
    return torch.baddbmm(params[f"{name}.b"].unsqueeze(1), x, params[f"{name}.w"])


def _dense_parameters(layers: Mapping[str, tuple[int, int]], gain: float) -> tuple[dict, dict]:
    """Shapes and scales of matrices and biases; (gain / inputs)^½ for all matrices but the last."""
    shapes, scales = {}, {}
    for i, (name, (n_in, n_out)) in enumerate(layers.items()):
        last = i == len(layers) - 1
        shapes |= {f"{name}.w": (n_in, n_out), f"{name}.b": (n_out,)}
        scales |= {f"{name}.w": math.sqrt((1.0 if last else gain) / n_in), f"{name}.b": 0.0}
    return shapes, scales


def mlp(name: str, sizes: Sequence[int], samples: Callable, loss: Callable, activation: str = "relu", **more) -> Task:
    """Fully connected layers of the given sizes, inputs first."""
    layers = {f"layer{i}": pair for i, pair in enumerate(zip(sizes, sizes[1:], strict=False))}
    shapes, scales = _dense_parameters(layers, 2.0 if activation == "relu" else 1.0)
    act = ACTIVATIONS[activation]

    def model(params: Params, x: Tensor) -> Tensor:
        for i in range(len(layers)):
            x = _dense(params, f"layer{i}", x)
            x = act(x) if i + 1 < len(layers) else x
        return x

    return Task(name, shapes, scales, model, loss, samples, **more)


def _patches(x: Tensor, side: int, stride: int) -> Tensor:
    """3 x 3 patches of images (P, B, side * side, C) with zeros around: (P, B * places, 9 * C)."""
    x = F.pad(x.unflatten(2, (side, side)), (0, 0, 1, 1, 1, 1))
    places = range(3)
    last = side - stride + 1
    cut = [x[:, :, i : i + last : stride, j : j + last : stride] for i in places for j in places]
    return torch.cat(cut, -1).flatten(1, 3)


def conv(name: str, channels: Sequence[int], samples: Callable, side: int = 8, classes: int = 10, **more) -> Task:
    """3 x 3 convolutions, all after the first with stride 2, the mean over places, and a linear layer."""
    sizes = [1, *channels]
    layers = {f"conv{i}": (9 * a, b) for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))}
    shapes, scales = _dense_parameters(layers | {"head": (sizes[-1], classes)}, 2.0)

    def model(params: Params, x: Tensor) -> Tensor:
        count, batch, width = len(x), x.shape[1], side
        x = x.unsqueeze(-1)
        for i in range(len(channels)):
            stride = 1 if i == 0 else 2
            x = torch.relu(_dense(params, f"conv{i}", _patches(x, width, stride)))
            width //= stride
            x = x.view(count, batch, width * width, -1)
        return _dense(params, "head", x.mean(2))

    return Task(name, shapes, scales, model, cross_entropy, samples, **more)


def denoiser(name: str, channels: int, layers: int, samples: Callable, side: int, **more) -> Task:
    """Pictures to pictures of the same size: 3 x 3 convolutions, those in the middle around a shortcut."""
    sizes = {"first": (9, channels)} | {f"middle{i}": (9 * channels, channels) for i in range(layers)}
    shapes, scales = _dense_parameters(sizes | {"last": (9 * channels, 1)}, 1.0)

    def model(params: Params, x: Tensor) -> Tensor:
        def convolved(layer: str, x: Tensor) -> Tensor:
            return _dense(params, layer, _patches(x, side, 1)).unflatten(1, (-1, side * side))

        h = F.gelu(convolved("first", x.unsqueeze(-1)))
        for i in range(layers):
            h = h + F.gelu(convolved(f"middle{i}", h))
        return convolved("last", h).squeeze(-1)

    return Task(name, shapes, scales, model, squared_error, samples, **more)


def _normed(x: Tensor, gain: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain.unsqueeze(1)


def residual_mlp(name: str, sizes: Sequence[int], blocks: int, samples: Callable, loss: Callable, **more) -> Task:
    """A stream of width ``sizes[1]`` from ``sizes[0]`` inputs to ``sizes[2]`` outputs; each block adds a perceptron of
    its RMS-normed values."""
    n_in, width, n_out = sizes
    layers = {"in": (n_in, width)}
    for i in range(blocks):
        layers |= {f"{i}.up": (width, 2 * width), f"{i}.down": (2 * width, width)}
    shapes, scales = _dense_parameters(layers | {"out": (width, n_out)}, 1.0)
    norms = [*(f"{i}.norm" for i in range(blocks)), "norm"]
    shapes |= dict.fromkeys(norms, (width,))
    scales |= dict.fromkeys(norms, None)

    def model(params: Params, x: Tensor) -> Tensor:
        h = _dense(params, "in", x)
        for i in range(blocks):
            up = F.silu(_dense(params, f"{i}.up", _normed(h, params[f"{i}.norm"])))
            h = h + _dense(params, f"{i}.down", up)
        return _dense(params, "out", _normed(h, params["norm"]))

    return Task(name, shapes, scales, model, loss, samples, **more)


def _looked_up(table: Tensor, x: Tensor) -> Tensor:
    """Rows of the tables (P, symbols, width) for the symbols x (P, B, ...): (P, all others, width)."""
    offset = torch.arange(len(x), device=x.device, dtype=torch.int64).view(-1, 1) * table.shape[1]
    return table.flatten(0, 1)[x.flatten(1) + offset]


def gru(name: str, width: int, window: int, samples: Callable, **more) -> Task:
    """A recurrent language model of characters, with the gates of the GRU."""
    symbols = len(data.ALPHABET)
    layers = {"inputs": (width, 3 * width), "state": (width, 3 * width), "head": (width, symbols)}
    shapes, scales = _dense_parameters(layers, 1.0)
    shapes, scales = {"embedding": (symbols, width), **shapes}, {"embedding": 1.0, **scales}

    def model(params: Params, x: Tensor) -> Tensor:
        seen = _dense(params, "inputs", _looked_up(params["embedding"], x)).unflatten(1, x.shape[1:])
        h, states = torch.zeros_like(seen[:, :, 0, :width]), []
        for t in range(window):
            new, update, reset = seen[:, :, t].chunk(3, -1)
            own_new, own_update, own_reset = _dense(params, "state", h).chunk(3, -1)
            new = torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)
            h = torch.lerp(new, h, torch.sigmoid(update + own_update))
            states.append(h)
        return _dense(params, "head", torch.stack(states, 2).flatten(1, 2))

    return Task(name, shapes, scales, model, cross_entropy, partial(samples, window=window), **more)


def transformer(
    name: str, width: int, layers: int, window: int, heads: int = 2, samples: Callable = data.text, **more
) -> Task:
    """A causal language model of characters: RMS norms, attention, a perceptron of four times the width."""
    symbols = len(data.ALPHABET)
    shapes: dict[str, tuple[int, ...]] = {"embedding": (symbols, width), "position": (window, width)}
    scales: dict[str, float | None] = {"embedding": 0.5, "position": 0.1}
    for i in range(layers):
        dense = {
            "qkv": (width, 3 * width),
            "out": (width, width),
            "up": (width, 4 * width),
            "down": (4 * width, width),
        }
        shapes |= {f"{i}.{key}": shape for key, shape in dense.items()}
        scales |= {f"{i}.{key}": shape[0] ** -0.5 for key, shape in dense.items()}
        shapes |= {f"{i}.norm{k}": (width,) for k in range(2)}
        scales |= {f"{i}.norm{k}": None for k in range(2)}
    shapes |= {"norm": (width,), "head": (width, symbols)}
    scales |= {"norm": None, "head": width**-0.5}

    def model(params: Params, x: Tensor) -> Tensor:
        count, batch = x.shape[:2]
        h = _looked_up(params["embedding"], x) + params["position"].repeat(1, batch, 1)
        for i in range(layers):
            qkv = torch.bmm(_normed(h, params[f"{i}.norm0"]), params[f"{i}.qkv"])
            q, k, v = qkv.view(count * batch, window, 3, heads, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + torch.bmm(mixed.transpose(1, 2).reshape(count, batch * window, width), params[f"{i}.out"])
            up = F.gelu(torch.bmm(_normed(h, params[f"{i}.norm1"]), params[f"{i}.up"]))
            h = h + torch.bmm(up, params[f"{i}.down"])
        return torch.bmm(_normed(h, params["norm"]), params["head"])

    more = {"batch": 8, **more}
    return Task(name, shapes, scales, model, cross_entropy, partial(samples, window=window), **more)


@torch.enable_grad()
def _trained(task: Task, steps: int) -> dict[str, Tensor]:
    """Parameters (1, ...) of a task after training with AdamW, to be adapted."""
    generator = torch.Generator().manual_seed(0)
    samples = task.samples()
    leaves = {key: x.requires_grad_() for key, x in task.start(1, generator).items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=5e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        task.losses(leaves, samples.batch(1, task.batch, generator)).sum().backward()
        optimizer.step()
        cosine.step()
    return {key: x.detach() for key, x in leaves.items()}


def lora(name: str, frozen: Task, samples: Callable, rank: int, steps: int = 1000, **more) -> Task:
    """Low-rank additions A B to the matrices in the blocks of ``frozen``, trained, which stay as they are;
    B starts at zero."""
    matrices = [key for key, shape in frozen.shapes.items() if len(shape) == 2 and key[0].isdigit()]
    shapes, scales = {}, {}
    for key in matrices:
        n_in, n_out = frozen.shapes[key]
        shapes |= {f"{key}.a": (n_in, rank), f"{key}.b": (rank, n_out)}
        scales |= {f"{key}.a": n_in**-0.5, f"{key}.b": 0.0}

    trained = functools.cache(lambda: _trained(frozen, steps))

    def model(params: Params, x: Tensor) -> Tensor:
        whole = {key: p.to(x.device).expand(len(x), *p.shape[1:]) for key, p in trained().items()}
        whole |= {key: whole[key] + params[f"{key}.a"] @ params[f"{key}.b"] for key in matrices}
        return frozen.model(whole, x)

    return Task(name, shapes, scales, model, frozen.loss, samples, batch=frozen.batch, **more)


def _all() -> dict[str, Task]:
    """Tasks to train on are small; those to judge by have other sizes, depths and activations, and other samples."""
    digits, images = data.digits, data.digit_images
    functions = [partial(data.functions, seed=seed) for seed in range(4)]
    regions = [partial(data.regions, seed=seed) for seed in range(4, 8)]
    ce, mse = cross_entropy, squared_error
    capitals = transformer("capitals", 20, 1, 12, samples=partial(data.text, capitals=True))
    train = [
        mlp("digits_mlp", (64, 16, 10), digits, ce),
        mlp("digits_mlp3", (64, 24, 24, 10), digits, ce, "gelu"),
        mlp("functions_mlp", (8, 32, 4), functions[0], mse, "tanh"),
        mlp("functions_deep", (8, 16, 16, 16, 16, 4), functions[1], mse),
        mlp("regions_mlp", (8, 24, 24, 6), regions[0], ce),
        mlp("autoencoder", (64, 16, 6, 16, 64), images, mse, "tanh"),
        conv("digits_conv", (6, 8), digits, batch=16),
        lora("adapters", capitals, partial(data.text, window=12), rank=2),
        transformer("characters", 16, 1, 16),
    ]
    validation = [
        mlp("digits_wide", (64, 48, 10), digits, ce, "tanh"),
        mlp("regions_deep", (8, 20, 20, 20, 20, 6), regions[1], ce, "gelu"),
        mlp("functions_wide", (8, 64, 4), functions[2], mse),
        mlp("autoencoder_relu", (64, 32, 8, 32, 64), images, mse),
        conv("digits_conv_wide", (8, 12), digits),
        transformer("characters_wide", 24, 1, 24),
    ]
    coder = transformer("coder", 28, 2, 20, samples=data.code)
    test = [
        transformer("char_lm", 32, 2, 32),
        mlp("digits_autoencoder", (64, 48, 12, 48, 64), images, mse, "tanh", batch=64),
        conv("digits_cnn", (8, 16), digits, batch=64),
        mlp("digits_mlp_large", (64, 64, 64, 10), digits, ce, batch=64),
        mlp("digits_mlp_deep", (64, 32, 32, 32, 32, 32, 10), digits, ce, batch=64),
        mlp("functions_large", (8, 64, 64, 4), functions[3], mse, "gelu", batch=64),
        lora("char_lora", train[-1], partial(data.text, window=16, capitals=True), rank=4),
        # Data that training and validation have nothing of, and mostly other kinds of model.
        transformer("code_lm", 40, 3, 24, heads=4, samples=data.code),
        gru("names_gru", 40, 16, data.character_names, batch=16),
        lora("names_lora", coder, partial(data.character_names, window=20), rank=3),
        denoiser("waves_denoiser", 12, 2, data.noisy_waves, side=10, batch=16),
        residual_mlp("teacher_residual", (16, 28, 6), 3, data.teacher, mse, batch=64),
        mlp("tumours_mlp", (30, 40, 20, 2), data.tumours, ce, "tanh"),
    ]
    parts = {"train": train, "validation": validation, "test": test}
    return {task.name: replace(task, part=part) for part, tasks in parts.items() for task in tasks}


TASKS: dict[str, Task] = _all()


def add(task: Task) -> None:
    """Make a task known by its name, to configurations too.

    Raises:
        ValueError: there is another one of this name.
    """
    if task.name in TASKS:
        raise ValueError(f"there is a task called {task.name!r} already")
    TASKS[task.name] = task


def named(name: str) -> Task:
    """The task called ``name``.

    Raises:
        ValueError: if there is none; the message lists the names.
    """
    if name not in TASKS:
        raise ValueError(f"no task is called {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def of_part(part: str) -> list[Task]:
    """The tasks of a part: "train", "validation" or "test"."""
    return [task for task in TASKS.values() if task.part == part]
