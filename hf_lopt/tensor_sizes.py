"""How large the elements of whole tensors are, of sharded ones too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lopt import distributed


@dataclass(frozen=True)
class Size:
    """Of a whole tensor: root mean square, and whether all elements are the same. Without values (inf, False)."""

    rms: float
    constant: bool


def sizes_of(params: Sequence[Tensor]) -> list[Size]:
    """A collective where tensors are sharded."""
    shards = [distributed.local(p.detach()) for p in params]
    device = next((x.device for x in shards if x.device.type != "meta"), None)
    if device is None:
        return [Size(math.inf, False)] * len(shards)
    sums = [_sums(x, device) for x in shards]
    groups = [s.groups() if (s := distributed.sharding_of(p)) else () for p in params]
    whole = torch.stack(distributed.sum_over(list(zip(sums, groups, strict=True)))).tolist()
    return [_size(total, square, p.numel()) for (total, square), p in zip(whole, params, strict=True)]


def _sums(x: Tensor, device: torch.device) -> Tensor:
    """(Σx, Σx²), float64."""
    if x.device.type == "meta":
        return torch.full((2,), math.inf, dtype=torch.float64, device=device)
    square = torch.linalg.vector_norm(x, dtype=torch.float32).double().square()
    return torch.stack([x.sum(dtype=torch.float32).double(), square]).to(device)


def _size(total: float, square: float, numel: int) -> Size:
    mean, mean_square = total / numel, square / numel
    return Size(math.sqrt(mean_square), abs(mean_square - mean * mean) <= 1e-4 * mean_square)
