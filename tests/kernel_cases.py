"""Lists of tensors with random contents, and the arguments of every pass over them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

import reference_steps
from hf_lopt import features
from hf_lopt.features import ElementFeatures
from hf_lopt.kernels import ops
from hf_lopt.kernels.arguments import (
    AdamStep,
    ApplyNetwork,
    Descend,
    FeatureSums,
    Sums,
    UpdateFactored,
)
from hf_lopt.kernels.reference.passes import slice_indices
from hf_lopt.step.accumulators import factored_axes
from hf_lopt.step.layout import matrix_axes


# Features and units of the hidden layers: of VeLO and Celo, of the small networks, of Celo2.
FAMILIES = {"velo": (features.VELO, 4), "small_fc": (features.SMALL_FC, 32), "celo2": (features.CELO2, 8)}
SHAPES = [(), (1,), (7,), (1, 1), (1, 6), (5, 9), (9, 5), (6, 6), (3, 4, 5), (8, 4, 3, 3), (4, 8, 3, 3), (3, 3, 4, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "transposed", "every second", "channels last"]
AXIS_ORDERS = ["torch", "jax", "torch_transposed", "torch_stacked"]
EXTREME_SIZES = [0.0, 1e-42, 1e-20, 1e-10, 0.05, 900.0, 1e4, 1e10, 1e20]


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
    """The same numbers and strides on another device; numbers that share a place get places of their own."""
    if x.device == torch.device(device):
        return x
    if 0 in x.stride():
        return x.to(device)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


@dataclass
class Case:
    """A list of tensors with random contents, and the arguments of every pass over them.

    What a pass takes from the one before comes from the plain kernels. `scale` and `decay` are the same for all
    results; `compared` keeps what the plain kernels make of it.
    """

    features: ElementFeatures
    units: int
    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    second_moments: list[Tensor]
    diagonals: list[Tensor]
    rows: list[Tensor]
    cols: list[Tensor]
    row_axes: list[int]
    col_axes: list[int]
    slice_axes: list[int]
    scale: float = 1e-3
    decay: float = 1e-4
    compared: dict[str, list] = field(default_factory=dict)
    scales: dict[str, list[Tensor]] = field(default_factory=lambda: {"momentum_scales": [], "second_scales": []})
    rounding: dict = field(default_factory=lambda: {"step": None, "places": [], "round_params": False})

    def slices(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """The parts of parameter-shaped tensors that have results of their own."""
        if not self.slice_axes:
            return list(xs)
        return [x[i] for t, x in enumerate(xs) for i in slice_indices(x.shape, self.slice_axes[2 * t : 2 * t + 2])]

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def to(self, device: str) -> Case:
        """The same tensors elsewhere, with their strides."""
        if device == "cpu":
            return self
        lists = ("params", "grads", "momenta", "second_moments", "diagonals", "rows", "cols")
        found = {name: [moved(x, device) for x in getattr(self, name)] for name in lists}
        scales = {name: [moved(x, device) for x in xs] for name, xs in self.scales.items()}
        step = self.rounding["step"]
        rounding = self.rounding | {"step": None if step is None else step.to(device)}
        return replace(self, compared={}, scales=scales, rounding=rounding, **found)

    def numbers(self, first: float, last: float | None = None, count: int | None = None) -> Tensor:
        """A number for each tensor, or for each of ``count``."""
        count = len(self.params) if count is None else count
        return torch.linspace(first, first if last is None else last, count, device=self.device)

    def flag(self, skip: bool) -> Tensor:
        return torch.tensor(skip, device=self.device)

    def sums(self, moments: bool = True) -> Sums:
        return Sums(
            params=self.params,
            grads=self.grads,
            momenta=self.momenta,
            second_moments=self.second_moments,
            row_axes=self.row_axes,
            col_axes=self.col_axes,
            clip=self.features.clip,
            moments=moments,
            **self.scales,
        )

    def update_factored(self) -> UpdateFactored:
        with ops.plain():
            row_sums, col_sums, _ = ops.sums(self.sums(moments=False))
        sizes = (
            [p.shape[axis] if axis >= 0 else 1 for p, axis in zip(self.params, axes, strict=True)]
            for axes in (self.row_axes, self.col_axes)
        )
        row_sizes, col_sizes = sizes
        return UpdateFactored(
            rows=self.rows,
            cols=self.cols,
            row_sums=row_sums,
            col_sums=col_sums,
            row_means=[torch.empty(0, device=self.device) for _ in self.params],
            row_sizes=row_sizes,
            col_sizes=col_sizes,
            row_axes=self.row_axes,
            col_axes=self.col_axes,
            decays=self.features.decays.factored,
        )

    @functools.cached_property
    def feature_arguments(self) -> dict:
        """What both later passes take."""
        with ops.plain():
            rows, cols, row_factors, col_factors = ops.update_factored(self.update_factored())
        return {
            "features": self.features.names,
            "params": self.params,
            "grads": self.grads,
            "momenta": self.momenta,
            "second_moments": self.second_moments,
            "diagonals": self.diagonals,
            "rows": rows,
            "cols": cols,
            "row_factors": row_factors,
            "col_factors": col_factors,
            "row_axes": self.row_axes,
            "col_axes": self.col_axes,
            "slice_axes": self.slice_axes,
            "momentum_decays": self.features.decays.momentum,
            "second_decays": self.features.decays.second_moment,
            "factored_decays": self.features.decays.factored,
            "clip": self.features.clip,
            "second_eps": self.features.second_eps,
            "diagonal_eps": self.features.diagonal_eps,
            **self.scales,
        }

    def feature_sums(self) -> FeatureSums:
        return FeatureSums(**self.feature_arguments)

    @functools.cached_property
    def sums_of_squares(self) -> Tensor:
        """Of every feature column, by the plain kernel."""
        with ops.plain():
            return ops.feature_sums(self.feature_sums())

    @functools.cached_property
    def network(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of a size that a trained network has, the scales of the features in the first layer."""
        params, generator = self.slices(self.params), torch.Generator().manual_seed(1)
        widths = (sum(self.features.widths()), self.units, self.units, 2)
        numel = torch.tensor([max(p.numel(), 1) for p in params], device=self.device)
        scale = (self.sums_of_squares / numel.unsqueeze(1) + self.features.norm_eps).rsqrt().float()
        weights = [
            torch.randn(len(params), n_in, n_out, generator=generator) / math.sqrt(n_in)
            for n_in, n_out in zip(widths, widths[1:], strict=False)
        ]
        biases = [torch.randn(len(params), n, generator=generator) * 0.3 for n in widths[1:]]
        weights, biases = ([x.to(self.device) for x in xs] for xs in (weights, biases))
        weights[0] *= scale.unsqueeze(2)
        return weights, biases

    def apply_network(self, skip: bool = False, into_out: bool = False) -> ApplyNetwork:
        weights, biases = self.network
        count = len(self.slices(self.params))
        return ApplyNetwork(
            **self.feature_arguments,
            weights=weights,
            biases=biases,
            scale=self.numbers(self.scale, count=count),
            decay=self.numbers(self.decay, count=count),
            exp_mult=1e-3,
            skip=self.flag(skip),
            out=[torch.empty(p.shape, device=self.device) for p in self.params] if into_out else [],
            **self.rounding,
        )

    def adam_step(self, skip: bool = False) -> AdamStep:
        return AdamStep(
            params=self.params,
            grads=self.grads,
            momenta=[m[:1].clone() for m in self.momenta],
            second_moments=self.second_moments,
            momentum_decay=0.9,
            second_decay=0.95,
            clip=1000.0,
            scale=self.numbers(1e-3, 2e-3),
            decay=self.numbers(0.01),
            momentum_correction=torch.tensor(1.5, device=self.device),
            second_correction=torch.tensor(2.5, device=self.device),
            inner_eps=1e-10,
            outer_eps=1e-8,
            skip=self.flag(skip),
            **{name: [x[:1].clone() for x in scales] for name, scales in self.scales.items()},
            **self.rounding,
        )

    def steps(self, layout: str = "contiguous") -> list[Tensor]:
        """Steps that have been computed before."""
        generator = torch.Generator().manual_seed(2)
        steps = [strided(torch.randn(p.shape, generator=generator), layout) for p in self.params]
        return [moved(x, str(self.device)) for x in steps]

    def descend(self, skip: bool = False, layout: str = "contiguous") -> Descend:
        return Descend(
            params=self.params,
            steps=self.steps(layout),
            lr=self.numbers(0.1, 0.2),
            weight_decay=self.numbers(3.0, 0.1),
            squares=None,
            numel=None,
            norm_eps=0.0,
            slice_axes=[],
            skip=self.flag(skip),
            **self.rounding,
        )


