"""Celo2 and ELO-Celo2: a normalised, optionally orthogonalised network update; Adam for vectors and embeddings.

Moudgil et al. 2026, "Celo2: Towards Learned Optimization Free Lunch"; github.com/amoudgl/celo.
Newton-Schulz orthogonalisation: Jordan et al. 2024, "Muon".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_lopt import distributed
from hf_lopt.features import CELO2, CELO2_VECTOR, Decays
from hf_lopt.kernels import ops
from hf_lopt.kernels.arguments import AdamStep
from hf_lopt.rules.base import Rule, UpdateResult
from hf_lopt.step import accumulators, networks, passes
from hf_lopt.step.measure import Measurements, StepDecision, measure
from hf_lopt.step.networks import Theta, specialize_networks
from hf_lopt.step.orthogonal import axes_of_matrices, orthogonalize_steps
from hf_lopt.step.tensors import Layout, TensorList


PREFIX = "ff_mod_stack/~/"
BRANCHES = ("auto", "network", "adam")
ADAM = Decays(momentum=(0.9,), second_moment=(0.95,), factored=())
ADAM_EPS = 1e-8

# Network outputs that are held at a time, in elements: on the CPU few, so that they stay in cache, elsewhere as many
# as memory allows.
_CHUNK_CPU, _CHUNK_OTHER = 1 << 20, 1 << 28
# Devices on which stacks of matrices go into calls of their own. Their kernels do not take all stacks, and a call goes
# to the compiled kernels as a whole or not at all, so that one such stack would slow down every matrix beside it.
_STACKS_APART = frozenset(("cpu",))

Squares = Callable[[], Tensor]


def _shapes() -> dict[str, tuple[int | str, ...]]:
    shapes: dict[str, tuple[int | str, ...]] = {
        f"{PREFIX}w0__{k}": (width, "U") for k, width in enumerate(CELO2.widths())
    }
    shapes |= {f"{PREFIX}w1": ("U", "V"), f"{PREFIX}w2": ("V", 3)}
    biases: tuple[int | str, ...] = ("U", "V", 3)
    return shapes | {f"{PREFIX}b{layer}": (n,) for layer, n in enumerate(biases)}


def uses_adam(rank: int, group: Mapping[str, Any]) -> bool:
    """Whether a parameter goes to the Adam branch: "auto" sends tensors of rank < 2 there."""
    branch = group["branch"]
    if branch not in BRANCHES:
        raise ValueError(f"branch must be one of {', '.join(BRANCHES)}, got {branch!r}")
    return branch == "adam" or (branch == "auto" and rank < 2)


def init_state(p: Tensor, group: Mapping[str, Any], theta: Theta) -> dict[str, Tensor]:
    decays = ADAM if uses_adam(p.dim(), group) else CELO2.decays
    return accumulators.init(p, group["axis_order"], decays, group["state_dtype"])


def init_run(theta: Theta) -> dict[str, Tensor]:
    return {}


def prepare(theta: Theta, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Both networks, flat (1, P), or a row for each of several; o1 is left out by an exponent of 0, o2 altogether.

    That of vectors takes all features, with weights of 0 for those that it was not trained with."""
    first = torch.cat([theta[f"{PREFIX}w0__{k}"] for k in range(len(CELO2.names))], -2)
    weights = [first, theta[f"{PREFIX}w1"], theta[f"{PREFIX}w2"]]
    biases = [theta[f"{PREFIX}b{layer}"] for layer in range(3)]
    trained = torch.arange(first.shape[-2], dtype=torch.int64, device=first.device) < sum(CELO2_VECTOR.widths())
    vector = [torch.where(trained.unsqueeze(1), first, 0.0), *weights[1:]]
    return {
        "network": networks.flatten_network(weights, biases),
        "vector_network": networks.flatten_network(vector, biases),
        "hidden": tuple(x.shape[-1] for x in biases),
    }


