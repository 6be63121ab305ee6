"""The operators' kernels in plain PyTorch: the specification that fused kernels are tested against.

They are written block by block, so that their temporaries stay in cache and never grow to the size of a tensor.

Axes: T tensors, F feature columns, H hidden units, O network outputs, D decays, n elements of a block.
Shapes of a tensor's state, for a parameter of shape ``s``: momentum and second moment ``(D, *s)``, as
:mod:`hf_lopt.kernels.reference.formats` stores them; factored row
accumulator ``(D, *s without axis A)`` and column accumulator ``(D, *s without axis B)``, where A and B are the largest
and second largest axis; for rank < 2 a diagonal accumulator ``(D, *s)`` instead.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lopt.features import (
    FACTOR_EPS,
    FACTORED_EPS,
    FEATURES,
    STAT_G2,
    STAT_NONFINITE,
    STAT_P2,
    STAT_PAIRS,
)
from hf_lopt.kernels.arguments import ApplyNetwork, FeatureSums, Sums, UpdateFactored
from hf_lopt.kernels.reference import formats


# Elements of a block: small enough for the feature matrix to stay in cache, large enough to hide the cost of a call.
_BLOCK_CPU, _BLOCK_OTHER = 1 << 15, 1 << 22


@functools.cache
def complement(decay: float) -> float:
    """``1 - decay`` as float32 arithmetic gives it; the references round the decay first, which shows at 0.999."""
    decay32 = torch.tensor(decay, dtype=torch.float32)
    return (1.0 - decay32).item()


def block_indices(shape: Sequence[int], limit: int, row_axis: int | None = None) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cut a tensor into blocks of about ``limit`` elements along its leading axes.

    ``row_axis``: the axes from this one on are rows of 8-bit codes, whose blocks are not cut.
    """
    numel = math.prod(shape)
    if numel == 0:
        return
    if numel <= limit or not shape or (row_axis is not None and row_axis < 0):
        yield ()
        return
    inner = numel // shape[0]
    if inner > limit and row_axis != 0:
        for i in range(shape[0]):
            for rest in block_indices(shape[1:], limit, None if row_axis is None else row_axis - 1):
                yield (slice(i, i + 1), *rest)
        return
    length = max(1, limit // inner)
    if row_axis == 0:
        unit = formats.BLOCK // math.gcd(formats.BLOCK, inner)
        length = max(length // unit, 1) * unit
    for i in range(0, shape[0], length):
        yield (slice(i, i + length),)


def block_of(x: Tensor, index: tuple[slice, ...]) -> Tensor:
    """Block ``index`` of ``x`` (D, *shape), where an axis of size 1 broadcasts and is kept whole."""
    return x[(slice(None), *(slice(None) if x.shape[i + 1] == 1 else s for i, s in enumerate(index)))]


def block_size(x: Tensor) -> int:
    return _BLOCK_CPU if x.device.type == "cpu" else _BLOCK_OTHER


def ema(old: Tensor, new: Tensor, decays: Sequence[float]) -> Tensor:
    """``decay * old + (1 - decay) * new`` for ``old`` (D, *block) and ``new`` (*block)."""
    out = torch.empty_like(old)
    for i, decay in enumerate(decays):
        torch.mul(old[i], decay, out=out[i]).add_(new, alpha=complement(decay))
    return out


class Block:
    """One block of one tensor with its updated accumulators, everything in float32: what the formulas of
    :data:`hf_lopt.features.FEATURES` take."""

    def __init__(self, tensors: Tensors, t: int, index: tuple[slice, ...]):
        x = tensors.arguments
        g = tensors.grads[t][index].float()
        self.g = g.clamp(-x.clip, x.clip) if x.clip < math.inf else g
        self.p = tensors.params[t][index].float()
        g2 = self.g * self.g
        self.m = ema(tensors.momenta[t].load(index), self.g, x.momentum_decays)
        self.v = ema(tensors.second_moments[t].load(index), g2, x.second_decays)
        self.rsqrt_v = (self.v + x.second_eps).rsqrt_()
        self.diagonal_eps = x.diagonal_eps
        self.diagonal: Tensor | None = None
        self.factored = tensors.row_axes[t] >= 0
        if self.factored:
            self.row, self.col, self.row_factor, self.col_factor = (
                block_of(y, index)
                for y in (tensors.rows[t], tensors.cols[t], tensors.row_factors[t], tensors.col_factors[t])
            )
        elif tensors.diagonals[t].numel():
            self.diagonal = ema(block_of(tensors.diagonals[t], index), g2 + FACTORED_EPS, x.factored_decays)
            # For rank < 2 the row and the column accumulator are both the diagonal one.
            self.row = self.col = self.diagonal

    def column(self, name: str) -> Tensor:
        """The feature ``name``, (k, *block) with k = 1 or one column per decay."""
        feature = FEATURES[name]
        formula = feature.formula if self.factored else feature.vector_formula or feature.formula
        value = formula(self)
        return value if value.dim() > self.g.dim() else value.unsqueeze(0)


@dataclass
class _VectorAccumulators:
    """What the formulas of features take that depend on a row or column accumulator alone."""

    row: Tensor
    col: Tensor


class Tensors:
    """The tensors of pass 1 or pass 2, cut into slices where that is asked for, and the columns of each feature."""

    def __init__(self, arguments: FeatureSums):
        x = self.arguments = arguments
        self.params, self.grads = list(x.params), list(x.grads)
        self.momenta = formats.accumulators(x.momenta, x.momentum_scales)
        self.second_moments = formats.accumulators(x.second_moments, x.second_scales)
        self.diagonals = list(x.diagonals)
        self.row_axes, self.col_axes = list(x.row_axes), list(x.col_axes)

        def broadcast(xs: Sequence[Tensor], axes: Sequence[int]) -> list[Tensor]:
            """Gives a vector accumulator the axis that it was reduced over, with size 1."""
            return [y.unsqueeze(axis + 1) if axis >= 0 else y for y, axis in zip(xs, axes, strict=True)]

        self.rows, self.row_factors = broadcast(x.rows, x.row_axes), broadcast(x.row_factors, x.row_axes)
        self.cols, self.col_factors = broadcast(x.cols, x.col_axes), broadcast(x.col_factors, x.col_axes)
        if x.slice_axes:
            self._cut_into_slices()
        counts = (len(x.momentum_decays), len(x.second_decays), len(x.factored_decays))
        self.columns: list[tuple[str, slice]] = []
        start = 0
        for name in x.features:
            width = FEATURES[name].columns(*counts)
            self.columns.append((name, slice(start, start + width)))
            start += width
        self.width = start

    def _cut_into_slices(self) -> None:
        """Replace every tensor by the matrices over its two slice axes, as views: each is normalised on its own."""
        axes = self.arguments.slice_axes
        self._indices = indices = [slice_indices(p.shape, axes[2 * t : 2 * t + 2]) for t, p in enumerate(self.params)]
        self.params, self.grads = self.slices_of(self.params), self.slices_of(self.grads)
        for name in ("momenta", "second_moments"):
            pairs = zip(getattr(self, name), indices, strict=True)
            setattr(self, name, [part for x, index in pairs for part in x.slices(index)])
        for name in ("diagonals", "rows", "cols", "row_factors", "col_factors"):
            xs = zip(getattr(self, name), indices, strict=True)
            setattr(self, name, [block_of(x, i) if x.dim() > 1 else x for x, index in xs for i in index])
        for name in ("row_axes", "col_axes"):
            setattr(
                self, name, [axis for axis, index in zip(getattr(self, name), indices, strict=True) for _ in index]
            )

    def slices_of(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Views of parameter-shaped tensors, one per entry of the results."""
        if not (xs and self.arguments.slice_axes):
            return list(xs)
        return [x[i] for x, index in zip(xs, self._indices, strict=True) for i in index]

    def split(self, t: int) -> tuple[list[tuple[str, slice]], list[tuple[str, slice]]]:
        """(element features, vector features) of tensor ``t`` with their columns. The latter are constant along a row
        or a column."""
        if self.row_axes[t] < 0:
            return self.columns, []
        element = [c for c in self.columns if not FEATURES[c[0]].constant_along]
        return element, [c for c in self.columns if FEATURES[c[0]].constant_along]

    def vector_feature(self, t: int, name: str) -> Tensor:
        """A row or column feature of a factored tensor, (D, *shape with the reduced axis of size 1)."""
        return FEATURES[name].formula(_VectorAccumulators(self.rows[t], self.cols[t]))

    def blocks(self, t: int) -> Iterator[tuple[tuple[slice, ...], Block]]:
        p = self.params[t]
        for index in block_indices(p.shape, block_size(p), self.momenta[t].row_axis):
            yield index, Block(self, t, index)

    def places(self) -> list[formats.Place]:
        """Where each entry of the results lies; none where nothing is rounded at random."""
        x = self.arguments
        assert isinstance(x, ApplyNetwork)
        places = formats.read_places(x.places, x.params)
        if not x.slice_axes or not places:
            return places
        return [place.of_slice(i) for place, index in zip(places, self._indices, strict=True) for i in index]


def slice_indices(shape: Sequence[int], axes: Sequence[int]) -> list[tuple[slice, ...]]:
    """Indices of the matrices over two ``axes`` of a tensor, in row-major order of the others; one for rank < 2."""
    ranges = [
        [slice(None)] if i in axes or len(shape) < 2 else [slice(k, k + 1) for k in range(n)]
        for i, n in enumerate(shape)
    ]
    return list(itertools.product(*ranges))


def _stack(block: Block, columns: list[tuple[str, slice]]) -> Tensor:
    """Feature matrix (columns, n) of a block."""
    return torch.cat([x.reshape(x.shape[0], -1) for x in (block.column(name) for name, _ in columns)])


def stat_width(momenta: Sequence[Tensor], second_moments: Sequence[Tensor]) -> int:
    """Number of statistics with the pairs (Σ, Σ²) of each second moment and each momentum."""
    return STAT_PAIRS + 2 * (second_moments[0].shape[0] + momenta[0].shape[0])


def _add_moments(stats: Tensor, p: Tensor, v: Tensor, m: Tensor) -> None:
    """Add the statistics of a block of the parameter, its second moments and its momenta."""
    stats[STAT_P2] += sum_of_squares(p)
    for i, part in enumerate((*v, *m)):
        stats[STAT_PAIRS + 2 * i] += part.sum(dtype=torch.float64)
        stats[STAT_PAIRS + 2 * i + 1] += sum_of_squares(part)


def sums(arguments: Sums) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Pass 0. Returns row sums of g² (shape without axis A) and column sums (without axis B), float32, empty for
    rank < 2, and statistics (T, S) in float64: the count of non-finite gradient entries and Σg²; with ``moments`` also
    Σp², and (Σv, Σv²) for each second moment and (Σm, Σm²) for each momentum. All add up over the shards of a tensor.
    """
    x = arguments
    stats = torch.zeros(
        len(x.params), stat_width(x.momenta, x.second_moments), dtype=torch.float64, device=x.params[0].device
    )
    momenta = formats.accumulators(x.momenta, x.momentum_scales)
    second_moments = formats.accumulators(x.second_moments, x.second_scales)
    rows, cols = [], []
    for t, (p, g) in enumerate(zip(x.params, x.grads, strict=True)):
        a, b = x.row_axes[t], x.col_axes[t]
        keep = [list(g.shape) for _ in range(2)] if a >= 0 else [[0], [0]]
        if a >= 0:
            keep[0][a] = keep[1][b] = 1
        row, col = (torch.zeros(s, dtype=torch.float32, device=g.device) for s in keep)
        for index in block_indices(g.shape, block_size(g), momenta[t].row_axis if x.moments else None):
            y = g[index].float()
            stats[t, STAT_NONFINITE] += (~torch.isfinite(y)).sum()
            stats[t, STAT_G2] += sum_of_squares(y)
            if x.moments:
                _add_moments(stats[t], p[index], second_moments[t].load(index), momenta[t].load(index))
            if a >= 0:
                y = y.clamp(-x.clip, x.clip) if x.clip < math.inf else y
                y = y * y
                for out, axis in ((row, a), (col, b)):
                    part = y.sum(axis, keepdim=True)
                    out[tuple(slice(None) if out.shape[i] == 1 else s for i, s in enumerate(index))] += part
        rows.append(row.squeeze(a) if a >= 0 else row)
        cols.append(col.squeeze(b) if a >= 0 else col)
    return rows, cols, stats


def sum_of_squares(x: Tensor) -> Tensor:
    x = x.double().flatten()  # the squares too: variances are differences of these sums
    return torch.dot(x, x)


def feature_sums(arguments: FeatureSums) -> Tensor:
    """Pass 1. Sums of squares (T, F), float64, of every feature column, formed from the updated accumulators."""
    x = Tensors(arguments)
    out = torch.zeros(len(x.params), x.width, dtype=torch.float64, device=x.params[0].device)
    for t, p in enumerate(x.params):
        element, vector = x.split(t)
        for name, columns in vector:
            square = x.vector_feature(t, name).double().square_()
            out[t, columns] = square.flatten(1).sum(1) * (p.numel() / max(square[0].numel(), 1))
        ranges = torch.cat([torch.arange(c.start, c.stop, device=out.device, dtype=torch.int64) for _, c in element])
        for _, block in x.blocks(t):
            features = _stack(block, element)
            out[t, ranges] += torch.linalg.vecdot(features, features)
    return out


def store_unless(skip: Tensor) -> Callable[[Tensor, Tensor], None] | None:
    """A function that stores a value where ``skip`` is false; None if it is known to be true."""
    if skip.device.type == "cpu":
        return None if bool(skip) else Tensor.copy_
    # On an accelerator the decision stays data: asking for it would wait for the device.
    return lambda target, value: target.copy_(torch.where(skip, target, value))


def store_parameter(p: Tensor, new: Tensor, store: formats.Store, noise: formats.Noise | None) -> None:
    """Stores new values of a parameter; of one in bfloat16 rounded at random where there is ``noise``."""
    if noise is not None and p.dtype == torch.bfloat16:
        new = formats.round_to_bfloat16(new, noise(formats.PARAMETER_SLOT))
    store(p, new)


def apply_network(arguments: ApplyNetwork) -> tuple[Tensor, Tensor]:
    """Pass 2. Evaluates the network and updates params, momenta, second moments and diagonals in place.

    ``weights[0]`` (T or 1, F, U) has the feature scales in it, further layers follow; ``biases`` likewise. With
    outputs o: step = scale[t] * o0 * exp(exp_mult * o1), p <- p - decay[t] * p - step; if ``out`` is not empty, the
    step is written there (float32) and p is left alone. ``skip`` (bool, 0-d): nothing is changed where it is true.

    Returns (T, O - 1) float64: Σ step², then the sums of the outputs o2, o3, …; and the statistics that pass 0 would
    find next with ``moments``, so that it need not read the parameters and accumulators (undefined after a skip)."""
    a, x = arguments, Tensors(arguments)
    outs, places = x.slices_of(a.out), x.places()
    sums = torch.zeros(len(x.params), a.weights[-1].shape[-1] - 1, dtype=torch.float64, device=a.scale.device)
    stats = sums.new_zeros(len(x.params), stat_width(a.momenta, a.second_moments))
    store = store_unless(a.skip)
    if store is None:
        return sums, stats
    for t, p in enumerate(x.params):
        w, b = ([y[t if y.shape[0] > 1 else 0] for y in ys] for ys in (a.weights, a.biases))
        element, vector = x.split(t)
        w_element = torch.cat([w[0][columns] for _, columns in element]).T
        # A row or column feature adds the same to every element of its row or column.
        constant = [torch.einsum("dh,d...->h...", w[0][c], x.vector_feature(t, name)) for name, c in vector]
        for index, block in x.blocks(t):
            shape = block.p.shape
            z = torch.addmm(b[0].unsqueeze(1), w_element, _stack(block, element))
            for part in constant:
                z.view(-1, *shape).add_(block_of(part, index))
            for wi, bi in zip(w[1:], b[1:], strict=True):
                z = torch.addmm(bi.unsqueeze(1), wi.T, z.relu_())
            step = (z[0] * torch.exp(z[1] * a.exp_mult) * a.scale[t]).view(shape)
            sums[t, 0] += sum_of_squares(step)
            sums[t, 1:] += z[2:].sum(1, dtype=torch.float64)
            noise = None if a.step is None else formats.Noise(places[t], index, shape, a.step)
            m = x.momenta[t].put(index, block.m, store, noise, 0)
            v = x.second_moments[t].put(index, block.v, store, noise, len(m))
            if block.diagonal is not None:
                store(block_of(x.diagonals[t], index), block.diagonal)
            if a.out:
                store(outs[t][index], step)
            else:
                new = torch.addcmul(block.p, block.p, a.decay[t], value=-1) - step
                store_parameter(p[index], new, store, noise if a.round_params else None)
            _add_moments(stats[t], p[index], v, m)
    return sums, stats


def update_factored(arguments: UpdateFactored) -> tuple[list[Tensor], ...]:
    """New row and column accumulators of factored tensors and their inverse-root factors; arguments stay as they are.

    R <- b R + (1-b) (row_sums / row_sizes + 1e-30), C likewise; row factor 1/sqrt(max(R / (mean_B(R) + 1e-9), 1e-9)),
    column factor 1/sqrt(max(C, 1e-9)). Returns four lists; their entries are empty for tensors that are not factored.
    """
    x = arguments
    out: tuple[list[Tensor], ...] = tuple([y.new_empty(0) for y in x.row_sums] for _ in range(4))
    for t, (a, b) in enumerate(zip(x.row_axes, x.col_axes, strict=True)):
        if a < 0:
            continue
        row = ema(x.rows[t], x.row_sums[t] / x.row_sizes[t] + FACTORED_EPS, x.decays)
        col = ema(x.cols[t], x.col_sums[t] / x.col_sizes[t] + FACTORED_EPS, x.decays)
        # Axis B in the row accumulator, which has lost axis A and gained the decays in front.
        mean = x.row_means[t] if x.row_means[t].numel() else row.mean(b + 1 if b < a else b, keepdim=True)
        row_factor = (row / (mean + FACTOR_EPS)).clamp_min_(FACTOR_EPS).rsqrt_()
        col_factor = col.clamp_min(FACTOR_EPS).rsqrt_()
        for part, y in zip(out, (row, col, row_factor, col_factor), strict=True):
            part[t] = y
    return out
