"""Celo2 and ELO-Celo2: a normalised, optionally orthogonalised network update; Adam for vectors and embeddings.

github.com/amoudgl/celo, Celo2. Newton-Schulz orthogonalisation: Jordan et al. 2024, "Muon".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_lopt import _ops, accumulators, distributed
from hf_lopt.accumulators import Decays
from hf_lopt.features import CELO2, CELO2_VECTOR, ElementFeatures
from hf_lopt.networks import ElementNetwork, Theta
from hf_lopt.rules import base, passes
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


def uses_adam(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a parameter goes to the Adam branch: "auto" sends tensors of rank < 2 there."""
    branch = group["branch"]
    if branch not in BRANCHES:
        raise ValueError(f"branch must be one of {', '.join(BRANCHES)}, got {branch!r}")
    return branch == "adam" or (branch == "auto" and p.dim() < 2)


def init_state(p: Tensor, group: Mapping[str, Any], theta: Theta) -> dict[str, Tensor]:
    decays = ADAM if uses_adam(p, group) else CELO2.decays
    return accumulators.init(p, group["axis_order"], decays)


def prepare(theta: Theta, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The network with a leading axis of size 1; o1 is left out by an exponent of 0, o2 altogether."""
    first = torch.cat([theta[f"{PREFIX}w0__{k}"] for k in range(len(CELO2.names))])
    weights = [first, theta[f"{PREFIX}w1"], theta[f"{PREFIX}w2"]]
    biases = [theta[f"{PREFIX}b{layer}"] for layer in range(3)]
    network = ElementNetwork(*(tuple(x.unsqueeze(0) for x in xs) for xs in (weights, biases))).first_outputs(2)
    vector = (network.weights[0][:, : sum(CELO2_VECTOR.widths())], *network.weights[1:])
    return {"network": network, "vector_network": ElementNetwork(vector, network.biases)}


def newton_schulz(x: Tensor) -> Tensor:
    """Matrices (..., R, C) with their singular values moved to about 1, five steps of a quintic iteration, float32."""
    transposed = x.shape[-2] > x.shape[-1]
    x = x.mT if transposed else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + NS_EPS)
    c0, c1, c2 = NS_COEFFICIENTS
    for _ in range(NS_STEPS):
        a = x @ x.mT
        x = c0 * x + (c1 * a + c2 * (a @ a)) @ x
    return x.mT if transposed else x


def normalise(x: Tensor) -> Tensor:
    """Matrices (..., R, C), or a whole tensor of rank < 2, with a mean square of 1."""
    axes = (-2, -1) if x.dim() >= 2 else tuple(range(x.dim()))
    mean = x.square().mean(axes, keepdim=True) if axes else x.square()
    return x * (mean + CELO2.norm_eps).rsqrt()


def _finished(parts: Sequence[passes.Batch], steps: list[list[Tensor]], orthogonalize: bool) -> list[list[Tensor]]:
    """The network's outputs as steps: orthogonal and of unit mean square, matrix by matrix.

    Of sharded tensors those that are made orthogonal go to one owner each; the others need only their mean squares.
    """
    layouts, flat = [part.layout for part in parts], [step for own in steps for step in own]
    shapes, cuts = ([x for layout in layouts for x in getattr(layout, name)] for name in ("shapes", "cuts"))
    orders = [order for layout in layouts for order in layout.axis_orders]
    axes = [passes.matrix_axes(len(shape), order) for shape, order in zip(shapes, orders, strict=True)]

    def finish(i: int, step: Tensor) -> Tensor:
        if step.dim() < 2:
            return normalise(step)
        matrices = step.movedim(axes[i], (-2, -1))
        return normalise(newton_schulz(matrices) if orthogonalize else matrices).movedim((-2, -1), axes[i])

    split = [i for i, cut in enumerate(cuts) if cut is not None and cut.groups()]
    ortho = [i for i in split if orthogonalize and len(shapes[i]) >= 2]
    plain = [i for i in split if i not in set(ortho)]
    out = [step if i in set(split) else finish(i, step) for i, step in enumerate(flat)]
    if ortho:
        cache = layouts[0].root.cache
        if "owners" not in cache:
            costs = [math.prod(shapes[i]) * min(shapes[i][axis] for axis in axes[i]) for i in ortho]
            cache["owners"] = distributed.Owners([cuts[i] for i in ortho], [shapes[i] for i in ortho], costs)
        done = cache["owners"].apply(lambda k, step: finish(ortho[k], step), [flat[i] for i in ortho])
        for i, step in zip(ortho, done, strict=True):
            out[i] = step
    sums = [(_sum_of_squares(flat[i], axes[i]), cuts[i].groups(_pair(shapes[i], axes[i]))) for i in plain]
    for i, total in zip(plain, distributed.sum_over(sums), strict=True):
        count = math.prod(shapes[i][axis] for axis in _pair(shapes[i], axes[i]))
        out[i] = flat[i] * (total / count + CELO2.norm_eps).rsqrt().float()
    ends = itertools.accumulate(len(own) for own in steps)
    return [out[end - len(own) : end] for own, end in zip(steps, ends, strict=True)]


def _pair(shape: Sequence[int], axes: tuple[int, int]) -> Sequence[int]:
    """The axes that one mean square is taken over: those of the matrix, or all."""
    return axes if len(shape) >= 2 else range(len(shape))


def _sum_of_squares(step: Tensor, axes: tuple[int, int]) -> Tensor:
    """Of each matrix of a shard, or of the whole shard; float64, with the axes kept."""
    over = tuple(_pair(step.shape, axes))
    return step.square().sum(over, keepdim=True, dtype=torch.float64) if over else step.double().square()


def _branch(batch: passes.Batch, i: int) -> str:
    p = batch.layout.wholes[i]
    if uses_adam(p, {"branch": batch.labels["branch"][i]}):
        return "adam"
    rank = p.dim()
    return "vectors" if rank < 2 else "matrices" if rank == 2 else "stacks"


def _parts(batch: passes.Batch) -> dict[str, passes.Batch]:
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
    batch: passes.Batch,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor | None,
) -> base.Outcome:
    """One step: p <- p - lr (step + weight_decay p), and adam_lr_mult times as far in the Adam branch."""
    parts = _parts(batch)
    adam = parts.pop("adam", None)
    work = [(part, CELO2_VECTOR if name == "vectors" else CELO2) for name, part in parts.items()]
    readings, _, skip = passes.read(work, others=[] if adam is None else [adam])
    steps = [
        passes.network_outputs(part, features, reading, weights[_network(features)], skip)
        for (part, features), reading in zip(work, readings, strict=True)
    ]
    sums = torch.zeros_like(batch.layout.numel)
    if work:
        steps = _finished([part for part, _ in work], steps, settings["orthogonalize"])
    for (part, _), own in zip(work, steps, strict=True):
        sums[part.index] = passes.descend(part, own, skip)
    if adam is not None:
        sums[adam.index] = _adam(adam, run, settings, skip)
    return base.Outcome({}, skip, {"update_rms": passes.update_rms(batch, sums)})


def _adam(batch: passes.Batch, run: Mapping[str, Tensor], settings: Mapping[str, Any], skip: Tensor) -> Tensor:
    """The Adam branch. Celo2 has its epsilon inside the root and no bias correction, ELO-Celo2 the usual form."""
    corrected = settings["adam_bias_correction"]
    t = (run["step"] + 1).double()
    decays = (*ADAM.momentum, *ADAM.second_moment)
    corrections = [(1.0 / (1.0 - decay**t) if corrected else torch.ones_like(t)).float() for decay in decays]
    lr = batch["lr"] * settings["adam_lr_mult"]
    return _ops.adam_step(
        *(batch.params, batch.grads, *batch.accumulators(), *decays, float("inf")),
        *(lr, lr * batch["weight_decay"], *corrections),
        *((0.0, ADAM_EPS) if corrected else (ADAM_EPS, 0.0)),
        skip,
    )


_DEFAULTS = {
    "lr": 1e-3,
    "weights": "auto",
    "weight_decay": 0.0,
    "axis_order": "torch",
    "orthogonalize": True,
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
