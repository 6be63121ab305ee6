"""The formats of what a state dict has: what is saved in another one than an optimizer keeps is converted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lopt import distributed, notices
from hf_lopt.kernels.reference import formats
from hf_lopt.rules.base import Rule
from hf_lopt.step.accumulators import CODE_DTYPES, CODES, SCALES, row_axis, stored_as
from hf_lopt.step.networks import Theta


def stored_words(p: Tensor, group: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a group that a parameter without shards, and of any size, would need for the same state."""
    return {"state_dtype": stored_as(p, group["axis_order"], group["state_dtype"])}


def without_cast(state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state dict without the tensors that torch would cast to the dtype of their parameter, for :func:`put_back`.

    In memory, too: 8-bit codes would become four times as large.
    """
    dtypes = {
        i: p.dtype
        for ours, theirs in zip(groups, state_dict["param_groups"], strict=True)
        for i, p in zip(theirs["params"], ours["params"], strict=True)
    }
    state = {
        i: {k: v for k, v in own.items() if not isinstance(v, Tensor) or v.dtype == dtypes.get(i)}
        for i, own in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def put_back(
    state: Mapping[Tensor, dict[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    state_dict: Mapping[str, Any],
    rule: Rule,
    theta: Theta,
) -> None:
    """Complete what torch has loaded from :func:`without_cast`, in the formats of ``groups`` and in memory of its own.

    Warns if state had to be converted.
    """
    saved, converted, found = state_dict["state"], 0, ""
    for group, theirs in zip(groups, state_dict["param_groups"], strict=True):
        for p, i in zip(group["params"], theirs["params"], strict=True):
            values = saved.get(i)
            if not values:
                continue
            for key, value in values.items():
                if isinstance(value, Tensor) and value.dtype != p.dtype:
                    state[p][key] = value.to(device=p.device, copy=True)
            kind = saved_format(values)
            wanted = stored_words(p, group)["state_dtype"]
            if kind != wanted:
                _convert(state[p], rule.init_state(p, group, theta), row_axis(p.shape, group["axis_order"]))
                converted, found = converted + 1, "int8" if found == "int8" else kind  # where some are bfloat16
    if converted:
        notices.warn(
            f"the checkpoint has state in {found}; {converted} tensors of it were converted, rounded to nearest, for "
            f"state_dtype={groups[0]['state_dtype']!r} of this {rule.class_name}"
        )
    _own_memory(state)


def _own_memory(state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Give memory of its own to each tensor whose numbers lie in that of another one, or of one another.

    Steps write in place. A tensor that was expanded or is there twice would have what was written for another.
    """
    seen: set[int] = set()
    for values in state.values():
        for key, value in values.items():
            if not isinstance(value, Tensor) or distributed.local(value).is_meta:
                continue
            local = distributed.local(value)
            storage = local.untyped_storage().data_ptr()
            expanded = any(stride == 0 and n > 1 for stride, n in zip(local.stride(), local.shape, strict=True))
            if expanded or (storage in seen and local.numel()):
                values[key] = value.clone(memory_format=torch.contiguous_format)
            seen.add(storage)


def saved_format(values: Mapping[str, Any]) -> str:
    """What momenta and second moments of a parameter are saved in, one of ``STATE_DTYPES``."""
    if "momentum" + CODES in values:
        return "int8"
    momentum = values.get("momentum")
    return "bfloat16" if isinstance(momentum, Tensor) and momentum.dtype == torch.bfloat16 else "float32"


def _convert(state: dict[str, Any], fresh: Mapping[str, Tensor], axis: int) -> None:
    """Replace momenta and second moments by what they are in the formats of ``fresh`` state, row axis ``axis``."""
    for name, dtype in CODE_DTYPES.items():
        value = state.pop(name, None)
        value = state.pop(name + CODES) if value is None else value
        old_scales = state.pop(name + SCALES, None)
        scales = None if old_scales is None else distributed.local(old_scales)
        target = fresh.get(name)
        codes, new_scales = formats.convert(
            distributed.local(value), scales, dtype if target is None else target.dtype, axis
        )
        keys = {name + CODES: codes, name + SCALES: new_scales} if target is None else {name: codes}
        for key, value in keys.items():
            assert value is not None
            distributed.local(fresh[key]).copy_(value)
            state[key] = fresh[key]
