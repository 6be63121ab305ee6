"""Passes 0 and 1 of a step, the reductions behind them, and the decision about the step.

    pass 0   sums of g² over rows and columns   -> reduction 1 -> row and column factors
    pass 1   mean squares of all features       -> reduction 2, with the loss and what is not finite
             the decision about the step, the features of the run

Tensors are the local shards of sharded parameters; what :func:`measure` returns is of the whole tensors, the same on
all ranks. :mod:`hf_lopt.step.passes` has pass 2.

On an accelerator every call of PyTorch in this file is a launch, so whatever an operator can take as an argument is
not computed here.

Axes: T tensors, M results (one for each tensor, or for each of its slices), S statistics, F feature columns,
R replicas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lopt import distributed
from hf_lopt.features import LOSS, STAT_G2, STAT_P2, STEP, TIME, ElementFeatures
from hf_lopt.kernels import ops
from hf_lopt.kernels.arguments import Advance, Assign, FeatureSums, Sums
from hf_lopt.kernels.reference import scheduler as reference
from hf_lopt.step import accumulators
from hf_lopt.step.accumulators import Factors
from hf_lopt.step.reduction import reduce_measurements
from hf_lopt.step.tensors import StepCache, TensorList


# A gradient that no clip bounds counts as not finite where its sum of squares is 2^63 or more, a norm of 3e9. Second
# moments are at most the largest sum of squares so far, and the sums of their squares have to fit into float32, in
# which some kernels form them: 2^126 does. With this factor such a sum is infinite as float64, at 2^1024.
_GRADIENT_LIMIT = 2.0**961


@dataclass
class Measurements:
    """What passes 0 and 1 have found in a list of tensors, of the whole tensors.

    Attributes:
        stats: statistics (T, S) float64, see the operator ``sums``.
        factors: new row and column accumulators with their factors.
        sums: sums of squares of the features, (M, F) float64.
        numel: over how many elements each row of them was taken, (M,) float64.
    """

    stats: Tensor
    factors: Factors
    sums: Tensor
    numel: Tensor

    @property
    def mean_squares(self) -> Tensor:
        """(M, F) float64."""
        return self.sums / self.numel.unsqueeze(1)

    def part(self, tensors: TensorList, start: int, stop: int) -> Measurements:
        """What was found in the tensors from ``start`` to before ``stop`` of the list."""
        first, last = (sum(tensors.layout.slices[:t]) for t in (start, stop))
        f = self.factors
        factors = Factors(*(x[start:stop] for x in (f.rows, f.cols, f.row_factors, f.col_factors)))
        sums, numel = (x.narrow(0, first, last - first) for x in (self.sums, self.numel))
        return Measurements(self.stats.narrow(0, start, stop - start), factors, sums, numel)


@dataclass
class StepDecision:
    """What is decided about a step, and the features of the run; see the operator ``advance``.

    Attributes:
        skip: bool, 0-d: true on all ranks if anything that enters the step is not finite on any.
        loss: mean over ranks, 0-d, of replicas (R,); None where the rule takes none.
        features: (29 + corrections,) float32.
        inputs: of the scheduler, (T, I).
        replica_steps: steps done by each replica, (R,); None outside of meta-training.
    """

    skip: Tensor
    loss: Tensor | None
    features: Tensor
    inputs: Tensor
    replica_steps: Tensor | None = None

    @property
    def loss_features(self) -> Tensor:
        """(9,)."""
        return self._part(LOSS)

    @property
    def step_features(self) -> Tensor:
        """Of the step count, (11,); of replicas (R, 11)."""
        return self._part(STEP) if self.replica_steps is None else reference.step_features(self.replica_steps)

    @property
    def corrections(self) -> tuple[Tensor, ...]:
        """1 / (1 - decay^n) for the decays that :func:`measure` was asked for, 0-d each."""
        return self._part(slice(STEP.stop, self.features.shape[0])).unbind()

    def _part(self, place: slice) -> Tensor:
        return self.features.narrow(0, place.start, place.stop - place.start)


Part = tuple[TensorList, ElementFeatures]


def measure(
    parts: Sequence[Part],
    run: Mapping[str, Any],
    loss: Tensor | None = None,
    *,
    horizon: int | Sequence[int] = 0,
    tensor_inputs: bool = False,
    others: Sequence[TensorList] = (),
    others_clip: float = math.inf,
    correction_decays: Sequence[float] = (),
) -> tuple[list[Measurements], StepDecision]:
    """Passes 0 and 1 over lists whose features share their factored decays, and the decision about the step.

    Nothing but the run has been changed then: its counters and, where it has one, its loss buffer.

    Args:
        parts: lists with the features that their networks see.
        run: state of the run: "step" 0-d, and its "counters" (3,) unless the caller counts; "loss_means" and
            "loss_min" (10,) where the rule has a loss buffer. Of replicas "step" (R,) and buffers (R, 10).
        loss: of this rank, 0-d; of replicas (R,). A step whose loss is not finite is skipped, also where the rule has
            no other use for it; None: there is none.
        horizon: length of the run in steps, for the scheduler; of replicas one each.
        tensor_inputs: whether VeLO's features of each tensor are among the scheduler's inputs.
        others: lists that are only looked at for values that are not finite.
        others_clip: the bound that the rule sets on their gradients itself (inf: none).
        correction_decays: decays whose bias corrections the rule wants.
    """
    lists = [*(tensors for tensors, _ in parts), *others]
    first = [_gradient_sums(tensors, features, tensor_inputs) for tensors, features in parts]
    factors = _factors(parts, first)
    sums = [
        ops.feature_sums(FeatureSums(**feature_arguments(tensors, features, f)))
        for (tensors, features), f in zip(parts, factors, strict=True)
    ]
    stats = [x.stats for x in first]
    checked, nonfinite = [*stats, *map(_nonfinite_statistics, others)], None
    clips = [features.clip for _, features in parts] + [others_clip] * len(others)
    settings = lists[0].root.device_settings.values()
    finite = [*sums, *_gradient_limits(lists, checked, clips), *settings]  # what has to be
    if distributed.world_size() > 1:
        stats, totals, loss, nonfinite = reduce_measurements(
            parts, checked, [x.complete() for x in first], sums, finite, loss, lists
        )
        moments, checked, finite = stats, [], []
    else:
        totals, moments = sums, [x.moments for x in first]
    of_tensors: list[Tensor] = []
    p_column = 0
    if tensor_inputs:
        ((tensors, features),) = parts
        of_tensors = [moments[0], totals[0], tensors.layout.numel, tensors.layout.one_hot_ranks]
        p_column = features.column("p")
    decision = _decide(
        lists,
        run,
        loss,
        horizon,
        stats=checked,
        sums=finite,
        nonfinite=nonfinite,
        correction_decays=correction_decays,
        tensor_inputs=of_tensors,
        p_column=p_column,
    )
    measurements = [
        Measurements(s, f, total, tensors.layout.slice_numel)
        for (tensors, _), s, f, total in zip(parts, stats, factors, totals, strict=True)
    ]
    return measurements, decision


@dataclass
class _GradientSums:
    """Results of pass 0: sums over rows and columns, statistics of the gradient, and those of everything else.

    The latter come from the pass that last wrote parameters and accumulators, unless these have been changed since.
    The statistic of the parameter does not: a user may edit it through ``.data``, which leaves no trace."""

    rows: list[Tensor]
    cols: list[Tensor]
    stats: Tensor
    moments: Tensor

    def complete(self) -> Tensor:
        """Both kinds of statistics in one tensor (T, S)."""
        if self.stats is self.moments:
            return self.stats
        return torch.cat([self.stats[:, :STAT_P2], self.moments[:, STAT_P2:]], 1)


def _gradient_sums(tensors: TensorList, features: ElementFeatures, moments: bool) -> _GradientSums:
    cache = tensors.cache
    cached = cache.moments if moments and cache.versions == tensors.accumulator_versions() else None
    row_axes, col_axes = _factored_axes(tensors, features)
    rows, cols, stats = ops.sums(
        Sums(
            params=tensors.params,
            grads=tensors.grads,
            momenta=tensors.momenta,
            second_moments=tensors.second_moments,
            row_axes=row_axes,
            col_axes=col_axes,
            clip=features.clip,
            moments=moments and cached is None,
            **tensors.scales,
        )
    )
    if cached is None and moments:
        cached = cache.moments = stats
    return _GradientSums(rows, cols, stats, stats if cached is None else cached)


def _nonfinite_statistics(tensors: TensorList) -> Tensor:
    """Statistics (2T, S) that count what is not finite in gradients and, after them, in parameters."""
    none, values = [-1] * (2 * len(tensors)), [*tensors.grads, *tensors.params]
    return ops.sums(
        Sums(
            params=values,
            grads=values,
            momenta=2 * tensors.momenta,
            second_moments=2 * tensors.second_moments,
            row_axes=none,
            col_axes=none,
            clip=math.inf,
            moments=False,
            momentum_scales=[],
            second_scales=[],
        )
    )[2]


def _gradient_limits(lists: Sequence[TensorList], stats: Sequence[Tensor], clips: Sequence[float]) -> Iterator[Tensor]:
    """Numbers (T, 1) float64 of the lists without a clip, infinite where a gradient of this rank is too large.

    Replicas are left out: one of them that diverges is no reason to stop the others.
    """
    for tensors, found, clip in zip(lists, stats, clips, strict=True):
        if clip == math.inf and not tensors.layout.replicas:
            yield found.narrow(0, 0, len(tensors)).narrow(1, STAT_G2, 1) * _GRADIENT_LIMIT


def _factored_axes(tensors: TensorList, features: ElementFeatures) -> tuple[list[int], list[int]]:
    """Axes A and B; -1 throughout where the rule has no factored accumulators."""
    if features.decays.factored:
        return tensors.layout.row_axes, tensors.layout.col_axes
    return [-1] * len(tensors), [-1] * len(tensors)


def _factors(parts: Sequence[Part], sums: Sequence[_GradientSums]) -> list[Factors]:
    """Row and column accumulators of all parts and their factors, in one reduction."""
    decays = {features.decays.factored for _, features in parts}
    assert len(decays) <= 1, decays
    if decays <= {()}:
        return [Factors(*[tensors.layout.nothing] * 4) for tensors, _ in parts]
    layouts = [tensors.layout for tensors, _ in parts]
    joined = accumulators.update_factored(
        _joined([tensors.tensors("factored_row") for tensors, _ in parts]),
        _joined([tensors.tensors("factored_col") for tensors, _ in parts]),
        _joined([s.rows for s in sums]),
        _joined([s.cols for s in sums]),
        _joined([layout.shapes for layout in layouts]),
        _joined([layout.row_axes for layout in layouts]),
        _joined([layout.col_axes for layout in layouts]),
        decays.pop(),
        _joined([layout.shardings for layout in layouts]) if any(layout.sharded for layout in layouts) else None,
        sizes=layouts[0].factored_sizes if len(layouts) == 1 else None,
        nothing=layouts[0].nothing if len(layouts) == 1 else None,
    )
    if len(parts) == 1:
        return [joined]
    out, start = [], 0
    for tensors, _ in parts:
        span = slice(start, start + len(tensors))
        out.append(Factors(joined.rows[span], joined.cols[span], joined.row_factors[span], joined.col_factors[span]))
        start = span.stop
    return out


def _joined(lists: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """Several lists as one; a single one as it is."""
    return lists[0] if len(lists) == 1 else [x for values in lists for x in values]


def feature_arguments(tensors: TensorList, features: ElementFeatures, f: Factors) -> dict[str, Any]:
    """The arguments that passes 1 and 2 share."""
    row_axes, col_axes = _factored_axes(tensors, features)
    return {
        "features": features.names,
        "params": tensors.params,
        "grads": tensors.grads,
        "momenta": tensors.momenta,
        "second_moments": tensors.second_moments,
        "diagonals": tensors.tensors("factored_diag"),
        "rows": f.rows,
        "cols": f.cols,
        "row_factors": f.row_factors,
        "col_factors": f.col_factors,
        "row_axes": row_axes,
        "col_axes": col_axes,
        "slice_axes": tensors.layout.slice_axes,
        "momentum_decays": features.decays.momentum,
        "second_decays": features.decays.second_moment,
        "factored_decays": features.decays.factored,
        "clip": features.clip,
        "second_eps": features.second_eps,
        "diagonal_eps": features.diagonal_eps,
        **tensors.scales,
    }


def _decide(
    lists: Sequence[TensorList],
    run: Mapping[str, Any],
    loss: Tensor | None,
    horizon: int | Sequence[int],
    **found: Any,
) -> StepDecision:
    """Calls the operator ``advance`` with what was ``found`` and with the run; of replicas the run is theirs."""
    replicas = bool(lists[0].layout.replicas)
    counters = run.get("counters")
    if counters is None:  # the caller counts the steps
        counters = run["step"].new_zeros(3)
        if not replicas:
            counters[0] = run["step"]
    buffer = [run[name] for name in ("loss_means", "loss_min") if name in run]
    skip, features, inputs = ops.advance(
        Advance(
            loss=None if replicas else loss,
            counters=counters,
            loss_buffer=[] if replicas else buffer,
            horizon=0.0 if replicas else float(horizon),  # type: ignore[arg-type]
            rows=sum(len(tensors) for tensors in lists),
            **found,
        )
    )
    if not replicas:
        return StepDecision(skip, loss, features, inputs)
    if buffer:
        assert loss is not None and not isinstance(horizon, int)
        inputs = _replica_inputs(lists[0].root, run["step"].unsqueeze(1), buffer, loss, horizon, inputs, skip)
    return StepDecision(skip, loss, features, inputs, run["step"])


def _replica_inputs(
    cache: StepCache,
    steps: Tensor,
    buffer: Sequence[Tensor],
    losses: Tensor,
    horizons: Sequence[int],
    inputs: Tensor,
    skip: Tensor,
) -> Tensor:
    """The scheduler's inputs (T, I) with the time and loss of each replica, whose loss buffers (R, 10) change in
    place; ``steps`` (R, 1), ``losses`` (R,)."""
    if cache.loss_decays is None or cache.loss_decays[0] != horizons:
        decays = torch.stack([reference.loss_decays(horizon, buffer[0]) for horizon in horizons])
        lengths = torch.tensor(horizons, dtype=torch.int64, device=losses.device).unsqueeze(1)
        cache.loss_decays = horizons, decays, lengths
    _, decays, lengths = cache.loss_decays
    means, minimum = buffer
    *new, slopes = reference.next_loss_buffer(means, minimum, losses.unsqueeze(1), steps, decays)
    ops.assign(Assign(buffer, new, skip))
    times = reference.time_features(steps, lengths)
    inputs = inputs.unflatten(0, (len(horizons), -1)).clone()
    inputs[:, :, TIME] = times.unsqueeze(1)
    inputs[:, :, LOSS] = slopes.unsqueeze(1)
    return inputs.flatten(0, 1)
