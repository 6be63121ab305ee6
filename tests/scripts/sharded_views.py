"""On two ranks: matrices in several axes, sharded along the first one, step as they do in one process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


sys.path.append(str(Path(__file__).parents[1]))

from hf_lopt import LearnedOptimizer, distributed  # noqa: E402
from ranks import leave  # noqa: E402


# Of five rows the ranks have three and two.
CASES = [("jax_merged", (5, 2, 4)), ("torch_merged", (6, 2, 4)), ("torch_stacked/4", (12, 5)), ("jax/2", (12, 5))]


def train(rule: str, mesh) -> list[torch.Tensor]:
    """Parameters and their state after three steps, with a checkpoint before the last one."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        x = torch.randn(shape, generator=generator)
        return x if mesh is None else distribute_tensor(x, mesh, [Shard(0)])

    params = [nn.Parameter(draw(shape)) for _, shape in CASES]
    grads = [[draw(shape) for _, shape in CASES] for _ in range(3)]
    groups = [{"params": [p], "axis_order": order} for p, (order, _) in zip(params, CASES, strict=True)]
    optimizer = LearnedOptimizer([dict(group) for group in groups], rule, weights="bundled")
    for i, of_step in enumerate(grads):
        if i == 2:
            saved, optimizer = optimizer.state_dict(), LearnedOptimizer(groups, rule, weights="bundled")
            optimizer.load_state_dict(saved)
        for p, g in zip(params, of_step, strict=True):
            p.grad = g
        optimizer.step()
    found = [*params, *(value for p in params for value in optimizer.state[p].values())]
    assert mesh is None or all(isinstance(x, DTensor) for x in found)
    return [x.full_tensor() if mesh is not None else x for x in map(torch.Tensor.detach, found)]


def main() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for rule in ("celo2", "small_fc_lopt"):
        with distributed.alone():
            alone = train(rule, None)
        for x, y in zip(train(rule, mesh), alone, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)
    p = nn.Parameter(distribute_tensor(torch.ones(12, 5), mesh, [Shard(0)]))
    p.grad = torch.ones_like(p)
    optimizer = LearnedOptimizer([{"params": [p], "axis_order": "jax/3"}], "celo2", weights="bundled")
    try:
        optimizer.step()
    except ValueError as error:
        assert "divides 3" in str(error) and "axis_order='torch'" in str(error), error
    else:
        raise AssertionError("three matrices on two ranks")
    leave()


if __name__ == "__main__":
    main()
