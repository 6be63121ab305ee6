"""How many steps a pass over the samples takes, as training loops tell it."""

from __future__ import annotations

import math
from typing import Any


def batches_in(loader: Any) -> int:
    """Of one pass; 0 where there is no loader, or one over an iterable dataset that does not know its length."""
    try:
        return len(loader)
    except TypeError:
        return 0


def steps_per_epoch(batches: float, accumulated: int) -> float:
    """Where so many batches make a step, the last window being a short one; 0.0 where ``batches`` is 0 or infinite."""
    return float(math.ceil(batches / accumulated)) if math.isfinite(batches) else 0.0