@dataclass
class _Part:
    """Tensors whose steps are made in the same way from the network's outputs: orthogonal, or of unit mean square."""

    tensors: TensorList
    measured: Measurements
    orthogonalize: bool


def _branch(tensors: TensorList, i: int, settings: Mapping[str, Any]) -> str:
    """What is done to a tensor: "adam", or a network for "vectors", for "stacks" of matrices, or for other tensors."""
    rank = tensors.layout.rank(i)
    if uses_adam(rank, {"branch": tensors.labels["branch"][i]}):
        return "adam"
    if settings["orthogonalize"] and rank < 2:
        return "vectors"
    return "stacks" if rank > 2 and tensors.layout.device.type in _STACKS_APART else "network"


def _branches(tensors: TensorList, settings: Mapping[str, Any]) -> dict[str, TensorList]:
    """The list by what is done to its tensors; the matrices of a stack are normalised one by one."""
    branches = tensors.cache.branches
    if not branches:
        places: dict[str, list[int]] = {}
        for i in range(len(tensors)):
            places.setdefault(_branch(tensors, i, settings), []).append(i)
        for name, indices in places.items():
            has_stacks = name != "adam" and any(tensors.layout.rank(i) > 2 for i in indices)
            branches[name] = indices, has_stacks
    return {name: tensors.subset(name, indices, sliced) for name, (indices, sliced) in branches.items()}


def update(
    tensors: TensorList,
    run: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    settings: Mapping[str, Any],
    loss: Tensor | None,
) -> UpdateResult:
    """One step: p <- p - lr (step + weight_decay p), and adam_lr_mult times as far in the Adam branch."""
    branches = _branches(tensors, settings)
    adam = branches.pop("adam", None)
    measured, decision = measure(
        [(branch, CELO2) for branch in branches.values()],
        run,
        loss,
        others=[] if adam is None else [adam],
        correction_decays=(*ADAM.momentum, *ADAM.second_moment),
    )
    parts = [
        _Part(branch, found, settings["orthogonalize"] and name != "vectors")
        for (name, branch), found in zip(branches.items(), measured, strict=True)
    ]
    squares: list[tuple[TensorList, Squares]] = []
    for together in _together(parts):
        found = _finish(together, weights, settings, decision.skip)
        squares += zip((part.tensors for part in together), found, strict=True)
    if adam is not None:
        of_adam = _adam_step(adam, decision, settings)
        squares.append((adam, lambda: of_adam))

    def sums() -> Tensor:
        out = torch.zeros_like(tensors.layout.numel)
        for part, found in squares:
            out[slice(None) if part.root_indices is None else part.root_indices] = found()
        # A skipped step leaves the network's outputs unwritten.
        return torch.where(decision.skip, 0.0, out)

    return UpdateResult({}, decision.skip, {"update_rms": passes.update_rms(tensors, sums)})


