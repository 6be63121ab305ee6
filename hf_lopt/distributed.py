"""Where one process and many meet: DTensor in, local shard out; sums over the whole tensor in few collectives.

The passes of a step work on the local shards of parameters. What belongs to the whole tensor (row and column
means, feature statistics, the loss) is summed here, packed, one collective per process group and reduction.
This module is the one place that knows about DTensor.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Sharding:
    """How a parameter is sharded: its mesh, and for each mesh dimension the tensor axis that it shards, or -1.

    A shard may be empty or shorter than others, and a strided one (FSDP over tensor parallel) is not one contiguous
    range of the axis. Sums over shards are right all the same: they do not depend on where in the tensor a shard lies.
    """

    mesh: Any
    placements: tuple[Any, ...]

    @property
    def axes(self) -> tuple[int, ...]:
        # _StridedShard is not a Shard in torch: ask for the attribute, not for the class.
        return tuple(getattr(placement, "dim", -1) for placement in self.placements)

    def groups(self, axes: Iterable[int] | None = None) -> tuple[dist.ProcessGroup, ...]:
        """Process groups over which a sum along the tensor's ``axes`` (None: all of them) is spread."""
        wanted = None if axes is None else set(axes)
        dims = [d for d, axis in enumerate(self.axes) if axis >= 0 and (wanted is None or axis in wanted)]
        return tuple(self.mesh.get_group(d) for d in dims if self.mesh.size(d) > 1)

    def piece(self, shape: Sequence[int], coordinate: Sequence[int]) -> tuple[slice, ...]:
        """What the rank at ``coordinate`` of the mesh holds of a tensor of ``shape``."""
        spans = [(0, n) for n in shape]
        # A strided shard is a part of what the plain ones to its right have left.
        for d in sorted(range(len(self.axes)), key=lambda d: hasattr(self.placements[d], "split_factor")):
            axis = self.axes[d]
            if axis >= 0:
                start, length = spans[axis]
                size = -(-length // self.mesh.size(d))
                first = min(size * coordinate[d], length)
                spans[axis] = (start + first, min(size, length - first))
        return tuple(slice(start, start + length) for start, length in spans)

    def start(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The first index along each axis of what this rank holds of a tensor of ``shape``."""
        coordinate = self.mesh.get_coordinate()
        if coordinate is None:  # holds nothing
            return (0,) * len(shape)
        return tuple(s.start for s in self.piece(shape, coordinate))

    def of_state(self, leading: int, dropped: int = -1) -> tuple[Any, ...]:
        """Placements of a state tensor with ``leading`` axes in front and the axis ``dropped`` left out."""
        from torch.distributed.tensor import Replicate, Shard

        placements = []
        for placement, axis in zip(self.placements, self.axes, strict=True):
            if axis < 0 or axis == dropped:
                placements.append(Replicate())
                continue
            moved = axis + leading - (0 <= dropped < axis)
            factor = getattr(placement, "split_factor", None)
            placements.append(Shard(moved) if factor is None else type(placement)(moved, split_factor=factor))
        return tuple(placements)


@functools.cache
def _dtensor() -> type | None:
    if not dist.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return DTensor


def is_dtensor(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor."""
    # By far the most tensors are of these two types; asked several times per tensor and step.
    if type(x) is Tensor or type(x) is torch.nn.Parameter:
        return False
    cls = _dtensor()
    return cls is not None and isinstance(x, cls)


def sharding_of(x: Tensor) -> Sharding | None:
    """How ``x`` is sharded; None for an ordinary tensor.

    Raises:
        ValueError: for a DTensor with a partial placement, whose value no rank has.
    """
    if not is_dtensor(x):
        return None
    if any(placement.is_partial() for placement in x.placements):
        raise ValueError(
            f"a parameter of shape {tuple(x.shape)} has placements {x.placements}: a partial tensor has no value to "
            "update. Redistribute it to Shard or Replicate first."
        )
    return Sharding(x.device_mesh, tuple(x.placements))


def local(x: Tensor, like: Sharding | None = None) -> Tensor:
    """The local shard of ``x`` as an ordinary tensor that shares its memory; ``x`` itself if it is one already.

    ``like``: the placements wanted. A gradient may come with others than its parameter; it is brought to them, a
    collective.
    """
    if not is_dtensor(x):
        return x
    if like is not None and tuple(x.placements) != like.placements:
        x = x.redistribute(like.mesh, like.placements)
    return x.to_local()


def local_gradient(p: Tensor) -> Tensor:
    """The local shard of the gradient of ``p``, sharded as ``p``. A collective where the gradient comes otherwise."""
    return local(p.grad, like=sharding_of(p))


def view(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``x`` in another shape, whose first axis is the first of ``x`` or a divisor of it, in the same memory.

    Raises:
        ValueError: for memory that is not contiguous, and for shards that are not whole in the new shape: of the first
            axis only, and of equal size.
    """
    sharding = sharding_of(x)
    shard = local(x)
    if not shard.is_contiguous():
        raise ValueError(f"a parameter of shape {tuple(x.shape)} is to be seen as {shape}, and is not contiguous")
    if sharding is None:
        return shard.view(shape)
    parts = math.prod(sharding.mesh.size(d) for d, axis in enumerate(sharding.axes) if axis == 0)
    whole = shape[0] == x.shape[0] or shape[0] % parts == 0
    if any(axis > 0 for axis in sharding.axes) or not whole or (parts > 1 and shard.shape[0] * shape[0] % x.shape[0]):
        raise ValueError(
            f"a parameter of shape {tuple(x.shape)} is to be seen as {shape}, which its placements "
            f"{list(x.placements)} cut apart: shard its first axis over a number of ranks that divides {shape[0]}, or "
            "give its group axis_order='torch'"
        )
    rows = shard.shape[0] * shape[0] // x.shape[0]
    stride = torch.empty(shape, dtype=torch.float32, device="meta").stride()
    return _dtensor().from_local(
        shard.view(rows, *shape[1:]),
        sharding.mesh,
        sharding.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def zeros(
    p: Tensor,
    leading: int | None,
    dropped: int = -1,
    dtype: torch.dtype = torch.float32,
    blocks: tuple[int, int] | None = None,
) -> Tensor:
    """Zero state for the parameter ``p``, sharded as it is: (leading, *shape without the axis ``dropped``), or shaped
    like ``p`` where ``leading`` is None.

    The global shape is given to the DTensor, because uneven and empty shards do not tell it. ``blocks``: an axis and a
    number of elements; from that axis on there is one axis, with a number for each block of so many.
    """

    def shape_of(x: Sequence[int]) -> list[int]:
        if blocks is not None:
            x = [*x[: blocks[0]], -(-math.prod(x[blocks[0] :]) // blocks[1])]
        return front + [n for axis, n in enumerate(x) if axis != dropped]

    front = [] if leading is None else [leading]
    shape, sharding = shape_of(p.shape), sharding_of(p)
    if sharding is None:
        return torch.zeros(shape, dtype=dtype, device=p.device)
    shard = local(p)
    value = torch.zeros(shape_of(shard.shape), dtype=dtype, device=shard.device)
    stride = torch.empty(shape, device="meta", dtype=dtype).stride()
    placements = sharding.of_state(len(front), dropped)
    return _dtensor().from_local(
        value, sharding.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


class SelectionsDifferError(RuntimeError):
    """Ranks came to a step with gradients of different parameters. Raised on all of them."""


_alone = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A context in which this process counts as the only one: what others train is no concern of its optimizers."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size() -> int:
    """Number of processes of the default group; 1 when there is none, and :func:`alone`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    """Number of this process in the default group; 0 when there is none, and :func:`alone`."""
    return dist.get_rank() if world_size() > 1 else 0


def world_groups(shardings: Iterable[Sharding | None]) -> tuple[dist.ProcessGroup, ...]:
    """Groups that together span all ranks: those of a mesh of this size, which other sums share, else the default."""
    size = world_size()
    if size == 1:
        return ()
    for sharding in shardings:
        if sharding is not None and sharding.mesh.size() == size:
            return tuple(sharding.mesh.get_group(d) for d in range(sharding.mesh.ndim))
    return (dist.group.WORLD,)


def sum_over(items: Sequence[tuple[Tensor, tuple[dist.ProcessGroup, ...]]]) -> list[Tensor]:
    """Each tensor summed over its groups; all of one dtype. One all-reduce per distinct group.

    A collective: every rank has to come with the same items, empty shards included.
    """
    out = [x for x, _ in items]
    groups = list(dict.fromkeys(group for _, spread in items for group in spread))
    for group in groups:
        members = [i for i, (_, spread) in enumerate(items) if group in spread]
        if dist.get_world_size(group) == 1:
            continue
        packed = torch.cat([out[i].reshape(-1) for i in members])
        home = packed.device
        packed = packed.to(device_of(group, home))  # parameters may be offloaded to a CPU that the group cannot reach
        dist.all_reduce(packed, group=group)
        parts = packed.to(home).split([out[i].numel() for i in members])
        for i, part in zip(members, parts, strict=True):
            out[i] = part.view(out[i].shape)
    return out


def mean_over_ranks(value: float) -> float:
    """The mean of a number over all ranks. A collective."""
    (total,) = sum_over([(torch.tensor([value], dtype=torch.float64), world_groups(()))])
    return total.item() / world_size()


def device_of(group: dist.ProcessGroup, home: torch.device) -> torch.device:
    if home.type == "cpu" and "gloo" not in str(dist.get_backend_config(group)):
        return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())
    return home


def whole_group(mesh: Any) -> dist.ProcessGroup:
    """A process group of all ranks of a mesh; of a mesh that is only a part of the world it may be created here."""
    if mesh.size() == world_size():
        return dist.group.WORLD
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()


def clip_grad_norm_(gradients: Sequence[Tensor], shardings: Sequence[Sharding | None], max_norm: float) -> None:
    """Scale local gradients in place so that the 2-norm over all whole tensors is at most ``max_norm``.

    The rule of ``torch.nn.utils.clip_grad_norm_``, with one reduction per process group for any mix of plain and
    sharded tensors, which that function refuses. A norm that is infinite makes all gradients NaN, where that function
    would make finite ones zero: a step that moves nothing and that nobody hears of.
    """
    norms = list(torch._foreach_norm(gradients))
    split = [i for i, sharding in enumerate(shardings) if sharding is not None and sharding.groups()]
    squares = sum_over([(norms[i].double().square(), shardings[i].groups()) for i in split])
    for i, total in zip(split, squares, strict=True):
        norms[i] = total.sqrt().to(norms[i])
    norm = torch.linalg.vector_norm(torch.stack(norms)).nan_to_num(math.nan, math.nan)
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def all_zero(gradients: Sequence[Tensor]) -> bool:
    """Whether no rank has a gradient other than zero. A collective, and it waits for the device."""
    found = [local(x).count_nonzero() for x in gradients]
    count = torch.stack([x.double() for x in found]).sum() if found else torch.zeros((), dtype=torch.float64)
    if world_size() > 1:
        (count,) = sum_over([(count, (dist.group.WORLD,))])
    return not count


def describe(p: Tensor) -> str:
    """Shape, dtype and placements of a parameter, the same text on every rank."""
    sharding = sharding_of(p)
    where = (
        ""
        if sharding is None
        else f" {list(sharding.placements)} on a mesh of {'x'.join(map(str, sharding.mesh.shape))}"
    )
    return f"{tuple(p.shape)} {p.dtype}{where}".replace("torch.", "")


def check_agreement(described_here: Mapping[str, str], device: torch.device) -> None:
    """Compare descriptions over all ranks of the default group, so that a difference is a message and not a hang.

    A collective: one all-gather of a digest, and another of everything only where ranks differ.

    Raises:
        ValueError: on every rank, naming what differs between which ranks.
    """
    if world_size() == 1:
        return
    digest = hashlib.sha256(repr(sorted(described_here.items())).encode()).digest()
    mine = torch.tensor(list(digest), dtype=torch.uint8, device=device_of(dist.group.WORLD, device))
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    if all(bytes(x.tolist()) == digest for x in torch.stack(everyone).cpu()):
        return
    described: list[Any] = [None] * world_size()
    dist.all_gather_object(described, dict(described_here))
    first = described[0]
    differences = []
    for rank, other in enumerate(described[1:], 1):
        keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        differences += [f"{k}: {first.get(k, 'none')} on rank 0, {other.get(k, 'none')} on rank {rank}" for k in keys]
    more = f", and {len(differences) - 5} more differences" if len(differences) > 5 else ""
    raise ValueError(
        "the ranks do not train the same thing. " + "; ".join(differences[:5]) + more + ". Build the optimizer from "
        "the same parameters, settings and weights on all ranks."
    )
