"""The passes of a step over a batch of tensors, and the reductions between them.

    pass 0   sums of g² over rows and columns   -> reduction 1 -> row and column factors
    pass 1   mean squares of all features       -> reduction 2, with the loss and what is not finite
             the decision about the step, the features of the run
    pass 2   accumulators, network, parameters

A rule calls :func:`read` for everything before pass 2, decides, and calls :func:`apply_network` or
:func:`network_outputs`. Tensors are the local shards of sharded parameters; what :func:`read` returns is of the whole
tensors, the same on all ranks.

Every line here is a launch on an accelerator, or none: what can be an argument of an operator is not computed before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lopt import _ops, _plain_scheduler, accumulators, distributed
from hf_lopt.accumulators import Factors
from hf_lopt.features import ElementFeatures, rank_one_hot
from hf_lopt.networks import Folded
from hf_lopt.rules.batches import Batch


@dataclass
class Reading:
    """What passes 0 and 1 have found in a batch, of the whole tensors."""

    stats: Tensor  # (T, S) float64, see the operator ``sums``
    factors: Factors
    sums: Tensor  # sums of squares (T, F) float64; a sliced batch has a row for each of its matrices
    numel: Tensor  # what they were taken over, (T,) float64

    @property
    def mean_squares(self) -> Tensor:
        return self.sums / self.numel.unsqueeze(1)

    def of(self, batch: Batch, start: int, stop: int) -> Reading:
        """What was found in a range of the tensors of ``batch``."""
        first, last = (sum(batch.layout.slices[:t]) for t in (start, stop))
        f = self.factors
        factors = Factors(*(x[start:stop] for x in (f.rows, f.cols, f.row_factors, f.col_factors)))
        sums, numel = (x.narrow(0, first, last - first) for x in (self.sums, self.numel))
        return Reading(self.stats.narrow(0, start, stop - start), factors, sums, numel)


@dataclass
class Turn:
    """What is decided about a step, and the features of the run; see the operator ``advance``."""

    skip: Tensor  # bool, 0-d: true on all ranks if anything that enters the step is not finite on any
    loss: Tensor | None  # mean over ranks, 0-d
    features: Tensor  # (29 + corrections,) float32
    inputs: Tensor  # of the scheduler, (T, I)
    steps: Tensor | None = None  # of many runs, (runs,)

    @property
    def loss_features(self) -> Tensor:
        return self._part(_plain_scheduler.LOSS)

    @property
    def step_features(self) -> Tensor:
        """Of the step count (11,); of many runs (runs, 11)."""
        return self._part(_plain_scheduler.STEP) if self.steps is None else _plain_scheduler.step_features(self.steps)

    @property
    def corrections(self) -> tuple[Tensor, ...]:
        """1 / (1 - decay^n) for the decays that :func:`read` was asked for, 0-d each."""
        return self._part(slice(_plain_scheduler.STEP.stop, len(self.features))).unbind()

    def _part(self, place: slice) -> Tensor:
        return self.features.narrow(0, place.start, place.stop - place.start)


def read(
    parts: Sequence[tuple[Batch, ElementFeatures]],
    run: Mapping[str, Any],
    loss: Tensor | None = None,
    *,
    horizon: int = 0,
    tensor_inputs: bool = False,
    others: Sequence[Batch] = (),
    corrected: Sequence[float] = (),
) -> tuple[list[Reading], Turn]:
    """Passes 0 and 1 over batches whose features share their factored decays, and the decision about the step.

    Nothing but the run has been changed then: its counters and, where it has one, its loss buffer. ``horizon``: of the
    run, for the scheduler. ``tensor_inputs``: VeLO's features of each tensor among the scheduler's inputs. ``others``:
    batches that are only looked at for values that are not finite. ``corrected``: decays of bias corrections.
    """
    first = [_sums(batch, features, tensor_inputs) for batch, features in parts]
    factors = _factors(parts, [x[:2] for x in first])
    sums = [
        _ops.feature_sums(*_common(batch, features, f)) for (batch, features), f in zip(parts, factors, strict=True)
    ]
    stats = [x[2] for x in first]
    checked, bad = [*stats, *map(_gradient_statistics, others)], None
    if distributed.world_size() > 1:
        stats, totals, loss, bad = _reduce(parts, checked, [_complete(*x[2:]) for x in first], sums, loss, others)
        moments, checked = stats, []
    else:
        totals, moments = sums, [x[3] for x in first]
    batches = [*(batch for batch, _ in parts), *others]
    root = batches[0].layout.root
    own: list[Tensor] = []
    p_column = 0
    if tensor_inputs:
        ((batch, features),) = parts
        if "ranks" not in root.cache:
            root.cache["ranks"] = rank_one_hot(batch.layout.shapes, batch.layout.device)
        own, p_column = [moments[0], totals[0], batch.layout.numel, root.cache["ranks"]], features.column("p")
    buffer = [run[name] for name in ("loss_means", "loss_min") if name in run]
    counters, steps = run.get("counters"), None
    if counters is None:  # the caller counts its steps, of which there may be one for each of many runs
        steps = run["step"] if run["step"].dim() else None
        counters = run["step"].new_zeros(3)
        if steps is None:
            counters[0] = run["step"]
    skip, values, inputs = _ops.advance(
        *(checked, sums if bad is None else [], bad, loss, counters, buffer, float(horizon), corrected),
        *(own, p_column, sum(len(batch.params) for batch in batches)),
    )
    readings = [
        Reading(s, f, total, batch.layout.slice_numel)
        for (batch, _), s, f, total in zip(parts, stats, factors, totals, strict=True)
    ]
    return readings, Turn(skip, loss, values, inputs, steps)


def _sums(batch: Batch, features: ElementFeatures, moments: bool) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Pass 0; its statistics twice, the second time those of parameters and accumulators. They come from the pass that
    last wrote them, unless accumulators have been changed since. Those of the parameter do not: a user may edit it
    through ``.data``, which leaves no trace."""
    layout = batch.layout
    known = layout.cache.get("stats") if moments and layout.versions == _versions(batch) else None
    row_sums, col_sums, stats = _ops.sums(
        *(batch.params, batch.grads, *batch.accumulators(), *_axes(batch, features)),
        *(features.clip, moments and known is None),
    )
    if known is None and moments:
        known = layout.cache["stats"] = stats
    return row_sums, col_sums, stats, stats if known is None else known