def _together(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """What is finished at a time: a little, so that the outputs stay in cache; all of it where ranks communicate."""
    if not parts:
        return
    if any(part.tensors.layout.sharded for part in parts):
        yield list(parts)
        return
    limit = _CHUNK_CPU if parts[0].tensors.layout.device.type == "cpu" else _CHUNK_OTHER
    for part in parts:
        for start, stop, chunk in part.tensors.chunks(limit):
            measured = part.measured if chunk is part.tensors else part.measured.part(part.tensors, start, stop)
            yield [replace(part, tensors=chunk, measured=measured)]


def _finish(
    parts: Sequence[_Part], weights: Mapping[str, Any], settings: Mapping[str, Any], skip: Tensor
) -> list[Squares]:
    """Pass 2 and the step. Returns functions for Σ (lr step)² of the local shards of each part, (T,) float64."""
    steps: list[list[Tensor]] = []
    local_squares: list[Tensor] = []
    for part in parts:
        network, sizes = _networks(part.tensors, weights), (sum(CELO2.widths()), *weights["hidden"])
        output, output_squares = passes.network_outputs(part.tensors, CELO2, part.measured, network, sizes, skip)
        steps.append(output)
        local_squares.append(output_squares)
    # What each step is divided by the root of; None for orthogonal ones, which have a mean square of 1 already.
    whole_squares: list[Tensor | None] = list(local_squares)
    squares: dict[int, Squares] = {}
    orthogonal = [i for i, part in enumerate(parts) if part.orthogonalize]
    other = [i for i, part in enumerate(parts) if not part.orthogonalize]
    if orthogonal:
        lists = [parts[i].tensors for i in orthogonal]
        found = orthogonalize_steps(lists, [steps[i] for i in orthogonal], CELO2.norm_eps, settings["ns_dtype"])
        for i, result in zip(orthogonal, found, strict=True):
            steps[i], whole_squares[i], squares[i] = result.steps, None, result.squares
    if other and any(part.tensors.layout.sharded for part in parts):
        totals = _whole_squares([parts[i].tensors for i in other], [local_squares[i] for i in other])
        for i, total in zip(other, totals, strict=True):
            whole_squares[i] = total
    for i in other:
        whole = whole_squares[i]
        assert whole is not None
        squares[i] = _normalised_squares(parts[i].tensors.layout, local_squares[i], whole)
    for part, step, divisor in zip(parts, steps, whole_squares, strict=True):
        passes.descend(part.tensors, CELO2, step, divisor, skip)
    return [_times_rates(part.tensors["lr"], squares[i]) for i, part in enumerate(parts)]


def _whole_squares(lists: Sequence[TensorList], squares: Sequence[Tensor]) -> list[Tensor]:
    """Sums of squares over all shards."""
    items = []
    for tensors, squares_of_list in zip(lists, squares, strict=True):
        layout = tensors.layout
        of_tensors = squares_of_list.split(layout.slices)
        for x, sharding, shape, pair in zip(
            of_tensors, layout.shardings, layout.shapes, axes_of_matrices(layout), strict=True
        ):
            # One mean square is taken over the axes of the matrix, or over all.
            axes = pair if len(shape) >= 2 else range(len(shape))
            items.append((x, sharding.groups(axes) if sharding else ()))
    done = iter(distributed.sum_over(items))
    return [torch.cat([next(done) for _ in tensors.params]) for tensors in lists]


def _normalised_squares(layout: Layout, local: Tensor, whole: Tensor) -> Squares:
    """A function for Σ step² of the local shards, (T,), after the whole steps were brought to a mean square of 1."""

    def squares() -> Tensor:
        scaled = local / (whole / layout.slice_numel + CELO2.norm_eps)
        return torch.stack([x.sum() for x in scaled.split(layout.slices)])

    return squares


def _times_rates(lr: Tensor, squares: Squares) -> Squares:
    """Sums of squares (T,) times lr²; of many replicas their mean."""
    if lr.stride(0) == 0:  # the caller's own number, who may change it before this is asked for
        lr = lr.clone()

    def scaled() -> Tensor:
        found = squares()
        return found * lr.double().square().unflatten(0, (len(found), -1)).mean(1)

    return scaled


def _networks(tensors: TensorList, weights: Mapping[str, Any]) -> Tensor:
    """The network of every tensor, one for all or a row for each slice; of many replicas (R, P) or likewise."""
    layout, cache = tensors.layout, tensors.cache
    if cache.network_rows is None or cache.network_rows[0] is not weights:
        names = ["vector_network" if layout.rank(i) < 2 else "network" for i in range(len(tensors))]
        found: Tensor = weights[names[0]]
        if len(set(names)) > 1:
            # In one piece for as long as the weights stay, also for a graph that was captured.
            found = torch.cat([weights[name].expand(n, -1) for name, n in zip(names, layout.slices, strict=True)])
        cache.network_rows = weights, found
    return cache.network_rows[1]


def _adam_step(tensors: TensorList, decision: StepDecision, settings: Mapping[str, Any]) -> Tensor:
    """The Adam branch. Celo2 has its epsilon inside the root and no bias correction, ELO-Celo2 the usual form.
    Returns Σ step², (T,) float64."""
    corrected = settings["adam_bias_correction"]
    corrections = decision.corrections if corrected else (tensors.layout.one.squeeze(0),) * 2
    rates = {"lr": tensors["lr"] * settings["adam_lr_mult"], "weight_decay": tensors["weight_decay"]}
    steps = specialize_networks(replace(tensors, settings=rates), None, None, tensors.layout.empty, ())
    sums: Tensor = ops.adam_step(
        AdamStep(
            params=tensors.params,
            grads=tensors.grads,
            momenta=tensors.momenta,
            second_moments=tensors.second_moments,
            momentum_decay=ADAM.momentum[0],
            second_decay=ADAM.second_moment[0],
            clip=float("inf"),
            scale=steps.scale,
            decay=steps.decay,
            momentum_correction=corrections[0],
            second_correction=corrections[1],
            inner_eps=0.0 if corrected else ADAM_EPS,
            outer_eps=ADAM_EPS if corrected else 0.0,
            skip=decision.skip,
            **tensors.scales,
            **tensors.rounding,
        )
    )
    return sums


CELO2_RULE = Rule(
    name="celo2",
    class_name="Celo2",
    summary="Celo2: an orthogonalised network update for matrices, Adam for vectors; the schedule is the caller's.",
    defaults={
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
        "state_dtype": "float32",
        "stochastic_rounding": False,
    },
    per_group=("axis_order", "branch", "state_dtype"),
    shapes=_shapes(),
    init_state=init_state,
    init_run=init_run,
    prepare=prepare,
    update=update,
    own_schedule=False,
    finetune_lr=1e-4,
    finetune_settings={"adam_lr_mult": 1.0},
    needs_horizon=False,
    needs_loss=False,
)
CELO2_BASE_RULE = Rule(
    name="celo2_base",
    class_name="Celo2",
    summary="Celo2 without orthogonalisation; every tensor goes through the network.",
    defaults={
        "lr": 1e-3,
        "weights": "auto",
        "weight_decay": 0.0,
        "axis_order": "torch",
        "orthogonalize": False,
        "ns_dtype": "float32",
        "branch": "network",
        "adam_lr_mult": 20.0,
        "adam_bias_correction": False,
        "max_grad_norm": 0.0,
        "max_nonfinite_steps": 10,
        "state_dtype": "float32",
        "stochastic_rounding": False,
    },
    per_group=("axis_order", "branch", "state_dtype"),
    shapes=_shapes(),
    init_state=init_state,
    init_run=init_run,
    prepare=prepare,
    update=update,
    own_schedule=False,
    finetune_lr=5e-5,
    finetune_settings={"adam_lr_mult": 1.0},
    needs_horizon=False,
    needs_loss=False,
)
ELO_CELO2_RULE = Rule(
    name="elo_celo2",
    class_name="ELOCelo2",
    summary="ELO-Celo2: Celo2's network with weight decay, global-norm clip and the usual Adam for vectors.",
    defaults={
        "lr": 3.16e-4,
        "weights": "auto",
        "weight_decay": 0.1,
        "axis_order": "torch",
        "orthogonalize": True,
        "ns_dtype": "float32",
        "branch": "auto",
        "adam_lr_mult": 20.0,
        "adam_bias_correction": True,
        "max_grad_norm": 1.0,
        "max_nonfinite_steps": 10,
        "state_dtype": "float32",
        "stochastic_rounding": False,
    },
    per_group=("axis_order", "branch", "state_dtype"),
    shapes=_shapes(),
    init_state=init_state,
    init_run=init_run,
    prepare=prepare,
    update=update,
    own_schedule=False,
    finetune_lr=1e-4,
    finetune_settings={"adam_lr_mult": 1.0},
    needs_horizon=False,
    needs_loss=False,
)

RULES = (CELO2_RULE, CELO2_BASE_RULE, ELO_CELO2_RULE)
