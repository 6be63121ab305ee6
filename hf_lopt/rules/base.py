"""What an update rule is: data, and one short function over lists of tensors.

A rule names its features, the shapes of its weights, its per-tensor and per-run state and its defaults; its ``update``
strings the passes of :mod:`hf_lopt._ops` together. It never loops over parameters and keeps no state of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_lopt import _ops, accumulators, distributed, weights
from hf_lopt.accumulators import Factors, factored_axes
from hf_lopt.features import ElementFeatures
from hf_lopt.networks import ElementNetwork, Theta


class Layout:
    """What is fixed for a list of parameters: axes, shapes, sizes. Built once and reused for the same list."""

    def __init__(self, params: Sequence[Tensor], axis_orders: Sequence[str], sliced: bool = False):
        self.device = params[0].device
        self.axis_orders = list(axis_orders)
        self.shapes = [tuple(p.shape) for p in params]
        axes = [factored_axes(shape, order) for shape, order in zip(self.shapes, axis_orders, strict=True)]
        self.row_axes, self.col_axes = [a for a, _ in axes], [b for _, b in axes]
        self.numel = torch.tensor([p.numel() for p in params], dtype=torch.float64, device=self.device)
        # Stacks of matrices that are normalised one by one count each matrix as a tensor of its own.
        self.slice_axes: list[int] = []
        self.slice_numel = self.numel
        if sliced:
            pairs = [matrix_axes(len(shape), order) for shape, order in zip(self.shapes, axis_orders, strict=True)]
            self.slice_axes = [axis for pair in pairs for axis in pair]
            sizes = [
                [s[a] * s[b]] * (math.prod(s) // (s[a] * s[b])) for s, (a, b) in zip(self.shapes, pairs, strict=True)
            ]
            self.slice_numel = torch.tensor([n for ns in sizes for n in ns], dtype=torch.float64, device=self.device)
        self.nothing = torch.empty(0, device=self.device)
        self.cache: dict[Any, Any] = {}  # what the next step of a rule can take from this one
        self.versions: list[int] = []  # of the accumulators, when the cached statistics were taken


def matrix_axes(rank: int, axis_order: str) -> tuple[int, int]:
    """The last two axes in the reference's layout, which hold the matrix of a linear or convolution kernel."""
    axes = accumulators.reference_axes(rank, axis_order)
    return (axes[-2], axes[-1]) if rank >= 2 else (-1, -1)


