"""Gradients of updates that take several calls of ``step()``: in the state of each parameter until the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_lopt import distributed


State = Mapping[Tensor, dict[str, Any]]


def add_gradients(params: Sequence[Tensor], state: State) -> None:
    """Add the gradients of ``params`` to ``gradient_sum`` (float32, like the parameter) in their state."""
    for p in params:
        distributed.local(state[p]["gradient_sum"]).add_(distributed.local_gradient(p))
        state[p]["gradients_summed"] += 1


def set_mean_gradients(
    params: Sequence[Tensor], trainable: Iterable[Tensor], state: State, calls: int, check: Callable[[], object]
) -> None:
    """Set gradients to their means over ``calls`` calls, of which this is the last, and begin anew.

    Args:
        params: parameters with a gradient in this call.
        trainable: all parameters that may have had one in an earlier call.
        state: of each parameter, see :func:`add_gradients`.
        calls: calls of ``step()`` per update.
        check: called with the means in place. What it raises leaves sums and gradients as they were.
    """
    now = {id(p) for p in params}
    summed = [p for p in trainable if id(p) in now or state[p].get("gradients_summed")]
    before = [p.grad for p in summed]
    try:
        for p in summed:
            mean = state[p]["gradient_sum"].clone()
            if id(p) in now:
                distributed.local(mean).add_(distributed.local_gradient(p))
            p.grad = mean.div_(calls).to(p.dtype)
        check()
    except Exception:
        for p, grad in zip(summed, before, strict=True):
            p.grad = grad
        raise
    for p in summed:
        distributed.local(state[p]["gradient_sum"]).zero_()
        state[p]["gradients_summed"] = 0
