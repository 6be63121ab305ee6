"""The loss that waits for the next step: who gave it, and what the micro-batches of an accumulation make of it.

A loss comes in two ways. A loop *gives* it, by ``observe_loss(loss)`` or ``step(loss)``: then it counts as it is, and
several add up. Or a ``backward`` that is watched (:mod:`hf_lopt.feed`) *feeds* what it propagates back: then the
window of accumulation decides. What a loop gives has precedence, so that a loop may do both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def as_scalar(loss: Tensor | float) -> Tensor | float:
    """A 0-d float32 tensor, detached, on the device of ``loss``; or a number.

    Raises:
        ValueError: for a tensor of more than one number.
    """
    if not isinstance(loss, Tensor):
        return float(loss)
    if loss.numel() != 1:
        raise ValueError(f"the loss must be one number, got a tensor of shape {tuple(loss.shape)}; reduce it first")
    return loss.detach().reshape(()).float()


class Window:
    """The losses of the backward calls since the last step. Not saved: nor are the gradients of half a window."""

    def __init__(self) -> None:
        self.full = 0  # calls in the last window of losses that the loop had divided by just that number
        self.clear()

    def clear(self) -> None:
        """Forget the losses."""
        self.total: Tensor | float | None = None
        self.calls = 0
        self._micro_batches: int | None = None
        self._last: object = None
        self._steps, self._parts = 1, 0

    def add(self, loss: Tensor | float, micro_batch: object = None, steps: int = 1, parts: int = 1) -> None:
        """Add the loss of one ``backward``.

        Args:
            loss: a scalar.
            micro_batch: tells calls for one micro-batch from calls for the next; None where nobody says.
            steps: what the loss will still be divided by before it reaches the gradients.
            parts: what the loop has divided it by, as far as that is known.
        """
        loss = as_scalar(loss)
        self.total = loss if self.total is None else self.total + loss
        self._parts = parts if self.calls == 0 or self._parts == parts else 0
        self.calls += 1
        self._steps = steps
        if micro_batch is not None:
            self._micro_batches = (self._micro_batches or 0) + (micro_batch != self._last)
            self._last = micro_batch

    def scale(self, factor: float) -> None:
        """Multiply the losses."""
        self.total = None if self.total is None else self.total * factor

    def mean(self) -> Tensor | float | None:
        """The loss of the window, None for an empty one: what was propagated back, as the mean over micro-batches.

        With known micro-batches a short last window has a mean over fewer. Otherwise losses add up to what reached the
        gradients. The exception is a loop that divides by a fixed number: after windows of that many calls, one of
        fewer is a short one, and its mean is over those calls.
        """
        if self.total is None:
            return None
        if self._micro_batches:
            return self.total / self._micro_batches if self._micro_batches > 1 else self.total
        if self._steps > 1:
            return self.total / self._steps
        is_short = 1 < self._parts == self.full and self.calls < self.full
        return self.total * (self._parts / self.calls) if is_short else self.total

    def close(self) -> None:
        """The window has had its step."""
        if self.calls == self._parts > 1 and not self._micro_batches:
            self.full = self._parts
        self.clear()


class PendingLoss:
    """The loss that waits for the next step of one optimizer, on its device, or none.

    An object of its own, so that a wrapper which copies the ``__dict__`` of an optimizer shares it: a loss that is
    given to either of them is there for the step of the other.
    """

    def __init__(self) -> None:
        self._given: Tensor | float | None = None
        self._window = Window()
        self.fed_calls = 0  # ever; a closure that feeds moves it
        self.dropped = False  # whether zero_grad() has dropped a loss since the last one came

    @property
    def is_set(self) -> bool:
        """Whether a loss waits."""
        return self._given is not None or self._window.total is not None

    @property
    def value(self) -> Tensor | float | None:
        """The loss, None if there is none."""
        return self._given if self._given is not None else self._window.mean()

    def __float__(self) -> float:
        """The loss as a number, NaN if there is none. Waits for the device."""
        return float("nan") if self.value is None else float(self.value)

    def add(self, loss: Tensor | float) -> None:
        """Add a scalar tensor, which is detached, or a number.

        Raises:
            ValueError: if it holds more than one number.
        """
        loss = as_scalar(loss)
        self._given = loss if self._given is None else self._given + loss
        self.dropped = False

    def feed(self, loss: Tensor | float, *, afresh: bool = False, **window: object) -> None:
        """Add the loss of a ``backward``; see :meth:`Window.add`. ``afresh``: there were no gradients before it.

        Raises:
            ValueError: if it holds more than one number.
        """
        if afresh:
            self._window.clear()  # the gradients of earlier calls have been dropped
        self._window.add(loss, **window)
        self.fed_calls += 1
        self.dropped = False

    def replace(self, loss: Tensor | float) -> None:
        """Take ``loss`` instead of what was given; see :meth:`add`."""
        self._given = None
        self.add(loss)

    def of_step(self, closure: Any, loss: Tensor | float | None) -> Any:
        """Take the loss of a step from its arguments: from ``loss``, or ``closure``, a function or the loss itself.

        A function is called with gradients enabled. What it returns does not count if it delivered losses of its own.

        Returns:
            the loss that was given or returned, None without one.

        Raises:
            ValueError: for two losses.
        """
        result, fed = closure, self.fed_calls
        if callable(closure):
            with torch.enable_grad():
                result = closure()
        elif closure is not None and loss is not None:
            raise ValueError("step() was given two losses: step(loss) or step(loss=loss), not both")
        if loss is not None:
            result, fed = loss, self.fed_calls
        if result is not None and self.fed_calls == fed:
            self.replace(result)
        return result

    def scale(self, factor: float) -> None:
        """Multiply the loss, if there is one."""
        self._given = None if self._given is None else self._given * factor
        self._window.scale(factor)

    def discard(self, by_zero_grad: bool = False) -> None:
        """Forget the loss."""
        self.dropped = self.is_set and by_zero_grad
        self._given = None
        self._window.clear()

    def take(self) -> Tensor | float | None:
        """The loss, which no longer waits."""
        value, self._given = self.value, None
        self._window.close()
        return value
