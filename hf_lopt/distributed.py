"""Where one process and many meet: DTensor in, local shard out; sums over the whole tensor in few collectives.

The passes of a step work on the local shards of parameters. What belongs to the whole tensor (row and column
means, feature statistics, the loss) is summed here, packed, one collective per process group and reduction.
This module is the one place that knows about DTensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Sharding:
    """How a parameter is cut: its mesh, and for each mesh dimension the tensor axis that is cut along it, or -1.

    A shard may be empty or shorter than others, and a strided one (FSDP over tensor parallel) is not one piece of the
    axis. Sums do not mind.
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
        return tuple(self.mesh.get_group(d) for d in dims)

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


def _dtensor() -> type | None:
    if not dist.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return DTensor


def sharding(x: Tensor) -> Sharding | None:
    """How ``x`` is cut; None for an ordinary tensor.

    Raises:
        ValueError: for a DTensor with a partial placement, whose value no rank has.
    """
    cls = _dtensor()
    if cls is None or not isinstance(x, cls):
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
    cls = _dtensor()
    if cls is None or not isinstance(x, cls):
        return x
    if like is not None and tuple(x.placements) != like.placements:
        x = x.redistribute(like.mesh, like.placements)
    return x.to_local()


def zeros(p: Tensor, leading: int | None, dropped: int = -1) -> Tensor:
    """Zero float32 state for the parameter ``p``, cut as it is: (leading, *shape without the axis ``dropped``), or
    shaped like ``p`` where ``leading`` is None.

    The global shape is given to the DTensor, because uneven and empty shards do not tell it.
    """
    front = [] if leading is None else [leading]
    shape = front + [n for axis, n in enumerate(p.shape) if axis != dropped]
    cut = sharding(p)
    if cut is None:
        return torch.zeros(shape, dtype=torch.float32, device=p.device)
    own = local(p)
    local_shape = front + [n for axis, n in enumerate(own.shape) if axis != dropped]
    value = torch.zeros(local_shape, dtype=torch.float32, device=own.device)
    stride = torch.empty(shape, device="meta").stride()
    placements = cut.of_state(len(front), dropped)
    return _dtensor().from_local(value, cut.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def world_size() -> int:
    """Number of processes of the default group; 1 when there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def world_groups(shardings: Iterable[Sharding | None]) -> tuple[dist.ProcessGroup, ...]:
    """Groups that together span all ranks: those of a mesh of this size, which other sums share, else the default."""
    size = world_size()
    if size == 1:
        return ()
    for cut in shardings:
        if cut is not None and cut.mesh.size() == size:
            return tuple(cut.mesh.get_group(d) for d in range(cut.mesh.ndim))
    return (dist.group.WORLD,)


def sum_over(items: Sequence[tuple[Tensor, tuple[dist.ProcessGroup, ...]]]) -> list[Tensor]:
    """Each tensor summed over its groups; all of one dtype. One all-reduce per distinct group.

    A collective: every rank has to come with the same items, empty shards included.
    """
    out = [x for x, _ in items]
    groups = list(dict.fromkeys(group for _, own in items for group in own))
    for group in groups:
        members = [i for i, (_, own) in enumerate(items) if group in own]
        if dist.get_world_size(group) == 1:
            continue
        packed = torch.cat([out[i].reshape(-1) for i in members])
        home = packed.device
        packed = packed.to(_device_of(group, home))  # parameters may be offloaded to a CPU that the group cannot reach
        dist.all_reduce(packed, group=group)
        parts = packed.to(home).split([out[i].numel() for i in members])
        for i, part in zip(members, parts, strict=True):
            out[i] = part.view(out[i].shape)
    return out


def _device_of(group: dist.ProcessGroup, home: torch.device) -> torch.device:
    if home.type == "cpu" and "gloo" not in str(dist.get_backend_config(group)):
        return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())
    return home


def on_whole_tensors(
    function: Callable[[Tensor, Any], Tensor],
    shards: Sequence[Tensor],
    cuts: Sequence[Sharding | None],
    shapes: Sequence[Sequence[int]],
    arguments: Sequence[Any],
) -> list[Tensor]:
    """``function(tensor, argument)`` of each whole tensor, cut again as the ``shards`` are; it keeps the shape."""
    out = []
    for shard, cut, shape, argument in zip(shards, cuts, shapes, arguments, strict=True):
        if cut is None or not cut.groups():
            out.append(function(shard, argument))
            continue
        stride = torch.empty(shape, device="meta").stride()
        whole = _dtensor().from_local(
            shard, cut.mesh, cut.placements, run_check=False, shape=torch.Size(shape), stride=stride
        )
        result = function(whole.full_tensor(), argument)
        out.append(
            _dtensor().from_local(result, cut.mesh, run_check=False).redistribute(cut.mesh, cut.placements).to_local()
        )
    return out
