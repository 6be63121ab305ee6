"""Celo2 and ELO-Celo2: a normalised, optionally orthogonalised network update; Adam for vectors and embeddings.

github.com/amoudgl/celo, Celo2. Newton-Schulz orthogonalisation: Jordan et al. 2024, "Muon".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_lopt import _ops, accumulators, distributed, networks
from hf_lopt.accumulators import Decays
from hf_lopt.features import CELO2, CELO2_VECTOR
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
    """Both networks, flat (1, P), or a row for each of several; o1 is left out by an exponent of 0, o2 altogether.

    That of vectors takes all features, with weights of 0 for those that it was not trained with."""
    first = torch.cat([theta[f"{PREFIX}w0__{k}"] for k in range(len(CELO2.names))], -2)
    weights = [first, theta[f"{PREFIX}w1"], theta[f"{PREFIX}w2"]]
    biases = [theta[f"{PREFIX}b{layer}"] for layer in range(3)]
    known = torch.arange(first.shape[-2], device=first.device) < sum(CELO2_VECTOR.widths())
    vector = [torch.where(known.unsqueeze(1), first, 0.0), *weights[1:]]
    return {
        "network": networks.flatten_network(weights, biases),
        "vector_network": networks.flatten_network(vector, biases),
        "hidden": tuple(x.shape[-1] for x in biases),
    }


def newton_schulz(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (..., R, C) with their singular values moved to about 1, float32.

    Five steps of a quintic iteration, in ``dtype``; three batched matrix products and a sum each.
    """
    return _ops.orthogonalize(x, dtype, NS_COEFFICIENTS, NS_STEPS, NS_EPS, None)[0]


