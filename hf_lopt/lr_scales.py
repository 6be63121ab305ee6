"""How much larger than its group's ``lr`` that of a single parameter is.

Fine-tuning trains two kinds of tensors at once: those of the checkpoint, which small steps must not undo, and new
layers, which start from random numbers and need the steps of training from scratch. Groups of their own would do, but
whether a layer is new depends on where the model was loaded from: the one that a run is resumed with is loaded from a
checkpoint that has all layers, and the groups of both have to fit. So a group holds ``lr_scales``, one number for each
of its parameters, in their order. It is saved and loaded with the group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


KEY = "lr_scales"


def problem(group: Mapping[str, Any]) -> str:
    """What is wrong with the ``lr_scales`` of a parameter group; "" without any, or if nothing is."""
    scales = group.get(KEY)
    if scales is None:
        return ""
    if not isinstance(scales, (list, tuple)) or not all(_is_number(x) for x in scales):
        return f"{KEY} must be a finite number >= 0 for each parameter of the group, got {scales!r:.60}"
    if len(scales) != len(group["params"]):
        return f"{len(scales)} {KEY} for a group of {len(group['params'])} parameters: it takes one for each"
    return ""


def in_words(group: Mapping[str, Any]) -> str:
    """The places of the parameters of a group whose number is not 1, with it."""
    return ", ".join(f"{i}: {x:g}" for i, x in enumerate(group.get(KEY) or ()) if x != 1) or "1 for all"


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) and x >= 0


def of_all(groups: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """The number of each parameter of the groups; None if it is 1 for all.

    Raises:
        RuntimeError: if a group's numbers do not fit its parameters.
    """
    if not any(KEY in group for group in groups):
        return None
    for i, group in enumerate(groups):
        if text := problem(group):
            raise RuntimeError(f"parameter group {i}: {text}. Assign others, or delete group[{KEY!r}] for 1 each.")
    scales = [x for group in groups for x in group.get(KEY) or [1.0] * len(group["params"])]
    return None if all(x == 1 for x in scales) else scales
