"""Numbers of every tensor under FSDP2 and without, from the same gradients; run by test_hf_layers.py."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


sys.path.insert(0, str(Path(__file__).parents[1]))

import hf_lopt  # noqa: E402
from hf_lopt.hf.layers import LayerLog  # noqa: E402
from ranks import leave  # noqa: E402


def model():
    """Rows that two ranks cannot share evenly, and one tensor that the second rank has nothing of."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1))


def numbers(net):
    optimizer = hf_lopt.VeLO(net.parameters(), num_training_steps=10, weights="bundled")
    log = LayerLog(net)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        log.before(optimizer)
        optimizer.step(loss)
        log.after(optimizer)
    return log.read()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    alone, together = model(), model()
    fully_shard(together, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    assert all(isinstance(p, DTensor) for p in together.parameters())
    want, got = numbers(alone), numbers(together)
    assert got.keys() == want.keys() and len(want) == 8, got
    for name, value in want.items():
        assert abs(got[name] - value) <= 1e-5 * abs(value), f"{name}: {got[name]} is not {value}"
    leave()