def orthogonal(x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Matrices (..., R, C) with equal singular values and a mean square of 1, and what it was before, (...).

    The iteration runs in ``dtype``.
    """
    return _ops.orthogonalize(x, dtype, NS_COEFFICIENTS, NS_STEPS, NS_EPS, CELO2.norm_eps)


# Network outputs that are held at a time, and how many are made orthogonal in one batch, in elements: on the CPU few,
# so that they stay in cache, elsewhere as many as memory allows.
_CHUNK_CPU, _CHUNK_OTHER, _BATCH_CPU, _BATCH_OTHER = 1 << 20, 1 << 28, 1 << 20, 1 << 27
# Where stacks of matrices take a way of their own: these kernels do not take all of them, and a call goes to the
# kernels or to plain PyTorch as a whole.
_STACKS_APART = frozenset(("cpu",))


@dataclass
class _Work:
    """Tensors that take the same way from the network's output to the step."""

    batch: batches.Batch
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


def _orthogonalise(
    axes: Sequence[tuple[int, int]], steps: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Steps whose matrices, over two ``axes`` of each, are orthogonal, and mean squares, see :func:`orthogonal`.

    Tensors of one shape go in batches. A matrix lies as it does in memory, which leaves the result as it is."""
    pairs = [tuple(sorted(pair)) for pair in axes]
    alike: dict[tuple, list[int]] = {}
    for i, (step, pair) in enumerate(zip(steps, pairs, strict=True)):
        alike.setdefault((step.shape, pair), []).append(i)
    done, mean_squares = list(steps), list(steps)
    for (shape, pair), members in alike.items():
        size = _BATCH_CPU if steps[0].device.type == "cpu" else _BATCH_OTHER
        count, places = max(1, size // max(shape.numel(), 1)), [axis + 1 for axis in pair]
        for k in range(0, len(members), count):
            some = members[k : k + count]
            # One alone needs no copy.
            x = steps[some[0]].unsqueeze(0) if len(some) == 1 else torch.stack([steps[i] for i in some])
            result, own = orthogonal(x.movedim(places, (-2, -1)), dtype)
            result = result.movedim((-2, -1), places)
            result = result if result.is_contiguous() else result.clone(memory_format=torch.contiguous_format)
            for i, x, y in zip(some, result.unbind(), own.unbind(), strict=True):
                done[i], mean_squares[i] = x, y
    return done, mean_squares


def _matrix_axes(layout: batches.Layout) -> list[tuple[int, int]]:
    pairs = zip(layout.shapes, layout.axis_orders, strict=True)
    return [batches.matrix_axes(len(shape), order) for shape, order in pairs]


def _orthogonal_steps(
    work: list[_Work], steps: list[list[Tensor]], dtype: torch.dtype
) -> tuple[list[list[Tensor]], list[Callable[[], Tensor]]]:
    """Of sharded tensors each goes to one owner, and back. Also functions for Σ step² of each tensor, (T,) float64."""
    layouts = [w.batch.layout for w in work]
    axes = [pair for layout in layouts for pair in _matrix_axes(layout)]
    flat = [step for own in steps for step in own]
    ends = list(itertools.accumulate(len(own) for own in steps))
    cuts = [slice(end - len(own), end) for own, end in zip(steps, ends, strict=True)]
    if not any(layout.sharded for layout in layouts):
        done, mean_squares = _orthogonalise(axes, flat, dtype)

        def squares(cut: slice) -> Callable[[], Tensor]:
            own = mean_squares[cut]
            sizes = [x.numel() / max(y.numel(), 1) for x, y in zip(flat[cut], own, strict=True)]
            return lambda: torch.stack(
                [(y.double() / (y + CELO2.norm_eps)).sum() * n for y, n in zip(own, sizes, strict=True)]
            )

        return [done[cut] for cut in cuts], [squares(cut) for cut in cuts]
    cache = layouts[0].root.cache
    if "owners" not in cache:
        shapes, shards = ([x for layout in layouts for x in getattr(layout, name)] for name in ("shapes", "cuts"))
        costs = [math.prod(s) * min(s[axis] for axis in pair) for s, pair in zip(shapes, axes, strict=True)]
        cache["owners"] = distributed.Owners(shards, shapes, costs)
    done = cache["owners"].apply(lambda i, step: _orthogonalise([axes[i]], [step], dtype)[0][0], flat)
    found = [torch.stack(torch._foreach_norm(done[cut])).double().square() for cut in cuts]
    return [done[cut] for cut in cuts], [lambda own=own: own for own in found]


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


def _unit_squares(layout: batches.Layout, own: Tensor, whole: Tensor) -> Callable[[], Tensor]:
    """A function for Σ step² of the local shards, (T,), after the whole steps were brought to a mean square of 1."""

    def squares() -> Tensor:
        scaled = own / (whole / layout.slice_numel + CELO2.norm_eps)
        return torch.stack([x.sum() for x in scaled.split(layout.slices)])

    return squares


def _finish(
    work: list[_Work], weights: Mapping[str, Any], settings: Mapping[str, Any], skip: Tensor
) -> list[Callable[[], Tensor]]:
    """Pass 2 and the step. Returns functions for Σ (lr step)² of the local shards of each batch, (T,) float64."""
    outputs = []
    for w in work:
        network, sizes = _networks(w.batch, weights), (sum(CELO2.widths()), *weights["hidden"])
        outputs.append(passes.network_outputs(w.batch, CELO2, w.reading, network, sizes, skip))
    steps, locals_ = [list(x) for x in zip(*outputs, strict=True)]
    wholes: list[Tensor | None] = list(locals_)
    sums: dict[int, Callable[[], Tensor]] = {}
    ortho = [i for i, w in enumerate(work) if w.orthogonalize]
    unit = [i for i, w in enumerate(work) if not w.orthogonalize]
    if ortho:
        dtype = getattr(torch, settings["ns_dtype"])
        done = _orthogonal_steps([work[i] for i in ortho], [steps[i] for i in ortho], dtype)
        for i, own, total in zip(ortho, *done, strict=True):
            steps[i], wholes[i], sums[i] = own, None, total
    if unit and work[0].batch.layout.root.sharded:
        done = _whole_squares([work[i] for i in unit], [locals_[i] for i in unit])
        for i, total in zip(unit, done, strict=True):
            wholes[i] = total
    for i in unit:
        sums[i] = _unit_squares(work[i].batch.layout, locals_[i], wholes[i])
    for w, own, total in zip(work, steps, wholes, strict=True):
        passes.descend(w.batch, CELO2, own, total, skip)
    return [_times_rates(w.batch["lr"], sums[i]) for i, w in enumerate(work)]


def _times_rates(lr: Tensor, sums: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Sums of squares (T,) times lr²; of many runs their mean."""
    if lr.stride(0) == 0:  # the caller's own number, who may change it before this is asked for
        lr = lr.clone()

    def squares() -> Tensor:
        own = sums()
        return own * lr.double().square().unflatten(0, (len(own), -1)).mean(1)

    return squares


def _networks(batch: batches.Batch, weights: Mapping[str, Any]) -> Tensor:
    """The network of every tensor, one for all or a row for each slice; of many runs (runs, P) or likewise."""
    layout = batch.layout
    names = ["vector_network" if layout.rank(i) < 2 else "network" for i in range(len(batch.params))]
    if len(set(names)) == 1:
        return weights[names[0]]
    known, rows = layout.cache.get("networks", (None, None))
    if known is not weights:  # in one piece for as long as the weights stay, also for a graph that was captured
        rows = torch.cat([weights[name].expand(count, -1) for name, count in zip(names, layout.slices, strict=True)])
        layout.cache["networks"] = weights, rows
    return rows


def _part(batch: batches.Batch, i: int, settings: Mapping[str, Any]) -> str:
    rank = batch.layout.rank(i)
    if uses_adam(rank, {"branch": batch.labels["branch"][i]}):
        return "adam"
    if settings["orthogonalize"] and rank < 2:
        return "vectors"
    return "stacks" if rank > 2 and batch.layout.device.type in _STACKS_APART else "network"


def _parts(batch: batches.Batch, settings: Mapping[str, Any]) -> dict[str, batches.Batch]:
    """The batch by what is done to its tensors; the matrices of a stack are normalised one by one."""
    layout = batch.layout
    if "parts" not in layout.cache:
        layout.cache["parts"] = {}
        for i in range(len(batch.params)):
            layout.cache["parts"].setdefault(_part(batch, i, settings), []).append(i)
    return {
        name: batch.subset(name, indices, sliced=name != "adam" and any(layout.rank(i) > 2 for i in indices))
        for name, indices in layout.cache["parts"].items()
    }


def update(
    batch: batches.Batch,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor | None,
) -> base.Outcome:
    """One step: p <- p - lr (step + weight_decay p), and adam_lr_mult times as far in the Adam branch."""
    parts = _parts(batch, settings)
    adam = parts.pop("adam", None)
    decays = (*ADAM.momentum, *ADAM.second_moment)
    pairs = [(part, CELO2) for part in parts.values()]
    readings, turn = passes.read(pairs, run, others=[] if adam is None else [adam], corrected=decays)
    work = [
        _Work(part, reading, settings["orthogonalize"] and name != "vectors")
        for (name, part), reading in zip(parts.items(), readings, strict=True)
    ]
    found: list[tuple[batches.Batch, Callable[[], Tensor]]] = []
    for together in _together(work):
        own = _finish(together, weights, settings, turn.skip)
        found += zip((w.batch for w in together), own, strict=True)
    if adam is not None:
        squares = _adam(adam, turn, settings)
        found.append((adam, lambda: squares))

    def sums() -> Tensor:
        out = torch.zeros_like(batch.layout.numel)
        for part, own in found:
            out[slice(None) if part.index is None else part.index] = own()
        return out

    return base.Outcome({}, turn.skip, {"update_rms": passes.update_rms(batch, sums)})


def _adam(batch: batches.Batch, turn: passes.Turn, settings: Mapping[str, Any]) -> Tensor:
    """The Adam branch. Celo2 has its epsilon inside the root and no bias correction, ELO-Celo2 the usual form."""
    corrected = settings["adam_bias_correction"]
    corrections = turn.corrections if corrected else [batch.layout.one.squeeze(0)] * 2
    rates = {"lr": batch["lr"] * settings["adam_lr_mult"], "weight_decay": batch["weight_decay"]}
    batch = replace(batch, settings=rates)
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
)
CELO2_BASE_RULE = replace(
    CELO2_RULE,
    name="celo2_base",
    summary="Celo2 without orthogonalisation; every tensor goes through the network.",
    defaults=_DEFAULTS | {"orthogonalize": False, "branch": "network"},
)
ELO_CELO2_RULE = replace(
    CELO2_RULE,
    name="elo_celo2",
    class_name="ELOCelo2",
    summary="ELO-Celo2: Celo2's network with weight decay, global-norm clip and the usual Adam for vectors.",
    defaults=_DEFAULTS | {"lr": 3.16e-4, "weight_decay": 0.1, "adam_bias_correction": True, "max_grad_norm": 1.0},
)

RULES = (CELO2_RULE, CELO2_BASE_RULE, ELO_CELO2_RULE)
