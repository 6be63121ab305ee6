"""Reduction 2 of a step: what passes 0 and 1 have found, over all shards and ranks, one packed all-reduce per group.

Axes: T tensors, M results (one for each tensor, or for each of its slices), S statistics, F feature columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lopt import distributed
from hf_lopt.features import STAT_NONFINITE, ElementFeatures
from hf_lopt.step.tensors import TensorList


def reduce_measurements(
    parts: Sequence[tuple[TensorList, ElementFeatures]],
    checked: Sequence[Tensor],
    stats: Sequence[Tensor],
    sums: Sequence[Tensor],
    finite: Sequence[Tensor],
    loss: Tensor | None,
    lists: Sequence[TensorList],
) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor]:
    """Reduction 2: statistics (T, S), feature sums (M, F), the mean loss, and whether anything is not finite, over all
    shards and ranks. The size of the last update and a number for the list
    of parameters ride along, see :func:`update_rms` and :func:`_selections_differ`."""
    flags = [(x[:, STAT_NONFINITE] > 0).any() for x in checked] + [~torch.isfinite(x).all() for x in finite]
    nonfinite = torch.stack(flags + ([] if loss is None else [~torch.isfinite(loss)])).any()
    cache, zero = lists[0].root, torch.zeros_like(nonfinite, dtype=torch.float64)
    last_update = zero if cache.local_update is None else cache.local_update
    numbers = [zero if loss is None else loss.double(), nonfinite.double(), last_update]
    of_the_run = torch.stack([*numbers, *_selection_sums(cache.selection, zero)])
    everyone = distributed.world_groups(sharding for tensors in lists for sharding in tensors.layout.shardings)
    items = [(of_the_run, everyone)]
    for (tensors, _), s, f in zip(parts, stats, sums, strict=True):
        layout = tensors.layout
        rows = f.split(layout.slices)
        for t, sharding in enumerate(layout.shardings):
            # Slices are whole along the other axes: their sums are spread over the shards of their own two axes only.
            axes = layout.slice_axes[2 * t : 2 * t + 2] if len(layout.shapes[t]) > 1 else []
            items.append((s[t], sharding.groups() if sharding else ()))
            items.append((rows[t], sharding.groups(axes or None) if sharding else ()))
    of_the_run, *rest = distributed.sum_over(items)
    differ = _selections_differ(of_the_run, cache.selection)
    cache.whole_update = of_the_run[2]
    new_stats, new_sums = [], []
    for tensors, _ in parts:
        count = 2 * len(tensors)
        of_part, rest = rest[:count], rest[count:]
        new_stats.append(torch.stack(of_part[::2]))
        new_sums.append(torch.cat(of_part[1::2]))
    mean_loss = None if loss is None else (of_the_run[0] / distributed.world_size()).to(loss)
    return new_stats, new_sums, mean_loss, (of_the_run[1] > 0) | differ


def _selection_sums(selection: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The number of the selection and its square: summed over ranks they show whether all have the same one."""
    return torch.full_like(like, selection), torch.full_like(like, selection**2)


def _selections_differ(of_the_run: Tensor, selection: int) -> Tensor:
    """Whether ranks have come with other parameters, bool, 0-d, by the sums over ranks; the same on all of them.

    Exact in float64: numbers are below 2^20, and there are fewer than 2^13 ranks.

    Raises:
        SelectionsDifferError: if they have. Not on an accelerator, where asking would wait: the step is skipped there.
    """
    ranks = distributed.world_size()
    differ = (of_the_run[3] != ranks * selection) | (of_the_run[4] != ranks * selection**2)
    if differ.device.type == "cpu" and bool(differ):
        raise distributed.SelectionsDifferError("ranks have gradients of different parameters")
    return differ


def reduce_without_step(device: torch.device, selection: int) -> None:
    """The part in reduction 2 of a rank that has no gradients, of ordinary tensors: the others may have some.

    Raises:
        SelectionsDifferError: if they do, on all ranks; see :func:`_selections_differ`.
    """
    zero = torch.zeros((), dtype=torch.float64, device=device)
    of_the_run = torch.stack([zero, zero, zero, *_selection_sums(selection, zero)])
    (total,) = distributed.sum_over([(of_the_run, distributed.world_groups(()))])
    _selections_differ(total, selection)
