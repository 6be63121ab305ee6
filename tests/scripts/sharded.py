"""Trains sharded parameters on several gloo ranks and compares them with a single process; run by test_sharding.py.

torchrun --nproc_per_node 4 sharded.py REFERENCE RESULT

REFERENCE: what :func:`reference` gives, by torch.save. RESULT: a JSON file, under "errors"
{layout: {rule: [error, error of state]}} in units of the largest element of a tensor, under "rounding"
{layout: {format: whether all is rounded at random as in a single process, to the bit}}.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import test_rules as single  # noqa: E402
from ranks import leave  # noqa: E402


# Uneven and empty shards, parameters smaller than the world, ties, more than two axes. The last two have no gradient.
SHAPES = [(), (7,), (1, 6), (5, 9), (9, 5), (6, 6), (3, 4, 5), (8, 4, 3, 3), (33, 16), (2,), (4, 6), (4, 2)]
UNUSED, FROZEN = 10, 11
# Twelve updates, and two steps that are skipped: infinity in one shard, NaN as the loss of one rank.
STEPS, INFINITE_GRADIENT, NAN_LOSS, MISSING_GRADIENT = 14, 5, 8, 3
Layout = Any  # a mesh, placements of matrices, placements of vectors; None: a plain tensor on every rank


def layouts(world: int) -> dict[str, list[Layout]]:
    """name -> one or more layouts, which the tensors take in turn."""
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    rows, columns = (line, [Shard(0)], [Shard(0)]), (line, [Shard(1)], [Replicate()])
    if world == 2:
        return {"fsdp": [rows], "columns": [columns], "beside_plain": [rows, None]}
    if world == 3:
        return {"fsdp": [rows], "beside_plain": [rows, None]}
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    hsdp = (square, [Replicate(), Shard(0)], [Replicate(), Shard(0)])
    fsdp_tp = (square, [Shard(0), Shard(1)], [Shard(0), Replicate()])
    return {
        "hsdp": [hsdp],
        "fsdp_tp": [fsdp_tp],
        "strided": [(square, [_StridedShard(0, split_factor=2), Shard(0)], [Shard(0), Replicate()])],
        "several_meshes": [rows, hsdp, fsdp_tp, columns, None, (square["tp"], [Shard(0)], [Shard(0)])],
    }


@functools.cache
def dimension(mesh: Any, name: str) -> Any:
    return mesh[name]  # a new object each time, which costs more than what is done with it


def distribute(x: torch.Tensor, mesh: Any, placements: list) -> DTensor:
    """Without communication: all ranks hold the same ``x``."""
    return distribute_tensor(x, mesh, placements, src_data_rank=None)


def spread(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    x = x.clone()
    if layout is None or x.dim() == 0:
        return x
    mesh, matrix, vector = layout
    placements = matrix if x.dim() >= 2 else vector
    if any(hasattr(placement, "split_factor") for placement in placements):
        shape, stride = x.shape, x.stride()
        # As FSDP over tensor parallel does it: first the inner dimension, then the outer one on what is left.
        for name in ("tp", "dp"):
            x = distribute(x, dimension(mesh, name), [Shard(0)]).to_local()
        return DTensor.from_local(x, mesh, placements, run_check=False, shape=shape, stride=stride)
    return distribute(x, mesh, placements)


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def train(name: str, chosen: list[Layout]) -> tuple[list[torch.nn.Parameter], Any]:
    """The parameters and the optimizer after the run."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) * 0.3 for shape in SHAPES]
    layout = [chosen[i % len(chosen)] for i in range(len(SHAPES))]
    params = [torch.nn.Parameter(spread(x, cut)) for x, cut in zip(start, layout, strict=True)]
    params[FROZEN].requires_grad_(False)
    optimizer = single.make(name, [{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.01}])
    rank, world = (dist.get_rank(), dist.get_world_size()) if chosen != [None] else (0, 1)
    for t in range(STEPS):
        gradients = single.gradients([torch.empty(s) for s in SHAPES], t)
        if t == INFINITE_GRADIENT:
            gradients[8][-1, -1] = math.inf
        for i, (p, g, cut) in enumerate(zip(params, gradients, layout, strict=True)):
            missing = i in (UNUSED, FROZEN) or (t == MISSING_GRADIENT and i == 5)
            p.grad = None if missing else spread(g, cut)
        # Every rank sees its own part of the loss; the mean is what counts.
        loss = 3.0 / (t + 1) + 0.1 * (t % 3) + 0.01 * (rank - (world - 1) / 2)
        if t == NAN_LOSS and rank == world - 1 and optimizer.rule.needs_loss:
            loss = math.nan
        optimizer.step(loss)
    assert optimizer.steps_done == STEPS - (2 if optimizer.rule.needs_loss else 1)
    return params, optimizer


