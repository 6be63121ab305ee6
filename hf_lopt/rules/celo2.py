"""Celo2 and ELO-Celo2: a normalised, optionally orthogonalised network update; Adam for vectors and embeddings.

github.com/amoudgl/celo, Celo2. Newton-Schulz orthogonalisation: Jordan et al. 2024, "Muon".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_lopt import _ops, accumulators, distributed, networks
from hf_lopt.accumulators import Decays
from hf_lopt.features import CELO2, CELO2_VECTOR, ElementFeatures
from hf_lopt.networks import Theta
from hf_lopt.rules import base, batches, passes
from hf_lopt.rules.small_fc import SMALL_FC_RULE


PREFIX = "ff_mod_stack/~/"
BRANCHES = ("auto", "network", "adam")
ADAM = Decays(momentum=(0.9,), second_moment=(0.95,), factored=())
ADAM_EPS = 1e-8
NS_COEFFICIENTS, NS_STEPS, NS_EPS = (3.4445, -4.7750, 2.0315), 5, 1e-8


def _shapes() -> dict[str, tuple[int | str, ...]]:
    shapes: dict[str, tuple[int | str, ...]] = {
        f"{PREFIX}w0__{k}": (width, "U") for k, width in enumerate(CELO2.widths())
    }
    shapes |= {f"{PREFIX}w1": ("U", "V"), f"{PREFIX}w2": ("V", 3)}
    return shapes | {f"{PREFIX}b{layer}": (n,) for layer, n in enumerate(("U", "V", 3))}


def uses_adam(rank: int, group: Mapping[str, Any]) -> bool:
    """Whether a parameter goes to the Adam branch: "auto" sends tensors of rank < 2 there."""
    branch = group["branch"]
    if branch not in BRANCHES:
        raise ValueError(f"branch must be one of {', '.join(BRANCHES)}, got {branch!r}")
    return branch == "adam" or (branch == "auto" and rank < 2)


def init_state(p: Tensor, group: Mapping[str, Any], theta: Theta) -> dict[str, Tensor]:
    decays = ADAM if uses_adam(p.dim(), group) else CELO2.decays
    return accumulators.init(p, group["axis_order"], decays)


def prepare(theta: Theta, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Both networks, flat (1, P), or one for each of several networks side by side; o1 is left out by an exponent of 0,
    o2 altogether."""
    first = torch.cat([theta[f"{PREFIX}w0__{k}"] for k in range(len(CELO2.names))], -2)
    weights = [first, theta[f"{PREFIX}w1"], theta[f"{PREFIX}w2"]]
    biases = [theta[f"{PREFIX}b{layer}"] for layer in range(3)]
    vector = [first.narrow(-2, 0, sum(CELO2_VECTOR.widths())), *weights[1:]]
    return {
        "network": networks.flatten_network(weights, biases),
        "vector_network": networks.flatten_network(vector, biases),
        "hidden": tuple(x.shape[-1] for x in biases),
    }


