"""Trains DTensors that are sharded over two gloo ranks; run from test_ranks.py and record.py.

frozen_ranks.py RESULT

RESULT: a JSON file, {rule: outcome} of the whole tensors, gathered on every rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


# This folder is found by itself, but not the one above, where `ranks` lies.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import frozen_runs as runs  # noqa: E402
import hf_lopt  # noqa: E402
from ranks import leave, run_on_ranks  # noqa: E402


# The first axis is divided: unevenly, with nothing for the second rank, and not at all where there is none.
SHAPES = [(), (1,), (7,), (1, 6), (5, 9), (33, 17), (17, 33), (3, 4, 5), (5, 4, 3, 3)]
# Sums over ranks may be rounded in another order elsewhere.
TOLERANCE = 1e-6


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def run(rule: str, mesh: Any) -> dict[str, Any]:
    """The outcome of one rule: float32, every tensor with an axis sharded along the first."""

    def spread(x: Tensor) -> Tensor:
        return distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None) if x.dim() else x

    params = [nn.Parameter(spread(0.3 * runs.numbers(shape, 3, i))) for i, shape in enumerate(SHAPES)]
    optimizer = runs.make(rule, params)
    for t in range(runs.STEPS):
        for i, p in enumerate(params):
            p.grad = spread(runs.numbers(SHAPES[i], 4, t, i))
        # Every rank sees its own part of the loss; the mean counts.
        optimizer.step(runs.loss_of(t) + 0.01 * (2 * dist.get_rank() - 1))
    saved = optimizer.state_dict()
    saved["state"] = {i: {key: whole(x) for key, x in state.items()} for i, state in saved["state"].items()}
    return runs.outcome([whole(p.detach()) for p in params], saved)


def measure(result: Path) -> dict[str, dict[str, Any]]:
    """{rule: outcome} from two new ranks; ``result`` is a file that they write."""
    run_on_ranks(2, str(Path(__file__).resolve()), result)
    return json.loads(result.read_text())


def main(result: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    found = {rule: run(rule, mesh) for rule in hf_lopt.available()}
    everyone = [None, None]
    dist.all_gather_object(everyone, found)
    assert everyone[0] == everyone[1], "the ranks hold different tensors"
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
