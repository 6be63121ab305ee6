"""Pass 2 of a step: the network, new accumulators and new parameters; and what takes its place.

A rule calls :func:`hf_lopt.step.measure.measure` for everything before, decides, and calls :func:`apply_network`, or
:func:`network_outputs` and :func:`descend`.

Axes: T tensors, M results (one for each tensor, or for each of its slices), O network outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hf_lopt import distributed
from hf_lopt.features import ElementFeatures
from hf_lopt.kernels import ops
from hf_lopt.kernels.arguments import ApplyNetwork, Assign, Descend, ZeroNan
from hf_lopt.kernels.held import Joined
from hf_lopt.step.accumulators import Factors
from hf_lopt.step.held import HeldTensors
from hf_lopt.step.measure import Measurements, feature_arguments
from hf_lopt.step.networks import TensorNetworks, specialize_networks
from hf_lopt.step.orthogonal import new_stacks
from hf_lopt.step.tensors import TensorList


def apply_network(
    tensors: TensorList,
    features: ElementFeatures,
    measurements: Measurements,
    network: TensorNetworks,
    exp_mult: float,
    skip: Tensor,
    tf32: bool = False,
) -> Tensor:
    """Pass 2: parameters and accumulators in place. Returns sums over local shards, (T, O - 1): Σ step², Σ o2 and on.

    Both terms are formed from the parameter before the step: p <- p - lr * weight_decay * p - step. ``tf32``: products
    of networks of 32 units may be in TF32 where the device has it.
    """
    factors, cache = measurements.factors, tensors.cache
    weights, biases = network.layers()
    sums, moments = ops.apply_network(
        ApplyNetwork(
            **feature_arguments(tensors, features, factors),
            weights=weights,
            biases=biases,
            scale=network.scale,
            decay=network.decay,
            exp_mult=exp_mult,
            skip=skip,
            out=(),
            **tensors.rounding,
            tf32=tf32,
        )
    )
    # The statistics of a skipped step are undefined: like the state, the old ones stay then. They are float64, and the
    # operator that stores takes float32 numbers, so that they are seen as twice as many of those.
    cached = [] if cache.moments is None else [(cache.moments.view(torch.float32), moments.view(torch.float32))]
    _store_factored(tensors, skip, factors, cached)
    if tensors.layout.stacked:
        return sums.unflatten(0, (len(tensors), -1)).sum(1)
    if cached:
        cache.versions = tensors.accumulator_versions()
    return sums


def network_outputs(
    tensors: TensorList,
    features: ElementFeatures,
    measurements: Measurements,
    networks: Tensor,
    sizes: Sequence[int],
    skip: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Pass 2 for a rule that makes more of the output o0 than a step: accumulators in place, parameters left alone.

    Returns o0, float32, shaped like the local parameters, and its sums of squares, (M,) float64.
    """
    factors = measurements.factors
    network = specialize_networks(tensors, features, measurements, networks, sizes, step_mult=None)
    out = new_stacks(tensors.params)
    weights, biases = network.layers()
    one = tensors.layout.one.expand(network.scale.shape[0])
    sums, _ = ops.apply_network(
        ApplyNetwork(
            **feature_arguments(tensors, features, factors),
            weights=weights,
            biases=biases,
            scale=one,
            decay=one,
            exp_mult=0.0,
            skip=skip,
            out=out,
            **tensors.rounding,
        )
    )
    _store_factored(tensors, skip, factors)
    return out, sums.select(1, 0)


def descend(
    tensors: TensorList, features: ElementFeatures, steps: Sequence[Tensor], squares: Tensor | None, skip: Tensor
) -> None:
    """p <- p - lr (step + weight_decay p), rounded once; ``steps`` float32.

    With ``squares``, sums of squares of the whole tensors or of their slices, (M,) float64, each step is first brought
    to a mean square of 1.
    """
    layout = tensors.layout
    ops.descend(
        Descend(
            params=tensors.params,
            steps=steps,
            lr=tensors["lr"],
            weight_decay=tensors["weight_decay"],
            squares=squares,
            numel=None if squares is None else layout.slice_numel,
            norm_eps=features.norm_eps,
            # Without squares slices differ in their settings at most, which are those of replicas.
            slice_axes=layout.slice_axes if layout.stacked or squares is not None else [],
            skip=skip,
            **tensors.rounding,
        )
    )


def update_rms(tensors: TensorList, sums_of_squares: Tensor | Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Root mean square of the step over all elements of all tensors, 0-d, from the sums of squares of shards (T,) or
    from a function that returns them.

    Computed when it is asked for. With several ranks it is that of the step before: it is summed over ranks in the
    next step's reduction rather than in one of its own.
    """
    cache, layout = tensors.root, tensors.layout

    def sums() -> Tensor:
        return sums_of_squares() if callable(sums_of_squares) else sums_of_squares

    def root(total: Tensor) -> Tensor:
        return (total / layout.numel.sum()).sqrt()

    if distributed.world_size() == 1:
        return lambda: root(sums().sum())
    cache.local_update = (sums() / layout.holders).sum()
    total = cache.local_update * distributed.world_size() if cache.whole_update is None else cache.whole_update
    return lambda: root(total)


def store(
    tensors: TensorList, skip: Tensor, more: Sequence[tuple[Tensor, Tensor]] = (), **new: Sequence[Tensor]
) -> None:
    """Write new per-tensor state by its key, and ``more`` pairs of target and value, unless the step is skipped."""
    pairs = [
        (target, value)
        for key, values in new.items()
        for target, value in zip(tensors.state.get(key, []), values, strict=False)
        if target is not None
    ]
    pairs += more
    if pairs:
        ops.assign(Assign([target for target, _ in pairs], [value for _, value in pairs], skip))


def _store_factored(
    tensors: TensorList, skip: Tensor, factors: Factors, more: Sequence[tuple[Tensor, Tensor]] = ()
) -> None:
    """New row and column accumulators, and ``more``, unless the step is skipped."""
    targets: list[Sequence[Tensor]] = [[target for target, _ in more]]
    values: list[Sequence[Tensor]] = [[value for _, value in more]]
    if "factored_row" in tensors.state:
        targets = [tensors.tensors("factored_row"), tensors.tensors("factored_col"), *targets]
        values = [factors.rows, factors.cols, *values]
    if len(targets) > 1 or more:
        ops.assign(Assign(Joined(*targets), Joined(*values), skip))


def keep_if(skip: Tensor, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``new`` run state, or ``old`` where the step is skipped."""
    return {key: torch.where(skip, old[key], value) for key, value in new.items()}


def ready_gradients(held: HeldTensors, nan_to_zero: bool, max_norm: float) -> Sequence[Tensor]:
    """The gradients, with 0 for NaN where the rule takes it so, clipped in place where a global norm is set."""
    if nan_to_zero:
        ops.zero_nan(ZeroNan([distributed.local(g) for g in held.grads]))
    gradients = held.local_gradients()
    if max_norm:
        distributed.clip_grad_norm_(gradients, [distributed.sharding_of(p) for p in held.params], max_norm)
    return gradients