@dataclass
class Batch:
    """All tensors of one step. Lists have one entry per parameter; ``(T,)`` tensors one element."""

    layout: Layout
    params: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor | None]]  # key -> the state of each parameter; None where it has no such accumulator
    settings: dict[str, Tensor]  # numbers of each parameter's group, (T,) float32: lr, weight_decay, …
    labels: dict[str, list[str]]  # words of each parameter's group: axis_order, …

    def __getitem__(self, name: str) -> Tensor:
        return self.settings[name]

    def subset(self, key: Any, indices: Sequence[int], sliced: bool = False) -> Batch:
        """The batch of some of the parameters; ``key`` names the selection, whose layout is kept."""

        def pick(xs: Sequence) -> list:
            return [xs[i] for i in indices]

        params = pick(self.params)
        if key not in self.layout.cache:
            index = torch.tensor(indices, device=self.layout.device)
            self.layout.cache[key] = Layout(params, pick(self.layout.axis_orders), sliced), index
        layout, index = self.layout.cache[key]
        return Batch(
            layout,
            params,
            pick(self.grads),
            {name: pick(xs) for name, xs in self.state.items()},
            {name: x[index] for name, x in self.settings.items()},
            {name: pick(xs) for name, xs in self.labels.items()},
        )

    def tensors(self, key: str) -> list[Tensor]:
        """The state ``key`` of every parameter, an empty tensor where it has none."""
        nothing = self.layout.nothing
        return [nothing if x is None else x for x in self.state.get(key, [None] * len(self.params))]

    def accumulators(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.tensors("momentum"), self.tensors("second_moment")


@dataclass
class Outcome:
    """What a rule's ``update`` gives back: the new run state, and what is worth logging (device tensors)."""

    run: dict[str, Tensor]
    skipped: Tensor  # bool, 0-d
    report: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A published update rule.

    Attributes:
        name: the ``optim=`` name; also names the embedded weights.
        class_name: the public class.
        summary: one sentence for its docstring, with the source.
        defaults: constructor keywords after ``params`` and their defaults, in order.
        per_group: the keywords that a parameter group may set for itself, beside lr and weight_decay.
        shapes: leaves of the weights and their shapes; letters stand for sizes that the file decides.
        init_state: (parameter, its group, weights) -> the state of one parameter.
        init_run: (weights) -> the tensors that belong to the run as a whole.
        prepare: (weights, settings) -> the tensors that ``update`` takes, packed once.
        update: the step itself.
        own_schedule: the rule decides its step size over the run: lr is a multiplier, 1.0 by default.
        needs_horizon, needs_loss: whether a step is undefined without them.
        finetune_lr: multiplier for embedded weights on a pretrained model, where a step made for training from
            scratch is too large; None: as elsewhere.
        nan_to_zero: NaN in a gradient counts as 0, as in the reference, instead of skipping the step.
    """

    name: str
    class_name: str
    summary: str
    defaults: Mapping[str, Any]
    per_group: tuple[str, ...]
    shapes: Mapping[str, tuple[int | str, ...]]
    init_state: Callable[[Tensor, Mapping[str, Any], Theta], dict[str, Tensor]]
    init_run: Callable[[Theta], dict[str, Tensor]]
    prepare: Callable[[Theta, Mapping[str, Any]], dict[str, Any]]
    update: Callable[..., Outcome]
    own_schedule: bool = True
    needs_horizon: bool = True
    needs_loss: bool = True
    finetune_lr: float | None = None
    nan_to_zero: bool = False

    def load_weights(self, spec: Any = "auto", **settings: Any) -> weights.Weights:
        """The weights that ``spec`` names; see :func:`hf_lopt.weights.load`."""
        hints = {k: v for k, v in settings.items() if k == "bank_scale"}
        return weights.load(self.name, spec, self.shapes, **hints)


def sums(batch: Batch, features: ElementFeatures, moments: bool = False) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Pass 0 over a batch: row sums, column sums and statistics of the whole tensors; with ``moments`` those of the
    accumulators, too.

    Statistics of the accumulators come from the pass that last wrote them, unless they have been changed since. Those
    of the parameter do not: a user may edit it through ``.data``, which leaves no trace. Pass 1 has them.
    """
    layout = batch.layout
    known = layout.cache.get("stats") if layout.versions == _versions(batch) else None
    row_sums, col_sums, stats = _ops.sums(
        *(batch.params, batch.grads, *batch.accumulators()),
        *(layout.row_axes, layout.col_axes, features.clip, moments and known is None),
    )
    if known is not None:
        stats = torch.cat([stats[:, : _ops.STAT_P2], known[:, _ops.STAT_P2 :]], 1)
    layout.cache["stats"] = stats
    return row_sums, col_sums, stats


def _versions(batch: Batch) -> list[int]:
    return [x._version for xs in batch.accumulators() for x in xs]


def non_finite(stats: Tensor, mean_squares: Tensor) -> Tensor:
    """Whether anything that passes 0 and 1 have read is not finite, bool (). Gradients are counted before the clip."""
    return (stats[:, _ops.STAT_NONFINITE] > 0).any() | ~torch.isfinite(mean_squares).all()


def non_finite_tensors(batch: Batch) -> Tensor:
    """The same for a batch that passes 0 and 1 do not read, from its gradients and parameters."""
    largest = torch._foreach_norm(batch.grads, math.inf) + torch._foreach_norm(batch.params, math.inf)
    return ~torch.isfinite(torch.stack([x.float() for x in largest])).all()


def agree(stats: Tensor, mean_squares: Tensor, loss: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The mean loss over ranks, and whether to skip the step (bool, 0-d): true on all ranks if anything that enters it
    is not finite on any."""
    return _agree(non_finite(stats, mean_squares), loss)


def agree_on_tensors(batch: Batch, loss: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """:func:`agree` for a rule that does not use passes 0 and 1."""
    return _agree(non_finite_tensors(batch), loss)


def _agree(bad: Tensor, loss: Tensor | None) -> tuple[Tensor | None, Tensor]:
    if loss is not None:
        bad = bad | ~torch.isfinite(loss)
    return distributed.agree(loss, bad)


def factors(batch: Batch, features: ElementFeatures, row_sums: list[Tensor], col_sums: list[Tensor]) -> Factors:
    """Updated row and column accumulators of a batch and their factors; nothing for a rule that has none."""
    layout = batch.layout
    if not features.decays.factored:
        return Factors(*[[layout.nothing] * len(batch.params)] * 4)
    return accumulators.update_factored(
        batch.tensors("factored_row"),
        batch.tensors("factored_col"),
        row_sums,
        col_sums,
        layout.shapes,
        layout.row_axes,
        layout.col_axes,
        features.decays.factored,
    )


def _common(batch: Batch, features: ElementFeatures, f: Factors) -> tuple:
    layout, decays = batch.layout, features.decays
    none = [-1] * len(batch.params)
    axes = (layout.row_axes, layout.col_axes) if decays.factored else (none, none)
    return (
        *(features.names, batch.params, batch.grads, *batch.accumulators(), batch.tensors("factored_diag")),
        *(f.rows, f.cols, f.row_factors, f.col_factors, *axes),
        layout.slice_axes,
        *(decays.momentum, decays.second_moment, decays.factored),
        *(features.clip, features.second_eps, features.diagonal_eps),
    )


def mean_squares(batch: Batch, features: ElementFeatures, f: Factors) -> Tensor:
    """Pass 1 over a batch: the mean square of every feature column over the whole tensor, (T, F) float64; a sliced
    batch has a row for each of its matrices."""
    return _ops.feature_sums(*_common(batch, features, f)) / batch.layout.slice_numel.unsqueeze(1)


def apply_network(
    batch: Batch,
    features: ElementFeatures,
    f: Factors,
    network: ElementNetwork,
    scale: Tensor,
    exp_mult: float,
    skip: Tensor,
) -> Tensor:
    """Pass 2 over a batch: parameters and element-wise accumulators in place; returns (T, O - 1): Σ step², Σ o2, ….

    Weight decay is decoupled and scaled by lr; both terms are formed from the parameter before the step:
    p <- p - lr * weight_decay * p - step.
    """
    arguments = (network.weights, network.biases, scale, batch["lr"] * batch["weight_decay"], exp_mult, skip, ())
    sums, stats = _ops.apply_network(*_common(batch, features, f), *arguments)
    layout = batch.layout
    if "stats" in layout.cache:  # what pass 0 found still holds if the step was skipped
        layout.cache["stats"] = torch.where(skip, layout.cache["stats"], stats)
    layout.versions = _versions(batch)
    return sums


def network_outputs(
    batch: Batch, features: ElementFeatures, f: Factors, network: ElementNetwork, skip: Tensor
) -> list[Tensor]:
    """Pass 2 over a batch whose rule makes more of the output o0 than a step: accumulators in place, parameters left
    alone. Returns o0, float32, shaped like the parameters."""
    out = [torch.zeros_like(p, dtype=torch.float32) for p in batch.params]
    ones = torch.ones_like(batch.layout.slice_numel, dtype=torch.float32)
    _ops.apply_network(
        *_common(batch, features, f), *(network.weights, network.biases, ones, torch.zeros_like(ones), 0.0, skip, out)
    )
    return out


def descend(batch: Batch, steps: Sequence[Tensor], skip: Tensor) -> Tensor:
    """p <- p - lr (step + weight_decay p), rounded once; returns Σ (lr step)², (T,) float64."""
    lr, decay = batch["lr"], batch["weight_decay"]
    sums = []
    for t, (p, step) in enumerate(zip(batch.params, steps, strict=True)):
        value = p.float()
        scaled = step * lr[t]
        p.copy_(torch.where(skip, value, torch.addcmul(value, value, lr[t] * decay[t], value=-1) - scaled))
        sums.append(scaled.double().square().sum())
    return torch.stack(sums)


def rms(sums_of_squares: Tensor, numel: Tensor) -> Tensor:
    """Root mean square over all elements of all tensors, 0-d, from the sums of squares (T,)."""
    return (sums_of_squares.sum() / numel.sum()).sqrt()


def store(batch: Batch, skip: Tensor, **new: Sequence[Tensor]) -> None:
    """Write new per-tensor state unless the step is skipped."""
    old, values = [], []
    for key, tensors in new.items():
        for target, value in zip(batch.state.get(key, []), tensors, strict=False):
            if target is not None:
                old.append(target)
                values.append(torch.where(skip, target, value))
    if old:
        torch._foreach_copy_(old, values)


def keep_if(skip: Tensor, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``new`` run state, or ``old`` where the step is skipped."""
    return {key: torch.where(skip, old[key], value) for key, value in new.items()}