def newton_schulz(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (..., R, C) with their singular values moved to about 1, float32.

    Five steps of a quintic iteration, in ``dtype``.
    """
    return _ops.orthogonalize(x, dtype, NS_COEFFICIENTS, NS_STEPS, NS_EPS, None)


def orthogonal(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (..., R, C) with equal singular values and a mean square of 1; the iteration runs in ``dtype``."""
    return _ops.orthogonalize(x, dtype, NS_COEFFICIENTS, NS_STEPS, NS_EPS, CELO2.norm_eps)


# Network outputs that are held at a time, in elements, and how many are made orthogonal in one batch.
_CHUNK_CPU, _CHUNK_OTHER, _BATCH = 1 << 20, 1 << 28, 1 << 20


@dataclass
class _Work:
    """Tensors that take the same way from the network's output to the step."""

    batch: batches.Batch
    features: ElementFeatures
    reading: passes.Reading
    orthogonalize: bool


def _together(work: list[_Work]) -> Iterator[list[_Work]]:
    """What is finished at a time: a little, so that the outputs stay in cache; all of it where ranks communicate."""
    if not work:
        return
    if work[0].batch.layout.root.sharded:
        yield work
        return
    limit = _CHUNK_CPU if work[0].batch.layout.device.type == "cpu" else _CHUNK_OTHER
    for w in work:
        for batch, reading in passes.chunks(w.batch, w.reading, limit):
            yield [replace(w, batch=batch, reading=reading)]


def _orthogonalise(axes: Sequence[tuple[int, int]], steps: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Steps whose matrices, over two ``axes`` of each, are orthogonal. Matrices of one shape go in batches."""
    matrices = [step.movedim(pair, (-2, -1)) for step, pair in zip(steps, axes, strict=True)]
    alike: dict[torch.Size, list[int]] = {}
    for i, x in enumerate(matrices):
        alike.setdefault(x.shape, []).append(i)
    for shape, members in alike.items():
        count = max(1, _BATCH // max(shape.numel(), 1))
        for k in range(0, len(members), count):
            some = members[k : k + count]
            if len(some) == 1:  # no copies
                matrices[some[0]] = orthogonal(matrices[some[0]], dtype)
                continue
            done = orthogonal(torch.stack([matrices[i] for i in some]), dtype)
            for i, x in zip(some, done, strict=True):
                matrices[i] = x
    return [x.movedim((-2, -1), pair).contiguous() for x, pair in zip(matrices, axes, strict=True)]


def _matrix_axes(layout: batches.Layout) -> list[tuple[int, int]]:
    pairs = zip(layout.shapes, layout.axis_orders, strict=True)
    return [batches.matrix_axes(len(shape), order) for shape, order in pairs]


def _orthogonal_steps(work: list[_Work], steps: list[list[Tensor]], dtype: torch.dtype) -> list[list[Tensor]]:
    """Of sharded tensors each goes to one owner, and back."""
    layouts = [w.batch.layout for w in work]
    axes = [pair for layout in layouts for pair in _matrix_axes(layout)]
    flat = [step for own in steps for step in own]
    if not any(layout.sharded for layout in layouts):
        done = _orthogonalise(axes, flat, dtype)
    else:
        cache = layouts[0].root.cache
        if "owners" not in cache:
            shapes, cuts = ([x for layout in layouts for x in getattr(layout, name)] for name in ("shapes", "cuts"))
            costs = [math.prod(s) * min(s[axis] for axis in pair) for s, pair in zip(shapes, axes, strict=True)]
            cache["owners"] = distributed.Owners(cuts, shapes, costs)
        done = cache["owners"].apply(lambda i, step: _orthogonalise([axes[i]], [step], dtype)[0], flat)
    ends = itertools.accumulate(len(own) for own in steps)
    return [done[end - len(own) : end] for own, end in zip(steps, ends, strict=True)]


def _whole_squares(work: list[_Work], squares: list[Tensor]) -> list[Tensor]:
    """Sums of squares over all shards."""
    items = []
    for w, own in zip(work, squares, strict=True):
        layout = w.batch.layout
        for x, cut, shape, pair in zip(
            own.split(layout.slices), layout.cuts, layout.shapes, _matrix_axes(layout), strict=True
        ):
            # One mean square is taken over the axes of the matrix, or over all.
            items.append((x, cut.groups(pair if len(shape) >= 2 else range(len(shape))) if cut else ()))
    done = iter(distributed.sum_over(items))
    return [torch.cat([next(done) for _ in w.batch.params]) for w in work]


def _unit_scales(w: _Work, squares: Tensor, steps: list[Tensor]) -> Tensor:
    """What brings each output to a mean square of 1, (T,); stacks are scaled in place, matrix by matrix."""
    layout = w.batch.layout
    scales = (squares / layout.slice_numel + CELO2.norm_eps).rsqrt().float()
    if not layout.slice_axes or layout.runs:
        return scales
    for step, own, pair in zip(steps, scales.split(layout.slices), _matrix_axes(layout), strict=True):
        step.mul_(own.view([1 if axis in pair else n for axis, n in enumerate(step.shape)]))
    return torch.ones_like(layout.numel, dtype=torch.float32)


def _finish(work: list[_Work], weights: Mapping[str, Any], settings: Mapping[str, Any], skip: Tensor) -> list[Tensor]:
    """Pass 2 and the step. Returns Σ (lr step)² of the local shards for each batch, (T,) float64."""
    outputs = []
    for w in work:
        sizes = (sum(w.features.widths()), *weights["hidden"])
        network = weights[_network(w.features)]
        outputs.append(passes.network_outputs(w.batch, w.features, w.reading, network, sizes, skip))
    steps, squares = [list(x) for x in zip(*outputs, strict=True)]
    ortho = [i for i, w in enumerate(work) if w.orthogonalize]
    unit = [i for i, w in enumerate(work) if not w.orthogonalize]
    scales: dict[int, Tensor] = {}
    if ortho:
        done = _orthogonal_steps(
            [work[i] for i in ortho], [steps[i] for i in ortho], getattr(torch, settings["ns_dtype"])
        )
        for i, own in zip(ortho, done, strict=True):
            steps[i], scales[i] = own, torch.ones_like(work[i].batch["lr"])
    if unit:
        whole = [squares[i] for i in unit]
        if work[0].batch.layout.root.sharded:
            whole = _whole_squares([work[i] for i in unit], whole)
        for i, total in zip(unit, whole, strict=True):
            scales[i] = _unit_scales(work[i], total, steps[i])
    sums = []
    for i, w in enumerate(work):
        passes.descend(w.batch, steps[i], scales[i], skip)
        if i in ortho or w.batch.layout.slice_axes:
            own = torch.stack(torch._foreach_norm(steps[i])).double().square()
        else:
            own = squares[i]
        rates = (w.batch["lr"] * scales[i]).double().square()
        # Of many runs: their mean rate.
        sums.append(own * rates.unflatten(0, (len(steps[i]), -1)).mean(1))
    return sums


def _branch(batch: batches.Batch, i: int) -> str:
    rank = batch.layout.rank(i)
    if uses_adam(rank, {"branch": batch.labels["branch"][i]}):
        return "adam"
    return "vectors" if rank < 2 else "matrices" if rank == 2 else "stacks"


def _parts(batch: batches.Batch) -> dict[str, batches.Batch]:
    """The batch by kind: Adam's tensors, vectors, matrices, and stacks of matrices, each normalised by itself."""
    cache = batch.layout.cache
    if "parts" not in cache:
        cache["parts"] = {}
        for i in range(len(batch.params)):
            cache["parts"].setdefault(_branch(batch, i), []).append(i)
    return {name: batch.subset(name, indices, sliced=name == "stacks") for name, indices in cache["parts"].items()}


def _network(features: ElementFeatures) -> str:
    return "vector_network" if features is CELO2_VECTOR else "network"


def update(
    batch: batches.Batch,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor | None,
) -> base.Outcome:
    """One step: p <- p - lr (step + weight_decay p), and adam_lr_mult times as far in the Adam branch."""
    parts = _parts(batch)
    adam = parts.pop("adam", None)
    pairs = [(part, CELO2_VECTOR if name == "vectors" else CELO2) for name, part in parts.items()]
    decays = (*ADAM.momentum, *ADAM.second_moment)
    readings, turn = passes.read(pairs, run, others=[] if adam is None else [adam], corrected=decays)
    skip = turn.skip
    work = [
        _Work(part, features, reading, settings["orthogonalize"] and features is CELO2)
        for (part, features), reading in zip(pairs, readings, strict=True)
    ]
    sums = torch.zeros_like(batch.layout.numel)
    for together in _together(work):
        for w, own in zip(together, _finish(together, weights, settings, skip), strict=True):
            sums[w.batch.index] = own
    if adam is not None:
        sums[adam.index] = _adam(adam, turn, settings)
    return base.Outcome({}, skip, {"update_rms": passes.update_rms(batch, sums)})


def _adam(batch: batches.Batch, turn: passes.Turn, settings: Mapping[str, Any]) -> Tensor:
    """The Adam branch. Celo2 has its epsilon inside the root and no bias correction, ELO-Celo2 the usual form."""
    corrected = settings["adam_bias_correction"]
    corrections = turn.corrections if corrected else [batch.layout.one[0]] * 2
    batch = replace(batch, settings=batch.settings | {"lr": batch["lr"] * settings["adam_lr_mult"]})
    steps = passes.fold(batch, None, None, batch.layout.nothing, ())
    return _ops.adam_step(
        *(batch.params, batch.grads, *batch.accumulators(), *ADAM.momentum, *ADAM.second_moment, float("inf")),
        *(steps.scale, steps.decay, *corrections),
        *((0.0, ADAM_EPS) if corrected else (ADAM_EPS, 0.0)),
        turn.skip,
    )


_DEFAULTS = {
    "lr": 1e-3,
    "weights": "auto",
    "weight_decay": 0.0,
    "axis_order": "torch",
    "orthogonalize": True,
    "ns_dtype": "float32",
    "branch": "auto",
    "adam_lr_mult": 20.0,
    "adam_bias_correction": False,
    "max_grad_norm": 0.0,
    "max_nonfinite_steps": 10,
}

CELO2_RULE = replace(
    SMALL_FC_RULE,
    name="celo2",
    class_name="Celo2",
    summary="Celo2: an orthogonalised network update for matrices, Adam for vectors; the schedule is the caller's.",
    defaults=_DEFAULTS,
    per_group=("axis_order", "branch"),
    shapes=_shapes(),
    init_state=init_state,
    prepare=prepare,
    update=update,
    own_schedule=False,
    finetune_lr=1e-4,
    finetune_settings={"adam_lr_mult": 1.0},
)
CELO2_BASE_RULE = replace(
    CELO2_RULE,
    name="celo2_base",
    summary="Celo2 without orthogonalisation; every tensor goes through the network.",
    defaults=_DEFAULTS | {"orthogonalize": False, "branch": "network"},
    finetune_lr=5e-5,
)
ELO_CELO2_RULE = replace(
    CELO2_RULE,
    name="elo_celo2",
    class_name="ELOCelo2",
    summary="ELO-Celo2: Celo2's network with weight decay, global-norm clip and the usual Adam for vectors.",
    defaults=_DEFAULTS | {"lr": 3.16e-4, "weight_decay": 0.1, "adam_bias_correction": True, "max_grad_norm": 1.0},
)

RULES = (CELO2_RULE, CELO2_BASE_RULE, ELO_CELO2_RULE)