def case(
    shapes: Sequence[tuple[int, ...]],
    family: str = "velo",
    p_dtype: torch.dtype = torch.float32,
    g_dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    size: float = 1.0,
    seed: int = 0,
    order: str = "torch",
    sliced: bool = False,
) -> Case:
    """Random contents; ``size``: of the gradients. ``sliced``: tensors of more than two axes are stacks of matrices,
    as Celo2 takes them."""
    row, units = FAMILIES[family]
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
        *(row, units, params, grads),
        momenta=[normal(3, *s) * typical * 0.3 for s in shapes],
        second_moments=[normal(1, *s).square() * typical**2 for s in shapes],
        diagonals=[normal(3, *s).square() * typical**2 if len(s) < 2 else torch.empty(0) for s in shapes],
        rows=[vector(s, a) for s, (a, _) in zip(shapes, axes, strict=True)],
        cols=[vector(s, b) for s, (_, b) in zip(shapes, axes, strict=True)],
        row_axes=[a for a, _ in axes],
        col_axes=[b for _, b in axes],
        slice_axes=[axis for s in shapes for axis in matrix_axes(len(s), order)] if sliced else [],
    )


@functools.cache
def shared_case(shapes: tuple[tuple[int, ...], ...], *arguments, **keywords) -> Case:
    """One that several backends compare with; nothing may change it."""
    return case(shapes, *arguments, **keywords)


