"""Arguments for the operators of a step, and what the tests of the compiled kernels share."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_lopt import _load, _ops
from hf_lopt._plain import slice_indices
from hf_lopt.accumulators import factored_axes, update_factored
from hf_lopt.features import VELO, ElementFeatures
from hf_lopt.rules.batches import matrix_axes


SMALL_FC = ElementFeatures(
    names=tuple("g p m v m_rsqrt_v rsqrt_v fac_g row col rsqrt_row rsqrt_col fac_m".split()),
    clip=math.inf,
    diagonal_eps=1e-6,
)
CELO2 = replace(VELO, second_eps=1e-8, norm_eps=1e-9)
FAMILIES = {"velo": (VELO, 4), "small_fc": (SMALL_FC, 32), "celo2": (CELO2, 8)}
DECAYS = VELO.decays


def instruction_sets() -> list[str]:
    """Those that this build has and this processor runs."""
    if not _load.loaded():
        return []
    best, found = torch.ops.hf_lopt.cpu_kernels(""), []
    for name in ("avx512", "avx2", "portable"):
        with contextlib.suppress(RuntimeError):
            found.append(torch.ops.hf_lopt.cpu_kernels(name))
    torch.ops.hf_lopt.cpu_kernels(best)
    return found


@contextlib.contextmanager
def instruction_set(name: str):
    before = torch.ops.hf_lopt.cpu_kernels("")
    torch.ops.hf_lopt.cpu_kernels(name)
    try:
        yield
    finally:
        torch.ops.hf_lopt.cpu_kernels(before)


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def strided(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides."""
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every second" and x.dim() >= 1:
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if layout == "channels last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def moved(x: Tensor, device: str) -> Tensor:
    """The same numbers and strides on another device."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


@dataclass
class Case:
    """The arguments of all passes for a list of tensors with random contents."""

    features: ElementFeatures
    units: int
    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    second_moments: list[Tensor]
    diagonals: list[Tensor]
    rows: list[Tensor]
    cols: list[Tensor]
    axes: list[tuple[int, int]]
    generator: torch.Generator
    slice_axes: tuple[int, ...] = ()

    def slices(self, xs: list[Tensor]) -> list[Tensor]:
        """The parts of parameter-shaped tensors that have results of their own."""
        if not self.slice_axes:
            return xs
        pairs = [self.slice_axes[2 * t : 2 * t + 2] for t in range(len(xs))]
        return [x[i] for x, pair in zip(xs, pairs, strict=True) for i in slice_indices(x.shape, pair)]

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def to(self, device: str) -> Case:
        """The same tensors elsewhere, with their strides."""
        lists = ("params", "grads", "momenta", "second_moments", "diagonals", "rows", "cols")
        return replace(self, **{name: [moved(x, device) for x in getattr(self, name)] for name in lists})

    def first_pass(self, moments: bool) -> tuple:
        a, b = zip(*self.axes, strict=True)
        return _ops.sums(self.params, self.grads, self.momenta, self.second_moments, a, b, self.features.clip, moments)

    def factors(self):
        a, b = zip(*self.axes, strict=True)
        with _ops.plain():
            row_sums, col_sums, _ = self.first_pass(False)
        shapes = [p.shape for p in self.params]
        return update_factored(self.rows, self.cols, row_sums, col_sums, shapes, a, b, DECAYS.factored)

    def common(self, f) -> tuple:
        a, b = zip(*self.axes, strict=True)
        return (
            *(self.features.names, self.params, self.grads, self.momenta, self.second_moments, self.diagonals),
            *(f.rows, f.cols, f.row_factors, f.col_factors, a, b, self.slice_axes),
            *(DECAYS.momentum, DECAYS.second_moment, DECAYS.factored),
            *(self.features.clip, self.features.second_eps, self.features.diagonal_eps),
        )

    def network(self, sums: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Weights of a size that a trained network has, with the scales folded in."""
        params, sizes = self.slices(self.params), (sum(self.features.widths()), self.units, self.units, 2)
        count, numel = len(params), torch.tensor([max(p.numel(), 1) for p in params], device=self.device)
        scale = (sums / numel.unsqueeze(1) + self.features.norm_eps).rsqrt().float()
        weights = [
            torch.randn(count, n_in, n_out, generator=self.generator) / math.sqrt(n_in)
            for n_in, n_out in zip(sizes, sizes[1:], strict=False)
        ]
        biases = [torch.randn(count, n, generator=self.generator) * 0.3 for n in sizes[1:]]
        weights, biases = ([x.to(self.device) for x in xs] for xs in (weights, biases))
        weights[0] *= scale.unsqueeze(2)
        return weights, biases


def case(
    shapes,
    family: str = "velo",
    p_dtype=torch.float32,
    g_dtype=torch.float32,
    layout: str = "contiguous",
    size: float = 1.0,
    seed: int = 0,
    order: str = "torch",
    sliced: bool = False,
) -> Case:
    """Random arguments; ``sliced``: tensors of more than two axes are stacks of matrices, as Celo2 takes them."""
    features, units = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    params = [strided((normal(*s) * 0.1).to(p_dtype), layout) for s in shapes]
    grads = []
    for s in shapes:
        g = normal(*s) * size
        g[torch.rand(s, generator=generator) < 0.1] = 0.0
        grads.append(strided(g.to(g_dtype), layout))
    typical = min(size, 1e3)
    axes = [factored_axes(s, order) for s in shapes]

    def vector(s, axis):
        if axis < 0:
            return torch.empty(0)
        return torch.rand(3, *(n for i, n in enumerate(s) if i != axis), generator=generator) * typical**2

    return Case(
        *(features, units, params, grads),
        momenta=[normal(3, *s) * typical * 0.3 for s in shapes],
        second_moments=[normal(1, *s).square() * typical**2 for s in shapes],
        diagonals=[normal(3, *s).square() * typical**2 if len(s) < 2 else torch.empty(0) for s in shapes],
        rows=[vector(s, a) for s, (a, _) in zip(shapes, axes, strict=True)],
        cols=[vector(s, b) for s, (_, b) in zip(shapes, axes, strict=True)],
        axes=axes,
        generator=generator,
        slice_axes=tuple(axis for s in shapes for axis in matrix_axes(len(s), order)) if sliced else (),
    )


SHAPES = [(), (1,), (7,), (1, 1), (1, 6), (5, 9), (9, 5), (6, 6), (3, 4, 5), (8, 4, 3, 3), (4, 8, 3, 3), (3, 3, 4, 8)]
