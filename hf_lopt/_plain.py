"""The operators' kernels in plain PyTorch: the specification that fused kernels are tested against.

They are written block by block, so that their temporaries stay in cache and never grow to the size of a tensor.

Axes: T tensors, F feature columns, H hidden units, O network outputs, D decays, n elements of a block.
Shapes of a tensor's state, for a parameter of shape ``s``: momentum and second moment ``(D, *s)``; factored row
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


# Columns of the statistics that ``sums`` returns, before the pairs (Σ, Σ²) of each second moment and each momentum.
STAT_NONFINITE, STAT_G2, STAT_P2, STAT_PAIRS = 0, 1, 2, 3

# Added to g² before it enters a factored accumulator, so that a row of zeros has a finite inverse root.
FACTORED_EPS = 1e-30

# Elements of a block: small enough for the feature matrix to stay in cache, large enough to hide the cost of a call.
_BLOCK_CPU, _BLOCK_OTHER = 1 << 15, 1 << 22


@functools.cache
def complement(decay: float) -> float:
    """``1 - decay`` as float32 arithmetic gives it; the references round the decay first, which shows at 0.999."""
    decay32 = torch.tensor(decay, dtype=torch.float32)
    return (1.0 - decay32).item()


def blocks(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cut a tensor into blocks of about ``limit`` elements along its leading axes."""
    numel = math.prod(shape)
    if numel == 0:
        return
    if numel <= limit or not shape:
        yield ()
        return
    inner = numel // shape[0]
    if inner > limit:
        for i in range(shape[0]):
            for rest in blocks(shape[1:], limit):
                yield (slice(i, i + 1), *rest)
        return
    length = max(1, limit // inner)
    for i in range(0, shape[0], length):
        yield (slice(i, i + length),)


def cut(x: Tensor, index: tuple[slice, ...]) -> Tensor:
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


class _Block:
    """One block of one tensor with its updated accumulators, everything in float32; features are formed from it."""

    def __init__(self, tensors: Tensors, t: int, index: tuple[slice, ...]):
        g = tensors.grads[t][index].float()
        self.g = g.clamp(-tensors.clip, tensors.clip) if tensors.clip < math.inf else g
        self.p = tensors.params[t][index].float()
        g2 = self.g * self.g
        self.m = ema(cut(tensors.momenta[t], index), self.g, tensors.momentum_decays)
        self.v = ema(cut(tensors.second_moments[t], index), g2, tensors.second_decays)
        self.rsqrt_v = (self.v + tensors.second_eps).rsqrt_()
        self.factored = tensors.row_axes[t] >= 0
        if self.factored:
            self.row, self.col, self.row_factor, self.col_factor = (
                cut(x, index)
                for x in (tensors.rows[t], tensors.cols[t], tensors.row_factors[t], tensors.col_factors[t])
            )
        self.diagonal = None
        if not self.factored and tensors.diagonals[t].numel():
            self.diagonal = ema(cut(tensors.diagonals[t], index), g2 + FACTORED_EPS, tensors.factored_decays)
            self.diagonal_eps = tensors.diagonal_eps

    def _over_rows_and_cols(self, x: Tensor) -> Tensor:
        return x * self.row_factor * self.col_factor

    def column(self, name: str) -> Tensor:
        """The feature ``name``, shape (k, *block) with k = 1 or one column per decay."""
        return getattr(self, "_" + name)()

    # One method per feature; the name is the one used in hf_lopt.features.
    def _g(self):
        return self.g.unsqueeze(0)

    def _clip_g(self):
        return self.g.clamp(-0.1, 0.1).unsqueeze(0)

    def _p(self):
        return self.p.unsqueeze(0)

    def _log_abs_p(self):
        return torch.log(self.p.abs() + 1e-8).unsqueeze(0)

    def _m(self):
        return self.m

    def _v(self):
        return self.v

    def _m_rsqrt_v(self):
        return self.m * self.rsqrt_v

    def _rsqrt_v(self):
        return self.rsqrt_v

    def _g_rsqrt_v(self):
        return self.g * self.rsqrt_v

    def _fac_g(self):
        if self.factored:
            return self._over_rows_and_cols(self.g.unsqueeze(0))
        return self.g * (self.diagonal + 1e-9).clamp_min(1e-9).rsqrt_()

    def _fac_m(self):
        if self.factored:
            return self._over_rows_and_cols(self.m)
        return self.m * (self.diagonal + self.diagonal_eps).rsqrt_()

    # Only met by tensors of rank < 2, whose row and column accumulators are both the diagonal one.
    def _row(self):
        return self.diagonal

    def _rsqrt_row(self):
        return (self.diagonal + 1e-8).rsqrt_()

    _col, _rsqrt_col = _row, _rsqrt_row


# Features that are constant along a row or a column of a factored tensor: formed from the accumulator alone.
_VECTOR_FEATURES = {
    "row": ("row", lambda x: x),
    "rsqrt_row": ("row", lambda x: (x + 1e-8).rsqrt()),
    "col": ("col", lambda x: x),
    "rsqrt_col": ("col", lambda x: (x + 1e-8).rsqrt()),
}
_PER_FACTORED_DECAY = {"fac_g", "row", "col", "rsqrt_row", "rsqrt_col"}
_PER_SECOND_DECAY = {"v", "rsqrt_v", "g_rsqrt_v"}
_PER_MOMENTUM_DECAY = {"m", "m_rsqrt_v", "fac_m"}


@dataclass
class Tensors:
    """The common arguments by name, in the order of the schema, and the column range of each feature."""

    features: Sequence[str]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    momenta: Sequence[Tensor]
    second_moments: Sequence[Tensor]
    diagonals: Sequence[Tensor]
    rows: Sequence[Tensor]
    cols: Sequence[Tensor]
    row_factors: Sequence[Tensor]
    col_factors: Sequence[Tensor]
    row_axes: Sequence[int]
    col_axes: Sequence[int]
    slice_axes: Sequence[int]
    momentum_decays: Sequence[float]
    second_decays: Sequence[float]
    factored_decays: Sequence[float]
    clip: float
    second_eps: float
    diagonal_eps: float

    def __post_init__(self) -> None:
        def broadcast(xs, axes):  # give a vector accumulator the axis that it was reduced over, with size 1
            return [x.unsqueeze(axis + 1) if axis >= 0 else x for x, axis in zip(xs, axes, strict=True)]

        self.rows, self.row_factors = broadcast(self.rows, self.row_axes), broadcast(self.row_factors, self.row_axes)
        self.cols, self.col_factors = broadcast(self.cols, self.col_axes), broadcast(self.col_factors, self.col_axes)
        if self.slice_axes:
            self._cut_into_slices()
        counts = (len(self.momentum_decays), len(self.second_decays), len(self.factored_decays))
        self.columns, start = [], 0
        for name in self.features:
            width = feature_width(name, *counts)
            self.columns.append((name, slice(start, start + width)))
            start += width
        self.width = start

    def _cut_into_slices(self) -> None:
        """Replace every tensor by the matrices over its two slice axes, as views: each is normalised on its own."""
        indices = [slice_indices(p.shape, self.slice_axes[2 * t : 2 * t + 2]) for t, p in enumerate(self.params)]
        self._indices = indices
        self.params, self.grads = self.slices_of(self.params), self.slices_of(self.grads)
        for name in ("momenta", "second_moments", "diagonals", "rows", "cols", "row_factors", "col_factors"):
            xs = zip(getattr(self, name), indices, strict=True)
            setattr(self, name, [cut(x, i) if x.dim() > 1 else x for x, index in xs for i in index])
        for name in ("row_axes", "col_axes"):
            setattr(
                self, name, [axis for axis, index in zip(getattr(self, name), indices, strict=True) for _ in index]
            )

    def slices_of(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Views of parameter-shaped tensors, one per entry of the results."""
        if not (xs and self.slice_axes):
            return list(xs)
        return [x[i] for x, index in zip(xs, self._indices, strict=True) for i in index]

    def split(self, t: int) -> tuple[list[tuple[str, slice]], list[tuple[str, slice]]]:
        """(element features, vector features) of tensor ``t`` with their columns."""
        if self.row_axes[t] < 0:
            return self.columns, []
        element = [c for c in self.columns if c[0] not in _VECTOR_FEATURES]
        return element, [c for c in self.columns if c[0] in _VECTOR_FEATURES]

    def vector_feature(self, t: int, name: str) -> Tensor:
        """A row or column feature of a factored tensor, (D, *shape with the reduced axis of size 1)."""
        which, formula = _VECTOR_FEATURES[name]
        return formula((self.rows if which == "row" else self.cols)[t])

    def blocks(self, t: int) -> Iterator[tuple[tuple[slice, ...], _Block]]:
        p = self.params[t]
        for index in blocks(p.shape, block_size(p)):
            yield index, _Block(self, t, index)


def slice_indices(shape: Sequence[int], axes: Sequence[int]) -> list[tuple[slice, ...]]:
    """Indices of the matrices over two ``axes`` of a tensor, in row-major order of the others; one for rank < 2."""
    ranges = [
        [slice(None)] if i in axes or len(shape) < 2 else [slice(k, k + 1) for k in range(n)]
        for i, n in enumerate(shape)
    ]
    return list(itertools.product(*ranges))


def feature_width(name: str, momentum: int = 3, second: int = 1, factored: int = 3) -> int:
    """Number of columns of the feature ``name`` for these numbers of decays."""
    if name in _PER_FACTORED_DECAY:
        return factored
    if name in _PER_MOMENTUM_DECAY:
        return momentum
    return second if name in _PER_SECOND_DECAY else 1


def _stack(block: _Block, columns: list[tuple[str, slice]]) -> Tensor:
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


def sums(params, grads, momenta, second_moments, row_axes, col_axes, clip, moments):
    """Pass 0. Returns row sums of g² (shape without axis A) and column sums (without axis B), float32, empty for
    rank < 2, and statistics (T, S) in float64: the count of non-finite gradient entries and Σg²; with ``moments`` also
    Σp², and (Σv, Σv²) for each second moment and (Σm, Σm²) for each momentum. All add up over the shards of a tensor.
    """
    stats = torch.zeros(len(params), stat_width(momenta, second_moments), dtype=torch.float64, device=params[0].device)
    rows, cols = [], []
    for t, (p, g) in enumerate(zip(params, grads, strict=True)):
        a, b = row_axes[t], col_axes[t]
        keep = [list(g.shape) for _ in range(2)] if a >= 0 else [[0], [0]]
        if a >= 0:
            keep[0][a] = keep[1][b] = 1
        row, col = (torch.zeros(s, dtype=torch.float32, device=g.device) for s in keep)
        for index in blocks(g.shape, block_size(g)):
            x = g[index].float()
            stats[t, STAT_NONFINITE] += (~torch.isfinite(x)).sum()
            stats[t, STAT_G2] += sum_of_squares(x)
            if moments:
                _add_moments(stats[t], p[index], cut(second_moments[t], index), cut(momenta[t], index))
            if a >= 0:
                x = x.clamp(-clip, clip) if clip < math.inf else x
                x = x * x
                for out, axis in ((row, a), (col, b)):
                    part = x.sum(axis, keepdim=True)
                    out[tuple(slice(None) if out.shape[i] == 1 else s for i, s in enumerate(index))] += part
        rows.append(row.squeeze(a) if a >= 0 else row)
        cols.append(col.squeeze(b) if a >= 0 else col)
    return rows, cols, stats


def sum_of_squares(x: Tensor) -> Tensor:
    x = x.double().flatten()  # the squares too: variances are differences of these sums
    return torch.dot(x, x)


def feature_sums(*args) -> Tensor:
    """Pass 1. Sums of squares (T, F), float64, of every feature column, formed from the updated accumulators."""
    x = Tensors(*args)
    out = torch.zeros(len(x.params), x.width, dtype=torch.float64, device=x.params[0].device)
    for t, p in enumerate(x.params):
        element, vector = x.split(t)
        for name, columns in vector:
            square = x.vector_feature(t, name).double().square_()
            out[t, columns] = square.flatten(1).sum(1) * (p.numel() / max(square[0].numel(), 1))
        ranges = torch.cat([torch.arange(c.start, c.stop, device=out.device) for _, c in element])
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


def apply_network(*args) -> tuple[Tensor, Tensor]:
    """Pass 2. Evaluates the network and updates params, momenta, second moments and diagonals in place.

    ``weights[0]`` (T or 1, F, U) has the feature scales folded in, further layers follow; ``biases`` likewise. With
    outputs o: step = scale[t] * o0 * exp(exp_mult * o1), p <- p - decay[t] * p - step; if ``out`` is not empty, the
    step is written there (float32) and p is left alone. ``skip`` (bool, 0-d): nothing is changed where it is true.

    Returns (T, O - 1) float64: Σ step², then the sums of the outputs o2, o3, …; and the statistics that pass 0 would
    find next with ``moments``, so that it need not read the parameters and accumulators (undefined after a skip)."""
    *common, weights, biases, scale, decay, exp_mult, skip, out = args
    x = Tensors(*common)
    outs = x.slices_of(out)
    sums = torch.zeros(len(x.params), weights[-1].shape[-1] - 1, dtype=torch.float64, device=scale.device)
    stats = sums.new_zeros(len(x.params), stat_width(x.momenta, x.second_moments))
    store = store_unless(skip)
    if store is None:
        return sums, stats
    for t, p in enumerate(x.params):
        w, b = ([y[t if y.shape[0] > 1 else 0] for y in ys] for ys in (weights, biases))
        element, vector = x.split(t)
        w_element = torch.cat([w[0][columns] for _, columns in element]).T
        # A row or column feature adds the same to every element of its row or column.
        constant = [torch.einsum("dh,d...->h...", w[0][c], x.vector_feature(t, name)) for name, c in vector]
        for index, block in x.blocks(t):
            shape = block.p.shape
            z = torch.addmm(b[0].unsqueeze(1), w_element, _stack(block, element))
            for part in constant:
                z.view(-1, *shape).add_(cut(part, index))
            for wi, bi in zip(w[1:], b[1:], strict=True):
                z = torch.addmm(bi.unsqueeze(1), wi.T, z.relu_())
            step = (z[0] * torch.exp(z[1] * exp_mult) * scale[t]).view(shape)
            sums[t, 0] += sum_of_squares(step)
            sums[t, 1:] += z[2:].sum(1, dtype=torch.float64)
            store(cut(x.momenta[t], index), block.m)
            store(cut(x.second_moments[t], index), block.v)
            if block.diagonal is not None:
                store(cut(x.diagonals[t], index), block.diagonal)
            if out:
                store(outs[t][index], step)
            else:
                store(p[index], torch.addcmul(block.p, block.p, decay[t], value=-1) - step)
            _add_moments(stats[t], p[index], block.v, block.m)
    return sums, stats


def update_factored(rows, cols, row_sums, col_sums, row_means, row_sizes, col_sizes, row_axes, col_axes, decays):
    """New row and column accumulators of factored tensors and their inverse-root factors; arguments stay as they are.

    R <- b R + (1-b) (row_sums / row_sizes + 1e-30), C likewise; row factor 1/sqrt(max(R / (mean_B(R) + 1e-9), 1e-9)),
    column factor 1/sqrt(max(C, 1e-9)). Sizes are the lengths of axes A and B of the whole tensor. ``row_means[t]`` is
    mean_B of the new R, with axis B of size 1, where a rank does not hold all of B; otherwise an empty tensor.

    Returns four lists; their entries are empty for tensors that are not factored.
    """
    out: tuple[list[Tensor], ...] = tuple([x.new_empty(0) for x in row_sums] for _ in range(4))
    for t, (a, b) in enumerate(zip(row_axes, col_axes, strict=True)):
        if a < 0:
            continue
        row = ema(rows[t], row_sums[t] / row_sizes[t] + FACTORED_EPS, decays)
        col = ema(cols[t], col_sums[t] / col_sizes[t] + FACTORED_EPS, decays)
        # Axis B in the row accumulator, which has lost axis A and gained the decays in front.
        mean = row_means[t] if row_means[t].numel() else row.mean(b + 1 if b < a else b, keepdim=True)
        row_factor = (row / (mean + 1e-9)).clamp_min_(1e-9).rsqrt_()
        for part, x in zip(out, (row, col, row_factor, col.clamp_min(1e-9).rsqrt_()), strict=True):
            part[t] = x
    return out