def reference() -> dict[str, tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]]:
    """rule -> parameters and their states, from this process alone."""
    found = {}
    for name in single.rules.names():
        params, optimizer = train(name, [None])
        found[name] = [p.detach() for p in params], [dict(optimizer.state.get(p, {})) for p in params]
    return found


def off(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x - y).abs().max() / y.abs().max().clamp_min(1e-30)).item()


def compare(name: str, chosen: list[Layout], expected: tuple) -> list[float]:
    """Errors of parameters and states, after a look at how they are stored."""
    params, optimizer = train(name, chosen)
    errors, state_errors = [], []
    for i, (p, q, states) in enumerate(zip(params, *expected, strict=True)):
        cut = chosen[i % len(chosen)] is not None and p.dim() > 0
        assert isinstance(p, DTensor) == cut, (name, p.shape)
        errors.append(off(whole(p.detach()), q))
        own = optimizer.state.get(p, {})
        assert own.keys() == states.keys(), (name, own.keys(), states.keys())
        for key, y in states.items():
            x = own[key]
            per_element = key in ("momentum", "second_moment") or key.startswith("factored")
            assert isinstance(x, DTensor) == (cut and per_element), (name, key)
            assert x.shape == y.shape, (name, key, x.shape, y.shape)
            if key in ("momentum", "second_moment") and cut:  # cut as the parameter is, behind one more axis
                assert [x.to_local().shape[1:], x.device_mesh] == [p.to_local().shape, p.device_mesh]
            state_errors.append(off(whole(x), y))
    return [max(errors), max(state_errors)]


# Large enough to be stored in fewer bits; uneven shards, and columns that are cut between and within blocks of codes.
STORED_SHAPES = [(33, 160), (5, 7, 256), (18, 1024), (40, 320), (300,)]


def stored_in(kind: str, chosen: list[Layout]) -> list[dict[str, torch.Tensor]]:
    """Each parameter and its state, whole, after a few steps of Adam, in which nothing is summed over ranks."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).bfloat16() for shape in STORED_SHAPES]
    layout = [chosen[i % len(chosen)] for i in range(len(start))]
    params = [torch.nn.Parameter(spread(x, cut)) for x, cut in zip(start, layout, strict=True)]
    optimizer = single.make("celo2", params, branch="adam", state_dtype=kind, stochastic_rounding=True)
    for _ in range(3):
        for p, cut in zip(params, layout, strict=True):
            p.grad = spread(torch.randn(p.shape, generator=generator).bfloat16(), cut)
        optimizer.step()
    return [{"": whole(p.detach())} | {key: whole(x) for key, x in optimizer.state[p].items()} for p in params]


def rounds_alike(kind: str, chosen: list[Layout]) -> bool:
    """Whether all is rounded as in a single process, to the bit; but for tensors whose blocks of codes are cut, which
    are in bfloat16 here. At least two are not cut by any layout."""
    same = []
    for ours, alone in zip(stored_in(kind, chosen), stored_in(kind, [None]), strict=True):
        if ours.keys() == alone.keys():
            same.append(all(torch.equal(ours[key], y) for key, y in alone.items()))
        else:
            assert "momentum_codes" in alone and ours["momentum"].dtype == torch.bfloat16
    return len(same) >= 3 and all(same)


def main(expected: Path, result: Path) -> None:
    warnings.filterwarnings("ignore", "skipped a step", RuntimeWarning)
    dist.init_process_group("gloo")
    reference = torch.load(expected, weights_only=True)
    found = {
        layout: {name: compare(name, chosen, expected) for name, expected in reference.items()}
        for layout, chosen in layouts(dist.get_world_size()).items()
    }
    rounding = {
        layout: {kind: rounds_alike(kind, chosen) for kind in ("bfloat16", "int8")}
        for layout, chosen in layouts(dist.get_world_size()).items()
    }
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        worst = {
            layout: {name: [max(f[layout][name][k] for f in everyone) for k in (0, 1)] for name in reference}
            for layout in found
        }
        result.write_text(json.dumps({"errors": worst, "rounding": rounding}))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