# ---- float64 --------------------


def reference_step(x: Case) -> list[Tensor]:
    """The network's step in float64 by tests/reference_steps.py, for tensors of rank 2."""
    steps, decays = [], x.features.decays
    weights, biases = ([y.double().cpu().numpy() for y in ys] for ys in x.network)
    for t, (a, b) in enumerate(zip(x.row_axes, x.col_axes, strict=True)):
        p, g, m, v = (y.double().cpu().numpy() for y in (x.params[t], x.grads[t], x.momenta[t], x.second_moments[t]))
        g, state = np.clip(g, -x.features.clip, x.features.clip), {"momentum": m, "second_moment": v}
        reference_steps.accumulate(state, g, decays.momentum, decays.second_moment, factored=())
        rows, row_factors, cols, col_factors = (
            x.feature_arguments[name][t].double().unsqueeze(axis + 1).cpu().numpy()
            for name, axis in (("rows", a), ("row_factors", a), ("cols", b), ("col_factors", b))
        )
        state |= {"factored_row": rows, "factored_col": cols}
        found = reference_steps.features(p, g, state, x.features.second_eps)
        # The passes are given the factors, which are float32.
        factor = row_factors * col_factors
        found |= {"fac_g": g * factor, "fac_m": state["momentum"] * factor}
        columns = [found[name] for name in x.features.names]
        o = reference_steps.network(columns, p.shape, [w[t] for w in weights], [y[t] for y in biases])
        steps.append(torch.from_numpy(x.scale * o[0] * np.exp(1e-3 * o[1])).to(x.device))
    return steps