def _complete(stats: Tensor, moments: Tensor) -> Tensor:
    """One statistic of both."""
    if stats is moments:
        return stats
    return torch.cat([stats[:, : _ops.STAT_P2], moments[:, _ops.STAT_P2 :]], 1)


def _gradient_statistics(batch: Batch) -> Tensor:
    """Statistics (2T, S) that count what is not finite in gradients and parameters."""
    none, twice = [-1] * (2 * len(batch.params)), [2 * x for x in batch.accumulators()]
    values = [*batch.grads, *batch.params]
    return _ops.sums(values, values, *twice, none, none, math.inf, False)[2]


def _versions(batch: Batch) -> list[int]:
    return [x._version for xs in batch.accumulators() for x in xs]


def _axes(batch: Batch, features: ElementFeatures) -> tuple[list[int], list[int]]:
    none = [-1] * len(batch.params)
    return (batch.layout.row_axes, batch.layout.col_axes) if features.decays.factored else (none, none)


def _factors(parts: Sequence[tuple[Batch, ElementFeatures]], sums: Sequence[tuple]) -> list[Factors]:
    """Row and column accumulators of all parts and their factors, in one reduction."""
    decays = {features.decays.factored for _, features in parts}
    assert len(decays) <= 1, decays
    if decays <= {()}:
        return [Factors(*[[batch.layout.nothing] * len(batch.params)] * 4) for batch, _ in parts]
    joined = accumulators.update_factored(
        [x for batch, _ in parts for x in batch.tensors("factored_row")],
        [x for batch, _ in parts for x in batch.tensors("factored_col")],
        [x for rows, _ in sums for x in rows],
        [x for _, cols in sums for x in cols],
        [shape for batch, _ in parts for shape in batch.layout.shapes],
        [axis for batch, _ in parts for axis in batch.layout.row_axes],
        [axis for batch, _ in parts for axis in batch.layout.col_axes],
        decays.pop(),
        [cut for batch, _ in parts for cut in batch.layout.cuts],
    )
    out, start = [], 0
    for batch, _ in parts:
        span = slice(start, start + len(batch.params))
        out.append(Factors(joined.rows[span], joined.cols[span], joined.row_factors[span], joined.col_factors[span]))
        start = span.stop
    return out


