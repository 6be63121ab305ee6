"""Small data sets that need no download: tables of scikit-learn, procedural ones, texts that come with Python.

A data set is cut into three parts with no sample in common, for training, choosing and testing optimizers; each part
has samples to train on and samples to judge by. Axes: N samples, D numbers of an input, B samples of a batch,
G streams.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


PARTS = {"train": (0.0, 0.25), "validation": (0.25, 0.4), "test": (0.4, 1.0)}
FRESH_SHARE = 0.25
CODE = ("argparse", "doctest", "inspect", "optparse", "pickletools", "statistics", "subprocess", "tarfile")
ALPHABET = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;'\"()[]{}_-+*/=<>#`"


@dataclass(frozen=True)
class Data:
    """Samples in memory.

    Attributes:
        inputs: (N, D) float32; for text (N,) int64, the numbers of characters.
        targets: (N,) int64 classes or (N, O) float32; for text None: the next characters.
        fresh: first sample of those that are never trained on.
        window: length of a piece of text, 0 for others.
    """

    inputs: Tensor
    targets: Tensor | None
    fresh: int
    window: int = 0

    def batch(
        self, streams: int, size: int, generator: torch.Generator, fresh: bool = False, copies: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Random samples with repetition: inputs (G, B, ...) and targets (G, B, ...), on the device of the data.

        ``copies``: all streams so many times over, (copies G, B, ...).
        """
        index = self.places(streams, size, generator, fresh)
        return self.at(index.to(self.inputs.device, non_blocking=True), copies)

    def places(self, streams: int, size: int, generator: torch.Generator, fresh: bool = False) -> Tensor:
        """Where the samples of a :meth:`batch` are, (G, B), drawn on the CPU."""
        low, high = (self.fresh, len(self.inputs)) if fresh else (0, self.fresh)
        return torch.randint(low, high - self.window, (streams, size), generator=generator, dtype=torch.int64)

    def at(self, index: Tensor, copies: int = 1) -> tuple[Tensor, Tensor]:
        """The samples at places (G, B) on the device of the data."""
        index = index.repeat(copies, 1)
        if self.targets is not None:
            # Row by row; indexing with a matrix goes number by number.
            picked = (x.index_select(0, index.flatten()) for x in (self.inputs, self.targets))
            inputs, targets = (x.unflatten(0, index.shape) for x in picked)
            return inputs, targets
        places = torch.arange(self.window + 1, dtype=torch.int64, device=index.device)
        pieces = self.inputs[index.unsqueeze(-1) + places]
        return pieces[..., :-1], pieces[..., 1:]

    def to(self, device: torch.device) -> Data:
        targets = None if self.targets is None else self.targets.to(device)
        return Data(self.inputs.to(device), targets, self.fresh, self.window)


def split_dataset(inputs: Tensor, targets: Tensor | None, part: str, window: int = 0) -> Data:
    """The samples of a part ("train", "validation" or "test") of those given, in their order."""
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    low, high = (round(share * len(inputs)) for share in PARTS[part])
    fresh = round((1.0 - FRESH_SHARE) * (high - low))
    return Data(inputs[low:high], None if targets is None else targets[low:high], fresh, window)


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'hf_lopt[meta]'") from error
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    inputs, numbers = torch.tensor(images, dtype=torch.float32), torch.tensor(classes, dtype=torch.int64)
    return inputs[order] / 8.0 - 1.0, numbers[order]


def digits(part: str) -> Data:
    """1,797 images of 8 x 8, in [-1, 1], with ten classes."""
    return split_dataset(*_digits(), part)


def digit_images(part: str) -> Data:
    """The same images, to be reproduced."""
    images, _ = _digits()
    return split_dataset(images, images, part)


