"""Where one process and many meet: the mean loss over ranks, and which tensors the passes may see.

The passes of a step work on local tensors. This module is the one place that asks whether a tensor is distributed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of the default group; 1 when there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def agree(loss: Tensor | None, bad: Tensor) -> tuple[Tensor | None, Tensor]:
    """The mean loss over the ranks of the default group, and whether the flag ``bad`` (bool) is set on any of them.

    One collective, which every rank has to call: all ranks must see the same loss, and skip a step together.
    """
    size = world_size()
    if size == 1:
        return loss, bad
    packed = torch.stack([torch.zeros_like(bad, dtype=torch.float64) if loss is None else loss.double(), bad.double()])
    dist.all_reduce(packed)  # SUM: gloo has no AVG
    return None if loss is None else (packed[0] / size).to(loss.dtype), packed[1] > 0


def is_distributed(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor, whose local shard is only a part of it."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def check_local(x: Tensor) -> None:
    """Refuse a DTensor: its row and column means and feature statistics belong to the whole tensor.

    Raises:
        ValueError: for a DTensor parameter.
    """
    if is_distributed(x):
        raise ValueError(
            f"a parameter of shape {tuple(x.shape)} is a DTensor with placements {x.placements}: learned optimizers "
            "need statistics of the whole tensor, which sharded parameters (FSDP2, tensor parallel) do not give yet. "
            "Use DistributedDataParallel or one process."
        )