def _reduce(
    parts: Sequence[tuple[Batch, ElementFeatures]],
    checked: list[Tensor],
    stats: list[Tensor],
    sums: list[Tensor],
    loss: Tensor | None,
    others: Sequence[Batch],
) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor]:
    """Reduction 2: statistics, feature sums, loss, and whether anything is not finite, over all shards and ranks."""
    flags = [(x[:, _ops.STAT_NONFINITE] > 0).any() for x in checked] + [~torch.isfinite(x).all() for x in sums]
    bad = torch.stack(flags + ([] if loss is None else [~torch.isfinite(loss)])).any()
    batches = [*(batch for batch, _ in parts), *others]
    root, zero = batches[0].layout.root, torch.zeros_like(bad, dtype=torch.float64)
    shared = [zero if loss is None else loss.double(), bad.double(), root.cache.get("local_update", zero)]
    shared = torch.stack(shared)
    items = [(shared, distributed.world_groups(cut for batch in batches for cut in batch.layout.cuts))]
    for (batch, _), s, f in zip(parts, stats, sums, strict=True):
        layout = batch.layout
        rows = f.split(layout.slices)
        for t, cut in enumerate(layout.cuts):
            pair = layout.slice_axes[2 * t : 2 * t + 2] if len(layout.shapes[t]) > 1 else None
            pair = pair or None
            items += [(s[t], cut.groups() if cut else ()), (rows[t], cut.groups(pair) if cut else ())]
    shared, *rest = distributed.sum_over(items)
    root.cache["whole_update"] = shared[2]
    new_stats, new_sums = [], []
    for batch, _ in parts:
        count = 2 * len(batch.params)
        own, rest = rest[:count], rest[count:]
        new_stats.append(torch.stack(own[::2]))
        new_sums.append(torch.cat(own[1::2]))
    return (
        new_stats,
        new_sums,
        None if loss is None else (shared[0] / distributed.world_size()).to(loss),
        shared[1] > 0,
    )


def _common(batch: Batch, features: ElementFeatures, f: Factors) -> tuple:
    layout, decays = batch.layout, features.decays
    return (
        *(features.names, batch.params, batch.grads, *batch.accumulators(), batch.tensors("factored_diag")),
        *(f.rows, f.cols, f.row_factors, f.col_factors, *_axes(batch, features)),
        layout.slice_axes,
        *(decays.momentum, decays.second_moment, decays.factored),
        *(features.clip, features.second_eps, features.diagonal_eps),
    )


def fold(
    batch: Batch,
    features: ElementFeatures | None,
    reading: Reading | None,
    networks: Tensor,
    sizes: Sequence[int],
    *,
    constants: Tensor | None = None,
    outputs: int = 2,
    factors: Sequence[Tensor] = (),
    step_mult: float | None = 1.0,
    p_scale: bool = False,
) -> Folded:
    """Networks for features that are not normalised, their step sizes and decays; see the operator ``fold_network``.

    ``networks`` (T or 1, P) are flat, of widths ``sizes``; a step is lr * factors * step_mult times the output, with
    ``p_scale`` also times the root mean square of the parameter. Weight decay is decoupled and scaled by lr. A
    ``step_mult`` of None leaves all this out: the step is made of the outputs later.
    """
    layout = batch.layout
    if step_mult is None:
        lr = weight_decay = layout.one.expand(len(reading.numel))
    else:
        lr, weight_decay = batch["lr"], batch["weight_decay"]
    if layout.runs:
        # Those of the runs, for each tensor in turn.
        networks, constants = (
            x.repeat(len(batch.params), 1) if x is not None and x.dim() > 1 and len(x) == layout.runs > 1 else x
            for x in (networks, constants)
        )
    flat, scale, decay = _ops.fold_network(
        *(networks, sizes, outputs, constants),
        *(
            (layout.nothing, layout.slice_numel, 0.0)
            if reading is None
            else (reading.sums, reading.numel, features.norm_eps)
        ),
        *(lr, weight_decay, factors, batch["min_param_scale"] if p_scale else None),
        *(1.0 if step_mult is None else step_mult,),
        features.column("p") if p_scale else -1,
    )
    inputs = sizes[0] - (0 if constants is None else constants.shape[-1]) if sizes else 0
    return Folded(flat, (inputs, *sizes[1:-1], outputs) if sizes else (), scale, decay)


def apply_network(
    batch: Batch,
    features: ElementFeatures,
    reading: Reading,
    network: Folded,
    exp_mult: float,
    skip: Tensor,
) -> Tensor:
    """Pass 2: parameters and accumulators in place. Returns sums over local shards, (T, O - 1): Σ step², Σ o2 and on.

    Both terms are formed from the parameter before the step: p <- p - lr * weight_decay * p - step.
    """
    layout = batch.layout
    arguments = (*network.layers(), network.scale, network.decay, exp_mult, skip, ())
    sums, stats = _ops.apply_network(*_common(batch, features, reading.factors), *arguments)
    known = layout.cache.get("stats")
    # As float32 numbers of twice the length, which are what ``assign`` takes.
    known = [] if known is None else [(known.view(torch.float32), stats.view(torch.float32))]
    store(batch, skip, known, factored_row=reading.factors.rows, factored_col=reading.factors.cols)
    if layout.runs:
        return sums.unflatten(0, (len(batch.params), -1)).sum(1)
    layout.versions = _versions(batch)
    return sums