def functions(part: str, seed: int = 0, inputs: int = 8, outputs: int = 4, samples: int = 8192) -> Data:
    """Smooth random functions of normal inputs: sums of sines in random directions, unit variance, some noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float32)
    directions = torch.randn(inputs, 6 * outputs, generator=generator, dtype=torch.float32) / math.sqrt(inputs)
    waves = torch.sin(2.0 * x @ directions + 3.0 * torch.randn(6 * outputs, generator=generator, dtype=torch.float32))
    y = waves.view(samples, outputs, 6).sum(2)
    y = (y - y.mean(0)) / y.std(0) + 0.1 * torch.randn(y.shape, generator=generator, dtype=torch.float32)
    return split_dataset(x, y, part)


def regions(part: str, seed: int = 0, inputs: int = 8, classes: int = 6, samples: int = 8192) -> Data:
    """Classes: which of several smooth random functions is the largest, for normal inputs of unequal size."""
    sizes = torch.logspace(-0.5, 0.5, inputs, dtype=torch.float32)
    whole = functions("train", seed, inputs, classes, samples=4 * samples)  # the first quarter
    return split_dataset(whole.inputs * sizes, whole.targets.argmax(1), part)


def _waves(generator: torch.Generator, samples: int, side: int, count: int = 3) -> Tensor:
    """Sums of plane waves of random direction, length and phase under a window each, (N, side * side)."""
    place = torch.linspace(-1.0, 1.0, side, dtype=torch.float32)
    y, x = torch.meshgrid(place, place, indexing="ij")
    shape = (samples, count, 1, 1)
    angle, phase = (2.0 * math.pi * torch.rand(shape, generator=generator, dtype=torch.float32) for _ in range(2))
    length = 0.4 + torch.rand(shape, generator=generator, dtype=torch.float32)
    at_x, at_y = (1.6 * torch.rand(shape, generator=generator, dtype=torch.float32) - 0.8 for _ in range(2))
    wave = torch.sin(2.0 * math.pi * (x * angle.cos() + y * angle.sin()) / length + phase)
    window = torch.exp(-2.0 * ((x - at_x).square() + (y - at_y).square()))
    return (wave * window).sum(1).flatten(1)


def noisy_waves(part: str, seed: int = 0, side: int = 10, samples: int = 4096) -> Data:
    """Generated pictures, with as much noise as picture; to be told from it."""
    generator = torch.Generator().manual_seed(seed)
    clean = _waves(generator, samples, side)
    clean = clean / clean.std()
    return split_dataset(clean + torch.randn(clean.shape, generator=generator, dtype=torch.float32), clean, part)


def teacher(
    part: str, seed: int = 0, inputs: int = 16, width: int = 24, outputs: int = 6, samples: int = 8192
) -> Data:
    """What a random perceptron with two hidden layers of tanh makes of normal inputs, unit variance, no noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float32)
    y = x
    for size in (width, width, outputs):
        y = 1.7 * torch.tanh(y) if y is not x else y
        y = y @ torch.randn(y.shape[1], size, generator=generator, dtype=torch.float32) / math.sqrt(y.shape[1])
    return split_dataset(x, (y - y.mean(0)) / y.std(0), part)


def tumours(part: str) -> Data:
    """569 breast tumours, 30 measurements of each at unit variance, benign or malignant (scikit-learn)."""
    from sklearn.datasets import load_breast_cancer

    rows, classes = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    x = torch.tensor(rows, dtype=torch.float32)[order]
    return split_dataset((x - x.mean(0)) / x.std(0), torch.tensor(classes, dtype=torch.int64)[order], part)


def _numbers(text: str) -> Tensor:
    """The places in ``ALPHABET`` of the characters that it has."""
    numbers = {character: i for i, character in enumerate(ALPHABET)}
    return torch.tensor([numbers[c] for c in text if c in numbers], dtype=torch.int64)


@functools.cache
def _text(capitals: bool) -> Tensor:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return _numbers(text.upper() if capitals else text)


def text(part: str, window: int, capitals: bool = False) -> Data:
    """The chapters of Python's language reference, character by character; others than ``ALPHABET`` are left out.

    ``capitals``: all letters are capitals, for a model that knows the text as it is.
    """
    return split_dataset(_text(capitals), None, part, window)


@functools.cache
def _code(modules: Sequence[str]) -> Tensor:
    specs = [importlib.util.find_spec(name) for name in modules]
    return _numbers("\n".join(spec.loader.get_source(spec.name) for spec in specs))


def code(part: str, window: int) -> Data:
    """The source text of modules of Python's standard library, character by character."""
    return split_dataset(_code(CODE), None, part, window)


@functools.cache
def _names() -> Tensor:
    names = [name for name in (unicodedata.name(chr(i), "") for i in range(0x3000)) if name]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0), dtype=torch.int64).tolist()
    return _numbers("\n".join(names[i] for i in order))


def character_names(part: str, window: int) -> Data:
    """The names of characters in Unicode (GREEK SMALL LETTER ALPHA), in random order, letter by letter."""
    return split_dataset(_names(), None, part, window)
