"""Trains sharded parameters on several gloo ranks and compares them with a single process; run by test_sharding.py.

torchrun --nproc_per_node 4 sharded.py LAYOUT RULE [RULE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import test_rules as single


# Uneven and empty shards, parameters smaller than the world, ties, more than two axes.
SHAPES = [(), (7,), (1, 6), (5, 9), (9, 5), (6, 6), (3, 4, 5), (8, 4, 3, 3), (33, 16), (2,)]
STEPS = 8


def layouts(world: int) -> dict[str, tuple]:
    """name -> (mesh, placements of matrices, placements of vectors); None: a plain tensor on every rank."""
    found = {}
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    found["fsdp"] = (line, [Shard(0)], [Shard(0)])
    found["columns"] = (line, [Shard(1)], [Replicate()])
    found["ddp"] = (None, None, None)
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        found["hsdp"] = (square, [Replicate(), Shard(0)], [Replicate(), Shard(0)])
        found["fsdp_tp"] = (square, [Shard(0), Shard(1)], [Shard(0), Replicate()])
        from torch.distributed.tensor.placement_types import _StridedShard

        found["strided"] = (square, [_StridedShard(0, split_factor=2), Shard(0)], [Shard(0), Replicate()])
    return found


def spread(x: torch.Tensor, layout: tuple) -> torch.Tensor:
    mesh, matrix, vector = layout
    if mesh is None or x.dim() == 0:
        return x.clone()
    placements = matrix if x.dim() >= 2 else vector
    if any(getattr(placement, "split_factor", None) for placement in placements):
        # As FSDP over tensor parallel does it: first the inner dimension, then the outer one on what is left.
        inner = distribute_tensor(x, mesh["tp"], [Shard(0)]).to_local()
        outer = distribute_tensor(inner, mesh["dp"], [Shard(0)]).to_local()
        return DTensor.from_local(outer, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())
    return distribute_tensor(x.clone(), mesh, placements)


def whole(x: torch.Tensor) -> torch.Tensor:
    if not isinstance(x, DTensor):
        return x
    if any(getattr(placement, "split_factor", None) for placement in x.placements):
        tp = DTensor.from_local(x.to_local(), x.device_mesh["dp"], [Shard(0)], run_check=False, **_tp_shape(x))
        tp = tp.full_tensor()
        return DTensor.from_local(
            tp, x.device_mesh["tp"], [Shard(0)], run_check=False, shape=x.shape, stride=x.stride()
        ).full_tensor()
    return x.full_tensor()


def _tp_shape(x: DTensor) -> dict:
    rows = len(torch.arange(x.shape[0]).chunk(2)[x.device_mesh.get_local_rank("tp")])
    shape = torch.Size([rows, *x.shape[1:]])
    return {"shape": shape, "stride": torch.empty(shape).stride()}


def train(name: str, layout: tuple | None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) * 0.3 for shape in SHAPES]
    params = [torch.nn.Parameter(spread(x, layout) if layout else x.clone()) for x in start]
    groups = [{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.01}]
    optimizer = single.make(name, groups)
    for t in range(STEPS):
        for p, g in zip(params, single.gradients([torch.empty(s) for s in SHAPES], t), strict=True):
            p.grad = None if t == 3 and p is params[5] else (spread(g, layout) if layout else g)
        loss = 3.0 / (t + 1) + 0.1 * (t % 3)
        if layout:  # every rank sees its own part of the loss; the mean is what counts
            rank, world = dist.get_rank(), dist.get_world_size()
            loss += 0.01 * (rank - (world - 1) / 2)
        optimizer.step(loss)
    if layout and layout[0] is not None:
        cut = [p for p in params if p.dim() > 0]
        assert all(isinstance(p, DTensor) for p in cut)
        for p in cut:
            assert all(isinstance(optimizer.state[p][key], DTensor) for key in ("momentum", "second_moment"))
    return [whole(p.detach()) for p in params]


def main(layout_name: str, names: list[str]) -> None:
    dist.init_process_group("gloo")
    layout = layouts(dist.get_world_size())[layout_name]
    for name in names:
        sharded = train(name, layout)
        world, dist.get_world_size = dist.get_world_size, lambda group=None: 1  # the same code as a single process
        try:
            alone = train(name, None)
        finally:
            dist.get_world_size = world
        for shape, p, q in zip(SHAPES, sharded, alone, strict=True):
            error = (p - q).abs().max().item() / max(q.abs().max().item(), 1e-30)
            assert error <= 2e-6, f"{name}, {layout_name}, {shape}: off by {error:.2e} of the largest parameter"
        if dist.get_rank() == 0:
            print(f"ok {layout_name} {name}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