def network_outputs(
    batch: Batch, features: ElementFeatures, reading: Reading, networks: Tensor, sizes: Sequence[int], skip: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Pass 2 for a rule that makes more of the output o0 than a step: accumulators in place, parameters left alone.

    Returns o0, float32, shaped like the local parameters, and its sums of squares, float64: one for each tensor, or
    for each matrix of a sliced batch.
    """
    network = fold(batch, features, reading, networks, sizes, step_mult=None)
    out = [torch.empty_like(p, dtype=torch.float32, memory_format=torch.contiguous_format) for p in batch.params]
    one = batch.layout.one.expand(len(network.scale))
    arguments = (*network.layers(), one, one, 0.0, skip, out)
    sums, _ = _ops.apply_network(*_common(batch, features, reading.factors), *arguments)
    store(batch, skip, factored_row=reading.factors.rows, factored_col=reading.factors.cols)
    return out, sums.select(1, 0)


def chunks(batch: Batch, reading: Reading, elements: int) -> Iterator[tuple[Batch, Reading]]:
    """Neighbouring tensors of about so many elements at a time, for work that needs memory for each of them."""
    cache = batch.layout.cache
    if "chunks" not in cache:
        starts, size = [0], 0
        for t, p in enumerate(batch.params):
            if size and size + p.numel() > elements:
                starts, size = [*starts, t], 0
            size += p.numel()
        cache["chunks"] = list(itertools.pairwise([*starts, len(batch.params)]))
    if len(cache["chunks"]) == 1:
        yield batch, reading
        return
    for start, stop in cache["chunks"]:
        part = batch.subset(("chunk", start), range(start, stop), sliced=bool(batch.layout.slice_axes))
        yield part, reading.of(batch, start, stop)


def descend(
    batch: Batch, features: ElementFeatures, steps: Sequence[Tensor], squares: Tensor | None, skip: Tensor
) -> None:
    """p <- p - lr (step + weight_decay p), rounded once; ``steps`` float32.

    With ``squares``, sums of squares of the whole tensors or of the matrices of a sliced batch, float64, each step is
    first brought to a mean square of 1.
    """
    layout = batch.layout
    size = None if squares is None else layout.slice_numel
    # Without squares slices differ in their settings at most, which are those of runs.
    axes = layout.slice_axes if layout.runs or squares is not None else []
    _ops.descend(
        *(batch.params, steps, batch["lr"], batch["weight_decay"], squares, size, features.norm_eps, axes, skip)
    )


def update_rms(batch: Batch, sums_of_squares: Tensor | Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Root mean square of the step over all elements of all tensors, 0-d, from the sums of squares of shards (T,) or
    from a function that returns them.

    Computed when it is asked for. With several ranks it is that of the step before.
    """
    cache, layout = batch.layout.cache, batch.layout

    def sums() -> Tensor:
        return sums_of_squares() if callable(sums_of_squares) else sums_of_squares

    def root(total: Tensor) -> Tensor:
        return (total / layout.numel.sum()).sqrt()

    if distributed.world_size() == 1:
        return lambda: root(sums().sum())
    total = (sums() / layout.replicas).sum()
    # Summed over ranks in the next step's reduction rather than in one of its own: the value is one step late.
    cache["local_update"], total = total, cache.get("whole_update", total * distributed.world_size())
    return lambda: root(total)


def store(batch: Batch, skip: Tensor, more: Sequence[tuple[Tensor, Tensor]] = (), **new: Sequence[Tensor]) -> None:
    """Write new per-tensor state, and what else there is, unless the step is skipped."""
    pairs = [
        (target, value)
        for key, tensors in new.items()
        for target, value in zip(batch.state.get(key, []), tensors, strict=False)
        if target is not None
    ]
    pairs += more
    if pairs:
        _ops.assign([target for target, _ in pairs], [value for _, value in pairs], skip)


def keep_if(skip: Tensor, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``new`` run state, or ``old`` where the step is skipped."""
    return {key: torch.where(skip, old[key], value) for key, value in new.items()}
