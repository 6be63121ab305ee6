"""Records what every rule sends in one step; run by test_sharding_cost.py.

torchrun --nproc_per_node 4 sharded_collectives.py RESULT

RESULT: a JSON file, {mesh: {matrices: {rule: {"calls": [of each rank: [[operator, bytes]]], "orthogonalised": [of each
rank: count]}}}}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import test_rules as single  # noqa: E402
from hf_lopt.step import orthogonal  # noqa: E402
from ranks import leave  # noqa: E402


MATRICES, VECTOR = ((24, 40), (40, 24)), (24,)
COUNTS = (4, 16)
# On meshes of two dimensions one rule of each structure.
_STRUCTURES = ("velo", "celo", "celo_adam", "small_fc_lopt", "rnn_mlp", "celo2", "elo_celo2")
RULES = {"line": single.rules.names(), "hsdp": _STRUCTURES, "fsdp_tp": _STRUCTURES}


class Collectives(TorchDispatchMode):
    """Every operator of torch.distributed that runs inside, with the bytes of its first argument (what is sent, except
    that an all-to-all has its output first: what is received)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [x for x in tree_leaves(args[0]) if isinstance(x, torch.Tensor)]
            self.calls.append((func._opname, sum(x.numel() * x.element_size() for x in tensors)))
        return func(*args, **(kwargs or {}))


def shapes(count: int) -> list[tuple[int, ...]]:
    return [*(MATRICES[i % 2] for i in range(count)), VECTOR]


def record(name: str, mesh: Any, placements: list, count: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(shape, generator=generator) for shape in shapes(count)]
    params = [torch.nn.Parameter(distribute_tensor(x, mesh, placements, src_data_rank=None)) for x in wholes]
    optimizer = single.make(name, params)
    orthogonalised, original = [], orthogonal.orthogonal
    orthogonal.orthogonal = lambda x, *how: orthogonalised.append(x.shape[-2:]) or original(x, *how)
    for t in range(3):  # the first step compares the ranks, the last is a usual one
        for p, g in zip(params, single.gradients(wholes, t), strict=True):
            p.grad = distribute_tensor(g, mesh, placements, src_data_rank=None)
        orthogonalised.clear()
        with Collectives() as mode:
            optimizer.step(1.0)
    orthogonal.orthogonal = original
    per_rank: list = [None] * dist.get_world_size()
    dist.all_gather_object(per_rank, len(orthogonalised))
    received: list = [None] * dist.get_world_size()
    dist.all_gather_object(received, mode.calls)
    assert all([op for op, _ in calls] == [op for op, _ in mode.calls] for calls in received)
    return {"calls": received, "orthogonalised": per_rank}


def main(result: Path) -> None:
    dist.init_process_group("gloo")
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    square = init_device_mesh("cpu", (2, 2))
    meshes = {"line": (line, [Shard(0)]), "hsdp": (square, [Replicate(), Shard(0)])}
    meshes["fsdp_tp"] = (square, [Shard(0), Shard(0)])
    found = {
        mesh: {count: {name: record(name, *how, count) for name in RULES[mesh]} for count in COUNTS}
        for mesh, how in meshes.items()
    }
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
